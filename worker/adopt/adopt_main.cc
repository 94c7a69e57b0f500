// hearth-adopt SNAPSHOT NEWJOB --out DIR: a run's first snapshot from another model's newest. Started by `hearth
// adopt`.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "common/base/command_line.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "worker/adopt/adopt.h"

namespace hearth {
namespace {

absl::StatusOr<std::string> Run(const std::string& path, const std::vector<std::string>& overrides,
                                AdoptOptions* options) {
  HEARTH_ASSIGN_OR_RETURN(options->job, LoadJob(path, overrides));
  HEARTH_RETURN_IF_ERROR(Annotate(ValidateJob(options->job), path));
  return Adopt(*options);
}

int Main(int argc, char** argv) {
  AdoptOptions options;
  std::string job;
  std::vector<std::string> overrides;
  uint64_t step = 1;
  CLI::App app("Takes a trained model over into a new run whose job has other features, tasks or tables.",
               "hearth adopt");
  app.set_version_flag("--version", BuildCommit());
  app.footer(
      "Then `hearth train NEWJOB --out DIR` goes on there. docs/OPERATIONS.md, \"A new feature, task or table\".");
  app.add_option("SNAPSHOT", options.snapshot, "The old model: a snapshot's folder, or a run's (its newest)")
      ->required();
  app.add_option("NEWJOB", job, "The job that is to go on with it; `was` and `salt` in it say what is renamed")
      ->required();
  CLI::Option* const out = app.add_option("--out", options.out, "The new run's folder; must not exist, or be empty");
  app.add_option("--set", overrides, "Override a field of the job, e.g. training.staleness=2")
      ->type_name("PATH=VALUE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--drop", options.rules.dropped,
                 "Let go of what the old model has, e.g. task:like; also slot, dense, table")
      ->type_name("KIND:NAME")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_flag("--truncate", options.rules.truncate, "Tables may lose columns, and groups experts");
  CLI::Option* const restart =
      app.add_option("--step", step, "0: steps, expiry and schedules begin anew; otherwise they go on")
          ->check(CLI::IsMember({0}));
  app.add_flag("--again", options.again, "The new run may train files that the model was trained on");
  app.add_flag("--dry-run", options.dry_run, "Print what would be carried, born, reset and dropped, and stop");
  app.add_option("--golden", options.golden, "Records by which both models are compared; 0: none")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app.add_option("--log", options.log, "Split or log of the new job that they come from; default: the first split");
  try {
    app.parse(argc, argv);
    if (!options.dry_run && out->count() == 0) throw CLI::RequiredError("--out");
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  options.restart = restart->count() > 0;
  const absl::StatusOr<std::string> report = Run(job, overrides, &options);
  const int code = Finish("hearth adopt", report);
  if (code == kExitOk && !options.dry_run) SayNext("hearth train " + job + " --out " + options.out);
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::HoldStandardDescriptors();
  return hearth::Main(argc, argv);
}
