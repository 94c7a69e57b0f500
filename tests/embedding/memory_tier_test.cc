#include "embedding/memory_tier.h"

#include <map>
#include <vector>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

constexpr TableNumber kTable = 7;
constexpr uint64_t kRowBytes = sizeof(RowHead) + 2 * sizeof(float);

void ExpectEqual(const MemoryTier& tier, uint32_t slot, const RowMeta& expected) {
  const RowMeta meta = tier.meta(slot);
  EXPECT_EQ(meta.count, expected.count);
  EXPECT_EQ(meta.last_step, expected.last_step);
  EXPECT_EQ(meta.flags, expected.flags);
  EXPECT_EQ(meta.updates, expected.updates);
}

TEST(RowHead, KeepsEachOfItsPartsApart) {
  RowHead head;
  head.Reset(MakeSign(kTable, kIdMask));
  EXPECT_TRUE(head.IsOf(MakeSign(kTable, kIdMask)));
  EXPECT_FALSE(head.IsOf(MakeSign(kTable, kIdMask - 1)));
  head.set_touch(0x1234);
  head.set_count(0x6bc);
  head.set_updates(0x5ef);
  head.set_last_step(0xffffffffu);
  head.Set(kRowDirty | kRowPrefetched);
  for (int i = 0; i < 7; ++i) head.BeginFlight();
  EXPECT_EQ(head.touch(), 0x234u);
  EXPECT_EQ(head.count(), 0x6bcu);
  EXPECT_EQ(head.updates(), 0x5efu);
  EXPECT_EQ(head.last_step(), 0xffffffffu);
  EXPECT_EQ(head.id(), kIdMask);
  EXPECT_EQ(head.Only(~kIdMask), kRowIsThere | kRowDirty | kRowPrefetched | kRowInFlight);
  for (int i = 0; i < 7; ++i) head.EndFlight();
  EXPECT_EQ(head.Only(~kIdMask), kRowIsThere | kRowDirty | kRowPrefetched);
  head.Reset(MakeSign(kTable, 0));
  EXPECT_TRUE(head.IsOf(MakeSign(kTable, 0)));
  head.Clear();
  EXPECT_FALSE(head.IsOf(MakeSign(kTable, 0))) << "a free slot is not that of id 0";
}

TEST(MemoryTier, KeepsWholeCountsOfRowsWhateverFitsTheirHeads) {
  MemoryTier tier(kTable, kRowBytes, 1000, 1000, 1);
  ASSERT_TRUE(tier.Open().ok());
  std::map<Sign, RowMeta> expected;
  Random random(5);
  const auto check = [&] {
    for (const auto& [sign, meta] : expected) {
      const uint32_t slot = tier.Find(sign);
      ASSERT_NE(slot, MemoryTier::kNone);
      ExpectEqual(tier, slot, meta);
      EXPECT_EQ(tier.sign(slot), sign);
    }
  };
  for (uint32_t round = 0; round < 20000; ++round) {
    const Sign sign = MakeSign(kTable, random.Below(60));
    uint32_t slot = tier.Find(sign);
    ASSERT_EQ(slot == MemoryTier::kNone, expected.count(sign) == 0);
    if (slot == MemoryTier::kNone) {
      ASSERT_TRUE(tier.Reserve(1).ok());
      slot = tier.Insert(sign);
      ExpectEqual(tier, slot, RowMeta{});
    }
    RowMeta* meta = &expected[sign];
    switch (random.Below(8)) {
      case 0: {
        const uint32_t steps[] = {0, 2047, 2048, 0xffffffffu};
        *meta = {steps[random.Below(4)], round, static_cast<uint32_t>(random.Below(2)), steps[random.Below(4)]};
        tier.SetMeta(slot, *meta);
        break;
      }
      case 1:
        tier.Remove(slot);
        expected.erase(sign);
        break;
      case 2:
        if (tier.rows() == tier.slots()) break;
        tier.MoveDown(static_cast<uint32_t>(tier.slots() - 1));  // the last slot is in use: see Trim below
        tier.Trim();
        break;
      case 3:
        tier.AddUpdate(slot);
        ++meta->updates;
        break;
      default: {
        const uint32_t occurrences = static_cast<uint32_t>(random.Below(2) == 0 ? 1 : random.Below(3000));
        tier.AddOccurrences(slot, occurrences);
        meta->count = AddSaturating(meta->count, occurrences);
      }
    }
    tier.Trim();
    if (round % 100 == 0) check();
  }
  check();
}

TEST(MemoryTier, ForgetsWhatIsBeyondAHeadWithItsRow) {
  MemoryTier tier(kTable, kRowBytes, 10, 10, 1);
  ASSERT_TRUE(tier.Open().ok());
  ASSERT_TRUE(tier.Reserve(1).ok());
  uint32_t slot = tier.Insert(MakeSign(kTable, 1));
  const uint64_t bytes = tier.bytes();
  tier.AddOccurrences(slot, RowHead::kCountMax);
  EXPECT_EQ(tier.bytes(), bytes);
  tier.AddOccurrences(slot, 1);
  EXPECT_GT(tier.bytes(), bytes);
  tier.Remove(slot);
  EXPECT_EQ(tier.bytes(), bytes);
  slot = tier.Insert(MakeSign(kTable, 2));
  ExpectEqual(tier, slot, RowMeta{});
}

TEST(MemoryTier, TellsWhichStepsUseARow) {
  MemoryTier tier(kTable, kRowBytes, 10, 10, 1);
  ASSERT_TRUE(tier.Open().ok());
  ASSERT_TRUE(tier.Reserve(1).ok());
  RowHead* head = tier.head(tier.Insert(MakeSign(kTable, 1)));
  for (const uint64_t now : {3u, 1000u, 5000u}) {  // also where the low bits of the steps begin anew
    tier.SetNow(now);
    tier.TouchUnused(head);
    EXPECT_FALSE(tier.InUse(*head));
    for (uint64_t ahead = 0; ahead < 40; ++ahead) {
      tier.Touch(head, now + ahead);
      EXPECT_TRUE(tier.InUse(*head)) << "in " << ahead << " steps";
      EXPECT_TRUE(tier.TouchedOfLate(*head));
    }
  }
  tier.Touch(head);
  tier.SetNow(5002);
  EXPECT_TRUE(tier.InUse(*head));
  EXPECT_FALSE(tier.TouchedOfLate(*head));
  tier.SetNow(5003);
  EXPECT_FALSE(tier.InUse(*head));
  // As far ahead as a job may read (config.cc): it stays until then.
  tier.Touch(head, 5003 + 128);
  tier.SetNow(5003 + 128);
  EXPECT_TRUE(tier.InUse(*head));
  for (int i = 0; i < 1000; ++i) {
    tier.TouchUnused(head);
    ASSERT_FALSE(tier.InUse(*head));
  }
}

}  // namespace
}  // namespace hearth
