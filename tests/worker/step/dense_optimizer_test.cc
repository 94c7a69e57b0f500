// Against scalar references in double. Against torch.optim: trainer_test.cc, which has Torch.
#include "worker/step/dense_optimizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "common/base/env.h"

namespace hearth {
namespace {

std::vector<float> RandomFloats(Random* random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random->Uniform() * 2 - 1);
  return values;
}

TEST(DenseUpdater, FollowsAdamsFormula) {
  DenseOptimizer config;
  config.set_kind(DenseOptimizer::ADAM);
  config.set_learning_rate(0.01);
  Random random(3);
  std::vector<float> weights = RandomFloats(&random, 33);
  std::vector<double> w(weights.begin(), weights.end()), m(33), v(33);
  DenseUpdater updater(config, 33);
  for (int t = 1; t <= 50; ++t) {
    const std::vector<float> gradient = RandomFloats(&random, 33);
    updater.Update(weights.data(), gradient.data());
    for (size_t i = 0; i < w.size(); ++i) {
      m[i] = 0.9 * m[i] + 0.1 * gradient[i];
      v[i] = 0.999 * v[i] + 0.001 * gradient[i] * gradient[i];
      w[i] -= 0.01 * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
      ASSERT_NEAR(weights[i], w[i], 2e-6) << "t " << t;
    }
  }
  EXPECT_EQ(updater.updates(), 50);
}

TEST(DenseUpdater, ContinuesFromItsSavedState) {
  DenseOptimizer config;
  Random random(4);
  const std::vector<float> start = RandomFloats(&random, 17);
  const std::vector<float> first = RandomFloats(&random, 17), second = RandomFloats(&random, 17);
  std::vector<float> whole = start, halves = start;
  DenseUpdater one(config, 17), before(config, 17), after(config, 17);
  one.Update(whole.data(), first.data());
  one.Update(whole.data(), second.data());
  before.Update(halves.data(), first.data());
  after.first_moment() = before.first_moment();
  after.second_moment() = before.second_moment();
  after.set_updates(before.updates());
  after.Update(halves.data(), second.data());
  EXPECT_EQ(whole, halves);
}

TEST(DenseUpdater, SgdKeepsNoState) {
  DenseOptimizer config;
  config.set_kind(DenseOptimizer::SGD);
  config.set_learning_rate(0.5);
  DenseUpdater updater(config, 2);
  std::vector<float> weights = {1, 2};
  updater.Update(weights.data(), std::vector<float>{2, -4}.data());
  EXPECT_EQ(weights, (std::vector<float>{0, 4}));
  EXPECT_TRUE(updater.first_moment().empty());
}

TEST(ClipNorm, ShortensALongGradientAndLeavesAShortOne) {
  std::vector<float> gradient = {3, 4};
  EXPECT_DOUBLE_EQ(ClipNorm(absl::MakeSpan(gradient), 0), 5);
  EXPECT_EQ(gradient, (std::vector<float>{3, 4}));
  EXPECT_DOUBLE_EQ(ClipNorm(absl::MakeSpan(gradient), 10), 5);
  EXPECT_EQ(gradient, (std::vector<float>{3, 4}));
  EXPECT_DOUBLE_EQ(ClipNorm(absl::MakeSpan(gradient), 1), 5);
  EXPECT_NEAR(gradient[0], 0.6, 1e-7);
  EXPECT_NEAR(gradient[1], 0.8, 1e-7);
}

}  // namespace
}  // namespace hearth
