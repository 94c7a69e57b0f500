#include "embedding/sparse_optimizer.h"

#include <cmath>
#include <limits>
#include <vector>

#include "common/base/env.h"
#include "embedding/embedding_table.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

Optimizer Config(Optimizer::Kind kind) {
  Optimizer config;
  config.set_kind(kind);
  config.set_learning_rate(0.1);
  config.set_initial_accumulator(0.3);
  config.set_epsilon(1e-6);
  return config;
}

constexpr Optimizer::Kind kKinds[] = {Optimizer::SGD, Optimizer::ADAGRAD, Optimizer::ROWWISE_ADAGRAD, Optimizer::ADAM};

// The header's formulas in double.
struct Scalar {
  Optimizer config;
  std::vector<double> w, a, m, v;

  Scalar(const Optimizer& c, const std::vector<float>& weights)
      : config(c), w(weights.begin(), weights.end()), a(w.size(), c.initial_accumulator()), m(w.size()), v(w.size()) {}

  void Update(const std::vector<float>& gradient, uint32_t t) {
    double mean = 0;
    for (const double g : gradient) mean += g * g / static_cast<double>(gradient.size());
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = gradient[i], lr = config.learning_rate(), b1 = config.beta1(), b2 = config.beta2();
      switch (config.kind()) {
        case Optimizer::SGD:
          w[i] -= lr * g;
          break;
        case Optimizer::ADAGRAD:
          a[i] += g * g;
          w[i] -= lr * g / (std::sqrt(a[i]) + config.epsilon());
          break;
        case Optimizer::ROWWISE_ADAGRAD:
          a[i] += mean;
          w[i] -= lr * g / (std::sqrt(a[i]) + config.epsilon());
          break;
        case Optimizer::ADAM:
          m[i] = b1 * m[i] + (1 - b1) * g;
          v[i] = b2 * v[i] + (1 - b2) * g * g;
          w[i] -= lr * (m[i] / (1 - std::pow(b1, t))) / (std::sqrt(v[i] / (1 - std::pow(b2, t))) + config.epsilon());
          break;
      }
    }
  }
};

TEST(SparseOptimizer, FollowsTheScalarFormulas) {
  Random random(1);
  for (const Optimizer::Kind kind : kKinds) {
    for (const uint32_t dim : {1u, 3u, 4u, 16u, 17u, 100u}) {
      const SparseOptimizer optimizer(Config(kind), dim);
      std::vector<float> weights(dim), state(optimizer.state_floats());
      for (float& w : weights) w = static_cast<float>(random.Uniform() - 0.5);
      Scalar scalar(Config(kind), weights);
      optimizer.InitState(state.data());
      for (uint32_t t = 1; t <= 30; ++t) {
        std::vector<float> gradient(dim);
        for (float& g : gradient) g = static_cast<float>(random.Uniform() * 4 - 2);
        ASSERT_TRUE(optimizer.Update(weights.data(), state.data(), gradient.data(), t, optimizer.RateAt(1)));
        scalar.Update(gradient, t);
      }
      for (uint32_t i = 0; i < dim; ++i) EXPECT_NEAR(weights[i], scalar.w[i], 2e-5) << Optimizer::Kind_Name(kind);
    }
  }
}

TEST(SparseOptimizer, HasTheStateThatTheHeaderNames) {
  const uint32_t floats[] = {0, 8, 1, 16};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(StateFloatsOf(Config(kKinds[i]), 8), floats[i]);
    const SparseOptimizer optimizer(Config(kKinds[i]), 8);
    ASSERT_EQ(optimizer.state_floats(), floats[i]);
    std::vector<float> state(floats[i], -1);
    optimizer.InitState(state.data());
    for (const float s : state) EXPECT_EQ(s, kKinds[i] == Optimizer::ADAM ? 0.0f : 0.3f);
  }
}

TEST(SparseOptimizer, LeavesEveryBitWhenAResultWouldNotBeFinite) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Optimizer::Kind kind : kKinds) {
    const SparseOptimizer optimizer(Config(kind), 5);
    for (const float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
      for (uint32_t place = 0; place < 5; ++place) {
        std::vector<float> weights = {1, 2, 3, 4, 5}, state(optimizer.state_floats());
        optimizer.InitState(state.data());
        const std::vector<float> before_weights = weights, before_state = state;
        std::vector<float> gradient = {1, 1, 1, 1, 1};
        gradient[place] = bad;
        EXPECT_FALSE(optimizer.Update(weights.data(), state.data(), gradient.data(), 1, optimizer.RateAt(1)));
        EXPECT_EQ(weights, before_weights);
        EXPECT_EQ(state, before_state);
      }
    }
  }
}

TEST(SparseOptimizer, RefusesAGradientWhoseSquareOverflows) {
  for (const Optimizer::Kind kind : {Optimizer::ADAGRAD, Optimizer::ROWWISE_ADAGRAD, Optimizer::ADAM}) {
    const SparseOptimizer optimizer(Config(kind), 2);
    std::vector<float> weights = {1, 2}, state(optimizer.state_floats()), gradient = {1, 1e30f};
    optimizer.InitState(state.data());
    EXPECT_FALSE(optimizer.Update(weights.data(), state.data(), gradient.data(), 1, optimizer.RateAt(1)));
  }
}

TEST(SparseOptimizer, TakesEachStepsRateFromTheSchedule) {
  Random random(5);
  for (const Optimizer::Kind kind : kKinds) {
    Optimizer config = Config(kind);
    config.mutable_schedule()->set_kind(Schedule::INVERSE_SQRT);
    config.mutable_schedule()->set_warmup_steps(8);
    const SparseOptimizer optimizer(config, 3);
    std::vector<float> weights = {0.1f, -0.2f, 0.3f}, state(optimizer.state_floats());
    Scalar scalar(config, weights);
    optimizer.InitState(state.data());
    for (uint32_t t = 1; t <= 30; ++t) {
      const uint32_t step = 2 * t;  // the row is in every second step: its own count is not the step
      std::vector<float> gradient(3);
      for (float& g : gradient) g = static_cast<float>(random.Uniform() * 4 - 2);
      scalar.config.set_learning_rate(0.1 * (step < 8 ? step / 8.0 : std::sqrt(8.0 / step)));
      ASSERT_TRUE(optimizer.Update(weights.data(), state.data(), gradient.data(), t, optimizer.RateAt(step)));
      scalar.Update(gradient, t);
    }
    for (uint32_t i = 0; i < 3; ++i) EXPECT_NEAR(weights[i], scalar.w[i], 2e-5) << Optimizer::Kind_Name(kind);
  }
}

TEST(SparseOptimizer, WithoutAScheduleHasTheLearningRateToTheBit) {
  for (const double rate : {0.05, 0.1, 1e-3, 0.0}) {
    Optimizer config;
    config.set_learning_rate(rate);
    const SparseOptimizer optimizer(config, 1);
    for (const uint64_t step : {1, 2, 999}) EXPECT_EQ(optimizer.RateAt(step), static_cast<float>(rate));
  }
}

TEST(SparseOptimizer, CountsAdamsStepsByRow) {
  // With the first step's correction the first update is lr in the gradient's direction, whatever its size.
  Optimizer config = Config(Optimizer::ADAM);
  config.set_epsilon(0);
  const SparseOptimizer optimizer(config, 1);
  for (const float gradient : {1e-3f, 50.0f}) {
    float weight = 0, state[2] = {0, 0};
    ASSERT_TRUE(optimizer.Update(&weight, state, &gradient, 1, optimizer.RateAt(1)));
    EXPECT_NEAR(weight, -0.1, 1e-5);
  }
}

}  // namespace
}  // namespace hearth
