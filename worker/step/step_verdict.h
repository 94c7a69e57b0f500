// What a step's reduction decided.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hearth {

// What a lane says in the reduction of a step, in bytes, beside its gradients and BatchNorm's moments (StepTail).
constexpr size_t kVoteBytes = 56;

// What all lanes together said in the reduction of a step: the same on every worker.
struct StepVerdict {
  uint64_t records = 0;     // n
  bool skip = false;        // a loss or gradient was not finite, of some lane or of all together
  bool all_at_end = false;  // every lane is at the end of its segment
  bool last = false;        // nothing follows that segment in this epoch
  bool stop = false;        // someone asked for a cut that ends the run
  bool cut = false;         // someone asked for a cut
  uint32_t time_s = 0;      // the log's time of the step, seconds since 1970; 0: it has none
};

}  // namespace hearth
