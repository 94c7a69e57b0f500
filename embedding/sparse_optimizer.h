// Sparse optimizers: one row, one update. Formulas as in PyTorch (torch.optim), FBGEMM for row-wise Adagrad:
//   SGD              w −= lr·g
//   ADAGRAD          a += g²;  w −= lr·g / (√a + ε)                          a starts at initial_accumulator
//   ROWWISE_ADAGRAD  a += mean_i g_i²;  w −= lr·g / (√a + ε)                 one a per row
//   ADAM             m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  w −= lr·(m/(1−β1^t)) / (√(v/(1−β2^t)) + ε),  t = the row's own count
#pragma once

#include <cstdint>

#include "common/proto/job.pb.h"

namespace hearth {

// Applied by all servers and by the golden trainer: the same bits everywhere (no fast-math, the order of operations is fixed).
class SparseOptimizer {
 public:
  SparseOptimizer(const Optimizer& config, uint32_t dim);
  uint32_t state_floats() const { return state_floats_; }
  void InitState(float* state) const;
  // Updates weights [dim] and state in place with gradient [dim]; t = the row's updates including this one (>= 1).
  // Returns false, and leaves the row as it was, when a result would not be finite.
  bool Update(float* weights, float* state, const float* gradient, uint32_t t) const;

 private:
  Optimizer config_;
  uint32_t dim_;
  uint32_t state_floats_;
};

}  // namespace hearth
