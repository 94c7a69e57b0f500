// The front command. What needs MPI or Torch is done by the roles that it starts.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "common/logging.h"
#include "common/status.h"
#include "common/version.h"
#include "scripts/hearth/generate.h"
#include "scripts/hearth/inspect.h"
#include "scripts/hearth/launch.h"

namespace hearth {
namespace {

constexpr int kRanksMax = 4096;

std::string Version() {
  const std::string torch = HEARTH_LIBTORCH_VERSION;
  return "hearth commit " + BuildCommit() + ", " + HEARTH_BUILD_TYPE + " build, LibTorch " +
         (torch.empty() ? "none" : torch) + ", CPU only (never run on a GPU)";
}

int Finish(const absl::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "hearth: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int Finish(const absl::StatusOr<std::string>& text) {
  if (text.ok()) std::fputs(text->c_str(), stdout);
  return Finish(text.status());
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

int Main(int argc, char** argv) {
  CLI::App app("Hearth: trains multi-task ranking models against sharded parameter servers.", "hearth");
  app.set_version_flag("--version", Version());
  app.require_subcommand(1);
  int code = 0;

  TrainOptions train;
  bool print_job = false;
  CLI::App* command = app.add_subcommand("train", "Train a job, or go on with it from its newest snapshot");
  command->add_option("JOB", train.job, "The job file, job.txtpb")->required();
  command->add_option("--out", train.out, "The run's folder");
  AddOverrides(command, &train.overrides);
  AddRanks(command, &train.servers, &train.workers);
  command->add_option("--hostfile", train.hostfile, "Hosts for mpirun");
  command->add_option("--max-restarts", train.restarts_max, "Restarts after a rank died")
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
  command->add_option("--out", generate.out, "Where to")->required();
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

  command = app.add_subcommand("verify", "Check every checksum of a snapshot");
  command->add_option("SNAPSHOT", snapshot, "A snapshot's folder, or a run's (its newest)")->required();
  command->callback([&] { code = Finish(VerifySnapshotAt(snapshot)); });

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
