// The dense half of a step on one worker: forward and backward of its lanes, one reduction over all workers, and the
// update. On the CPU: host_step.h; on a GPU: device_step.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "model/batch/batch.h"
#include "worker/dense/dense_reducer.h"

namespace hearth {

class DenseStep {
 public:
  virtual ~DenseStep() = default;
  // The batch's rows are there: what is copied to where the model computes may start. Any thread, one at a time, before
  // the batch's step and beside the steps before it.
  virtual absl::Status Stage(Batch* batch) = 0;
  // lanes and votes: this worker's, ascending. Of a lane with records: fills its groups' gradients, and its logits
  // below. Then the reduction, which gives every worker the same *sum. Called in the same step on every worker.
  virtual absl::Status Run(absl::Span<const std::unique_ptr<Batch>> lanes, absl::Span<LaneVote> votes,
                           StepSum* sum) = 0;
  // step: the sum's, which decides the learning rate. REQUIRES: sum is the last Run's, and trains.
  virtual absl::Status Update(uint64_t step, const StepSum& sum) = 0;

  // Of the last Run, [own lanes][records, tasks]; only of lanes with records.
  absl::Span<const float> logits(size_t lane) const { return results_[lane].logits; }
  // Of all Runs: in the reduction, as far as nothing else went on meanwhile.
  int64_t reduce_us() const { return reduce_us_; }

 protected:
  std::vector<LaneResult> results_;  // [own lanes]
  int64_t reduce_us_ = 0;
};

}  // namespace hearth
