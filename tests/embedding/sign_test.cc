#include "embedding/sign.h"

#include <vector>

#include "gtest/gtest.h"

namespace hearth {
namespace {

TEST(Sign, HoldsTableAndId) {
  const Sign sign = MakeSign(4095, kIdMask);
  EXPECT_EQ(TableOf(sign), 4095u);
  EXPECT_EQ(IdOf(sign), kIdMask);
  EXPECT_EQ(IdOf(MakeSign(1, uint64_t{1} << 60 | 5)), 5u);
  EXPECT_NE(MakeSign(1, 0), 0u);
}

TEST(Sign, KeepsTheKnownAnswersThatSnapshotsDependOn) {
  EXPECT_EQ(HashId("user-17", 0), 1127250460769409u);
  EXPECT_EQ(SaltOf("video_id"), 14494875153190310914u);
  EXPECT_EQ(LogicalShardOf(MakeSign(1, 17), 64), 61u);
  EXPECT_NE(HashId("user-17", 0), HashId("user-17", SaltOf("video_id")));
  EXPECT_LE(HashId("", 3), kIdMask);
}

TEST(Sign, SpreadsOverLogicalShards) {
  std::vector<int> counts(7);
  for (uint64_t id = 0; id < 70000; ++id) ++counts[LogicalShardOf(MakeSign(1, id), 7)];
  for (const int count : counts) EXPECT_NEAR(count, 10000, 500);
}

}  // namespace
}  // namespace hearth
