// The dense optimizer over one flat array of all parameters; formulas as torch.optim.Adam and torch.optim.SGD.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/proto/job.pb.h"

namespace hearth {

class DenseUpdater {
 public:
  DenseUpdater(const DenseOptimizer& config, int64_t size);
  // weights [size] −= update(gradient [size]); gradient already divided by n and clipped. Counts t itself.
  void Update(float* weights, const float* gradient);
  // What the formula of the next update multiplies by, computed in double as torch.optim does; counts it. For who
  // updates in other memory:
  //   ADAM  m ← beta1·m + keep1·g,  v ← beta2·v + keep2·g²,  w ← w − rate · m / (√v / root2 + epsilon)
  //   SGD   w ← w − rate · g
  struct Factors {
    float rate, beta1, beta2, keep1, keep2, root2, epsilon;
  };
  Factors Next();
  // State for snapshots: m and v [size] each for Adam (empty for SGD), and t.
  std::vector<float>& first_moment() { return m_; }
  std::vector<float>& second_moment() { return v_; }
  bool adam() const { return config_.kind() == DenseOptimizer::ADAM; }
  int64_t updates() const { return t_; }
  void set_updates(int64_t t) { t_ = t; }

 private:
  DenseOptimizer config_;
  int64_t size_ = 0;
  std::vector<float> m_, v_;
  int64_t t_ = 0;
};

// True when no value is infinite or NaN.
bool AllFinite(absl::Span<const float> values);

// Scales gradient so that its Euclidean norm (summed in double, in order) is at most clip_norm; 0: leaves it. Returns
// the norm.
double ClipNorm(absl::Span<float> gradient, double clip_norm);

}  // namespace hearth
