// Which steps are cuts, where segments and epochs end, and what each step's pull sees.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/step/step_verdict.h"

namespace hearth {

// What follows from step `step`'s verdict. Rides on the step's permit.
struct Decision {
  uint64_t step = 0;
  uint64_t cut = 0;           // step + staleness; 0: nothing was asked for
  bool segment_ends = false;  // at `cut`
  bool epoch_ends = false;    // with that segment
  bool stop = false;          // at `cut`
};

// The newest end of a segment that is decided.
struct SegmentEnd {
  uint64_t step = 0;      // its cut; 0: none
  bool of_epoch = false;  // nothing follows in the epoch
};

// Cuts, ends and views as docs/PROTOCOL.md §2, §3 fixes them. Pure; the trainer's side decides, the pull thread's
// side follows, and every worker's clock says the same. Steps are taken in order.
class StepClock {
 public:
  struct Options {
    uint32_t staleness = 0;    // k
    uint32_t every_steps = 0;  // multiples of it are cuts; 0: none
    uint64_t steps_max = 0;    // > 0: a cut, and the job's last step
    uint32_t epochs = 1;
    uint64_t step = 0;   // the cut that everything starts from
    uint32_t epoch = 0;  // of that cut's own step, 0-based
    SegmentEnd end;      // as that cut's lanes have it; REQUIRES: end.step <= step + staleness
  };
  explicit StepClock(const Options& options);

  // Derives what step's verdict means and takes it in.
  Decision Decide(uint64_t step, const StepVerdict& verdict);
  // Takes in what another clock decided.
  void Take(const Decision& decision);

  // max(step − 1 − k, last cut before step). REQUIRES: step − k − 1 is decided, or not after the start; step itself is
  // not.
  uint64_t View(uint64_t step) const;
  // First cut >= step that is known; 0: none.
  uint64_t NextCut(uint64_t step) const;
  bool SegmentEndsAt(uint64_t step) const { return end_.step != 0 && step == end_.step; }
  bool EpochEndsAt(uint64_t step) const { return SegmentEndsAt(step) && end_.of_epoch; }
  uint32_t EpochOf(uint64_t step) const { return epoch_ + (end_.of_epoch && step > end_.step ? 1 : 0); }
  // The run ends after this step; 0: not known yet. A job that was finished before it started ends at or before its
  // start.
  uint64_t StopAt() const;
  // All epochs are trained, or steps_max is reached, once `step` is applied.
  bool FinishedAt(uint64_t step) const;
  const SegmentEnd& end() const { return end_; }

 private:
  void AddCut(uint64_t step);

  const Options options_;
  std::vector<uint64_t> cuts_;  // asked for, ascending; of those passed only the last is kept
  uint32_t epoch_;              // of the steps up to end_.step
  SegmentEnd end_;
  uint64_t asked_stop_ = 0;
};

}  // namespace hearth
