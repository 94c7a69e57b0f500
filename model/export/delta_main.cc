// hearth-delta SNAPSHOT --since STEP --out DIR, hearth-delta --apply BASE [DELTA…] --out DIR: deltas of bundles for
// serving. Started by `hearth export` where it is given --since or --apply, and by the scheduler of a run that
// publishes. A program of its own because it needs no Torch: it is at work in milliseconds, also where bundles are
// served.
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "common/base/command_line.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "model/export/export_delta.h"

namespace hearth {
namespace {

int Main(int argc, char** argv) {
  std::vector<std::string> folders;
  std::string out, data_dir;
  uint64_t since = 0;
  bool apply = false;
  CLI::App app("Exports what changed since a step as a delta on a bundle, or merges a bundle and its deltas.",
               "hearth export");
  app.set_version_flag("--version", BuildCommit());
  app.add_option(
         "FOLDER", folders,
         "With --since a snapshot's folder, or a run's (its newest); with --apply a full export (or what --apply "
         "made) and deltas on it in order; without deltas: all beside it")
      ->required();
  app.add_option("--out", out, "With --since the folder of the bundles and of delta/; with --apply the new bundle's")
      ->required();
  CLI::Option* const since_option = app.add_option("--since", since, "Make a delta; the step at which the bundles end");
  CLI::Option* const apply_option = app.add_flag("--apply", apply, "Merge")->excludes(since_option);
  app.add_option("--data-dir", data_dir, "Where the job's files are, if they moved")->excludes(apply_option);
  try {
    app.parse(argc, argv);
    if (!apply && since_option->empty()) throw CLI::RequiredError("--since or --apply");
    if (!apply && folders.size() > 1) throw CLI::ExtrasError({folders.begin() + 1, folders.end()});
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  const absl::StatusOr<std::string> report = apply
                                                 ? ApplyDeltas({folders[0], {folders.begin() + 1, folders.end()}, out})
                                                 : ExportDelta({folders[0], out, since, data_dir});
  const int code = Finish("hearth export", report);
  if (code == kExitOk)
    SayNext(apply ? "hearth verify " + out : "hearth export --apply " + out + "/STEP --out BUNDLE, where it is served");
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::HoldStandardDescriptors();
  return hearth::Main(argc, argv);
}
