#include "embedding/row_index.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "embedding/row_arena.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

// An index over an arena, as the memory tier has it.
struct Places {
  RowArena arena{1};
  RowIndex index;

  explicit Places(uint64_t rows_max) : Places(rows_max, rows_max) {}
  Places(uint64_t rows_full, uint64_t rows_max) : index(&arena, rows_full, rows_max) {
    EXPECT_TRUE(arena.Open(sizeof(RowHead), rows_max).ok());
    EXPECT_TRUE(index.Reserve(0).ok());
  }
  uint32_t Insert(Sign sign) {
    EXPECT_TRUE(arena.Reserve(1).ok());
    EXPECT_TRUE(index.Reserve(arena.rows() + 1).ok());
    const uint32_t slot = arena.Take(sign);
    index.Insert(RowIndex::HashOf(sign), slot);
    return slot;
  }
  void Remove(uint32_t slot) {
    index.Remove(slot);
    arena.Release(slot);
  }
  uint32_t Find(Sign sign) const {
    const uint64_t hash = RowIndex::HashOf(sign);
    const uint32_t slot = index.Find(sign, hash);
    EXPECT_TRUE(slot == RowIndex::kNone || index.Candidate(hash) != RowIndex::kNone);
    return slot;
  }
};

TEST(RowIndex, EqualsAMapUnderRandomInsertsAndRemoves) {
  for (const uint64_t rows_max : {1u, 2u, 7u, 100u, 5000u}) {
    Random random(rows_max);
    Places places(rows_max);
    std::map<Sign, uint32_t> map;
    std::vector<Sign> signs;
    for (uint64_t i = 0; i < 3 * rows_max + 5; ++i) signs.push_back(MakeSign(1, random.Next()));
    for (uint32_t round = 0; round < 20 * rows_max + 100; ++round) {
      const Sign sign = signs[random.Below(signs.size())];
      if (map.count(sign)) {
        places.Remove(map[sign]);
        map.erase(sign);
      } else if (map.size() < rows_max) {
        map[sign] = places.Insert(sign);
      }
      const Sign asked = signs[random.Below(signs.size())];
      const auto it = map.find(asked);
      ASSERT_EQ(places.Find(asked), it == map.end() ? RowIndex::kNone : it->second);
    }
    for (const Sign sign : signs) {
      const auto it = map.find(sign);
      ASSERT_EQ(places.Find(sign), it == map.end() ? RowIndex::kNone : it->second);
    }
  }
}

TEST(RowIndex, IsTheSameBeyondWhatItIsSizedFor) {
  constexpr uint64_t kRowsMax = 30000;
  Places places(100, kRowsMax);
  Random random(8);
  std::vector<std::pair<Sign, uint32_t>> rows;
  uint64_t id = 0;
  for (int round = 0; round < 3; ++round) {
    for (; rows.size() < kRowsMax; ++id) rows.emplace_back(MakeSign(1, id), places.Insert(MakeSign(1, id)));
    for (const auto& [sign, slot] : rows) ASSERT_EQ(places.Find(sign), slot);
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(places.Find(MakeSign(1, id + 1 + random.Below(1 << 30))), RowIndex::kNone);
    for (int i = 0; i < 5000; ++i) {
      const size_t gone = random.Below(rows.size());
      places.Remove(rows[gone].second);
      ASSERT_EQ(places.Find(rows[gone].first), RowIndex::kNone);
      rows[gone] = rows.back();
      rows.pop_back();
    }
  }
}

TEST(RowIndex, LosesNothingWhileItGrowsAndShrinks) {
  constexpr uint64_t kRowsMax = 60000;
  Random random(1);
  Places places(kRowsMax);
  std::vector<std::pair<Sign, uint32_t>> rows;
  bool grew = false;
  for (uint64_t id = 0; rows.size() < kRowsMax; ++id) {
    rows.emplace_back(MakeSign(1, id), places.Insert(MakeSign(1, id)));
    grew |= places.index.growing();
    for (int i = 0; i < 8; ++i) {  // also of what has moved, and of what has not
      const auto& [sign, slot] = rows[random.Below(rows.size())];
      ASSERT_EQ(places.Find(sign), slot) << "of " << rows.size();
      ASSERT_EQ(places.Find(MakeSign(1, 1 << 20 | random.Next())), RowIndex::kNone);
    }
    if (id % 5 != 4) continue;
    const size_t gone = random.Below(rows.size());
    places.Remove(rows[gone].second);
    ASSERT_EQ(places.Find(rows[gone].first), RowIndex::kNone);
    rows[gone] = rows.back();
    rows.pop_back();
  }
  EXPECT_TRUE(grew);
  for (const auto& [sign, slot] : rows) ASSERT_EQ(places.Find(sign), slot);
}

// Somebody may choose ids so that they meet: it becomes slow, and nothing else.
TEST(RowIndex, SignsThatAllMeetInTheLastBucketAreKeptWhereverTheyGo) {
  constexpr uint64_t kCrowd = 1500, kOthers = 6000;
  Places places(kCrowd + kOthers);
  std::map<Sign, uint32_t> rows;
  Random random(3);
  uint64_t last = kOthers;  // the last id that was looked at
  const auto next_of_crowd = [&] {
    do ++last;
    while (RowIndex::HashOf(MakeSign(1, last)) >> 52 != 0xfff);
    return MakeSign(1, last);
  };
  for (uint64_t i = 0; i < kOthers; ++i) {
    if (i % 4 == 0) {
      const Sign sign = next_of_crowd();
      rows[sign] = places.Insert(sign);
    }
    rows[MakeSign(1, i)] = places.Insert(MakeSign(1, i));
    if (i % 500 == 0) {
      for (const auto& [sign, slot] : rows) ASSERT_EQ(places.Find(sign), slot);
    }
  }
  while (!rows.empty()) {
    const auto row = std::next(rows.begin(), static_cast<ptrdiff_t>(random.Below(std::min<size_t>(rows.size(), 50))));
    places.Remove(row->second);
    ASSERT_EQ(places.Find(row->first), RowIndex::kNone);
    rows.erase(row);
    if (rows.size() % 500 != 0) continue;
    for (const auto& [sign, slot] : rows) ASSERT_EQ(places.Find(sign), slot);
  }
}

TEST(RowIndex, SpreadsTheSignsOfOneLogicalShard) {
  // All buckets are used although the shard map picked the signs by Mix64: a crowd would pass full buckets without end.
  std::vector<uint64_t> hashes;
  for (uint64_t id = 0; id < 1000000; ++id) {
    if (LogicalShardOf(MakeSign(1, id), 64) == 5) hashes.push_back(RowIndex::HashOf(MakeSign(1, id)) >> 61);
  }
  for (uint64_t eighth = 0; eighth < 8; ++eighth) {
    EXPECT_NEAR(static_cast<double>(std::count(hashes.begin(), hashes.end(), eighth)) / hashes.size(), 0.125, 0.01);
  }
}

TEST(RowArena, KeepsRowsWhereTheyAreAndReusesSlots) {
  RowArena arena(1);
  ASSERT_TRUE(arena.Open(20, 100000).ok());
  std::vector<char*> rows;
  for (uint32_t i = 0; i < 100000; ++i) {
    ASSERT_TRUE(arena.Reserve(1).ok());
    const uint32_t slot = arena.Take(MakeSign(1, i));
    rows.push_back(arena.row(slot) + sizeof(RowHead));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(rows.back()) % 4, 0u);
    std::fill_n(rows.back(), 4, static_cast<char>(i));
  }
  EXPECT_EQ(arena.free(), 0u);
  for (uint32_t i = 0; i < 100000; ++i) ASSERT_EQ(std::count(rows[i], rows[i] + 4, static_cast<char>(i)), 4);
  arena.Release(7);
  EXPECT_EQ(arena.sign(7), 0u);
  ASSERT_TRUE(arena.Reserve(1).ok());
  EXPECT_EQ(arena.Take(MakeSign(1, 5)), 7u);
}

TEST(SlotSet, GivesEachSlotOnceAscending) {
  SlotSet set;
  ASSERT_TRUE(set.Open(100000).ok());
  std::vector<uint32_t> taken;
  set.TakeFirst(10, &taken);
  EXPECT_TRUE(taken.empty());
  Random random(5);
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(set.Reserve(30000u * static_cast<uint32_t>(round + 1)).ok());
    std::set<uint32_t> expected;
    for (int i = 0; i < 5000; ++i) {
      const uint32_t slot = static_cast<uint32_t>(random.Below(30000u * static_cast<uint32_t>(round + 1)));
      set.Add(slot);
      expected.insert(slot);
    }
    EXPECT_EQ(set.size(), expected.size());
    std::vector<uint32_t> all;
    while (set.size() > 0) {
      set.TakeFirst(1 + random.Below(200), &taken);
      ASSERT_FALSE(taken.empty());
      all.insert(all.end(), taken.begin(), taken.end());
    }
    EXPECT_EQ(all, std::vector<uint32_t>(expected.begin(), expected.end()));
  }
}

TEST(RowArena, TakesMemoryAsItFills) {
  RowArena arena(1);
  // 64 GiB of addresses, more than a small machine's memory. Not a terabyte: ThreadSanitizer leaves a process 1.5 TB of
  // addresses, the kernel's random start takes up to one of them, and one Open in ten found too few left.
  const absl::Status opened = arena.Open(1024, uint64_t{1} << 26);
  ASSERT_TRUE(opened.ok()) << opened;
  EXPECT_EQ(arena.bytes_committed(), 0u);
  ASSERT_TRUE(arena.Reserve(1000).ok());
  EXPECT_LT(arena.bytes_committed(), uint64_t{8} << 20);
  // And gives it back as it empties from behind.
  std::vector<uint32_t> slots;
  for (uint64_t id = 0; id < 40000; ++id) {
    ASSERT_TRUE(arena.Reserve(1).ok());
    slots.push_back(arena.Take(MakeSign(1, id)));
  }
  EXPECT_GE(arena.bytes_committed(), uint64_t{40} << 20);
  for (size_t i = 1000; i < slots.size(); ++i) arena.Release(slots[i]);
  arena.Trim();
  EXPECT_EQ(arena.slots(), 1000u);
  EXPECT_LT(arena.bytes_committed(), uint64_t{17} << 20);
  ASSERT_TRUE(arena.Reserve(5000).ok());
  EXPECT_EQ(arena.Take(MakeSign(1, 7)), 1000u);
}

}  // namespace
}  // namespace hearth
