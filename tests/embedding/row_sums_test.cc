#include "embedding/row_sums.h"

#include "gtest/gtest.h"

namespace hearth {
namespace {

RowMeta At(uint32_t last_step, uint32_t flags = kRowAdmitted) { return {1, last_step, flags, 1}; }

TEST(RowSums, WhatIsAddedAndRemovedInAnyOrderLeavesTheRest) {
  RowSums sums(0);
  sums.Remove(At(3), 70);  // mod 2^64: the order does not matter
  sums.Add(At(1), 5);
  sums.Add(At(3), 70);
  sums.Add(At(2, 0), 11);  // a counter of a sign without a row
  EXPECT_EQ(sums.hash(), 16u);
  EXPECT_EQ(sums.rows(), 1u);
  EXPECT_EQ(sums.records(), 2u);
}

TEST(RowSums, AStepThatExpiresDropsOutWhole) {
  RowSums sums(10);
  sums.Add(At(1), 5);
  sums.Add(At(1), 6);
  sums.Add(At(1, 0), 7);
  sums.Add(At(2), 8);
  EXPECT_EQ(sums.DropExpired(11), 0u);  // 1 + 10 is not before 11
  EXPECT_EQ(sums.DropExpired(12), 2u);
  EXPECT_EQ(sums.hash(), 8u);
  EXPECT_EQ(sums.rows(), 1u);
}

TEST(RowSums, ComeBackFromTheirBytesWithTheRuleThatTheyWereKeptBy) {
  RowSums sums(10);
  sums.Add(At(1), 5);
  sums.Add(At(4), 9);
  RowSums again(0);
  uint64_t step = 0, floats = 0;
  ASSERT_TRUE(again.Decode(sums.Encode(7, 33), &step, &floats).ok());
  EXPECT_EQ(step, 7u);
  EXPECT_EQ(floats, 33u);
  EXPECT_EQ(again.expire_after_steps(), 10u);
  EXPECT_EQ(again.hash(), 14u);
  EXPECT_EQ(again.DropExpired(12), 1u);
  EXPECT_EQ(again.hash(), 9u);
}

TEST(RowSums, RefuseBytesThatTheyDidNotWrite) {
  RowSums sums(0);
  uint64_t step = 0, floats = 0;
  const std::string bytes = sums.Encode(1, 2);
  EXPECT_EQ(sums.Decode("", &step, &floats).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(sums.Decode(bytes + "x", &step, &floats).code(), absl::StatusCode::kDataLoss);
  std::string other = bytes;
  other[0] = 9;
  EXPECT_EQ(sums.Decode(other, &step, &floats).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace hearth
