#include "scripts/hearth/prepare.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/artifact/manifest.h"
#include "common/artifact/numbered_folder.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/base/file_lock.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"
#include "scripts/hearth/fork.h"
#include "worker/log/log_reader.h"
#include "worker/log/record_plan.h"

namespace hearth {
namespace {

// A file or folder that a job names.
struct Input {
  std::string field;
  std::string path;  // resolved
  bool folder = false;
};

std::vector<Input> InputsOf(const Job& job) {
  std::vector<Input> inputs;
  const auto add = [&](const std::string& field, const std::string& path, bool folder) {
    inputs.push_back({field, ResolvePath(job, path), folder});
  };
  for (int i = 0; i < job.log_size(); ++i) {
    for (const std::string& path : job.log(i).path()) add(absl::StrCat("log[", i, "].path"), path, false);
    const std::string& directory = job.log(i).directory();
    if (!directory.empty()) add(absl::StrCat("log[", i, "].directory"), directory, true);
  }
  for (int i = 0; i < job.side_table_size(); ++i) {
    add(absl::StrCat("side_table[", i, "].path"), job.side_table(i).path(), false);
  }
  for (int i = 0; i < job.split_size(); ++i) {
    for (const std::string& path : job.split(i).log().path()) {
      add(absl::StrCat("split[", i, "].log.path"), path, false);
    }
  }
  return inputs;
}

// A pipe can be read once, and a folder not at all: a log is read by several, and again after a restart. Empty where
// the path is fit, or nothing is there.
std::string IrregularityOf(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (error || !std::filesystem::exists(status) || std::filesystem::is_regular_file(status)) return "";
  const bool folder = std::filesystem::is_directory(status);
  return absl::StrCat("is ", folder ? "a folder" : "no regular file", "; name ",
                      folder ? "its files, or give log.directory instead" : "a file: write the data to one");
}

// A run that has committed something but of which nothing verifies must not silently begin anew.
absl::Status RefuseIfAllCorrupt(const std::string& snapshots, const SnapshotChoice& choice) {
  if (!choice.folder.empty() || !PathExists(snapshots)) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(snapshots));
  for (const std::string& name : names) {
    if (!PathExists(JoinPath(JoinPath(snapshots, name), "MANIFEST"))) continue;
    return absl::DataLossError(absl::StrCat(snapshots, ": no snapshot verifies:\n",
                                            absl::StrJoin(choice.passed_over, "\n"),
                                            "\nbring one back from a copy, or train into another --out"));
  }
  return absl::OkStatus();
}

// The logs that a run of the job reads, and each one's column of GAUC's user.
void LogsOf(const Job& job, std::vector<Log>* logs, std::vector<std::string>* users) {
  logs->assign(job.log().begin(), job.log().end());
  users->resize(logs->size());
  for (const Split& split : job.split()) {
    logs->push_back(split.log());
    users->push_back(split.user());
  }
}

// The job without the paths that the run in `out`, where there is one, has read for good. By its newest MANIFEST, or
// that of step `from`, as it is: the scheduler judges by one that verifies.
Job WithoutFilesReadIn(const std::string& out, std::optional<uint64_t> from, const Job& job) {
  const std::string snapshots = JoinPath(out, "snapshots");
  const std::vector<uint64_t> steps = NumbersIn(snapshots).value_or(std::vector<uint64_t>());
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (from.has_value() && *step != *from) continue;
    const absl::StatusOr<Manifest> manifest = ReadManifest(JoinPath(snapshots, absl::StrCat(*step)));
    if (!manifest.ok()) continue;
    return WithoutReadPaths(job, {manifest->log_file().begin(), manifest->log_file().end()}, LanesOf(*manifest));
  }
  return job;
}

}  // namespace

// On a terminal a dead scheduler may have left its progress line standing.
void Say(const std::string& line) {
  std::fprintf(stderr, "%shearth: %s\n", isatty(STDERR_FILENO) == 1 ? "\r\x1b[K" : "", line.c_str());
}

int Complain(const absl::Status& status) {
  Say(std::string(status.message()));
  return ExitCodeOf(status);
}

absl::Status CheckInputs(const Job& job) {
  std::vector<std::string> missing, irregular;
  for (const Input& input : InputsOf(job)) {
    const std::string where = absl::StrCat(input.field, ": ", input.path, ": ");
    if (!PathExists(input.path)) missing.push_back(where + "no such file");
    const std::string fault = input.folder ? "" : IrregularityOf(input.path);
    if (!fault.empty()) irregular.push_back(where + fault);
  }
  if (!missing.empty()) {
    return absl::NotFoundError(
        absl::StrCat(absl::StrJoin(missing, "\n"), "\nput them there, or point the job at them: --set data_dir=…"));
  }
  return irregular.empty() ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrJoin(irregular, "\n"));
}

absl::Status CheckReading(const Job& job, const std::string& job_path) {
  std::vector<Log> logs;
  std::vector<std::string> users;
  LogsOf(job, &logs, &users);
  return Annotate(LogSchema::Check(job, logs, users), job_path);
}

absl::Status CheckInputsOfRun(const Job& job, const std::string& job_path, const std::string& out,
                              std::optional<uint64_t> from) {
  const Job rest = WithoutFilesReadIn(out, from, job);
  HEARTH_RETURN_IF_ERROR(CheckInputs(rest));
  return CheckReading(rest, job_path);
}

absl::Status CheckExpressions(const Job& job, const std::string& job_path) {
  std::vector<Log> logs;
  std::vector<std::string> users;
  LogsOf(job, &logs, &users);
  const std::vector<std::string> faults = FaultsOfExpressions(job, logs);
  if (faults.empty()) return absl::OkStatus();
  return Annotate(absl::InvalidArgumentError(absl::StrJoin(faults, "\n")), job_path);
}

absl::Status CheckPrograms(const Job& job, const std::string& folder) {
  std::vector<const char*> names = {"hearth-scheduler", "hearth-ps", "hearth-worker"};
  if (job.export_().delta_every_steps() > 0) names.insert(names.end(), {"hearth-export", "hearth-delta"});
  for (const char* name : names) {
    const std::string path = JoinPath(folder, name);
    if (access(path.c_str(), X_OK) != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, ": ", std::strerror(errno), "; build all of Hearth first: scripts/build"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Job> LoadValidJob(const std::string& path, const std::vector<std::string>& overrides) {
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadJob(path, overrides));
  HEARTH_RETURN_IF_ERROR(Annotate(ValidateJob(job), path));
  return job;
}

absl::StatusOr<std::unique_ptr<RunFolder>> RunFolder::Open(const std::string& path, bool fresh) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(path));
  std::error_code error;
  const std::string canonical = std::filesystem::canonical(path, error).string();
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  absl::StatusOr<std::unique_ptr<FileLock>> lock = FileLock::Take(Env::Real(), JoinPath(canonical, "lock"), 0);
  if (absl::IsFailedPrecondition(lock.status())) {
    return absl::FailedPreconditionError(absl::StrCat(
        lock.status().message(), ": another hearth is running in it; wait for it, stop it, or give another --out"));
  }
  if (!lock.ok()) return lock.status();
  std::unique_ptr<RunFolder> folder(new RunFolder(canonical, std::move(*lock)));
  if (fresh) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(canonical));
    for (const std::string& name : names) {
      if (name == "lock") continue;
      return absl::FailedPreconditionError(
          absl::StrCat(canonical, ": holds \"", name,
                       "\"; --fresh needs an empty folder: give another --out, remove it, "
                       "or leave --fresh out to go on from its newest snapshot"));
    }
  }
  return folder;
}

absl::Status CheckWorkers(const Job& job, int workers, bool resumed) {
  if (static_cast<uint32_t>(workers) <= job.training().lanes()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("--np-worker ", workers, ": the job has ", job.training().lanes(), " lanes",
                   resumed ? ", fixed at its first start" : "", ", and a worker needs one; give --np-worker ",
                   job.training().lanes(),
                   " or fewer, or start anew in another --out with --set training.lanes=", workers, " or more"));
}

absl::StatusOr<std::vector<JobChange>> TakeFromSnapshot(const SnapshotChoice& snapshot, Job* job) {
  HEARTH_ASSIGN_OR_RETURN(const Job saved, ParseJob(snapshot.manifest.job(), JoinPath(snapshot.folder, "MANIFEST")));
  if (!job->training().has_lanes()) job->mutable_training()->set_lanes(snapshot.manifest.lanes());
  for (int i = 0; i < std::min(job->log_size(), saved.log_size()); ++i) {
    const bool decided = saved.log(i).has_piece_bytes() || saved.log(i).directory().empty();
    if (!job->log(i).has_piece_bytes() && decided) job->mutable_log(i)->set_piece_bytes(PieceBytes(saved.log(i)));
  }
  if (!job->model().has_batch_norm_momentum() && saved.model().has_batch_norm_momentum()) {  // 0.1's default was 0.1
    job->mutable_model()->set_batch_norm_momentum(saved.model().batch_norm_momentum());
  }
  return ChangesOf(saved, *job, snapshot.manifest);
}

absl::Status ReconcileWithSnapshot(const SnapshotChoice& snapshot, Job* job) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<JobChange> changes, TakeFromSnapshot(snapshot, job));
  const std::vector<std::string> refused = RefusalsOf(changes);
  if (refused.empty()) {
    for (const JobChange& change : OfKind(changes, JobChange::kCarried)) {
      Say(absl::StrCat("changed from step ", snapshot.manifest.step() + 1, " on: ", change.ToString()));
    }
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(snapshot.folder,
                                                    ": is of another job; they differ (the saved one -> this job) in\n",
                                                    absl::StrJoin(refused, "\n"), "\n", kWaysOutOfRefusal));
}

std::vector<std::pair<std::string, std::string>> RankEnvironment(const Job& job) {
  return {
      {"OMP_NUM_THREADS", absl::StrCat(job.training().threads())},
      {"OMP_WAIT_POLICY", "passive"},
      // Large blocks come and go with each batch: keep them, first touch is what costs.
      {"MALLOC_MMAP_THRESHOLD_", "33554432"},
      {"MALLOC_TRIM_THRESHOLD_", "536870912"},
      {"MALLOC_TOP_PAD_", "16777216"},
      {"CUBLAS_WORKSPACE_CONFIG", ":4096:8"},  // the same bits each time
  };
}

int64_t NewestStep(const std::string& folder) {
  const absl::StatusOr<std::vector<std::string>> snapshots = SnapshotsAt(JoinPath(folder, "snapshots"));
  if (!snapshots.ok()) return -1;
  const auto step = NumberOfName(std::filesystem::path(snapshots->front()).filename().string());
  return step.has_value() ? static_cast<int64_t>(*step) : -1;
}

absl::StatusOr<Job> PrepareRun(Job job, const PrepareOptions& options, const RunFolder& folder) {
  const std::string snapshots = JoinPath(folder.path(), "snapshots");
  HEARTH_RETURN_IF_ERROR(MakeDirectories(snapshots));
  HEARTH_RETURN_IF_ERROR(FinishFork(folder.path()));
  HEARTH_ASSIGN_OR_RETURN(const SnapshotChoice choice, options.from.has_value()
                                                           ? FindSnapshotOf(snapshots, *options.from, options.give_up)
                                                           : FindNewestSnapshot(snapshots, options.give_up));
  HEARTH_RETURN_IF_ERROR(RefuseIfAllCorrupt(snapshots, choice));
  for (const std::string& line : choice.passed_over) Say(absl::StrCat("passed over: ", line));
  if (!choice.folder.empty()) {
    HEARTH_RETURN_IF_ERROR(ReconcileWithSnapshot(choice, &job));
    HEARTH_RETURN_IF_ERROR(Annotate(CheckEndIsAhead(job, choice.manifest), choice.folder));
    Say(absl::StrCat("resuming from ", choice.folder));
  } else if (!job.training().has_lanes()) {
    job.mutable_training()->set_lanes(static_cast<uint32_t>(options.workers));
  }
  DecidePieces(&job);  // of a log that is new; what a snapshot says stays
  HEARTH_RETURN_IF_ERROR(CheckWorkers(job, options.workers, !choice.folder.empty()));
  HEARTH_RETURN_IF_ERROR(Annotate(ValidateJob(job), options.job_path));  // again: lanes are known now
  if (options.from.has_value()) HEARTH_RETURN_IF_ERROR(ForkAt(folder.path(), *options.from));
  for (const char* name : {"logs", "tb", "dead-letter", "predictions", "live"}) {
    HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(folder.path(), name)));
  }
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder.path(), "job.txtpb"), PrintJob(job)));
  return job;
}

}  // namespace hearth
