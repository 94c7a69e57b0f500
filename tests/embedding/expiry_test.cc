#include "embedding/expiry.h"

#include <vector>

#include "common/base/env.h"
#include "embedding/lifecycle.h"
#include "gtest/gtest.h"
#include "tests/embedding/slow_clock.h"

namespace hearth {
namespace {

constexpr uint32_t kNoonS = 1'700'000'000;
constexpr uint32_t kHourS = 3600;

bool Expired(const Expiry& expiry, uint32_t last_step, uint64_t step) {
  return IsExpired(RowMeta{1, last_step, 0, 0}, expiry.HorizonAt(step));
}

TEST(Expiry, EqualsTheSlowClockThroughRandomTimesCutsAndOtherHours) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    SlowClock slow;
    slow.hours = 1 + random.Below(5);
    Expiry expiry(ExpiryRule{0, static_cast<uint32_t>(slow.hours)});
    uint64_t fallen = 0;  // last steps that were expired before the hours changed
    uint32_t time_s = kNoonS;
    for (uint64_t step = 1; step <= 120; ++step) {
      time_s += static_cast<uint32_t>(random.Below(slow.hours * 500));
      const uint32_t given = random.Below(8) == 0 ? 0 : time_s - static_cast<uint32_t>(random.Below(2) * 999);
      expiry.Tick(step, given);
      slow.Tick(step, given);
      for (uint32_t last_step = 0; last_step <= step; ++last_step) {
        ASSERT_EQ(Expired(expiry, last_step, step), last_step < fallen || slow.Expired(last_step))
            << "seed " << seed << " step " << step << " last " << last_step;
      }
      ASSERT_EQ(expiry.GenerationAt(step), slow.Generation());
      ASSERT_LE(expiry.Marks().size(), 67u);
      if (random.Below(10) != 0) continue;
      fallen = expiry.HorizonAt(step);
      if (random.Below(4) == 0) slow.hours = 1 + random.Below(5);
      const LogClock saved = expiry.clock();
      ASSERT_TRUE(Expiry::Check(saved).ok());
      expiry = Expiry(ExpiryRule{0, static_cast<uint32_t>(slow.hours)}, saved);
    }
  }
}

TEST(Expiry, ByTimeARowLivesForItsHoursAndForALittleLonger) {
  for (const uint32_t step_s : {5u, 7u, 60u, 200u}) {
    Expiry expiry(ExpiryRule{0, 1});
    for (uint64_t step = 1; step * step_s <= 3 * kHourS; ++step) {
      expiry.Tick(step, kNoonS + static_cast<uint32_t>(step) * step_s);
      for (uint32_t last_step = 1; last_step <= step; ++last_step) {
        const uint64_t age_s = (step - last_step) * step_s;
        if (age_s < kHourS) {
          ASSERT_FALSE(Expired(expiry, last_step, step)) << step_s << " age " << age_s;
        }
        if (age_s >= kHourS + kHourS / 64 + step_s) {
          ASSERT_TRUE(Expired(expiry, last_step, step)) << step_s;
        }
      }
    }
  }
}

TEST(Expiry, TimesThatLieFarAheadForAStepEndNoRowsAndTimesThatFallMoveNothing) {
  Expiry expiry(ExpiryRule{0, 1});
  for (uint64_t step = 1; step <= 100; ++step) expiry.Tick(step, kNoonS + static_cast<uint32_t>(step));
  expiry.Tick(101, 4'000'000'000u);
  EXPECT_FALSE(Expired(expiry, 1, 102));
  EXPECT_LE(expiry.clock().time_s(), kNoonS + 100 + kHourS / 16);
  const LogClock before = expiry.clock();
  EXPECT_FALSE(expiry.Tick(102, kNoonS));
  EXPECT_FALSE(expiry.Tick(103, 0));
  EXPECT_EQ(expiry.clock().SerializeAsString(), before.SerializeAsString());
}

TEST(Expiry, ABrokenClockAtTheVeryBeginningIsLeftWithTheNextStep) {
  Expiry expiry(ExpiryRule{0, 1});
  EXPECT_TRUE(expiry.Tick(1, 4'000'000'000u));
  EXPECT_FALSE(expiry.Tick(2, kNoonS)) << "the mark is the same";
  EXPECT_EQ(expiry.Marks(), std::vector<uint64_t>{2});
  EXPECT_EQ(expiry.clock().time_s(), kNoonS);
  EXPECT_EQ(expiry.GenerationAt(2), 0u);
  expiry = Expiry(ExpiryRule{0, 1}, expiry.clock());
  for (uint32_t step = 3; step <= 100; ++step) expiry.Tick(step, kNoonS + step * 60);
  EXPECT_TRUE(Expired(expiry, 1, 101));
  const uint32_t now_s = expiry.clock().time_s();
  expiry.Tick(101, kNoonS - kHourS);
  EXPECT_EQ(expiry.clock().time_s(), now_s) << "later it never falls";
}

TEST(Expiry, AGapInTheLogIsCaughtUpWith) {
  Expiry expiry(ExpiryRule{0, 1});
  expiry.Tick(1, kNoonS);
  const uint32_t later_s = kNoonS + 2 * kHourS;
  for (uint64_t step = 2; step < 18; ++step) expiry.Tick(step, later_s);
  EXPECT_FALSE(Expired(expiry, 17, 18));
  EXPECT_TRUE(Expired(expiry, 1, 18));
  for (uint64_t step = 18; step < 34; ++step) expiry.Tick(step, later_s);
  EXPECT_EQ(expiry.clock().time_s(), later_s);
}

TEST(Expiry, RefusesAClockThatIsNone) {
  Expiry expiry(ExpiryRule{0, 1});
  for (uint64_t step = 1; step <= 50; ++step) expiry.Tick(step, kNoonS + static_cast<uint32_t>(step) * 100);
  const LogClock whole = expiry.clock();
  EXPECT_TRUE(Expiry::Check(whole).ok());
  EXPECT_TRUE(Expiry::Check(LogClock()).ok());
  std::vector<LogClock> broken(3, whole);
  broken[0].set_time_s(kNoonS);
  broken[1].mutable_mark(1)->set_before_step(broken[1].mark(0).before_step());
  broken[2].mutable_mark()->SwapElements(0, 1);
  for (const LogClock& one : broken) EXPECT_EQ(Expiry::Check(one).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace hearth
