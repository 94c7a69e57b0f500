// hearth-export SNAPSHOT --out DIR: a snapshot as a bundle for serving. Started by `hearth export`, and by the
// scheduler of a run that publishes.
#include <CLI/CLI.hpp>
#include <string>

#include "common/base/command_line.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "worker/bundle/export_bundle.h"

namespace hearth {
namespace {

int Main(int argc, char** argv) {
  ExportOptions options;
  std::string format = "all";
  CLI::App app("Exports a snapshot as a bundle for serving: graph, weights, rows, features, golden records.",
               "hearth export");
  app.set_version_flag("--version", BuildCommit());
  app.footer(
      "With --since STEP a delta on bundles, with --apply bundles and deltas made one: --help behind them tells.");
  app.add_option("SNAPSHOT", options.snapshot, "A snapshot's folder, or a run's (its newest)")->required();
  app.add_flag("--best", options.best, "The run's best snapshot by the job's snapshot.best, not its newest");
  app.add_option("--out", options.out, "The bundle's folder; must not exist, or be empty")->required();
  app.add_option("--format", format, "all, or some of onnx,triton,hps,npy,safetensors,int8")->capture_default_str();
  app.add_option("--golden", options.golden, "Golden records; 0: none, and no log is read")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app.add_option("--log", options.log, "Split or log that golden records come from; default: the first split");
  app.add_option("--data-dir", options.data_dir, "Where the job's files are, if they moved");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  const absl::StatusOr<ExportFormats> formats = ParseExportFormats(format);
  if (!formats.ok()) {
    Finish("hearth export", formats.status());
    return kExitUsage;
  }
  options.formats = *formats;
  const absl::StatusOr<std::string> report = ExportBundle(options);
  const int code = Finish("hearth export", report);
  if (code == kExitOk)
    SayNext("hearth score " + options.out + " --logs FILE…, or scripts/score.py " + options.out + " --check");
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::HoldStandardDescriptors();
  return hearth::Main(argc, argv);
}
