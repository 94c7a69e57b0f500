// Chains of export bundles: a full export OUT/<step>, and the deltas on it, OUT/delta/<step>/<seq> with seq 1, 2, …
// (docs/FORMATS.md, "Delta"). Each delta names the sum of the manifest before it, so a chain has one order and one
// content. Reads manifests alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace hearth {

constexpr uint32_t kDeltasMax = 128;  // on one bundle: a merge opens three files of each at once

// A place in a chain.
struct BundleLink {
  std::string folder;
  bool is_delta = false;
  uint64_t base = 0;  // step of the full export
  uint64_t seq = 0;   // 0: the full export
  uint64_t from_step = 0;
  uint64_t step = 0;
  std::string previous_sha256;  // of the manifest before it; a delta's
  std::string sha256;           // of its manifest, by which the next delta knows it
};

// The place of a full export, of a delta, or of what `hearth export --apply` made (there: of the last delta applied).
// DataLoss where the manifest does not have its sum or lacks a field.
absl::StatusOr<BundleLink> ReadBundleLink(const std::string& folder);

// Whether `delta` is the next one behind `before`. FailedPrecondition: a gap, another base, no delta; DataLoss: the
// manifest before it is another one.
absl::Status CheckFollows(const BundleLink& before, const BundleLink& delta);

std::string DeltasFolder(const std::string& out, uint64_t base);
// The seqs of the deltas that lie there, ascending; a gap is the caller's to find.
absl::StatusOr<std::vector<uint64_t>> ListDeltas(const std::string& out, uint64_t base);

// The full export OUT/<base> and all deltas on it. DataLoss where one is missing in the middle or does not fit.
absl::StatusOr<std::vector<BundleLink>> ReadChain(const std::string& out, uint64_t base);
// The chain of the highest base; empty where OUT holds no full export.
absl::StatusOr<std::vector<BundleLink>> ReadNewestChain(const std::string& out);

// Renames what lies beyond `step` in the newest chains to <name>.ahead, the last link first: for a run that goes on
// from an older snapshot. The names set aside.
absl::StatusOr<std::vector<std::string>> SetAsideBeyond(const std::string& out, uint64_t step);
// The same for a run that forks at `step`: what was published beyond it is of a line that the run leaves, and stays
// there as <name><suffix>. Full exports go with all their deltas, whatever these hold, the newest first.
absl::StatusOr<std::vector<std::string>> SetAsideLine(const std::string& out, uint64_t step, const std::string& suffix);

}  // namespace hearth
