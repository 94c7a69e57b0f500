#include "common/job/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "common/job/config.h"

namespace hearth {
namespace {

Schedule Parsed(const std::string& text) {
  const auto job = ParseJob("training { dense_optimizer { schedule { " + text + " } } }", "test");
  EXPECT_TRUE(job.ok()) << job.status();
  return job->training().dense_optimizer().schedule();
}

void ExpectFactors(const std::string& text, const std::vector<std::pair<uint64_t, double>>& expected) {
  for (const auto& [step, factor] : expected) {
    EXPECT_NEAR(RateFactor(Parsed(text), step), factor, 1e-12) << text << ", step " << step;
  }
}

TEST(RateFactor, IsExactlyOneWithoutASchedule) {
  for (const uint64_t step : {uint64_t{1}, uint64_t{2}, uint64_t{1000}, uint64_t{4294967295}}) {
    EXPECT_EQ(RateFactor(Schedule(), step), 1.0);
    EXPECT_EQ(RateFactor(WithDefaults(Job()).training().dense_optimizer().schedule(), step), 1.0);
  }
}

TEST(RateFactor, RisesInALineUpToTheEndOfTheWarmUp) {
  ExpectFactors("warmup_steps: 4", {{1, 0.25}, {2, 0.5}, {3, 0.75}, {4, 1}, {5, 1}});
  ExpectFactors("warmup_steps: 10 warmup_start: 0.2", {{1, 0.28}, {5, 0.6}, {9, 0.92}, {10, 1}, {99, 1}});
  ExpectFactors("warmup_steps: 1", {{1, 1}, {2, 1}});
}

TEST(RateFactor, FallsByGammaAfterEveryFewSteps) {
  ExpectFactors("kind: STEP step_every: 3 gamma: 0.5", {{1, 1}, {3, 1}, {4, 0.5}, {6, 0.5}, {7, 0.25}, {30, 1. / 512}});
  ExpectFactors("kind: STEP step_every: 2 gamma: 0.1 warmup_steps: 5", {{5, 1}, {6, 1}, {7, 1}, {8, 0.1}, {10, 0.01}});
  ExpectFactors("kind: STEP step_every: 1 gamma: 0", {{1, 1}, {2, 0}, {4294967295, 0}});
}

TEST(RateFactor, FollowsHalfACosineToItsEnd) {
  ExpectFactors("kind: COSINE decay_steps: 100", {{50, 0.5}, {25, (1 + std::sqrt(0.5)) / 2}, {100, 0}, {200, 0}});
  ExpectFactors("kind: COSINE decay_steps: 90 warmup_steps: 30 end_fraction: 0.2",
                {{15, 0.5}, {30, 1}, {60, 0.6}, {50, 0.2 + 0.8 * 0.75}, {90, 0.2}, {91, 0.2}});
}

TEST(RateFactor, FallsWithTheRootOfTheStep) {
  ExpectFactors("kind: INVERSE_SQRT", {{1, 1}, {4, 0.5}, {100, 0.1}});
  ExpectFactors("kind: INVERSE_SQRT warmup_steps: 16", {{8, 0.5}, {16, 1}, {64, 0.5}, {1600, 0.1}});
}

TEST(RateFactor, FollowsAPowerToItsEnd) {
  ExpectFactors("kind: POLYNOMIAL decay_steps: 10", {{1, 0.9}, {5, 0.5}, {10, 0}, {11, 0}});
  ExpectFactors("kind: POLYNOMIAL decay_steps: 12 warmup_steps: 2 power: 2 end_fraction: 0.1",
                {{1, 0.5}, {2, 1}, {7, 0.1 + 0.9 * 0.25}, {12, 0.1}});
}

TEST(RateFactor, NeverLeavesZeroToOneAndNeverRisesAfterTheWarmUp) {
  for (const char* text : {"kind: CONSTANT", "kind: STEP step_every: 7 gamma: 0.9", "kind: COSINE decay_steps: 400",
                           "kind: INVERSE_SQRT", "kind: POLYNOMIAL decay_steps: 300 power: 0.5"}) {
    const Schedule schedule = Parsed(std::string(text) + " warmup_steps: 20 warmup_start: 0.1");
    double last = 0;
    for (uint64_t step = 1; step <= 500; ++step) {
      const double factor = RateFactor(schedule, step);
      EXPECT_GE(factor, 0) << text;
      EXPECT_LE(factor, 1) << text;
      EXPECT_TRUE(step <= 20 ? factor >= last : factor <= last) << text << ", step " << step;
      last = factor;
    }
  }
}

TEST(RateOf, IsTheLearningRateTimesTheFactor) {
  DenseOptimizer dense;
  dense.set_learning_rate(0.003);
  EXPECT_EQ(RateOf(dense, 7), 0.003);
  dense.mutable_schedule()->set_warmup_steps(10);
  EXPECT_DOUBLE_EQ(RateOf(dense, 7), 0.0021);
  Optimizer sparse;
  sparse.set_learning_rate(0.05);
  EXPECT_EQ(RateOf(sparse, 7), 0.05);
  sparse.mutable_schedule()->set_kind(Schedule::INVERSE_SQRT);
  EXPECT_DOUBLE_EQ(RateOf(sparse, 25), 0.01);
}

}  // namespace
}  // namespace hearth
