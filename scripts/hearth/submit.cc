#include "scripts/hearth/submit.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/artifact/history.h"
#include "common/base/file.h"
#include "common/base/output_file.h"
#include "common/base/report.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "scripts/hearth/fork.h"
#include "scripts/hearth/launch.h"
#include "scripts/hearth/prepare.h"
#include "scripts/hearth/run_json.h"
#include "scripts/hearth/supervise.h"

namespace hearth {
namespace {

constexpr uint64_t kRequeuesBytesMax = 4096;
constexpr char kParametersBegin[] = "# >>> parameters\n";
constexpr char kParametersEnd[] = "# <<< parameters\n";

// --- the script ---

// srun's list of programs knows no quoting worth relying on, and replaces %t and %o.
absl::Status CheckName(const std::string& what, const std::string& path) {
  for (const char c : path) {
    if (c > ' ' && !absl::StrContains("%\"'\\#$`*?[]{}()<>|&;!~", absl::string_view(&c, 1))) continue;
    if (static_cast<unsigned char>(c) >= 0x80) continue;
    return absl::FailedPreconditionError(
        absl::StrCat(what, " ", path,
                     ": under Slurm its name may hold no blank, quote, %, # or other sign of the shell; rename it"));
  }
  return absl::OkStatus();
}

absl::Status CheckOptions(const SubmitOptions& options) {
  if (options.time.empty() || options.time.find_first_not_of("0123456789:-") != std::string::npos) {
    return absl::FailedPreconditionError(
        absl::StrCat("--time ", options.time, ": give minutes, hours:minutes:seconds or days-hours"));
  }
  if (const int ranks = 1 + options.servers + options.workers; options.nodes > ranks) {
    return absl::FailedPreconditionError(
        absl::StrCat("--nodes ", options.nodes, ": the job has ", ranks, " ranks; give fewer nodes or more workers"));
  }
  // Slurm's names of partitions, several with commas between them.
  for (const char c : options.partition) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("_-.,+", absl::string_view(&c, 1)))
      continue;
    return absl::FailedPreconditionError(
        absl::StrCat("--partition \"", absl::CHexEscape(options.partition),
                     "\": a partition's name has letters, digits and _ - . +; give it, or several with commas"));
  }
  for (const std::string& option : options.sbatch) {
    if (absl::StartsWith(option, "-") &&
        std::none_of(option.begin(), option.end(), [](unsigned char c) { return absl::ascii_iscntrl(c); })) {
      continue;
    }
    return absl::FailedPreconditionError(
        absl::StrCat("--sbatch \"", absl::CHexEscape(option),
                     "\": give an option of sbatch in one word, such as --sbatch=--account=ranking"));
  }
  return absl::OkStatus();
}

std::string SbatchLine(absl::string_view option) { return absl::StrCat("#SBATCH ", option, "\n"); }

bool IsOnPath(const std::string& program) {
  const char* path = std::getenv("PATH");
  for (const absl::string_view folder : absl::StrSplit(path == nullptr ? "" : path, ':', absl::SkipEmpty())) {
    if (access(JoinPath(folder, program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

absl::Status CheckSbatch() {
  if (IsOnPath("sbatch")) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "sbatch is not on PATH; submit on a host of the cluster (Debian: slurm-client), or look at the script with "
      "--print");
}

// The job is in the folder and the folder is let go again: Slurm may start it at once.
absl::StatusOr<std::string> WriteScript(const SubmitOptions& options, const Job& loaded) {
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<RunFolder> folder, RunFolder::Open(options.out, false));
  HEARTH_ASSIGN_OR_RETURN(const Job job, PrepareRun(loaded, {options.job, options.workers, options.from, {}}, *folder));
  const int cpus = options.cpus_per_task > 0 ? options.cpus_per_task : static_cast<int>(job.training().threads());
  HEARTH_ASSIGN_OR_RETURN(const std::string script, BatchScript(options, folder->path(), cpus, RankEnvironment(job)));
  const std::string path = JoinPath(folder->path(), "hearth.sbatch");
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(path, script));
  return path;
}

absl::Status SubmitOrPrint(const SubmitOptions& options) {
  HEARTH_RETURN_IF_ERROR(CheckOptions(options));
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadValidJob(options.job, options.overrides));
  HEARTH_RETURN_IF_ERROR(CheckInputsOfRun(job, options.job, options.out, options.from));
  HEARTH_RETURN_IF_ERROR(CheckPrograms(job, options.programs));
  if (options.print) {
    const std::string folder = std::filesystem::weakly_canonical(options.out).string();
    const int cpus = options.cpus_per_task > 0 ? options.cpus_per_task : static_cast<int>(job.training().threads());
    HEARTH_ASSIGN_OR_RETURN(const std::string script, BatchScript(options, folder, cpus, RankEnvironment(job)));
    return WriteStandardOutput(script);
  }
  HEARTH_RETURN_IF_ERROR(CheckSbatch());
  HEARTH_RETURN_IF_ERROR(CheckName("--out", std::filesystem::weakly_canonical(options.out).string()));
  HEARTH_ASSIGN_OR_RETURN(const std::string script, WriteScript(options, job));
  Supervisor supervisor;
  HEARTH_ASSIGN_OR_RETURN(const Supervisor::End end, supervisor.Run({{"sbatch", script}, {}}));
  if (end.code == 0) {
    SayNext(absl::StrCat("squeue --me, and tail -f ", JoinPath(options.out, "slurm-JOB.out")));
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat("sbatch refused ", script, " (", DescribeEnd(end.code),
                                                    "); its reason stands above. Nothing was submitted"));
}

// --- after a start ---

// DIR/requeues: which of Slurm's jobs counts here, how often it was put back as a failure since it had a new snapshot,
// and the highest step of a snapshot that it has begun a start with: a newer one is new. One line, three numbers.
struct Requeues {
  std::string slurm_job;
  int failures = 0;
  int64_t step = -1;
};

std::string RequeuesPath(const std::string& folder) { return JoinPath(folder, "requeues"); }

Requeues ReadRequeues(const std::string& folder, const std::string& slurm_job) {
  Requeues none;
  none.slurm_job = slurm_job;
  const absl::StatusOr<std::string> text = ReadFile(RequeuesPath(folder), kRequeuesBytesMax);
  if (!text.ok()) return none;
  const std::vector<std::string> words = absl::StrSplit(*text, absl::ByAnyChar(" \n"), absl::SkipEmpty());
  Requeues read;
  if (words.size() != 3 || words[0] != slurm_job || !absl::SimpleAtoi(words[1], &read.failures) ||
      !absl::SimpleAtoi(words[2], &read.step)) {
    return none;
  }
  read.slurm_job = slurm_job;
  return read;
}

absl::Status WriteRequeues(const std::string& folder, const Requeues& requeues) {
  return WriteFileAtomically(RequeuesPath(folder),
                             absl::StrCat(requeues.slurm_job, " ", requeues.failures, " ", requeues.step, "\n"));
}

// The start's exit code: the scheduler's word where it has written one, else srun's.
int CodeOfStart(const std::string& folder, const BatchOutcome& outcome) {
  const RunState run = ReadRunState(folder);
  if (run.status == "saved") return kExitSaved;
  // srun may end with 0 when it could not launch the step at all.
  if (outcome.code == kExitOk && run.status != "finished" && run.status != "failed") return kExitInternal;
  return run.status == "failed" && run.ended && run.code != 0 ? run.code : outcome.code;
}

absl::Status TellRunJson(const std::string& folder, const std::string& status, int code, const std::string& reason) {
  const absl::StatusOr<Job> job = LoadJob(JoinPath(folder, "job.txtpb"), {});
  if (status != "running") HEARTH_RETURN_IF_ERROR(AppendEnd(folder, status, code, reason));
  return WriteRunEnd(folder, job.ok() ? job->name() : "", status, code, reason);
}

}  // namespace

absl::StatusOr<std::string> BatchScript(const SubmitOptions& options, const std::string& folder, int cpus_per_task,
                                        const std::vector<std::pair<std::string, std::string>>& environment) {
  HEARTH_RETURN_IF_ERROR(CheckOptions(options));
  HEARTH_RETURN_IF_ERROR(CheckName("--out", folder));
  HEARTH_RETURN_IF_ERROR(CheckName("programs in", options.programs));
  const std::string live =
      options.live.empty() ? "" : std::filesystem::absolute(options.live).lexically_normal().string();
  if (!live.empty()) HEARTH_RETURN_IF_ERROR(CheckName("--live", live));
  std::string parameters;
  std::string name = absl::StrCat("hearth-", std::filesystem::path(folder).filename().string());
  for (const std::string& option :
       {absl::StrCat("--job-name=", name), absl::StrCat("--output=", folder, "/slurm-%j.out"),
        absl::StrCat("--nodes=", options.nodes), absl::StrCat("--ntasks=", 1 + options.servers + options.workers),
        absl::StrCat("--cpus-per-task=", std::max(1, cpus_per_task)), absl::StrCat("--time=", options.time),
        absl::StrCat("--signal=B:USR1@", options.signal_lead_s)}) {
    parameters += SbatchLine(option);
  }
  if (!options.partition.empty()) parameters += SbatchLine(absl::StrCat("--partition=", options.partition));
  for (const std::string& option : options.sbatch) parameters += SbatchLine(option);
  for (const auto& [variable, value] :
       std::vector<std::pair<std::string, std::string>>{{"HEARTH_BIN", options.programs},
                                                        {"HEARTH_OUT", folder},
                                                        {"HEARTH_PS", absl::StrCat(options.servers)},
                                                        {"HEARTH_WORKER", absl::StrCat(options.workers)},
                                                        {"HEARTH_LIVE", live},
                                                        {"HEARTH_MAX_REQUEUES", absl::StrCat(options.requeues_max)}}) {
    absl::StrAppend(&parameters, "export ", variable, "=", value, "\n");
  }
  for (const auto& [variable, value] : environment) absl::StrAppend(&parameters, "export ", variable, "=", value, "\n");
  absl::StrAppend(&parameters, "export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}\n");

  std::string script = kSbatchTemplate;
  const size_t begin = script.find(kParametersBegin), end = script.find(kParametersEnd);
  HEARTH_CHECK(begin != std::string::npos && end != std::string::npos && begin < end,
               "hearth.sbatch has no parameters");
  script.replace(begin, end + sizeof(kParametersEnd) - 1 - begin, parameters);
  return script;
}

int Submit(const SubmitOptions& options) {
  const absl::Status status = SubmitOrPrint(options);
  return status.ok() ? kExitOk : Complain(status);
}

absl::Status BatchBegin(const std::string& folder, const std::string& slurm_job) {
  HEARTH_RETURN_IF_ERROR(FinishFork(folder));
  Requeues requeues = ReadRequeues(folder, slurm_job);
  requeues.step = std::max(requeues.step, NewestStep(folder));
  HEARTH_RETURN_IF_ERROR(WriteRequeues(folder, requeues));
  if (!PathExists(JoinPath(folder, "run.json"))) return absl::OkStatus();
  return TellRunJson(folder, "running", kExitOk, "");
}

absl::StatusOr<BatchNext> BatchEnd(const std::string& folder, const std::string& slurm_job,
                                   const BatchOutcome& outcome) {
  BatchNext next;
  next.code = CodeOfStart(folder, outcome);
  const bool saved = next.code == kExitSaved;
  if (!saved && IsFinalExit(next.code)) {
    next.reason = DescribeEnd(next.code);
    if (next.code == kExitOk || ReadRunState(folder).status == "failed") return next;
    HEARTH_RETURN_IF_ERROR(TellRunJson(folder, "failed", next.code, next.reason));
    return next;
  }
  if (outcome.stopped) {
    next.code = 128 + SIGTERM;
    next.reason = absl::StrCat("stopped by signal ", SIGTERM);
    HEARTH_RETURN_IF_ERROR(TellRunJson(folder, "failed", next.code, next.reason));
    return next;
  }
  if (outcome.requeued) {
    next.code = kExitSaved;
    next.reason = "put back into the queue by Slurm; the newest snapshot stands";
    HEARTH_RETURN_IF_ERROR(TellRunJson(folder, "saved", next.code, next.reason));
    return next;
  }
  Requeues requeues = ReadRequeues(folder, slurm_job);
  const bool advanced = NewestStep(folder) > std::max<int64_t>(0, requeues.step);  // step 0 is no progress
  const bool counted = !saved || !advanced;
  if (advanced) requeues.failures = 0;
  if (!counted) {
    next.reason = "saved before the time limit";
  } else if (saved) {
    next.reason = "the time limit came before a new snapshot";
  } else if (outcome.asked) {
    next.reason = absl::StrCat("the time limit came before the snapshot was whole (", DescribeEnd(next.code),
                               "), give --signal-lead more");
  } else {
    next.reason = DescribeEnd(next.code);
  }
  if (counted) ++requeues.failures;
  next.requeue = !counted || requeues.failures <= outcome.requeues_max;
  if (saved || outcome.asked || next.requeue) next.code = kExitSaved;
  if (!next.requeue) {
    absl::StrAppend(&next.reason, "; requeued ", outcome.requeues_max,
                    " times without a new snapshot, --max-requeues; submit it again to go on from the newest one");
  } else if (counted) {
    absl::StrAppend(&next.reason, "; requeue ", requeues.failures, " of ", outcome.requeues_max,
                    " from the newest snapshot", advanced ? ", counted anew behind a new one" : "");
  } else {
    absl::StrAppend(&next.reason, "; requeued");
  }
  HEARTH_RETURN_IF_ERROR(WriteRequeues(folder, requeues));
  HEARTH_RETURN_IF_ERROR(TellRunJson(folder, next.code == kExitSaved ? "saved" : "failed", next.code, next.reason));
  return next;
}

}  // namespace hearth
