// Sparse optimizers: one row, one update. Formulas as in PyTorch (torch.optim), FBGEMM for row-wise Adagrad:
//   SGD              w −= lr·g
//   ADAGRAD          a += g²;  w −= lr·g / (√a + ε)                          a starts at initial_accumulator
//   ROWWISE_ADAGRAD  a += mean_i g_i²;  w −= g · (lr / (√a + ε))               one a per row
//   ADAM             m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  w −= lr·(m/(1−β1^t)) / (√(v/(1−β2^t)) + ε),  t = the
//   row's own count
// lr is the learning rate times the schedule's factor of the step.
#pragma once

#include <cstdint>

#include "common/proto/job.pb.h"

namespace hearth {

// Applied by all servers and by the golden trainer: the same bits everywhere (no fast-math, the order of operations is
// fixed: Σ g² runs in four sums over i mod 4, then (0 + 2) + (1 + 3); β^t by repeated squaring in double).
// Immutable after construction, so any thread may use it.
class SparseOptimizer {
 public:
  static constexpr uint32_t kDimMax = 4096;

  // REQUIRES: 1 <= dim <= kDimMax.
  SparseOptimizer(const Optimizer& config, uint32_t dim);
  uint32_t state_floats() const { return state_floats_; }
  void InitState(float* state) const;
  // lr of a step, the same for all rows. REQUIRES: step >= 1.
  float RateAt(uint64_t step) const;
  // Updates weights [dim] and state in place with gradient [dim]; t = the row's updates including this one (>= 1).
  // Returns false, and leaves the row as it was, when a result would not be finite.
  bool Update(float* weights, float* state, const float* gradient, uint32_t t, float rate) const;

 private:
  bool UpdateSgd(float* weights, const float* gradient, float rate) const;
  bool UpdateAdagrad(float* weights, float* sums, const float* gradient, float rate) const;
  bool UpdateRowwiseAdagrad(float* weights, float* sum, const float* gradient, float rate) const;
  bool UpdateAdam(float* weights, float* state, const float* gradient, uint32_t t, float rate) const;

  Optimizer config_;
  Optimizer::Kind kind_;
  uint32_t dim_;
  uint32_t state_floats_;
  float initial_accumulator_;
  float epsilon_;
  double beta1_;
  double beta2_;
};

}  // namespace hearth
