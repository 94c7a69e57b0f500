#include "worker/evaluation/auc.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "common/base/env.h"
#include "gtest/gtest.h"
#include "model/batch/batch.h"

namespace hearth {
namespace {

// Every pair of a positive and a negative, ties one half.
std::optional<double> AucByPairs(const std::vector<float>& scores, const std::vector<float>& labels) {
  double won = 0;
  double pairs = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    for (size_t j = 0; j < scores.size(); ++j) {
      if (labels[i] != 1 || labels[j] != 0) continue;
      ++pairs;
      won += scores[i] > scores[j] ? 1 : scores[i] == scores[j] ? 0.5 : 0;
    }
  }
  if (pairs == 0) return std::nullopt;
  return won / pairs;
}

struct Sample {
  std::vector<float> scores;
  std::vector<float> labels;
  std::vector<uint64_t> users;
};

Sample RandomSample(uint64_t seed) {
  Random random(seed);
  Sample sample;
  const uint64_t levels = 2 + random.Below(200);  // few levels: many ties
  const uint64_t positives = 1 + random.Below(9);
  const uint64_t size = random.Below(150);
  for (uint64_t i = 0; i < size; ++i) {
    sample.scores.push_back((static_cast<float>(random.Below(levels)) - static_cast<float>(levels / 2)) * 0.37f);
    sample.labels.push_back(random.Below(10) < positives ? 1.0f : 0.0f);
    sample.users.push_back(Mix64(random.Below(12)));
  }
  return sample;
}

TEST(Auc, EqualsTheCountOverAllPairsOnRandomScoresWithTies) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    const Sample sample = RandomSample(seed);
    const auto expected = AucByPairs(sample.scores, sample.labels);
    const auto got = Auc(sample.scores, sample.labels);
    ASSERT_EQ(got.has_value(), expected.has_value()) << seed;
    if (!expected) continue;
    EXPECT_NEAR(*got, *expected, 1e-14) << seed;
  }
}

TEST(Auc, TakesBothZerosAsOneScoreAndOrdersInfinities) {
  EXPECT_EQ(Auc({0.0f, -0.0f}, {1.0f, 0.0f}), 0.5);
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Auc({-infinity, -1.0f, 1.0f, infinity}, {0.0f, 0.0f, 1.0f, 1.0f}), 1.0);
}

TEST(Auc, IsUndefinedWithOneClassOrNan) {
  EXPECT_FALSE(Auc({1.0f, 2.0f}, {1.0f, 1.0f}).has_value());
  EXPECT_FALSE(Auc({1.0f, 2.0f}, {0.0f, 0.0f}).has_value());
  EXPECT_FALSE(Auc({}, {}).has_value());
  EXPECT_FALSE(Auc({1.0f, std::nanf("")}, {1.0f, 0.0f}).has_value());
}

TEST(GroupedAuc, EqualsTheWeightedMeanOverUsersOnRandomSamples) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    const Sample sample = RandomSample(seed);
    std::map<uint64_t, Sample> by_user;
    for (size_t i = 0; i < sample.scores.size(); ++i) {
      by_user[sample.users[i]].scores.push_back(sample.scores[i]);
      by_user[sample.users[i]].labels.push_back(sample.labels[i]);
    }
    double sum = 0;
    uint64_t weight = 0;
    uint64_t users = 0;
    for (const auto& [user, own] : by_user) {
      const auto auc = AucByPairs(own.scores, own.labels);
      if (!auc) continue;
      ++users;
      weight += own.scores.size();
      sum += *auc * static_cast<double>(own.scores.size());
    }
    const Gauc gauc = GroupedAuc(sample.scores, sample.labels, sample.users);
    EXPECT_EQ(gauc.users, users);
    EXPECT_EQ(gauc.impressions, weight);
    ASSERT_EQ(gauc.value.has_value(), weight > 0);
    if (weight == 0) continue;
    EXPECT_NEAR(*gauc.value, sum / static_cast<double>(weight), 1e-13);
  }
}

TEST(GroupedAuc, LeavesRecordsWithoutAUserOut) {
  const Gauc gauc = GroupedAuc({0, 1, 2, 3}, {1, 0, 0, 1}, {kNoUser, kNoUser, 7, 7});
  EXPECT_EQ(gauc.users, 1u);
  EXPECT_EQ(gauc.impressions, 2u);
  EXPECT_EQ(gauc.value, 1.0);
}

TEST(Evaluate, ReportsLossAndCalibrationFromLogits) {
  const TaskScores scores = {{0.0f, 2.0f, -3.0f, 1.0f}, {1, 1, 0, 0}, {1, 1, 1, 2}};
  const Evaluation::Task task = Evaluate("click", scores);
  double loss = 0;
  double predicted = 0;
  for (size_t i = 0; i < 4; ++i) {
    const double p = 1 / (1 + std::exp(-static_cast<double>(scores.logits[i])));
    loss -= scores.labels[i] == 1 ? std::log(p) : std::log(1 - p);
    predicted += p;
  }
  EXPECT_EQ(task.name(), "click");
  EXPECT_EQ(task.samples(), 4u);
  EXPECT_EQ(task.positives(), 2u);
  EXPECT_NEAR(task.log_loss(), loss / 4, 1e-12);
  EXPECT_NEAR(task.calibration(), predicted / 2, 1e-12);
  EXPECT_EQ(task.auc(), 0.75);
  EXPECT_EQ(task.gauc(), 1.0);
  EXPECT_EQ(task.gauc_users(), 1u);
  EXPECT_EQ(task.gauc_impressions(), 3u);
}

TEST(Evaluate, LeavesUndefinedFiguresOut) {
  const Evaluation::Task none = Evaluate("like", {});
  EXPECT_EQ(none.samples(), 0u);
  EXPECT_FALSE(none.has_auc() || none.has_log_loss() || none.has_calibration() || none.has_gauc());
  const Evaluation::Task negatives = Evaluate("like", {{-1000.0f, 1.0f}, {0, 0}, {}});
  EXPECT_FALSE(negatives.has_auc() || negatives.has_calibration() || negatives.has_gauc());
  EXPECT_NEAR(negatives.log_loss(), std::log1p(std::exp(1.0)) / 2, 1e-12);
}

TEST(Evaluate, StaysFiniteAtExtremeLogits) {
  const Evaluation::Task task = Evaluate("click", {{-1000.0f, 1000.0f}, {1, 0}, {}});
  EXPECT_EQ(task.log_loss(), 1000.0);
  EXPECT_EQ(task.auc(), 0.0);
}

TEST(AddPrediction, CountsEachProbabilityInItsBucket) {
  Random random(3);
  TaskMetric metric;
  std::vector<uint64_t> positives(kAucBuckets, 0), negatives(kAucBuckets, 0);
  double loss = 0;
  const auto add = [&](float logit, bool positive) {
    AddPrediction(&metric, logit, positive, 0.25);
    loss += 0.25;
    const double bucket = std::floor(256 / (1 + std::exp(-static_cast<double>(logit))));
    ++(positive ? positives : negatives)[static_cast<size_t>(std::min(bucket, 255.0))];
  };
  for (int i = 0; i < 3000; ++i) {
    const float logit = static_cast<float>(8 * random.Uniform() - 4);
    add(logit, random.Uniform() < 1 / (1 + std::exp(-logit)));
  }
  add(1000.0f, true);  // both ends have a bucket
  add(-1000.0f, true);
  EXPECT_EQ(metric.labelled(), 3002u);
  EXPECT_EQ(metric.loss_sum(), loss);
  EXPECT_EQ(std::vector<uint64_t>(metric.positives().begin(), metric.positives().end()), positives);
  EXPECT_EQ(std::vector<uint64_t>(metric.negatives().begin(), metric.negatives().end()), negatives);
}

}  // namespace
}  // namespace hearth
