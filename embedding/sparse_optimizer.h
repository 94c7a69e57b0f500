// Sparse optimizers: one row, one update. lr is the learning rate times the schedule's factor of the step.
//   SGD              w −= lr·g
//   MOMENTUM         b = μ·b + g;  w −= lr·b                                  nesterov: w −= lr·(g + μ·b)
//   ADAGRAD          a = ρ·a + g²;  w −= lr·g / (√a + ε)                      a starts at initial_accumulator
//   ROWWISE_ADAGRAD  a = ρ·a + mean_i g_i²;  w −= g · (lr / (√a + ε))         one a per row
//   ADAM             m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  w −= lr·(m/(1−β1^t)) / (√(v/(1−β2^t)) + ε),  t = the
//                    row's own count
//   ADAMW            w = w·(1 − lr·weight_decay);  then as ADAM
//   FTRL             z += lr·g − (√(n+g²) − √n)·w;  n += g²                   n starts at initial_accumulator
//                    w = (sign(z)·lr·l1 − z) / (β + √n + 2·lr·l2) where |z| > lr·l1 and the divisor is above 0, else 0
// μ is momentum, ρ accumulator_decay. Sources: torch.optim; FBGEMM for row-wise Adagrad; McMahan et al. (KDD 2013) as
// TensorFlow has it (learning_rate_power −0.5) for FTRL, with z in TensorFlow's units times lr: the same formula while
// lr stays, and where lr changes (a schedule, another job) weights do not scale with it.
//
// Before its formula an update takes g in two steps, each only where it is asked for:
//   clip_norm        g ← g · clip_norm / ‖g‖₂ where ‖g‖₂ > clip_norm
//   weight_decay     g ← g + weight_decay·w                                   not of ADAMW and FTRL
#pragma once

#include <cstdint>

#include "common/proto/job.pb.h"

namespace hearth {

// What the loops over a row are compiled for.
enum class Simd { kBaseline, kAvx2, kAvx512 };
// The best that this machine has.
Simd BestSimd();

// Applied by all servers and by the golden trainer: the same bits everywhere, whatever Simd (no fast-math, no fused
// multiply-add, and the order of operations is fixed: Σ g² runs in four sums over i mod 4, then (0 + 2) + (1 + 3); β^t
// by repeated squaring in double). Immutable after construction, so any thread may use it.
class SparseOptimizer {
 public:
  static constexpr uint32_t kDimMax = 4096;

  // REQUIRES: 1 <= dim <= kDimMax; `simd` is not beyond BestSimd().
  SparseOptimizer(const Optimizer& config, uint32_t dim, Simd simd = BestSimd());
  uint32_t state_floats() const { return state_floats_; }
  void InitState(float* state) const;
  // lr of a step, the same for all rows. REQUIRES: step >= 1.
  float RateAt(uint64_t step) const;
  // Whether t below means anything.
  bool uses_updates() const { return rule_.kind == Optimizer::ADAM || rule_.kind == Optimizer::ADAMW; }
  // Updates weights [dim] and state in place with gradient [dim]; t = the row's updates including this one (>= 1).
  // Returns false, and leaves the row as it was, when a result, or with clip_norm Σ g², would not be finite.
  bool Update(float* weights, float* state, const float* gradient, uint32_t t, float rate) const {
    return update_(rule_, weights, state, gradient, t, rate);
  }

  // The configuration as the loops take it.
  struct Rule {
    Rule(const Optimizer& config, uint32_t dim);

    Optimizer::Kind kind;
    uint32_t dim;
    float clip_norm;
    float l2_in_gradient = 0;     // weight_decay of the kinds that add it to the gradient,
    double decay_of_weights = 0;  // and of ADAMW, which takes it from the weights
    float epsilon, accumulator_decay, momentum;
    bool nesterov;
    double beta1, beta2;
    uint32_t settled1, settled2;  // the t from which on β^t no longer counts
    float l1, l2, beta;
  };

 private:
  Optimizer config_;
  Rule rule_;
  uint32_t state_floats_;
  bool (*update_)(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t, float rate);
};

}  // namespace hearth
