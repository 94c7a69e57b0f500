#include "worker/step/step_clock.h"

#include <gtest/gtest.h>

namespace hearth {
namespace {

TEST(StepClock, AStopAfterTheLastEpochIsDecidedSaysNothingNew) {
  StepClock::Options options;
  options.staleness = 2;
  StepClock clock(options);
  StepVerdict end;
  end.all_at_end = true;
  EXPECT_EQ(clock.Decide(1, end).cut, 3u);
  StepVerdict stop = end;
  stop.stop = true;
  EXPECT_EQ(clock.Decide(2, stop).cut, 0u);
  EXPECT_EQ(clock.StopAt(), 3u);
  EXPECT_TRUE(clock.FinishedAt(3));
}

TEST(StepClock, WishesForACutWhileOneIsComingAreAnsweredByIt) {
  StepClock::Options options;
  options.staleness = 2;
  options.epochs = 2;
  StepClock clock(options);
  StepVerdict wish;
  wish.cut = true;
  EXPECT_EQ(clock.Decide(1, wish).cut, 3u);
  EXPECT_EQ(clock.Decide(2, wish).cut, 0u);
  EXPECT_EQ(clock.Decide(3, wish).cut, 0u);
  EXPECT_EQ(clock.Decide(4, wish).cut, 6u);
  EXPECT_EQ(clock.StopAt(), 0u);
}

TEST(StepClock, AJobThatWasFinishedIsFinishedAtItsStart) {
  StepClock::Options options;
  options.step = 40;
  options.epoch_ends_at = 40;
  EXPECT_TRUE(StepClock(options).FinishedAt(40));
  options.epochs = 2;  // raised since
  EXPECT_FALSE(StepClock(options).FinishedAt(40));
  EXPECT_EQ(StepClock(options).EpochOf(41), 1u);
  options.steps_max = 30;
  EXPECT_TRUE(StepClock(options).FinishedAt(40));
}

}  // namespace
}  // namespace hearth
