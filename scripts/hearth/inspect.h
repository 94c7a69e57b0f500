// `hearth inspect` and `hearth verify`: what a snapshot holds, and whether it is whole.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/artifact/snapshot_hold.h"

namespace hearth {

// The snapshot that `path` means, held: itself, or for a run's folder (or its `snapshots`) the newest whose MANIFEST
// reads well; newer ones are told on stderr. Errors as HoldNewestSnapshot.
absl::StatusOr<HeldSnapshot> HoldSnapshotAt(const std::string& path);

// Reads the MANIFEST alone: step, job, lanes, tables, cursors, ledger, evaluations, hash. For people, or as JSON.
absl::StatusOr<std::string> InspectSnapshot(const std::string& path, bool json);

// Checks every checksum, every block, and the hashes of all rows, of the dense state and of the model; a line for
// people. DataLoss names the file. Of a run it is the newest committed snapshot that must be whole: where it is not,
// the error names it and the newest one that is.
absl::StatusOr<std::string> VerifySnapshotAt(const std::string& path);

}  // namespace hearth
