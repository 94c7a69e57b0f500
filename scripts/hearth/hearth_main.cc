// The front command. What needs MPI or Torch is done by the roles that it starts.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "absl/strings/match.h"
#include "common/artifact/bundle.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "scripts/hearth/generate.h"
#include "scripts/hearth/inspect.h"
#include "scripts/hearth/launch.h"
#include "scripts/hearth/submit.h"

namespace hearth {
namespace {

constexpr int kRanksMax = 4096;

std::string Version() {
  const std::string torch = HEARTH_LIBTORCH_VERSION;
  const std::string cuda = HEARTH_CUDA_VERSION;
  return "hearth commit " + BuildCommit() + ", " + HEARTH_BUILD_TYPE + " build, LibTorch " +
         (torch.empty() ? "none" : torch) + ", " + (cuda.empty() ? "CPU only" : "CUDA " + cuda) +
         " (run on one NVIDIA H200 so far)";
}

int Finish(const absl::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "hearth: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int Finish(const absl::StatusOr<std::string>& text) {
  if (text.ok()) std::fputs(text->c_str(), stdout);
  return Finish(text.status());
}

// Becomes hearth-<name>, which lies beside this program, with all of the arguments behind the name.
int Become(const std::string& name, char** argv) {
  const std::string program = ProgramsBesideThis().folder + "/hearth-" + name;
  execv(program.c_str(), argv + 1);
  std::fprintf(stderr, "hearth: %s: %s; build all of Hearth, with LibTorch: scripts/build\n", program.c_str(),
               std::strerror(errno));
  return kExitConfig;
}

void AddRanks(CLI::App* command, int* servers, int* workers) {
  command->add_option("--np-ps", *servers, "Parameter servers")->check(CLI::Range(1, kRanksMax))->capture_default_str();
  command->add_option("--np-worker", *workers, "Workers, at most one a lane")
      ->check(CLI::Range(1, kRanksMax))
      ->capture_default_str();
}

void AddOverrides(CLI::App* command, std::vector<std::string>* overrides) {
  command->add_option("--set", *overrides, "Override a field of the job, e.g. training.staleness=2")
      ->type_name("PATH=VALUE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void AddSubmit(CLI::App* app, int* code) {
  static SubmitOptions submit;
  CLI::App* command =
      app->add_subcommand("submit", "Submit a job to Slurm: saves before its time limit, requeues, resumes");
  command->add_option("JOB", submit.job, "The job file, job.txtpb")->required();
  command->add_option("--out", submit.out, "The run's folder, on a file system of all nodes")->required();
  command->add_option("--time", submit.time, "Time limit of one start, as Slurm writes it")->required();
  command->add_option("--nodes", submit.nodes, "Nodes")->check(CLI::Range(1, kRanksMax))->capture_default_str();
  AddOverrides(command, &submit.overrides);
  AddRanks(command, &submit.servers, &submit.workers);
  command->add_option("--partition", submit.partition, "Slurm's partition");
  command->add_option("--cpus-per-task", submit.cpus_per_task, "Cores for each rank (if not said: training.threads)")
      ->check(CLI::Range(1, kRanksMax));
  command->add_option("--signal-lead", submit.signal_lead_s, "Seconds before the limit in which to save")
      ->check(CLI::Range(1, 65535))
      ->capture_default_str();
  command
      ->add_option("--max-requeues", submit.requeues_max,
                   "Requeues after a dead rank, or a start that saved no new snapshot")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  command->add_option("--sbatch", submit.sbatch, "One more option for sbatch, e.g. --sbatch=--account=ranking")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_flag("--print", submit.print, "Print the batch script; write and submit nothing");
  command->callback([code] {
    submit.programs = ProgramsBesideThis().folder;
    *code = Submit(submit);
  });
}

// What scripts/slurm/hearth.sbatch asks; not for people.
void AddBatch(CLI::App* app, int* code) {
  static std::string folder, slurm_job;
  static BatchOutcome outcome;
  CLI::App* command = app->add_subcommand("batch-begin", "")->group("");
  command->add_option("DIR", folder)->required();
  command->add_option("--job", slurm_job)->required();
  command->callback([code] { *code = Finish(BatchBegin(folder, slurm_job)); });

  command = app->add_subcommand("batch-end", "")->group("");
  command->add_option("DIR", folder)->required();
  command->add_option("--job", slurm_job)->required();
  command->add_option("--code", outcome.code)->required();
  command->add_option("--max-requeues", outcome.requeues_max)->required();
  command->add_flag("--asked", outcome.asked);
  command->add_flag("--stopped", outcome.stopped);
  command->add_flag("--requeued", outcome.requeued);
  command->callback([code] {
    const absl::StatusOr<BatchVerdict> verdict = BatchEnd(folder, slurm_job, outcome);
    *code = Finish(verdict.status());
    if (!verdict.ok()) return;
    std::fprintf(stderr, "hearth: %s\n", verdict->reason.c_str());
    std::printf("%s %d\n", verdict->requeue ? "requeue" : "end", verdict->code);
  });
}

int Main(int argc, char** argv) {
  CLI::App app("Hearth: trains multi-task ranking models against sharded parameter servers.", "hearth");
  app.set_version_flag("--version", Version());
  app.footer("Exit codes, signals, folders: docs/OPERATIONS.md.");
  app.require_subcommand(1);
  int code = 0;

  TrainOptions train;
  bool print_job = false;
  CLI::App* command = app.add_subcommand("train", "Train a job, or go on with it from its newest snapshot");
  command->add_option("JOB", train.job, "The job file, job.txtpb")->required();
  command->add_option("--out", train.out, "The run's folder; needed, but for --print-job");
  AddOverrides(command, &train.overrides);
  AddRanks(command, &train.servers, &train.workers);
  command->add_option("--hostfile", train.hostfile, "Hosts for mpirun");
  command->add_option("--max-restarts", train.restarts_max, "Restarts after a rank died, in the life of this command")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  command->add_flag("--fresh", train.fresh, "Start anew; --out must be empty");
  command->add_flag("--print-job", print_job, "Print the effective job and stop");
  command->callback([&] {
    train.programs = ProgramsBesideThis();
    if (print_job) {
      std::string text;
      const absl::Status status = PrintEffectiveJob(train, &text);
      code = status.ok() ? Finish(absl::StatusOr<std::string>(text)) : Finish(status);
      return;
    }
    if (train.out.empty()) throw CLI::RequiredError("--out");
    code = Train(train);
  });

  AddSubmit(&app, &code);
  AddBatch(&app, &code);

  EvalOptions eval;
  command = app.add_subcommand("eval", "Evaluate a snapshot on other logs, through servers, read only");
  command->add_option("JOB", eval.job, "The job file")->required();
  command->add_option("--snapshot", eval.snapshot, "A snapshot's folder, or a run's (its newest)")->required();
  command->add_option("--logs", eval.logs, "Log files")->required();
  command->add_option("--predictions", eval.predictions, "Write predictions there; zstd where the name ends in .zst");
  AddOverrides(command, &eval.overrides);
  AddRanks(command, &eval.servers, &eval.workers);
  command->callback([&] {
    eval.programs = ProgramsBesideThis();
    code = Evaluate(eval);
  });

  GenerateOptions generate;
  command =
      app.add_subcommand("generate", "Generate a synthetic log, its true probabilities, and a job that trains on it");
  command->add_option("SPEC", generate.spec_path, "The spec, e.g. scripts/jobs/synthetic-log.txtpb")->required();
  command->add_option("--out", generate.out, "Its folder: new, empty, or an earlier log of this command, which goes")
      ->required();
  command->add_option("--records", generate.records, "Records of the training log; the test log scales with it");
  command->add_option("--seed", generate.seed, "Overrides the spec's");
  command->callback([&] {
    std::string report;
    const absl::Status status = Generate(generate, &report);
    if (status.ok()) std::fputs(report.c_str(), stdout);
    code = Finish(status);
  });

  std::string snapshot;
  bool json = false;
  command = app.add_subcommand("inspect", "Show what a snapshot holds");
  command->add_option("SNAPSHOT", snapshot, "A snapshot's folder, or a run's (its newest)")->required();
  command->add_flag("--json", json, "As JSON");
  command->callback([&] { code = Finish(InspectSnapshot(snapshot, json)); });

  command = app.add_subcommand("verify", "Check every checksum of a snapshot or an export bundle");
  command->add_option("SNAPSHOT", snapshot, "A snapshot's folder, a run's (its newest), or a bundle's")->required();
  command->callback([&] { code = Finish(IsBundle(snapshot) ? VerifyBundle(snapshot) : VerifySnapshotAt(snapshot)); });

  for (const auto& [name, what] :
       {std::make_pair("export", "Export a snapshot as a bundle for serving, or a delta on one, or merge them"),
        std::make_pair("score", "Score raw logs from an export bundle alone")}) {
    app.add_subcommand(name, what);  // for the list of commands; never parsed here
    if (argc < 2 || std::strcmp(argv[1], name) != 0) continue;
    const bool delta = std::any_of(argv + 2, argv + argc, [](absl::string_view argument) {
      return argument == "--apply" || argument == "--since" || absl::StartsWith(argument, "--since=");
    });
    return Become(delta && argv[1][0] == 'e' ? "delta" : name, argv);
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
