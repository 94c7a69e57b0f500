#include "embedding/sparse_optimizer.h"

#include <cmath>
#include <cstring>

#include "common/base/status.h"
#include "common/job/schedule.h"
#include "embedding/embedding_table.h"

namespace hearth {
namespace {

constexpr uint32_t kDimMax = SparseOptimizer::kDimMax;

// Exponent bits all set: infinite or not a number. In integers, so that the loop vectorizes.
bool AllFinite(const float* x, uint32_t count) {
  uint32_t bad = 0;
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= (bits & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  }
  return bad == 0;
}

float SumOfSquares(const float* x, uint32_t count) {
  float sums[4] = {0, 0, 0, 0};
  uint32_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (uint32_t j = 0; j < 4; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (uint32_t j = 0; i < count; ++i, ++j) sums[j] += x[i] * x[i];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// libm's pow may differ between versions and CPU kinds; products do not.
double Power(double base, uint32_t exponent) {
  double result = 1;
  for (double square = base; exponent != 0; exponent >>= 1, square *= square) {
    if (exponent & 1) result *= square;
  }
  return result;
}

}  // namespace

uint32_t StateFloatsOf(const Optimizer& optimizer, uint32_t dim) {
  switch (optimizer.kind()) {
    case Optimizer::SGD:
      return 0;
    case Optimizer::ADAGRAD:
      return dim;
    case Optimizer::ROWWISE_ADAGRAD:
      return 1;
    case Optimizer::ADAM:
      return 2 * dim;
  }
  HEARTH_CHECK(false, "optimizer kind ", static_cast<int>(optimizer.kind()));
  return 0;
}

SparseOptimizer::SparseOptimizer(const Optimizer& config, uint32_t dim)
    : config_(config),
      kind_(config.kind()),
      dim_(dim),
      state_floats_(StateFloatsOf(config, dim)),
      initial_accumulator_(static_cast<float>(config.initial_accumulator())),
      epsilon_(static_cast<float>(config.epsilon())),
      beta1_(config.beta1()),
      beta2_(config.beta2()) {
  HEARTH_CHECK(dim >= 1 && dim <= kDimMax, "dim ", dim);
}

void SparseOptimizer::InitState(float* state) const {
  const float value = kind_ == Optimizer::ADAM ? 0.0f : initial_accumulator_;
  for (uint32_t i = 0; i < state_floats_; ++i) state[i] = value;
}

float SparseOptimizer::RateAt(uint64_t step) const { return static_cast<float>(RateOf(config_, step)); }

bool SparseOptimizer::Update(float* weights, float* state, const float* gradient, uint32_t t, float rate) const {
  switch (kind_) {
    case Optimizer::SGD:
      return UpdateSgd(weights, gradient, rate);
    case Optimizer::ADAGRAD:
      return UpdateAdagrad(weights, state, gradient, rate);
    case Optimizer::ROWWISE_ADAGRAD:
      return UpdateRowwiseAdagrad(weights, state, gradient, rate);
    case Optimizer::ADAM:
      return UpdateAdam(weights, state, gradient, t, rate);
  }
  return false;
}

// Each update computes aside, looks, and only then writes: a refused row keeps every bit.

bool SparseOptimizer::UpdateSgd(float* weights, const float* gradient, float rate) const {
  float w[kDimMax];
  for (uint32_t i = 0; i < dim_; ++i) w[i] = weights[i] - rate * gradient[i];
  if (!AllFinite(w, dim_)) return false;
  std::memcpy(weights, w, dim_ * sizeof(float));
  return true;
}

bool SparseOptimizer::UpdateAdagrad(float* weights, float* sums, const float* gradient, float rate) const {
  float w[kDimMax], a[kDimMax];
  for (uint32_t i = 0; i < dim_; ++i) a[i] = sums[i] + gradient[i] * gradient[i];
  for (uint32_t i = 0; i < dim_; ++i) {
    w[i] = weights[i] - (rate * gradient[i]) / (std::sqrt(a[i]) + epsilon_);
  }
  if (!AllFinite(w, dim_) || !AllFinite(a, dim_)) return false;
  std::memcpy(weights, w, dim_ * sizeof(float));
  std::memcpy(sums, a, dim_ * sizeof(float));
  return true;
}

bool SparseOptimizer::UpdateRowwiseAdagrad(float* weights, float* sum, const float* gradient, float rate) const {
  float w[kDimMax];
  const float a = *sum + SumOfSquares(gradient, dim_) / static_cast<float>(dim_);
  const float scale = rate / (std::sqrt(a) + epsilon_);
  for (uint32_t i = 0; i < dim_; ++i) w[i] = weights[i] - scale * gradient[i];
  if (!AllFinite(w, dim_) || !AllFinite(&a, 1)) return false;
  std::memcpy(weights, w, dim_ * sizeof(float));
  *sum = a;
  return true;
}

bool SparseOptimizer::UpdateAdam(float* weights, float* state, const float* gradient, uint32_t t, float rate) const {
  float w[kDimMax], m[kDimMax], v[kDimMax];
  const float beta1 = static_cast<float>(beta1_), beta2 = static_cast<float>(beta2_);
  const float rest1 = static_cast<float>(1 - beta1_), rest2 = static_cast<float>(1 - beta2_);
  const float correction1 = static_cast<float>(1 - Power(beta1_, t));
  const float correction2 = static_cast<float>(1 - Power(beta2_, t));
  for (uint32_t i = 0; i < dim_; ++i) m[i] = beta1 * state[i] + rest1 * gradient[i];
  for (uint32_t i = 0; i < dim_; ++i) v[i] = beta2 * state[dim_ + i] + rest2 * gradient[i] * gradient[i];
  for (uint32_t i = 0; i < dim_; ++i) {
    w[i] = weights[i] - rate * (m[i] / correction1) / (std::sqrt(v[i] / correction2) + epsilon_);
  }
  if (!AllFinite(w, dim_) || !AllFinite(m, dim_) || !AllFinite(v, dim_)) return false;
  std::memcpy(weights, w, dim_ * sizeof(float));
  std::memcpy(state, m, dim_ * sizeof(float));
  std::memcpy(state + dim_, v, dim_ * sizeof(float));
  return true;
}

}  // namespace hearth
