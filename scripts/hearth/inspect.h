// `hearth inspect` and `hearth verify`: what a snapshot holds, and whether it is whole.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

// The snapshot's folder that `path` means: itself, or for a run's folder (or its `snapshots`) the newest with a
// MANIFEST that reads well. NotFound where there is none; DataLoss where `path` looks like a snapshot and has no valid
// MANIFEST.
absl::StatusOr<std::string> FindSnapshotFolder(const std::string& path);

// Reads the MANIFEST alone: step, job, lanes, tables, cursors, ledger, evaluations, hash. For people, or as JSON.
absl::StatusOr<std::string> InspectSnapshot(const std::string& path, bool json);

// Checks every checksum, every block, and the hash of all rows; a line for people. DataLoss names the file.
absl::StatusOr<std::string> VerifySnapshotAt(const std::string& path);

}  // namespace hearth
