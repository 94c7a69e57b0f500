#include "worker/dense_optimizer.h"

#include <cmath>
#include <cstring>

namespace hearth {

DenseUpdater::DenseUpdater(const DenseOptimizer& config, int64_t size) : config_(config) {
  if (config.kind() == DenseOptimizer::ADAM) {
    m_.assign(static_cast<size_t>(size), 0.0f);
    v_.assign(static_cast<size_t>(size), 0.0f);
  }
  size_ = size;
}

void DenseUpdater::Update(float* weights, const float* gradient) {
  ++t_;
  switch (config_.kind()) {
    case DenseOptimizer::SGD: {
      const float rate = static_cast<float>(config_.learning_rate());
      for (int64_t i = 0; i < size_; ++i) weights[i] -= rate * gradient[i];
      return;
    }
    case DenseOptimizer::ADAM: {
      // The scalars are computed in double, as torch.optim.Adam does; each element in float, in one order of
      // operations.
      const double t = static_cast<double>(t_);
      const float beta1 = static_cast<float>(config_.beta1());
      const float beta2 = static_cast<float>(config_.beta2());
      const float keep1 = static_cast<float>(1.0 - config_.beta1());
      const float keep2 = static_cast<float>(1.0 - config_.beta2());
      const float step_size = static_cast<float>(config_.learning_rate() / (1.0 - std::pow(config_.beta1(), t)));
      const float root2 = static_cast<float>(std::sqrt(1.0 - std::pow(config_.beta2(), t)));
      const float epsilon = static_cast<float>(config_.epsilon());
      float* m = m_.data();
      float* v = v_.data();
      for (int64_t i = 0; i < size_; ++i) {
        const float g = gradient[i];
        m[i] = beta1 * m[i] + keep1 * g;
        v[i] = beta2 * v[i] + keep2 * (g * g);
        weights[i] -= step_size * (m[i] / (std::sqrt(v[i]) / root2 + epsilon));
      }
      return;
    }
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
