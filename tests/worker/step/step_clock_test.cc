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
  end.last = true;
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

TEST(StepClock, ASegmentEndsAtACutAndTheEpochGoesOn) {
  StepClock::Options options;
  options.staleness = 1;
  StepClock clock(options);
  StepVerdict end;
  end.all_at_end = true;
  const Decision decision = clock.Decide(4, end);
  EXPECT_TRUE(decision.segment_ends);
  EXPECT_FALSE(decision.epoch_ends);
  EXPECT_TRUE(clock.SegmentEndsAt(5));
  EXPECT_FALSE(clock.EpochEndsAt(5));
  EXPECT_FALSE(clock.Decide(5, end).segment_ends) << "lanes wait there for the cut";
  EXPECT_EQ(clock.View(6), 5u);
  EXPECT_EQ(clock.EpochOf(6), 0u);
  EXPECT_EQ(clock.StopAt(), 0u);
  end.last = true;
  EXPECT_TRUE(clock.Decide(9, end).epoch_ends);
  EXPECT_EQ(clock.StopAt(), 10u);
}

TEST(StepClock, AJobThatWasFinishedIsFinishedAtItsStart) {
  StepClock::Options options;
  options.step = 40;
  options.end = {40, true};
  EXPECT_TRUE(StepClock(options).FinishedAt(40));
  options.epochs = 2;  // raised since
  EXPECT_FALSE(StepClock(options).FinishedAt(40));
  EXPECT_EQ(StepClock(options).EpochOf(41), 1u);
  options.steps_max = 30;
  EXPECT_TRUE(StepClock(options).FinishedAt(40));
}

}  // namespace
}  // namespace hearth
