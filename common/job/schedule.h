// Learning rates as functions of the step (docs/MODEL.md §8). There is no state: a resume at any step has the rates of
// a run that was never stopped.
#pragma once

#include <cstdint>

#include "common/proto/job.pb.h"

namespace hearth {

// What the learning rate of step `step` is multiplied by: exactly 1 without warm-up and decay. In double, by libm's cos
// and pow, so the bits are those of one kind of CPU. REQUIRES: step >= 1; FaultsOf finds nothing in the schedule.
double RateFactor(const Schedule& schedule, uint64_t step);

// The learning rate of that step times its factor; a group's factor is not in it.
double RateOf(const DenseOptimizer& optimizer, uint64_t step);
double RateOf(const Optimizer& optimizer, uint64_t step);

}  // namespace hearth
