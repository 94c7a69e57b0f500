#include "common/base/env.h"

#include <gtest/gtest.h>

#include <set>

namespace hearth {
namespace {

TEST(Event, IsStickyAndResetsItself) {
  Env* const env = Env::Real();
  const auto event = env->NewEvent();
  EXPECT_FALSE(event->WaitUntil(env->NowUs()));
  event->Notify();
  event->Notify();
  EXPECT_TRUE(event->WaitUntil(0)) << "a notification that came first is not lost, even for a deadline in the past";
  EXPECT_FALSE(event->WaitUntil(0)) << "two notifications before one wait are one";
}

TEST(Event, NeverReturnsBeforeItsDeadline) {
  Env* const env = Env::Real();
  const auto event = env->NewEvent();
  for (int i = 0; i < 50; ++i) {
    const int64_t deadline_us = env->NowUs() + 20 * i;
    EXPECT_FALSE(event->WaitUntil(deadline_us));
    EXPECT_GE(env->NowUs(), deadline_us);
  }
}

TEST(Event, WakesAWaiterOfAnotherThreadEachTime) {
  Env* const env = Env::Real();
  const auto ping = env->NewEvent();
  const auto pong = env->NewEvent();
  int turns = 0;  // passed from hand to hand by the events
  constexpr int kTurns = 2000;
  const auto thread = env->StartThread("pong", [&] {
    for (int i = 0; i < kTurns; ++i) {
      ping->WaitUntil(kNever);
      ++turns;
      pong->Notify();
    }
  });
  for (int i = 0; i < kTurns; ++i) {
    ping->Notify();
    ASSERT_TRUE(pong->WaitUntil(kNever));
    ASSERT_EQ(turns, i + 1);
  }
}

TEST(Env, ThreadsAreJoinedByTheirDestructor) {
  bool ran = false;
  Env::Real()->StartThread("a name longer than the kernel keeps", [&] { ran = true; }).reset();
  EXPECT_TRUE(ran);
}

// Known answers: snapshots and shuffles depend on these for ever.
TEST(Seeds, Mix64IsSplitmix64) {
  EXPECT_EQ(Mix64(0), 0xe220a8397b1dcdafull);  // the first output of the published generator seeded with 0
  EXPECT_EQ(Mix64(0x9e3779b97f4a7c15ull), 0x6e789e6aa1b965f4ull);  // its second
}

TEST(Seeds, DifferByJobAndByPurposeAndStayAsTheyAre) {
  EXPECT_EQ(SeedOf(1, "log_shuffle"), Mix64(0xff670ad27bda07abull))
      << "XXH3-64 of the purpose, seeded by the job's seed";
  std::set<uint64_t> seeds;
  for (uint64_t job = 0; job < 100; ++job) {
    for (const char* purpose : {"", "a", "log_shuffle", "dense_init"}) seeds.insert(SeedOf(job, purpose));
  }
  EXPECT_EQ(seeds.size(), 400u);
}

TEST(Random, BelowStaysBelowAndReachesEverything) {
  Random random(7);
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t draw = random.Below(10);
    ASSERT_LT(draw, 10u);
    seen.insert(draw);
    const double uniform = random.Uniform();
    ASSERT_GE(uniform, 0.0);
    ASSERT_LT(uniform, 1.0);
  }
  EXPECT_EQ(seen.size(), 10u);
}

}  // namespace
}  // namespace hearth
