// The dense model's half of an adoption: arrays by the plan.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/artifact/safetensors.h"
#include "model/adopt/plan.h"

namespace hearth {

// Copies of an expert differ from it by about this share of each weight of its matrices: alike they would stay alike.
constexpr double kCopyNoise = 1e-3;

// Fills `places`, the arrays of a model that has just been born with the plan's new job, as a snapshot names them
// (docs/FORMATS.md, "dense.safetensors"), from those of the old one: weights, their running mean where both have it,
// the optimizer's moments where the plan keeps its state, running statistics. What is born keeps its value, with
// moments of zero; where a place for the count of updates is, it goes on unless the state begins anew. `seed`: of the
// copies' noise, a function of it and of a parameter's name. DataLoss: the old arrays are not those that the plan is
// about.
absl::Status TakeOverParameters(const AdoptionPlan& plan, absl::Span<const NamedTensor> old, uint64_t seed,
                                absl::Span<const NamedTensor> places, double noise = kCopyNoise);

}  // namespace hearth
