// The dense half of a step in the host's memory: one lane after the other, and sums by Collective.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "model/batch/batch.h"
#include "worker/collective/collective.h"
#include "worker/dense/dense_reducer.h"
#include "worker/dense/dense_replica.h"
#include "worker/dense/dense_step.h"

namespace hearth {

// replica, collective and env outlive the step. REQUIRES: the replica's model is in the host's memory.
std::unique_ptr<DenseStep> MakeHostStep(Env* env, DenseReplica* replica, Collective* collective, uint32_t lanes,
                                        double clip_norm);

// Its parts, for a reference that sums by itself. As above they REQUIRE a model in the host's memory.
// Forward and backward of a batch with records. Reads group.rows, fills group.gradients and *result.
absl::Status TrainLane(DenseModel* model, Batch* batch, LaneResult* result);
// Moves parameters and running statistics in step `step`. gradient [parameters]: divided by the step's records, and
// clipped.
absl::Status UpdateModel(DenseModel* model, uint64_t step, absl::Span<const float> gradient,
                         const BatchMoments& pooled);

}  // namespace hearth
