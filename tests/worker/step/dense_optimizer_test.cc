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
    updater.Update(static_cast<uint64_t>(t), weights.data(), gradient.data());
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
  one.Update(1, whole.data(), first.data());
  one.Update(2, whole.data(), second.data());
  before.Update(1, halves.data(), first.data());
  after.first_moment() = before.first_moment();
  after.second_moment() = before.second_moment();
  after.set_updates(before.updates());
  after.Update(2, halves.data(), second.data());
  EXPECT_EQ(whole, halves);
}

TEST(DenseUpdater, TakesEachStepsRateFromTheScheduleAndCorrectsByItsOwnCount) {
  DenseOptimizer config;
  config.set_learning_rate(0.01);
  config.mutable_schedule()->set_warmup_steps(40);
  Random random(5);
  std::vector<float> weights = RandomFloats(&random, 9);
  std::vector<double> w(weights.begin(), weights.end()), m(9), v(9);
  DenseUpdater updater(config, 9);
  for (int t = 1; t <= 30; ++t) {
    const uint64_t step = 2 * static_cast<uint64_t>(t);  // every second step was skipped
    const std::vector<float> gradient = RandomFloats(&random, 9);
    updater.Update(step, weights.data(), gradient.data());
    const double rate = step < 40 ? 0.01 * static_cast<double>(step) / 40 : 0.01;
    for (size_t i = 0; i < w.size(); ++i) {
      m[i] = 0.9 * m[i] + 0.1 * gradient[i];
      v[i] = 0.999 * v[i] + 0.001 * gradient[i] * gradient[i];
      w[i] -= rate * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
      ASSERT_NEAR(weights[i], w[i], 2e-6) << "step " << step;
    }
  }
}

// Each part moves as the whole of an optimizer that has its learning rate and its decay.
TEST(DenseUpdater, GivesEachPartItsOwnRateAndDecay) {
  for (const auto kind : {DenseOptimizer::SGD, DenseOptimizer::ADAM, DenseOptimizer::ADAMW}) {
    DenseOptimizer config;
    config.set_kind(kind);
    config.set_learning_rate(0.25);
    const std::vector<DenseUpdater::Part> parts = {{4, 1, 0}, {9, 0.5, 0.125}, {10, 0, 0.5}, {17, 2, 0}};
    Random random(6);
    std::vector<float> weights = RandomFloats(&random, 17);
    const std::vector<float> start = weights;
    DenseUpdater updater(config, 17, parts);
    std::vector<std::vector<float>> wholes(parts.size(), start);
    std::vector<DenseUpdater> alone;
    for (const DenseUpdater::Part& part : parts) {
      DenseOptimizer one = config;
      one.set_learning_rate(0.25 * part.rate_factor);
      alone.emplace_back(one, 17, std::vector<DenseUpdater::Part>{{17, 1, part.weight_decay}});
    }
    for (uint64_t step = 1; step <= 5; ++step) {
      const std::vector<float> gradient = RandomFloats(&random, 17);
      updater.Update(step, weights.data(), gradient.data());
      for (size_t p = 0; p < parts.size(); ++p) alone[p].Update(step, wholes[p].data(), gradient.data());
    }
    for (size_t p = 0, i = 0; p < parts.size(); ++p) {
      for (; i < static_cast<size_t>(parts[p].end); ++i) {
        EXPECT_EQ(weights[i], wholes[p][i]) << DenseOptimizer::Kind_Name(kind) << ", " << i;
        EXPECT_EQ(weights[i] == start[i], p == 2) << "a factor of 0 holds what it matches";
      }
    }
  }
}

TEST(DenseUpdater, AdamWWithoutDecayIsAdamToTheBit) {
  DenseOptimizer adam, adamw;
  adamw.set_kind(DenseOptimizer::ADAMW);
  Random random(7);
  std::vector<float> one = RandomFloats(&random, 33), other = one;
  DenseUpdater a(adam, 33), b(adamw, 33);
  for (uint64_t step = 1; step <= 20; ++step) {
    const std::vector<float> gradient = RandomFloats(&random, 33);
    a.Update(step, one.data(), gradient.data());
    b.Update(step, other.data(), gradient.data());
  }
  EXPECT_EQ(one, other);
}

TEST(DenseUpdater, SgdKeepsNoState) {
  DenseOptimizer config;
  config.set_kind(DenseOptimizer::SGD);
  config.set_learning_rate(0.5);
  DenseUpdater updater(config, 2);
  std::vector<float> weights = {1, 2};
  updater.Update(1, weights.data(), std::vector<float>{2, -4}.data());
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
