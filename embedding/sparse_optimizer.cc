#include "embedding/sparse_optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/status.h"
#include "common/job/schedule.h"
#include "embedding/embedding_table.h"

// Bodies, inlined into one function for each instruction set, so that each has its own vectorised loops.
#define HEARTH_BODY inline __attribute__((always_inline))

namespace hearth {
namespace {

constexpr uint32_t kDimMax = SparseOptimizer::kDimMax;
using Rule = SparseOptimizer::Rule;
using Lanes = float __attribute__((vector_size(16)));  // of a sum within a row: fixed, whatever the vector width

// Exponent bits all set: infinite or not a number. In integers, so that the loop vectorizes.
HEARTH_BODY uint32_t NotFinite(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
}

HEARTH_BODY float SumOfSquares(const float* x, uint32_t count) {
  Lanes sums = {0, 0, 0, 0};
  uint32_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Lanes next;
    std::memcpy(&next, x + i, sizeof(next));
    sums += next * next;
  }
  for (uint32_t j = 0; j < count % 4; ++j) sums[j] += x[i + j] * x[i + j];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// libm's pow may differ between versions and CPU kinds; products do not.
HEARTH_BODY double Power(double base, uint32_t exponent) {
  double result = 1;
  for (double square = base; exponent != 0; exponent >>= 1, square *= square) {
    if (exponent & 1) result *= square;
  }
  return result;
}

// From this t on 1 − β^t is 1 as a float: a row that has come far asks for no powers.
uint32_t SettledAt(double beta) {
  uint32_t t = 1;
  while (t < uint32_t{1} << 31 && Power(beta, t) > 0x1p-26) t *= 2;
  return t;
}

// --- One element: its gradient, and x = {weight, its state …} --------------------------------------------------------

struct Descent {
  float rate;
  HEARTH_BODY void operator()(float g, float* x) const { x[0] = x[0] - rate * g; }
};

template <bool kNesterov>
struct Momentum {
  float rate, momentum;
  HEARTH_BODY void operator()(float g, float* x) const {
    x[1] = momentum * x[1] + g;
    x[0] = x[0] - rate * (kNesterov ? g + momentum * x[1] : x[1]);
  }
};

struct Adagrad {
  float rate, decay, epsilon;
  HEARTH_BODY void operator()(float g, float* x) const {
    x[1] = decay * x[1] + g * g;
    x[0] = x[0] - (rate * g) / (std::sqrt(x[1]) + epsilon);
  }
};

struct Adam {
  HEARTH_BODY Adam(const Rule& rule, uint32_t t, float rate)
      : rate(rate),
        kept(static_cast<float>(1 - rate * rule.decay_of_weights)),
        epsilon(rule.epsilon),
        beta1(static_cast<float>(rule.beta1)),
        beta2(static_cast<float>(rule.beta2)),
        rest1(static_cast<float>(1 - rule.beta1)),
        rest2(static_cast<float>(1 - rule.beta2)),
        correction1(t >= rule.settled1 ? 1.0f : static_cast<float>(1 - Power(rule.beta1, t))),
        correction2(t >= rule.settled2 ? 1.0f : static_cast<float>(1 - Power(rule.beta2, t))) {}
  HEARTH_BODY void operator()(float g, float* x) const {
    x[1] = beta1 * x[1] + rest1 * g;
    x[2] = beta2 * x[2] + rest2 * g * g;
    x[0] = kept * x[0] - rate * (x[1] / correction1) / (std::sqrt(x[2] / correction2) + epsilon);
  }
  float rate, kept, epsilon, beta1, beta2, rest1, rest2, correction1, correction2;
};

struct Ftrl {
  float rate, l1, l2_twice, beta;  // l1, l2_twice: times the rate
  HEARTH_BODY void operator()(float g, float* x) const {
    const float n = x[1] + g * g, root = std::sqrt(n);
    const float z = x[2] + (rate * g - (root - std::sqrt(x[1])) * x[0]);
    const float beyond = std::abs(z) > l1 ? std::copysign(l1, z) - z : 0.0f;
    const float divisor = beta + root + l2_twice;
    x[0] = divisor > 0 ? beyond / divisor : 0.0f;
    x[1] = n;
    x[2] = z;
  }
};

// --- One row ---------------------------------------------------------------------------------------------------------

// Computes aside, looks, and only then writes: a refused row keeps every bit. `bad`: it is refused anyway.
template <uint32_t kStates, uint32_t kMax, typename Element>
HEARTH_BODY bool ForEachElement(uint32_t dim, float* weights, float* state, const float* gradient,
                                const Element& element, float (*aside)[kMax], uint32_t bad = 0) {
  for (uint32_t i = 0; i < dim; ++i) {
    float x[1 + kStates] = {weights[i]};
    for (uint32_t s = 0; s < kStates; ++s) x[1 + s] = state[s * dim + i];
    element(gradient[i], x);
    for (uint32_t s = 0; s <= kStates; ++s) {
      aside[s][i] = x[s];
      bad |= NotFinite(x[s]);
    }
  }
  if (bad != 0) return false;
  std::memcpy(weights, aside[0], dim * sizeof(float));
  for (uint32_t s = 0; s < kStates; ++s) std::memcpy(state + s * dim, aside[1 + s], dim * sizeof(float));
  return true;
}

// The gradient as the formulas take it. False where Σ g² is not finite.
HEARTH_BODY bool Prepare(const Rule& rule, uint32_t dim, const float* weights, const float* gradient, float* prepared) {
  float scale = 1;
  if (rule.clip_norm > 0) {
    const float squares = SumOfSquares(gradient, dim);
    if (NotFinite(squares)) return false;
    const float norm = std::sqrt(squares);
    if (norm > rule.clip_norm) scale = rule.clip_norm / norm;
  }
  for (uint32_t i = 0; i < dim; ++i) prepared[i] = scale * gradient[i];
  if (rule.l2_in_gradient > 0) {
    for (uint32_t i = 0; i < dim; ++i) prepared[i] = prepared[i] + rule.l2_in_gradient * weights[i];
  }
  return true;
}

// kDim: the row's, or kDimMax for any.
template <uint32_t kDim>
HEARTH_BODY bool UpdateDim(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t,
                           float rate) {
  const uint32_t dim = kDim == kDimMax ? rule.dim : kDim;
  float prepared[kDim], aside[3][kDim];
  if (rule.clip_norm > 0 || rule.l2_in_gradient > 0) {
    if (!Prepare(rule, dim, weights, gradient, prepared)) return false;
    gradient = prepared;
  }
  switch (rule.kind) {
    case Optimizer::SGD:
      return ForEachElement<0>(dim, weights, state, gradient, Descent{rate}, aside);
    case Optimizer::MOMENTUM:
      if (rule.nesterov) {
        return ForEachElement<1>(dim, weights, state, gradient, Momentum<true>{rate, rule.momentum}, aside);
      }
      return ForEachElement<1>(dim, weights, state, gradient, Momentum<false>{rate, rule.momentum}, aside);
    case Optimizer::ADAGRAD: {
      const Adagrad adagrad{rate, rule.accumulator_decay, rule.epsilon};
      return ForEachElement<1>(dim, weights, state, gradient, adagrad, aside);
    }
    case Optimizer::ROWWISE_ADAGRAD: {
      const float a = rule.accumulator_decay * *state + SumOfSquares(gradient, dim) / static_cast<float>(dim);
      const Descent descent{rate / (std::sqrt(a) + rule.epsilon)};
      if (!ForEachElement<0>(dim, weights, state, gradient, descent, aside, NotFinite(a))) return false;
      *state = a;
      return true;
    }
    case Optimizer::ADAM:
    case Optimizer::ADAMW:
      return ForEachElement<2>(dim, weights, state, gradient, Adam(rule, t, rate), aside);
    case Optimizer::FTRL: {
      const Ftrl ftrl{rate, rate * rule.l1, 2 * rate * rule.l2, rule.beta};
      return ForEachElement<2>(dim, weights, state, gradient, ftrl, aside);
    }
  }
  return false;
}

// The usual dims have loops of fixed length, without ends and calls of memcpy.
HEARTH_BODY bool UpdateRow(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t,
                           float rate) {
  switch (rule.dim) {
    case 4:
      return UpdateDim<4>(rule, weights, state, gradient, t, rate);
    case 8:
      return UpdateDim<8>(rule, weights, state, gradient, t, rate);
    case 12:
      return UpdateDim<12>(rule, weights, state, gradient, t, rate);
    case 16:
      return UpdateDim<16>(rule, weights, state, gradient, t, rate);
    case 24:
      return UpdateDim<24>(rule, weights, state, gradient, t, rate);
    case 32:
      return UpdateDim<32>(rule, weights, state, gradient, t, rate);
    case 48:
      return UpdateDim<48>(rule, weights, state, gradient, t, rate);
    case 64:
      return UpdateDim<64>(rule, weights, state, gradient, t, rate);
    default:
      return UpdateDim<kDimMax>(rule, weights, state, gradient, t, rate);
  }
}

// --- Instruction sets: not by target_clones, as a test calls each of them, under sanitizers too ----------------------

#if defined(__x86_64__)
#define HEARTH_TARGET(features) __attribute__((target(features)))
bool Has(Simd simd) {
  return simd == Simd::kBaseline || (simd == Simd::kAvx2 && __builtin_cpu_supports("avx2")) ||
         (simd == Simd::kAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"));
}
#else
#define HEARTH_TARGET(features)
bool Has(Simd simd) { return simd == Simd::kBaseline; }
#endif

bool UpdateBaseline(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t, float rate) {
  return UpdateRow(rule, weights, state, gradient, t, rate);
}
HEARTH_TARGET("avx2")
bool UpdateAvx2(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t, float rate) {
  return UpdateRow(rule, weights, state, gradient, t, rate);
}
HEARTH_TARGET("avx512f,avx512vl")
bool UpdateAvx512(const Rule& rule, float* weights, float* state, const float* gradient, uint32_t t, float rate) {
  return UpdateRow(rule, weights, state, gradient, t, rate);
}

}  // namespace

uint32_t StateFloatsOf(const Optimizer& optimizer, uint32_t dim) {
  switch (optimizer.kind()) {
    case Optimizer::SGD:
      return 0;
    case Optimizer::ROWWISE_ADAGRAD:
      return 1;
    case Optimizer::ADAGRAD:
    case Optimizer::MOMENTUM:
      return dim;
    case Optimizer::ADAM:
    case Optimizer::ADAMW:
    case Optimizer::FTRL:
      return 2 * dim;
  }
  HEARTH_CHECK(false, "optimizer kind ", static_cast<int>(optimizer.kind()));
  return 0;
}

Simd BestSimd() {
  static const Simd best = Has(Simd::kAvx512) ? Simd::kAvx512 : Has(Simd::kAvx2) ? Simd::kAvx2 : Simd::kBaseline;
  return best;
}

SparseOptimizer::Rule::Rule(const Optimizer& config, uint32_t dim)
    : kind(config.kind()),
      dim(dim),
      clip_norm(static_cast<float>(config.clip_norm())),
      epsilon(static_cast<float>(config.epsilon())),
      accumulator_decay(static_cast<float>(config.accumulator_decay())),
      momentum(static_cast<float>(config.momentum())),
      nesterov(config.nesterov()),
      beta1(config.beta1()),
      beta2(config.beta2()),
      settled1(SettledAt(beta1)),
      settled2(SettledAt(beta2)),
      l1(static_cast<float>(config.l1())),
      l2(static_cast<float>(config.l2())),
      beta(static_cast<float>(config.beta())) {
  if (kind == Optimizer::ADAMW) {
    decay_of_weights = config.weight_decay();
  } else if (kind != Optimizer::FTRL) {
    l2_in_gradient = static_cast<float>(config.weight_decay());
  }
}

SparseOptimizer::SparseOptimizer(const Optimizer& config, uint32_t dim, Simd simd)
    : config_(config), rule_(config, dim), state_floats_(StateFloatsOf(config, dim)) {
  HEARTH_CHECK(dim >= 1 && dim <= kDimMax, "dim ", dim);
  HEARTH_CHECK(Has(simd), "this machine lacks instruction set ", static_cast<int>(simd));
  update_ = simd == Simd::kAvx512 ? UpdateAvx512 : simd == Simd::kAvx2 ? UpdateAvx2 : UpdateBaseline;
}

void SparseOptimizer::InitState(float* state) const {
  std::fill_n(state, state_floats_, 0.0f);
  const uint32_t accumulators = rule_.kind == Optimizer::ADAGRAD || rule_.kind == Optimizer::FTRL ? rule_.dim
                                : rule_.kind == Optimizer::ROWWISE_ADAGRAD                        ? 1
                                                                                                  : 0;
  std::fill_n(state, accumulators, static_cast<float>(config_.initial_accumulator()));
}

float SparseOptimizer::RateAt(uint64_t step) const { return static_cast<float>(RateOf(config_, step)); }

}  // namespace hearth
