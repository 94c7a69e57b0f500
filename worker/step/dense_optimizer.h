// The dense optimizer over one flat array of all parameters; formulas as torch.optim.Adam, AdamW and SGD.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/proto/job.pb.h"

namespace hearth {

class DenseUpdater {
 public:
  // What some of the array's elements have of their own. Parts follow one another.
  struct Part {
    int64_t end = 0;  // one behind its last element
    double rate_factor = 1;
    double weight_decay = 0;
  };
  // parts: empty, or up to `size`. Only ADAMW looks at their decay.
  DenseUpdater(const DenseOptimizer& config, int64_t size, std::vector<Part> parts = {});
  // weights [size] −= update(gradient [size]) in step `step`; gradient already divided by n and clipped. Counts t
  // itself: a step that is skipped has a learning rate and no t.
  void Update(uint64_t step, float* weights, const float* gradient);
  // What the formula of the next update multiplies by, computed in double as torch.optim does; counts it. For who
  // updates in other memory, and for a part with its own two:
  //   ADAM  m ← beta1·m + keep1·g,  v ← beta2·v + keep2·g²,  w ← w − rate · m / (√v / root2 + epsilon)
  //   ADAMW w ← w · keep_weight, then as ADAM
  //   SGD   w ← w − rate · g
  struct Factors {
    float rate, beta1, beta2, keep1, keep2, root2, epsilon;
    double plain_rate;  // the learning rate of the step, before ADAM's correction
    double correction;  // ADAM's: rate = plain_rate · rate_factor / correction
    float RateOf(const Part& part) const { return static_cast<float>(plain_rate * part.rate_factor / correction); }
    float KeepWeightOf(const Part& part) const {
      return static_cast<float>(1.0 - plain_rate * part.rate_factor * part.weight_decay);
    }
  };
  Factors Next(uint64_t step);
  // State for snapshots: m and v [size] each for Adam and AdamW (empty for SGD), and t.
  std::vector<float>& first_moment() { return m_; }
  std::vector<float>& second_moment() { return v_; }
  bool adam() const { return config_.kind() != DenseOptimizer::SGD; }
  bool decays() const { return config_.kind() == DenseOptimizer::ADAMW; }
  const std::vector<Part>& parts() const { return parts_; }
  int64_t updates() const { return t_; }
  void set_updates(int64_t t) { t_ = t; }

 private:
  void UpdateRange(const Factors& factors, int64_t begin, const Part& part, float* weights, const float* gradient);

  DenseOptimizer config_;
  std::vector<Part> parts_;  // at least one
  std::vector<float> m_, v_;
  int64_t t_ = 0;
};

// True when no value is infinite or NaN.
bool AllFinite(absl::Span<const float> values);

// Scales gradient so that its Euclidean norm (summed in double, in order) is at most clip_norm; 0: leaves it. Returns
// the norm.
double ClipNorm(absl::Span<float> gradient, double clip_norm);

}  // namespace hearth
