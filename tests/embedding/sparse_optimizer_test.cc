#include "embedding/sparse_optimizer.h"

#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "embedding/embedding_table.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

Optimizer ConfigOf(const std::string& text) {
  Optimizer config;
  config.set_learning_rate(0.1);
  config.set_initial_accumulator(0.3);
  config.set_epsilon(1e-6);
  EXPECT_TRUE(google::protobuf::TextFormat::MergeFromString(text, &config)) << text;
  return config;
}
Optimizer Config(Optimizer::Kind kind) { return ConfigOf("kind: " + Optimizer::Kind_Name(kind)); }

std::vector<Optimizer::Kind> Kinds() {
  std::vector<Optimizer::Kind> kinds;
  for (int kind = 0; kind < Optimizer::Kind_ARRAYSIZE; ++kind) kinds.push_back(static_cast<Optimizer::Kind>(kind));
  return kinds;
}

// Every kind by itself and with each of its settings, those with clipping and decay of the row, too.
std::vector<Optimizer> Configs() {
  std::vector<std::string> kinds = {
      "kind: SGD",
      "kind: MOMENTUM",
      "kind: MOMENTUM momentum: 0.7 nesterov: true",
      "kind: ADAGRAD",
      "kind: ADAGRAD accumulator_decay: 0.8",
      "kind: ROWWISE_ADAGRAD",
      "kind: ROWWISE_ADAGRAD accumulator_decay: 0.8",
      "kind: ADAM beta1: 0.8 beta2: 0.99",
      "kind: ADAMW",
      "kind: FTRL",
      "kind: FTRL initial_accumulator: 0 beta: 1 l1: 0.4 l2: 0.5",
  };
  std::vector<Optimizer> configs;
  for (const std::string& kind : kinds) {
    for (const char* more : {"", "clip_norm: 0.9", "weight_decay: 0.2", "clip_norm: 0.9 weight_decay: 0.2"}) {
      Optimizer config = ConfigOf(absl::StrCat(kind, " ", more));
      if (config.kind() != Optimizer::FTRL || config.weight_decay() == 0) configs.push_back(config);
    }
  }
  return configs;
}

std::vector<Simd> AllSimd() {
  std::vector<Simd> all;
  for (int simd = 0; simd <= static_cast<int>(BestSimd()); ++simd) all.push_back(static_cast<Simd>(simd));
  return all;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

struct Row {
  std::vector<float> weights, state;

  Row(const SparseOptimizer& optimizer, std::vector<float> initial)
      : weights(std::move(initial)), state(optimizer.state_floats()) {
    optimizer.InitState(state.data());
  }
  bool Update(const SparseOptimizer& optimizer, const std::vector<float>& gradient, uint32_t t, uint64_t step = 1) {
    return optimizer.Update(weights.data(), state.data(), gradient.data(), t, optimizer.RateAt(step));
  }
  bool operator==(const Row& other) const { return SameBits(weights, other.weights) && SameBits(state, other.state); }
};

std::vector<float> Draw(Random* random, uint32_t dim, double scale) {
  std::vector<float> floats(dim);
  for (float& x : floats) x = static_cast<float>((2 * random->Uniform() - 1) * scale);
  return floats;
}

// The header's formulas in double. FTRL as TensorFlow writes it; where the rate changes, its linear term, which is in
// units of 1 / rate, is told in the new ones.
struct Scalar {
  Optimizer config;
  std::vector<double> w, a, m, v;
  double ftrl_rate = 0;

  Scalar(const Optimizer& c, const std::vector<float>& weights)
      : config(c), w(weights.begin(), weights.end()), a(w.size(), c.initial_accumulator()), m(w.size()), v(w.size()) {}

  void Update(const std::vector<float>& gradient, uint32_t t) {
    const double lr = config.learning_rate(), b1 = config.beta1(), b2 = config.beta2();
    const bool coupled = config.kind() != Optimizer::ADAMW;
    double norm = 0, mean = 0;
    for (const double g : gradient) norm += g * g;
    norm = std::sqrt(norm);
    std::vector<double> all(gradient.begin(), gradient.end());
    for (size_t i = 0; i < w.size(); ++i) {
      if (config.clip_norm() > 0 && norm > config.clip_norm()) all[i] *= config.clip_norm() / norm;
      if (coupled) all[i] += config.weight_decay() * w[i];
      mean += all[i] * all[i] / static_cast<double>(w.size());
    }
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = all[i];
      switch (config.kind()) {
        case Optimizer::SGD:
          w[i] -= lr * g;
          break;
        case Optimizer::MOMENTUM:
          m[i] = config.momentum() * m[i] + g;
          w[i] -= lr * (config.nesterov() ? g + config.momentum() * m[i] : m[i]);
          break;
        case Optimizer::ADAGRAD:
          a[i] = config.accumulator_decay() * a[i] + g * g;
          w[i] -= lr * g / (std::sqrt(a[i]) + config.epsilon());
          break;
        case Optimizer::ROWWISE_ADAGRAD:
          a[i] = config.accumulator_decay() * a[i] + mean;
          w[i] -= lr * g / (std::sqrt(a[i]) + config.epsilon());
          break;
        case Optimizer::ADAMW:
          w[i] -= lr * config.weight_decay() * w[i];
          [[fallthrough]];
        case Optimizer::ADAM:
          m[i] = b1 * m[i] + (1 - b1) * g;
          v[i] = b2 * v[i] + (1 - b2) * g * g;
          w[i] -= lr * (m[i] / (1 - std::pow(b1, t))) / (std::sqrt(v[i] / (1 - std::pow(b2, t))) + config.epsilon());
          break;
        case Optimizer::FTRL: {
          double& linear = m[i];
          if (ftrl_rate != 0) linear *= ftrl_rate / lr;
          const double sigma = (std::sqrt(a[i] + g * g) - std::sqrt(a[i])) / lr;
          linear += g - sigma * w[i];
          a[i] += g * g;
          const double quadratic = (config.beta() + std::sqrt(a[i])) / lr + 2 * config.l2();
          const double sign = linear < 0 ? -1 : 1;
          w[i] = std::abs(linear) > config.l1() ? (sign * config.l1() - linear) / quadratic : 0;
          break;
        }
      }
    }
    ftrl_rate = lr;
  }
};

// The loops of version 0.1: the bits of its jobs.
bool UpdateOf01(const Optimizer& config, Row* row, const std::vector<float>& g, uint32_t t, float rate) {
  const size_t dim = g.size();
  std::vector<float> w = row->weights, s = row->state;
  const auto epsilon = static_cast<float>(config.epsilon());
  const auto power = [](double base, uint32_t exponent) {
    double result = 1;
    for (double square = base; exponent != 0; exponent >>= 1, square *= square) {
      if (exponent & 1) result *= square;
    }
    return result;
  };
  switch (config.kind()) {
    case Optimizer::SGD:
      for (size_t i = 0; i < dim; ++i) w[i] = w[i] - rate * g[i];
      break;
    case Optimizer::ADAGRAD:
      for (size_t i = 0; i < dim; ++i) {
        s[i] = s[i] + g[i] * g[i];
        w[i] = w[i] - (rate * g[i]) / (std::sqrt(s[i]) + epsilon);
      }
      break;
    case Optimizer::ROWWISE_ADAGRAD: {
      float sums[4] = {0, 0, 0, 0};
      for (size_t i = 0; i < dim; ++i) sums[i % 4] += g[i] * g[i];
      s[0] = s[0] + ((sums[0] + sums[2]) + (sums[1] + sums[3])) / static_cast<float>(dim);
      const float scale = rate / (std::sqrt(s[0]) + epsilon);
      for (size_t i = 0; i < dim; ++i) w[i] = w[i] - scale * g[i];
      break;
    }
    default: {
      const auto beta1 = static_cast<float>(config.beta1()), beta2 = static_cast<float>(config.beta2());
      const auto rest1 = static_cast<float>(1 - config.beta1()), rest2 = static_cast<float>(1 - config.beta2());
      const auto correction1 = static_cast<float>(1 - power(config.beta1(), t));
      const auto correction2 = static_cast<float>(1 - power(config.beta2(), t));
      for (size_t i = 0; i < dim; ++i) {
        s[i] = beta1 * s[i] + rest1 * g[i];
        s[dim + i] = beta2 * s[dim + i] + rest2 * g[i] * g[i];
        w[i] = w[i] - rate * (s[i] / correction1) / (std::sqrt(s[dim + i] / correction2) + epsilon);
      }
      break;
    }
  }
  for (const float x : w) {
    if (!std::isfinite(x)) return false;
  }
  for (const float x : s) {
    if (!std::isfinite(x)) return false;
  }
  row->weights = w;
  row->state = s;
  return true;
}

TEST(SparseOptimizer, FollowsTheScalarFormulas) {
  Random random(1);
  for (const Optimizer& config : Configs()) {
    for (const uint32_t dim : {1u, 3u, 4u, 16u, 17u, 100u}) {
      const SparseOptimizer optimizer(config, dim);
      Row row(optimizer, Draw(&random, dim, 0.5));
      Scalar scalar(config, row.weights);
      for (uint32_t t = 1; t <= 30; ++t) {
        const std::vector<float> gradient = Draw(&random, dim, t % 5 == 0 ? 0.1 : 2);
        ASSERT_TRUE(row.Update(optimizer, gradient, t));
        scalar.Update(gradient, t);
      }
      for (uint32_t i = 0; i < dim; ++i) {
        EXPECT_NEAR(row.weights[i], scalar.w[i], 2e-5 * (1 + std::abs(scalar.w[i]))) << config.ShortDebugString();
      }
    }
  }
}

TEST(SparseOptimizer, HasTheBitsOf01WhereNothingNewIsSet) {
  Random random(2);
  for (const Optimizer::Kind kind : {Optimizer::SGD, Optimizer::ADAGRAD, Optimizer::ROWWISE_ADAGRAD, Optimizer::ADAM}) {
    for (const uint32_t dim : {1u, 3u, 4u, 8u, 12u, 16u, 21u, 24u, 32u, 48u, 64u, 130u}) {
      for (const Simd simd : AllSimd()) {
        const SparseOptimizer optimizer(Config(kind), dim, simd);
        Row row(optimizer, Draw(&random, dim, 0.1));
        Row before = row;
        for (uint32_t t = 1; t <= 40; ++t) {
          std::vector<float> gradient = Draw(&random, dim, t % 9 == 0 ? 1e-20 : t % 11 == 0 ? 1e20 : 1);
          gradient[t % dim] = t % 2 == 0 ? 0.0f : -0.0f;
          const float rate = optimizer.RateAt(t);
          ASSERT_EQ(row.Update(optimizer, gradient, t), UpdateOf01(Config(kind), &before, gradient, t, rate));
          ASSERT_TRUE(row == before) << Optimizer::Kind_Name(kind) << " dim " << dim << " t " << t;
        }
      }
    }
  }
}

TEST(SparseOptimizer, AdamHasTheBitsOf01HoweverFarARowHasCome) {
  Random random(7);
  for (const char* betas : {"", "beta1: 0 beta2: 0.9999999", "beta1: 0.5 beta2: 0.99", "beta1: 0.9999 beta2: 0"}) {
    const Optimizer config = ConfigOf(absl::StrCat("kind: ADAM ", betas));
    const SparseOptimizer optimizer(config, 8);
    const std::vector<float> initial = Draw(&random, 8, 0.1), gradient = Draw(&random, 8, 1);
    const auto expect_the_same = [&](uint32_t t) {
      Row row(optimizer, initial);
      Row before = row;
      EXPECT_EQ(row.Update(optimizer, gradient, t), UpdateOf01(config, &before, gradient, t, optimizer.RateAt(1)));
      EXPECT_TRUE(row == before) << betas << " t " << t;
    };
    for (uint32_t t = 1; t <= 40000; t += 1 + t / 500) expect_the_same(t);
    for (uint32_t bit = 0; bit < 32; ++bit) {
      for (const uint32_t beside : {0u, 1u, 2u}) expect_the_same(std::max(1u, (1u << bit) - 1 + beside));
    }
  }
}

TEST(SparseOptimizer, GivesTheSameBitsByEveryInstructionSet) {
  Random random(3);
  for (const Optimizer& config : Configs()) {
    for (const uint32_t dim : {1u, 2u, 4u, 7u, 8u, 12u, 15u, 16u, 24u, 31u, 32u, 33u, 48u, 64u, 100u, 257u}) {
      std::vector<SparseOptimizer> optimizers;
      std::vector<Row> rows;
      const std::vector<float> initial = Draw(&random, dim, 0.1);
      for (const Simd simd : AllSimd()) {
        optimizers.emplace_back(config, dim, simd);
        rows.emplace_back(optimizers.back(), initial);
      }
      for (uint32_t t = 1; t <= 30; ++t) {
        std::vector<float> gradient = Draw(&random, dim, t % 7 == 0 ? 1e-21 : t % 11 == 0 ? 3e18 : 1);
        if (t % 3 == 0) gradient[random.Below(dim)] = random.Below(2) == 0 ? 0.0f : -0.0f;
        if (t % 13 == 0) gradient[random.Below(dim)] = std::numeric_limits<float>::infinity();
        const bool updated = rows[0].Update(optimizers[0], gradient, t);
        EXPECT_TRUE(!updated || t % 13 != 0);
        for (size_t i = 1; i < rows.size(); ++i) {
          ASSERT_EQ(rows[i].Update(optimizers[i], gradient, t), updated) << config.ShortDebugString() << " dim " << dim;
          ASSERT_TRUE(rows[i] == rows[0]) << config.ShortDebugString() << " dim " << dim << " t " << t << " simd " << i;
        }
      }
    }
  }
}

TEST(SparseOptimizer, AClipThatIsNotReachedAndADecayOfZeroChangeNoBit) {
  Random random(4);
  for (const Optimizer::Kind kind : Kinds()) {
    Optimizer config = Config(kind);
    const SparseOptimizer plain(config, 16);
    config.set_clip_norm(1e9);
    config.set_weight_decay(0);
    config.set_accumulator_decay(1);
    const SparseOptimizer set(config, 16);
    Row row(plain, Draw(&random, 16, 0.1));
    Row other = row;
    for (uint32_t t = 1; t <= 20; ++t) {
      const std::vector<float> gradient = Draw(&random, 16, 1);
      ASSERT_TRUE(row.Update(plain, gradient, t));
      ASSERT_TRUE(other.Update(set, gradient, t));
      ASSERT_TRUE(row == other) << Optimizer::Kind_Name(kind);
    }
  }
}

TEST(SparseOptimizer, AdamWWithoutDecayIsAdamToTheBit) {
  Random random(5);
  const SparseOptimizer adam(Config(Optimizer::ADAM), 9), adamw(Config(Optimizer::ADAMW), 9);
  Row row(adam, Draw(&random, 9, 0.1));
  Row other = row;
  for (uint32_t t = 1; t <= 20; ++t) {
    const std::vector<float> gradient = Draw(&random, 9, 1);
    ASSERT_TRUE(row.Update(adam, gradient, t) && other.Update(adamw, gradient, t));
    ASSERT_TRUE(row == other);
  }
}

TEST(SparseOptimizer, HasTheStateThatTheHeaderNames) {
  for (const Optimizer::Kind kind : Kinds()) {
    std::vector<float> expected;
    switch (kind) {
      case Optimizer::SGD:
        break;
      case Optimizer::ROWWISE_ADAGRAD:
        expected = {0.3f};
        break;
      case Optimizer::ADAGRAD:
        expected = {0.3f, 0.3f, 0.3f};
        break;
      case Optimizer::MOMENTUM:
        expected = {0, 0, 0};
        break;
      case Optimizer::ADAM:
      case Optimizer::ADAMW:
        expected = {0, 0, 0, 0, 0, 0};
        break;
      case Optimizer::FTRL:
        expected = {0.3f, 0.3f, 0.3f, 0, 0, 0};
        break;
    }
    EXPECT_EQ(StateFloatsOf(Config(kind), 3), expected.size());
    const SparseOptimizer optimizer(Config(kind), 3);
    ASSERT_EQ(optimizer.state_floats(), expected.size());
    std::vector<float> state(expected.size(), -1);
    optimizer.InitState(state.data());
    EXPECT_EQ(state, expected) << Optimizer::Kind_Name(kind);
  }
}

TEST(SparseOptimizer, LeavesEveryBitWhenAResultWouldNotBeFinite) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Optimizer& config : Configs()) {
    for (const Simd simd : AllSimd()) {
      for (const uint32_t dim : {5u, 16u, 19u}) {
        const SparseOptimizer optimizer(config, dim, simd);
        Row row(optimizer, std::vector<float>(dim, 2));
        ASSERT_TRUE(row.Update(optimizer, std::vector<float>(dim, 0.5f), 1));
        const Row before = row;
        for (const float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
          for (uint32_t place = 0; place < dim; ++place) {
            std::vector<float> gradient(dim, 1);
            gradient[place] = bad;
            EXPECT_FALSE(row.Update(optimizer, gradient, 2)) << config.ShortDebugString();
            EXPECT_TRUE(row == before) << config.ShortDebugString();
          }
        }
      }
    }
  }
}

TEST(SparseOptimizer, RefusesAGradientWhoseSquareOverflows) {
  for (const char* config : {"kind: ADAGRAD", "kind: ROWWISE_ADAGRAD", "kind: ADAM", "kind: ADAMW", "kind: FTRL",
                             "kind: SGD clip_norm: 1", "kind: MOMENTUM clip_norm: 1"}) {
    const SparseOptimizer optimizer(ConfigOf(config), 2);
    Row row(optimizer, {1, 2});
    EXPECT_FALSE(row.Update(optimizer, {1, 1e30f}, 1)) << config;
    EXPECT_EQ(row.weights, std::vector<float>({1, 2}));
  }
}

TEST(SparseOptimizer, TakesEachStepsRateFromTheSchedule) {
  Random random(5);
  for (Optimizer config : Configs()) {
    config.mutable_schedule()->set_kind(Schedule::INVERSE_SQRT);
    config.mutable_schedule()->set_warmup_steps(8);
    const SparseOptimizer optimizer(config, 3);
    Row row(optimizer, {0.1f, -0.2f, 0.3f});
    Scalar scalar(config, row.weights);
    for (uint32_t t = 1; t <= 30; ++t) {
      const uint32_t step = 2 * t;  // the row is in every second step: its own count is not the step
      const std::vector<float> gradient = Draw(&random, 3, 2);
      scalar.config.set_learning_rate(0.1 * (step < 8 ? step / 8.0 : std::sqrt(8.0 / step)));
      ASSERT_TRUE(row.Update(optimizer, gradient, t, step));
      scalar.Update(gradient, t);
    }
    for (uint32_t i = 0; i < 3; ++i) EXPECT_NEAR(row.weights[i], scalar.w[i], 2e-5) << config.ShortDebugString();
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
  const SparseOptimizer optimizer(ConfigOf("kind: ADAM epsilon: 0"), 1);
  for (const float gradient : {1e-3f, 50.0f}) {
    float weight = 0, state[2] = {0, 0};
    ASSERT_TRUE(optimizer.Update(&weight, state, &gradient, 1, optimizer.RateAt(1)));
    EXPECT_NEAR(weight, -0.1, 1e-5);
  }
}

TEST(SparseOptimizer, FtrlWithoutRegularizationIsAdagradWhateverTheRateDoes) {
  const char* settings = "initial_accumulator: 0 epsilon: 0 schedule { kind: COSINE warmup_steps: 5 decay_steps: 25 }";
  const SparseOptimizer ftrl(ConfigOf(absl::StrCat("kind: FTRL ", settings)), 6);
  const SparseOptimizer adagrad(ConfigOf(absl::StrCat("kind: ADAGRAD ", settings)), 6);
  Random random(6);
  Row row(ftrl, Draw(&random, 6, 0.5));
  Row other(adagrad, row.weights);
  for (uint32_t t = 1; t <= 40; ++t) {  // at a rate of 0 in the end
    const std::vector<float> gradient = Draw(&random, 6, 1);
    ASSERT_TRUE(row.Update(ftrl, gradient, t, t));
    ASSERT_TRUE(other.Update(adagrad, gradient, t, t));
    for (uint32_t i = 0; i < 6; ++i) ASSERT_NEAR(row.weights[i], other.weights[i], 1e-5) << "t " << t;
  }
}

TEST(SparseOptimizer, FtrlHoldsAWeightAtZeroUntilItsGradientsAgree) {
  const SparseOptimizer optimizer(ConfigOf("kind: FTRL initial_accumulator: 0 l1: 1"), 2);
  Row row(optimizer, {0.05f, 0.05f});
  for (uint32_t t = 1; t <= 8; ++t) {
    ASSERT_TRUE(row.Update(optimizer, {t % 2 == 0 ? 0.4f : -0.4f, 0.4f}, t));
    EXPECT_EQ(row.weights[0], 0.0f);
    EXPECT_EQ(row.weights[1] < 0, t >= 3) << "t " << t;  // 2 · 0.4 is below l1
  }
}

TEST(SparseOptimizer, FtrlBearsGradientsWhoseSquareIsZero) {
  for (const Simd simd : AllSimd()) {
    const SparseOptimizer optimizer(ConfigOf("kind: FTRL initial_accumulator: 0"), 16, simd);
    Row row(optimizer, std::vector<float>(16, 0.5f));
    std::vector<float> gradient(16, 0.0f);
    gradient[1] = 1e-30f;
    gradient[2] = -1e-30f;
    gradient[3] = 1;
    ASSERT_TRUE(row.Update(optimizer, gradient, 1));
    for (uint32_t i = 0; i < 16; ++i) EXPECT_NEAR(row.weights[i], i == 3 ? 0.4f : 0.0f, 1e-6);
  }
}

TEST(SparseOptimizer, ClipsARowsGradientToTheNorm) {
  const SparseOptimizer optimizer(ConfigOf("kind: SGD clip_norm: 5"), 2);
  Row row(optimizer, {0, 0});
  ASSERT_TRUE(row.Update(optimizer, {3, -4}, 1));  // its norm is 5
  EXPECT_FLOAT_EQ(row.weights[0], -0.3f);
  EXPECT_FLOAT_EQ(row.weights[1], 0.4f);
  ASSERT_TRUE(row.Update(optimizer, {-300, 400}, 2));
  EXPECT_NEAR(row.weights[0], 0, 1e-6);
  EXPECT_NEAR(row.weights[1], 0, 1e-6);
}

}  // namespace
}  // namespace hearth
