// `hearth inspect` and `hearth verify`: what a snapshot holds, and whether it is whole.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

// The snapshot's folder that `path` means: itself, or for a run's folder (or its `snapshots`) the newest with a
// MANIFEST that reads well; newer ones are told on stderr. NotFound where there is none; DataLoss where `path` looks
// like a snapshot and has no valid MANIFEST.
absl::StatusOr<std::string> FindSnapshotFolder(const std::string& path);

// Reads the MANIFEST alone: step, job, lanes, tables, cursors, ledger, evaluations, hash. For people, or as JSON.
absl::StatusOr<std::string> InspectSnapshot(const std::string& path, bool json);

// Checks every checksum, every block, and the hashes of all rows, of the dense state and of the model; a line for
// people. DataLoss names the file. Of a run it is the newest committed snapshot that must be whole: where it is not,
// the error names it and the newest one that is.
absl::StatusOr<std::string> VerifySnapshotAt(const std::string& path);

}  // namespace hearth
