// `hearth export`: a snapshot as a bundle for serving (docs/FORMATS.md, "Export bundle"), with golden records, read
// back and compared before one rename makes it appear.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "model/export/export.h"

namespace hearth {

struct ExportOptions {
  std::string snapshot;  // a snapshot's folder, or a run's (its newest)
  bool best = false;     // of a run's snapshots not the newest, but the best
  std::string out;       // must not exist, or be an empty folder
  ExportFormats formats;
  int golden = 64;       // golden records; 0: none, and then no log is read
  std::string log;       // that they come from: name of a split or log; empty: see ChooseLog
  std::string data_dir;  // where the job's files are now; empty: where the job says
};
// A report for people. On an error nothing is left at `out`, nor beside it.
absl::StatusOr<std::string> ExportBundle(const ExportOptions& options);

}  // namespace hearth
