#include "embedding/row_index.h"

#include <algorithm>
#include <map>
#include <vector>

#include "embedding/row_arena.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

TEST(RowIndex, EqualsAMapUnderRandomInsertsAndRemoves) {
  for (const uint64_t rows_max : {1u, 2u, 7u, 100u, 5000u}) {
    Random random(rows_max);
    RowIndex index(rows_max);
    std::map<Sign, uint32_t> map;
    std::vector<Sign> signs;
    for (uint64_t i = 0; i < 3 * rows_max + 5; ++i) signs.push_back(MakeSign(1 + i % 3, random.Next()));
    ASSERT_TRUE(index.Reserve(0).ok());
    for (uint32_t round = 0; round < 20 * rows_max + 100; ++round) {
      const Sign sign = signs[random.Below(signs.size())];
      if (map.count(sign)) {
        index.Remove(sign);
        map.erase(sign);
      } else if (map.size() < rows_max) {
        ASSERT_TRUE(index.Reserve(map.size() + 1).ok());
        index.Insert(sign, RowIndex::HashOf(sign), round);
        map[sign] = round;
      }
      const Sign asked = signs[random.Below(signs.size())];
      const auto it = map.find(asked);
      ASSERT_EQ(index.Find(asked, RowIndex::HashOf(asked)), it == map.end() ? RowIndex::kNone : it->second);
    }
    for (const Sign sign : signs) {
      const auto it = map.find(sign);
      ASSERT_EQ(index.Find(sign, RowIndex::HashOf(sign)), it == map.end() ? RowIndex::kNone : it->second);
    }
  }
}

TEST(RowIndex, SpreadsTheSignsOfOneLogicalShard) {
  // All buckets are used although the shard map picked the signs by Mix64: a crowd would pass full buckets without end.
  RowIndex index(20000);
  ASSERT_TRUE(index.Reserve(20000).ok());
  uint32_t rows = 0;
  for (uint64_t id = 0; rows < 20000; ++id) {
    const Sign sign = MakeSign(1, id);
    if (LogicalShardOf(sign, 64) != 5) continue;
    index.Insert(sign, RowIndex::HashOf(sign), rows++);
  }
  std::vector<uint64_t> hashes;
  for (uint64_t id = 0; id < 1000000; ++id) {
    if (LogicalShardOf(MakeSign(1, id), 64) == 5) hashes.push_back(RowIndex::HashOf(MakeSign(1, id)) >> 61);
  }
  for (uint64_t eighth = 0; eighth < 8; ++eighth) {
    EXPECT_NEAR(static_cast<double>(std::count(hashes.begin(), hashes.end(), eighth)) / hashes.size(), 0.125, 0.01);
  }
}

TEST(RowArena, KeepsRowsWhereTheyAreAndReusesSlots) {
  RowArena arena;
  ASSERT_TRUE(arena.Open(20, 100000).ok());
  std::vector<char*> rows;
  for (uint32_t i = 0; i < 100000; ++i) {
    ASSERT_TRUE(arena.Reserve(1).ok());
    const uint32_t slot = arena.Take(MakeSign(1, i));
    rows.push_back(arena.row(slot));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(rows.back()) % 16, 0u);
    std::fill_n(rows.back(), 20, static_cast<char>(i));
  }
  EXPECT_EQ(arena.free(), 0u);
  for (uint32_t i = 0; i < 100000; ++i) ASSERT_EQ(std::count(rows[i], rows[i] + 20, static_cast<char>(i)), 20);
  arena.Release(7);
  EXPECT_EQ(arena.sign(7), 0u);
  ASSERT_TRUE(arena.Reserve(1).ok());
  EXPECT_EQ(arena.Take(MakeSign(1, 5)), 7u);
}

TEST(RowArena, TakesMemoryAsItFills) {
  RowArena arena;
  // 64 GiB of addresses, more than a small machine's memory. Not a terabyte: ThreadSanitizer leaves a process 1.5 TB of
  // addresses, the kernel's random start takes up to one of them, and one Open in ten found too few left.
  const absl::Status opened = arena.Open(1024, uint64_t{1} << 26);
  ASSERT_TRUE(opened.ok()) << opened;
  EXPECT_EQ(arena.bytes(), 0u);
  ASSERT_TRUE(arena.Reserve(1000).ok());
  EXPECT_LT(arena.bytes(), uint64_t{8} << 20);
}

}  // namespace
}  // namespace hearth
