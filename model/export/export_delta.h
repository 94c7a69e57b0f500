// Deltas of an export (docs/FORMATS.md, "Delta"): what changed between a chain of bundles and a snapshot, and its merge
// back into a whole bundle. Free of Torch and of logs. Memory is bounded by a few buffers a delta.
//
// A delta is a function of the chain before it and of the snapshot, nothing else: made again after a kill it has the
// same bytes. Upserts are the live admitted rows that a step after the chain's touched (RowMeta::last_step); deletions
// are the keys that the chain holds and that have no live admitted row any more. So servers keep no tombstones for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace hearth {

struct DeltaOptions {
  std::string snapshot;  // a snapshot's folder, or a run's (its newest)
  std::string out;       // holds <base>/ and delta/<base>/
  uint64_t since = 0;    // the step at which OUT's newest chain ends
  std::string data_dir;  // where the job's files are now; empty: where the job says
};
// Makes OUT/delta/<base>/<seq> by one rename. A report for people. FailedPrecondition: `since` is not the chain's end,
// or the snapshot is not behind it or of another job; DataLoss: a part of the chain or the snapshot is damaged, or the
// chain is not of the snapshot's run. On an error nothing is left.
absl::StatusOr<std::string> ExportDelta(const DeltaOptions& options);

struct ApplyOptions {
  std::string base;                 // a full export, or what an earlier ApplyDeltas made
  std::vector<std::string> deltas;  // in order; empty: all that lie beside the base
  std::string out;                  // must not exist, or be an empty folder
};
// A bundle with the base's formats whose rows, weights, graph and features are, byte for byte, a full export's at the
// last delta's step. FailedPrecondition: a gap, another base, no delta; DataLoss: any changed byte.
absl::StatusOr<std::string> ApplyDeltas(const ApplyOptions& options);

}  // namespace hearth
