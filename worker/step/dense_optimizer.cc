#include "worker/step/dense_optimizer.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "common/base/status.h"
#include "common/job/schedule.h"

namespace hearth {

DenseUpdater::DenseUpdater(const DenseOptimizer& config, int64_t size, std::vector<Part> parts)
    : config_(config), parts_(std::move(parts)) {
  if (parts_.empty()) parts_.push_back({size, 1, 0});
  HEARTH_CHECK(parts_.back().end == size, "parts of ", parts_.back().end, " elements of ", size);
  if (adam()) {
    m_.assign(static_cast<size_t>(size), 0.0f);
    v_.assign(static_cast<size_t>(size), 0.0f);
  }
}

DenseUpdater::Factors DenseUpdater::Next(uint64_t step) {
  const double t = static_cast<double>(++t_);
  Factors factors;
  factors.plain_rate = RateOf(config_, step);
  factors.correction = adam() ? 1.0 - std::pow(config_.beta1(), t) : 1.0;
  factors.rate = factors.RateOf(Part());
  factors.beta1 = static_cast<float>(config_.beta1());
  factors.beta2 = static_cast<float>(config_.beta2());
  factors.keep1 = static_cast<float>(1.0 - config_.beta1());
  factors.keep2 = static_cast<float>(1.0 - config_.beta2());
  factors.root2 = static_cast<float>(std::sqrt(1.0 - std::pow(config_.beta2(), t)));
  factors.epsilon = static_cast<float>(config_.epsilon());
  return factors;
}

void DenseUpdater::Update(uint64_t step, float* weights, const float* gradient) {
  const Factors factors = Next(step);
  int64_t begin = 0;
  for (const Part& part : parts_) {
    UpdateRange(factors, begin, part, weights, gradient);
    begin = part.end;
  }
}

void DenseUpdater::UpdateRange(const Factors& f, int64_t begin, const Part& part, float* weights,
                               const float* gradient) {
  const float rate = f.RateOf(part);
  if (!adam()) {
    for (int64_t i = begin; i < part.end; ++i) weights[i] -= rate * gradient[i];
    return;
  }
  if (decays() && part.weight_decay > 0) {
    const float keep = f.KeepWeightOf(part);
    for (int64_t i = begin; i < part.end; ++i) weights[i] *= keep;
  }
  // Each element in float, in one order of operations.
  float* m = m_.data();
  float* v = v_.data();
  for (int64_t i = begin; i < part.end; ++i) {
    const float g = gradient[i];
    m[i] = f.beta1 * m[i] + f.keep1 * g;
    v[i] = f.beta2 * v[i] + f.keep2 * (g * g);
    weights[i] -= rate * (m[i] / (std::sqrt(v[i]) / f.root2 + f.epsilon));
  }
}

// No branch inside, so that it runs at memory speed: no exponent may be all ones.
bool AllFinite(absl::Span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (const float& value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    found |= (bits & kExponent) == kExponent ? 1u : 0u;
  }
  return found == 0;
}

double ClipNorm(absl::Span<float> gradient, double clip_norm) {
  double squares = 0;
  for (const float g : gradient) squares += static_cast<double>(g) * g;
  const double norm = std::sqrt(squares);
  if (clip_norm > 0 && norm > clip_norm) {
    const float scale = static_cast<float>(clip_norm / norm);
    for (float& g : gradient) g *= scale;
  }
  return norm;
}

}  // namespace hearth
