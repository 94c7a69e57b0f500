#include "scripts/hearth/launch.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/output_file.h"
#include "common/base/report.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/seal.h"
#include "scripts/hearth/inspect.h"
#include "scripts/hearth/prepare.h"
#include "scripts/hearth/run_json.h"
#include "scripts/hearth/supervise.h"

namespace hearth {
namespace {

constexpr int kBackOffMost = 30;  // times the first one

// --- running ---

// Of one start: each has a token of its own.
absl::StatusOr<Command> MpirunCommand(const Programs& programs, const RoleCounts& counts, const std::string& hostfile,
                                      const std::vector<std::string>& scheduler_flags,
                                      const std::vector<std::string>& server_flags, const Job& job,
                                      const std::string& folder) {
  Command command;
  command.environment = RankEnvironment(job);
  // Another user can read neither this environment nor, where mpirun's -x takes it to other hosts by its name alone, a
  // command line with it.
  HEARTH_ASSIGN_OR_RETURN(const JobToken token, JobToken::Random());
  command.environment.push_back({kJobTokenVariable, token.Hex()});
  // The scheduler's stderr is a pipe to mpirun: tell it what stands at the pipe's other end.
  struct winsize window;
  if (isatty(STDERR_FILENO) == 1 && ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0) {
    command.environment.push_back({"HEARTH_TERMINAL_COLUMNS", absl::StrCat(window.ws_col)});
  }
  command.environment.push_back({kRunFolderVariable, folder});
  command.mpirun = true;
  std::vector<std::string> exported;
  for (const auto& [name, value] : command.environment) {
    // The token always: without a hostfile, too, mpirun may have the hosts of an allocation.
    if (!hostfile.empty() || name == kJobTokenVariable) exported.insert(exported.end(), {"-x", name});
  }
  command.argv = MpirunArguments(programs, counts, hostfile, scheduler_flags, server_flags, folder);
  // Options of the whole job stand before the first context's -np.
  const auto first = std::find(command.argv.begin(), command.argv.end(), "-np");
  command.argv.insert(first, exported.begin(), exported.end());
  for (const auto& [name, value] : {std::pair<const char*, const char*>{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                    {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                    {"OMPI_MCA_mpi_yield_when_idle", "1"},
                                    {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"}}) {
    if (std::getenv(name) == nullptr) command.environment.push_back({name, value});
  }
  return command;
}

// When it was written; none: it is not there.
std::optional<std::filesystem::file_time_type> RunJsonTime(const std::string& out) {
  std::error_code error;
  const auto time = std::filesystem::last_write_time(JoinPath(out, "run.json"), error);
  return error ? std::nullopt : std::make_optional(time);
}

// The scheduler writes how a run ended, unless it was the one that died, or failed before it had anything to write to:
// then run.json tells of an earlier attempt, if it is not `fresh`. A job given up after restarts has both reasons.
absl::Status TellRunJson(const std::string& out, const std::string& job_name, bool fresh, int code,
                         std::string reason) {
  const RunState run = ReadRunState(out);
  const bool told = fresh && !run.status.empty() && run.status != "running" && run.ended && run.code == code;
  if (told && IsFinalExit(code)) return absl::OkStatus();
  if (told && !run.reason.empty()) reason = absl::StrCat(run.reason, "; ", reason);
  const char* const status = code == kExitSaved ? "saved" : "failed";
  HEARTH_RETURN_IF_ERROR(WriteRunEnd(out, job_name, status, code, reason));
  return AppendEnd(out, status, code, reason);
}

// Of a job that was stopped, or asked to save, before anything was started.
int CodeBeforeStart(const Supervisor& supervisor, std::string* reason) {
  if (supervisor.stop_signal() != 0) {
    *reason = absl::StrCat("stopped by signal ", supervisor.stop_signal());
    return 128 + supervisor.stop_signal();
  }
  *reason = "asked to save before anything was started; the newest snapshot stands";
  return kExitSaved;
}

// How much the scheduler has written: it says its first word when all ranks have found each other.
uint64_t SchedulerLogBytes(const std::string& folder) {
  return FileBytes(JoinPath(folder, "logs/scheduler-0.log")).value_or(0);
}

// Whether mpirun itself ended, with a code that no role of ours has, and why: hosts that it does not know, an interface
// that is not there, libraries that do not fit. A rank that a signal ended is none of that.
bool IsRefusal(const Supervisor::End& end) {
  return !end.signaled && !IsFinalExit(end.code) && end.code != kExitInternal && !end.refusal.empty() &&
         !absl::StrContains(end.messages, "exited on signal");
}

std::string RefusalReason(const Supervisor::End& end) {
  return absl::StrCat("mpirun could not start the ranks: ", end.refusal, " (exit code ", end.code,
                      "); correct the hostfile or MPI's settings: hearth doctor says what works");
}

// For whoever looks into a cluster's troubles.
void KeepMessages(const std::string& folder, const std::string& messages) {
  if (messages.empty()) return;
  const std::string path = JoinPath(folder, "logs/mpirun.log");
  const absl::Status status = WriteFileAtomically(path, messages);
  if (!status.ok()) Say(std::string(status.message()));
}

// How often in a row a rank has died, and nothing newer than ever was saved. A job of months may lose a rank a day; one
// that dies at the same record each time is given up.
class RestartBudget {
 public:
  explicit RestartBudget(const TrainOptions& options)
      : options_(options), step_(std::max<int64_t>(0, NewestStep(options.out))), wait_us_(options.back_off_us) {}
  // A start has ended. Falling back to an older snapshot and saving that step again is nothing new, nor is step 0.
  void Look() {
    const int64_t newest = NewestStep(options_.out);
    if (newest <= step_) return;
    step_ = newest;
    refilled_ = used_ > 0;
    used_ = 0;
    wait_us_ = options_.back_off_us;
  }
  bool spent() const { return used_ >= options_.restarts_max; }
  int used() const { return used_; }
  // One more restart, told in one line. How long to wait before it.
  int64_t Take(int code) {
    const int64_t wait_us = wait_us_;
    ++used_;
    Say(absl::StrFormat("the job ended with %s; restart %d of %d from the newest snapshot%s in %.1f s",
                        DescribeEnd(code), used_, options_.restarts_max,
                        refilled_ ? absl::StrCat(" (", step_, ": new, the count begins anew)") : "", wait_us / 1e6));
    wait_us_ = std::min(wait_us_ * 2, options_.back_off_us * kBackOffMost);
    refilled_ = false;
    return wait_us;
  }

 private:
  const TrainOptions& options_;
  int64_t step_;  // the highest of a snapshot so far
  int64_t wait_us_;
  int used_ = 0;
  bool refilled_ = false;
};

// Runs the roles until the job has an exit code that stands. `reason` says why, for run.json.
// `output`: whether the last start's standard output arrived.
int RunToEnd(const TrainOptions& options, const Job& job, const std::string& folder, Supervisor* supervisor,
             std::string* reason, absl::Status* output) {
  RestartBudget budget(options);
  bool came_together = false;  // in some start
  supervisor->Pause(0);        // what was asked while the job was being prepared
  if (supervisor->save_asked()) return CodeBeforeStart(*supervisor, reason);
  for (int restarts = 0; supervisor->stop_signal() == 0; ++restarts) {
    const uint64_t log_bytes = SchedulerLogBytes(folder);
    const RoleCounts counts = {options.servers, options.workers};
    std::vector<std::string> flags = {"--restarts", absl::StrCat(restarts)};
    if (options.again) flags.push_back("--again");
    std::vector<std::string> server_flags;
    if (!options.live.empty()) server_flags = {"--live", std::filesystem::absolute(options.live).lexically_normal()};
    const absl::StatusOr<Command> command =
        MpirunCommand(options.programs, counts, options.hostfile, flags, server_flags, job, folder);
    if (!command.ok()) {
      *reason = std::string(command.status().message());
      return ExitCodeOf(command.status());
    }
    const absl::StatusOr<Supervisor::End> end = supervisor->Run(*command);
    if (!end.ok()) {
      *reason = absl::StrCat(std::string(end.status().message()), "; install Open MPI: scripts/setup");
      return kExitConfig;
    }
    const bool swept = supervisor->EndRolesOf(folder);
    const int code = end->code;
    came_together |= SchedulerLogBytes(folder) != log_bytes;
    *reason = DescribeEnd(code);
    *output = end->output;
    if (code == kExitOk || code == kExitSaved) return code;  // whatever signal came after it
    KeepMessages(folder, end->messages);
    if (supervisor->stop_signal() != 0) {
      *reason = absl::StrCat("stopped by signal ", supervisor->stop_signal());
      return 128 + supervisor->stop_signal();
    }
    if (IsFinalExit(code)) return code;
    if (!came_together && IsRefusal(*end)) {
      *reason = RefusalReason(*end);
      return kExitConfig;
    }
    if (supervisor->save_asked()) {
      *reason = absl::StrCat("asked to save; a rank ended before it had (", DescribeEnd(code),
                             "); the newest snapshot stands");
      return kExitSaved;
    }
    if (!swept) {
      *reason = absl::StrCat(DescribeEnd(code), ", and ranks of it cannot be ended");
      return code;
    }
    budget.Look();
    if (budget.spent()) {
      *reason = absl::StrCat(DescribeEnd(code), "; restarted ", budget.used(),
                             " times without a new snapshot, --max-restarts");
      return code;
    }
    supervisor->Pause(budget.Take(code));
    if (supervisor->save_asked() && supervisor->stop_signal() == 0) {
      *reason = "asked to save between two starts; the newest snapshot stands";
      return kExitSaved;
    }
  }
  *reason = absl::StrCat("stopped by signal ", supervisor->stop_signal());
  return 128 + supervisor->stop_signal();
}

// --- eval ---

// The job's only split becomes `eval`: the given files, read as the job reads its first split, or its last log.
Job WithEvalSplit(const EvalOptions& options, Job job) {
  Split split = job.split_size() > 0 ? job.split(0) : Split();
  if (job.split_size() == 0) *split.mutable_log() = job.log(job.log_size() - 1);
  Log* log = split.mutable_log();
  for (const auto clear : {&Log::clear_path, &Log::clear_directory, &Log::clear_shuffle, &Log::clear_batch_size})
    (log->*clear)();
  log->set_name("eval");
  for (const std::string& file : options.logs)
    log->add_path(std::filesystem::absolute(file).lexically_normal().string());
  split.set_name("eval");
  split.set_predictions(!options.predictions.empty());
  job.clear_split();
  *job.add_split() = split;
  job.mutable_metrics()->set_tensorboard(false);
  job.mutable_metrics()->clear_prometheus_port();  // the training job's, perhaps at this moment
  return job;
}

absl::Status CheckEvalInputs(const Job& job, const std::string& job_path) {
  Job needed = job;  // the training logs are not read
  needed.clear_log();
  HEARTH_RETURN_IF_ERROR(CheckInputs(needed));
  return CheckReading(needed, job_path);
}

// Where the rows and the dense parameters mean the same, other logs may be read in other ways.
absl::Status ReconcileForEval(const SnapshotChoice& snapshot, Job* job) {
  HEARTH_ASSIGN_OR_RETURN(const Job saved, ParseJob(snapshot.manifest.job(), JoinPath(snapshot.folder, "MANIFEST")));
  job->mutable_training()->set_lanes(snapshot.manifest.lanes());
  const std::vector<std::string> differences = ModelDifferences(*job, saved);
  if (differences.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(snapshot.folder, ": is of another model; they differ (this job != the saved one) in\n",
                   absl::StrJoin(differences, "\n"), "\nset these fields back, or evaluate a snapshot of this job"));
}

absl::StatusOr<Job> PrepareEval(const EvalOptions& options, const HeldSnapshot& snapshot, const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadValidJob(options.job, options.overrides));
  HEARTH_RETURN_IF_ERROR(ReconcileForEval({snapshot.folder, snapshot.manifest, {}}, &job));
  HEARTH_RETURN_IF_ERROR(CheckWorkers(job, options.workers, true));
  job = WithEvalSplit(options, job);
  HEARTH_RETURN_IF_ERROR(Annotate(ValidateJob(job), options.job));
  HEARTH_RETURN_IF_ERROR(CheckEvalInputs(job, options.job));
  for (const char* name : {"logs", "snapshots", "tb", "dead-letter", "predictions", "live"}) {
    HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(folder, name)));
  }
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder, "job.txtpb"), PrintJob(job)));
  return job;
}

}  // namespace

Programs ProgramsBesideThis() {
  std::error_code error;
  return {std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string()};
}

bool IsFinalExit(int code) {
  switch (code) {
    case kExitOk:
    case kExitSaved:
    case kExitUsage:
    case kExitBadData:
    case kExitNoInput:
    case kExitIo:
    case kExitConfig:
      return true;
    default:
      return false;
  }
}

std::vector<std::string> MpirunArguments(const Programs& programs, const RoleCounts& counts,
                                         const std::string& hostfile, const std::vector<std::string>& scheduler_flags,
                                         const std::vector<std::string>& server_flags, const std::string& folder) {
  std::vector<std::string> argv = {programs.mpirun, "--oversubscribe", "--bind-to", "none"};
  if (!hostfile.empty()) argv.insert(argv.end(), {"--hostfile", hostfile});
  const std::vector<std::string> sizes = {"--ps", absl::StrCat(counts.servers), "--worker",
                                          absl::StrCat(counts.workers)};
  const auto add_role = [&](const char* name, int ranks, const std::vector<std::string>& flags) {
    if (argv[argv.size() - 1] == folder) argv.push_back(":");
    argv.insert(argv.end(), {"-np", absl::StrCat(ranks), JoinPath(programs.folder, name)});
    argv.insert(argv.end(), sizes.begin(), sizes.end());
    argv.insert(argv.end(), flags.begin(), flags.end());
    argv.push_back(folder);
  };
  add_role("hearth-scheduler", 1, scheduler_flags);
  add_role("hearth-ps", counts.servers, server_flags);
  add_role("hearth-worker", counts.workers, {});
  return argv;
}

absl::Status PrintEffectiveJob(const TrainOptions& options, std::string* text) {
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadValidJob(options.job, options.overrides));
  if (!job.training().has_lanes()) job.mutable_training()->set_lanes(static_cast<uint32_t>(options.workers));
  HEARTH_RETURN_IF_ERROR(CheckWorkers(job, options.workers, false));
  HEARTH_RETURN_IF_ERROR(Annotate(ValidateJob(job), options.job));
  // The files may be elsewhere; those that are here are looked at.
  HEARTH_RETURN_IF_ERROR(CheckInputs(job).ok() ? CheckReading(job, options.job) : CheckExpressions(job, options.job));
  *text = PrintJob(job);
  return absl::OkStatus();
}

absl::Status PrintChanges(const TrainOptions& options, std::string* text) {
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadValidJob(options.job, options.overrides));
  const std::string snapshots = JoinPath(options.out, "snapshots");
  SnapshotChoice choice;
  if (PathExists(snapshots)) {
    HEARTH_ASSIGN_OR_RETURN(
        choice, options.from.has_value() ? FindSnapshotOf(snapshots, *options.from) : FindNewestSnapshot(snapshots));
  }
  if (choice.folder.empty()) {
    *text = absl::StrCat(options.out, ": holds no snapshot; the job would start there\n");
    return absl::OkStatus();
  }
  HEARTH_ASSIGN_OR_RETURN(const std::vector<JobChange> changes, TakeFromSnapshot(choice, &job));
  const uint64_t step = choice.manifest.step();
  *text = absl::StrCat("from ", choice.folder, changes.empty() ? ": the same job\n" : "\n");
  const auto list = [&](JobChange::Kind kind, absl::string_view verdict, absl::string_view meaning) {
    const std::vector<JobChange> those = OfKind(changes, kind);
    for (const JobChange& change : those) {
      absl::StrAppendFormat(text, "%-9s %s  (%s)\n", verdict, change.ToString(),
                            change.why.empty() ? meaning : change.why);
    }
    return those.size();
  };
  list(JobChange::kCarried, "carried", absl::StrCat("from step ", step + 1, " on"));
  list(JobChange::kFree, "free", "changes no bit");
  list(JobChange::kFiles, "files", "the list of files judges it when the run starts");
  if (list(JobChange::kRefused, "refused", "") == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(*text, "for what is refused: ", kWaysOutOfRefusal));
}

int Train(const TrainOptions& options) {
  Supervisor supervisor;  // from here on a signal is remembered
  absl::StatusOr<Job> job = LoadValidJob(options.job, options.overrides);
  if (!job.ok()) return Complain(job.status());
  if (const absl::Status status = CheckInputsOfRun(*job, options.job, options.out, options.from); !status.ok()) {
    return Complain(status);
  }
  if (const absl::Status status = CheckPrograms(*job, options.programs.folder); !status.ok()) return Complain(status);
  if (!options.hostfile.empty() && !PathExists(options.hostfile)) {
    return Complain(absl::NotFoundError(absl::StrCat("--hostfile ", options.hostfile, ": no such file")));
  }
  absl::StatusOr<std::unique_ptr<RunFolder>> folder = RunFolder::Open(options.out, options.fresh);
  if (!folder.ok()) return Complain(folder.status());
  const std::string& path = (*folder)->path();
  if (!supervisor.EndRolesOf(path)) {
    return Complain(
        absl::InternalError(absl::StrCat(path, ": ranks of an earlier run are still there and cannot be ended")));
  }
  // A large snapshot takes minutes to verify: whoever stops us then does not wait for that.
  const auto asked = [&supervisor] {
    supervisor.Pause(0);
    return supervisor.save_asked() || supervisor.stop_signal() != 0;
  };
  const absl::StatusOr<Job> prepared = PrepareRun(*job, {options.job, options.workers, options.from, asked}, **folder);
  std::string reason;
  if (absl::IsCancelled(prepared.status())) {  // nothing in the folder was looked at, and nothing is changed
    const int code = CodeBeforeStart(supervisor, &reason);
    Say(reason);
    return code;
  }
  if (!prepared.ok()) return Complain(prepared.status());

  const auto before = RunJsonTime(path);
  absl::Status output;
  const int code = RunToEnd(options, *prepared, path, &supervisor, &reason, &output);
  if (code == kExitOk && !output.ok()) return Complain(Annotate(output, "the job is finished, its table is lost"));
  if (code == kExitOk) {
    SayNext(absl::StrCat("hearth inspect ", options.out, ", or hearth export ", options.out, " --out BUNDLE"));
    return code;
  }
  Say(absl::StrCat(reason, "; see ", JoinPath(path, "run.json"), " and ", JoinPath(path, "logs")));
  const absl::Status status = TellRunJson(path, job->name(), RunJsonTime(path) != before, code, reason);
  if (!status.ok()) Say(std::string(status.message()));
  return code;
}

int Evaluate(const EvalOptions& options) {
  // Held until the last rank has gone: servers and workers read it too.
  const absl::StatusOr<HeldSnapshot> snapshot =
      options.best ? HoldBestSnapshot(options.snapshot, SnapshotCheck::kLengths) : HoldSnapshotAt(options.snapshot);
  if (!snapshot.ok()) return Complain(snapshot.status());
  if (!options.predictions.empty()) {
    const absl::Status status = Annotate(OutputFile::Check(options.predictions), "--predictions");
    if (!status.ok()) return Complain(status);
  }
  if (const absl::Status status = CheckPrograms(Job(), options.programs.folder); !status.ok()) {
    return Complain(status);
  }
  Supervisor supervisor;
  const absl::StatusOr<std::unique_ptr<TemporaryFolder>> folder = TemporaryFolder::Make("hearth-eval");
  if (!folder.ok()) return Complain(folder.status());
  const std::string& path = (*folder)->path();
  const absl::StatusOr<Job> job = PrepareEval(options, *snapshot, path);
  if (!job.ok()) return Complain(job.status());

  const RoleCounts counts = {options.servers, options.workers};
  const absl::StatusOr<Command> command =
      MpirunCommand(options.programs, counts, "", {"--evaluate", snapshot->folder}, {}, *job, path);
  if (!command.ok()) return Complain(command.status());
  const absl::StatusOr<Supervisor::End> end = supervisor.Run(*command);
  if (!end.ok()) return Complain(absl::FailedPreconditionError(end.status().message()));
  supervisor.EndRolesOf(path);
  if (supervisor.stop_signal() != 0) return 128 + supervisor.stop_signal();
  if (end->code != 0 && SchedulerLogBytes(path) == 0 && IsRefusal(*end)) {
    return Complain(absl::FailedPreconditionError(RefusalReason(*end)));
  }
  if (end->code != 0) {
    Say(absl::StrCat("evaluation ended with ", DescribeEnd(end->code)));
    return end->code;
  }
  absl::Status status = end->output;
  if (!options.predictions.empty()) {
    status.Update(CopyZstdTo(JoinPath(path, "predictions/eval.tsv.zst"), options.predictions));
  }
  if (!status.ok()) return Complain(status);
  SayNext(absl::StrCat("hearth export ", options.snapshot, " --out BUNDLE"));
  return kExitOk;
}

}  // namespace hearth
