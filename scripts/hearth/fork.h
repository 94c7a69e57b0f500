// `hearth train --from STEP`: a run goes back to a snapshot that is kept and goes another way from there. What lies
// beyond it, snapshots and publications, is set aside under another name and never removed (docs/OPERATIONS.md,
// "Going back").
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace hearth {

// Sets aside what lies beyond `step` in the run's folder, which the caller has locked, the newest first, and tells each
// name. Writes down what it is about to do before it does (common/artifact/history.h), so that a kill at any time
// leaves either of both lines, or what FinishFork makes of it. Nothing where `step` is the newest.
absl::Status ForkAt(const std::string& dir, uint64_t step);
// Ends what a kill has cut short. Before anything looks for the newest snapshot.
absl::Status FinishFork(const std::string& dir);

}  // namespace hearth
