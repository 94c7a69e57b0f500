#include "embedding/row_sums.h"

#include "gtest/gtest.h"

namespace hearth {
namespace {

RowMeta At(uint32_t last_step, uint32_t flags = kRowAdmitted) { return {1, last_step, flags, 1}; }

TEST(RowSums, WhatIsAddedAndRemovedInAnyOrderLeavesTheRest) {
  RowSums sums(ExpiryRule{});
  sums.Remove(At(3), 70);  // mod 2^64: the order does not matter
  sums.Add(At(1), 5);
  sums.Add(At(3), 70);
  sums.Add(At(2, 0), 11);  // a counter of a sign without a row
  EXPECT_EQ(sums.hash(), 16u);
  EXPECT_EQ(sums.rows(), 1u);
  EXPECT_EQ(sums.records(), 2u);
}

TEST(RowSums, AStepThatExpiresDropsOutWhole) {
  RowSums sums(ExpiryRule{10, 0});
  sums.Add(At(1), 5);
  sums.Add(At(1), 6);
  sums.Add(At(1, 0), 7);
  sums.Add(At(2), 8);
  EXPECT_EQ(sums.DropExpired(11 - 10), 0u);  // 1 + 10 is not before 11
  EXPECT_EQ(sums.DropExpired(12 - 10), 2u);
  EXPECT_EQ(sums.hash(), 8u);
  EXPECT_EQ(sums.rows(), 1u);
}

TEST(RowSums, ComeBackFromTheirBytesWithTheRuleThatTheyWereKeptBy) {
  RowSums sums(ExpiryRule{10, 0});
  sums.Add(At(1), 5);
  sums.Add(At(4), 9);
  RowSums again(ExpiryRule{});
  uint64_t step = 0, floats = 0;
  ASSERT_TRUE(again.Decode(sums.Encode(7, 33), &step, &floats).ok());
  EXPECT_EQ(step, 7u);
  EXPECT_EQ(floats, 33u);
  EXPECT_EQ(again.rule().steps, 10u);
  EXPECT_EQ(again.hash(), 14u);
  EXPECT_EQ(again.DropExpired(12 - 10), 1u);
  EXPECT_EQ(again.hash(), 9u);
}

TEST(RowSums, ByTimeWhatLiesBeforeAMarkDropsOutWhole) {
  RowSums sums(ExpiryRule{0, 2});
  sums.Add(At(1), 5);
  sums.Mark(2);
  sums.Add(At(2), 6);
  sums.Add(At(8, 0), 7);
  sums.Mark(9);
  sums.Add(At(9), 8);
  sums.Remove(At(2), 6);
  sums.Add(At(12), 6);
  EXPECT_EQ(sums.DropExpired(2), 1u);
  EXPECT_EQ(sums.hash(), 21u);
  RowSums again(ExpiryRule{0, 2}, {2, 9});
  uint64_t step = 0, floats = 0;
  ASSERT_TRUE(again.Decode(sums.Encode(12, 3), &step, &floats).ok());
  EXPECT_TRUE(again.rule() == (ExpiryRule{0, 2}));
  for (RowSums* one : {&sums, &again}) {
    EXPECT_EQ(one->records(), 3u);
    EXPECT_EQ(one->DropExpired(9), 0u) << "a counter is no row";
    EXPECT_EQ(one->hash(), 14u);
    one->Remove(At(9), 8);
    EXPECT_EQ(one->hash(), 6u);
    EXPECT_EQ(one->rows(), 1u);
  }
  RowSums without(ExpiryRule{0, 2});
  EXPECT_EQ(without.Decode(sums.Encode(12, 3), &step, &floats).code(), absl::StatusCode::kDataLoss);
}

TEST(RowSums, RefuseBytesThatTheyDidNotWrite) {
  RowSums sums(ExpiryRule{});
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
