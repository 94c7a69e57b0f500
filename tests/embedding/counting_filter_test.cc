#include "embedding/counting_filter.h"

#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "embedding/row_record.h"
#include "gtest/gtest.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

constexpr TableNumber kTable = 2;
constexpr uint32_t kShard = 5;
constexpr uint64_t kIds = 40;

Table Config(uint32_t expire_after_steps, uint64_t counters, uint32_t count_min = 3) {
  Table config;
  config.set_name("t");
  config.set_expire_after_steps(expire_after_steps);
  config.mutable_admission()->set_counter(Admission::BLOOM);
  config.mutable_admission()->set_bloom_counters(counters);
  config.mutable_admission()->set_count_min(count_min);
  return config;
}

uint32_t GenerationOf(uint64_t step, uint32_t expire) { return expire == 0 ? 0 : static_cast<uint32_t>(step / expire); }

struct Seen {
  uint64_t step;
  uint64_t id;
  uint32_t occurrences;
};

// Steps ascend, some are left out, some see nothing for long.
std::vector<Seen> DrawSeen(uint64_t seed, uint64_t steps) {
  Random random(seed);
  std::vector<Seen> seen;
  for (uint64_t step = 1; step <= steps; ++step) {
    if (random.Below(30) == 0) step += random.Below(40);
    for (uint64_t i = random.Below(6); i > 0; --i) {
      seen.push_back({step, random.Below(kIds), 1 + static_cast<uint32_t>(random.Below(3))});
    }
  }
  return seen;
}

// What was seen in the steps that count at `step`, added up.
uint32_t Truth(const std::vector<Seen>& seen, size_t count, uint64_t id, uint64_t step, uint32_t expire_after_steps) {
  uint32_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    const bool counts = expire_after_steps == 0 || seen[i].step / expire_after_steps + 1 >= step / expire_after_steps;
    if (seen[i].id == id && counts) sum += seen[i].occurrences;
  }
  return sum;
}

void SaveTo(KvStore* store, uint32_t generation, CountingFilter* filter) {
  filter->Save(generation, [&](KvKey key, absl::string_view value) {
    ASSERT_TRUE(store->Write({{key, value, false}}).ok());
  });
}

std::unique_ptr<CountingFilter> LoadFrom(KvStore* store, const Table& config, uint64_t step) {
  auto filter = CountingFilter::Load(config, kTable, kShard, step, {}, store);
  EXPECT_TRUE(filter.ok()) << filter.status();
  return *std::move(filter);
}

TEST(CountingFilter, CountsWhatTheStepsThatCountHaveSeenAndNothingElse) {
  for (const uint32_t expire : {0u, 1u, 2u, 7u, 50u, 1000u}) {
    const std::vector<Seen> seen = DrawSeen(expire, 150);
    CountingFilter filter(Config(expire, 100000), kTable, kShard);
    for (size_t i = 0; i < seen.size(); ++i) {
      filter.Add(GenerationOf(seen[i].step, expire), MakeSign(kTable, seen[i].id), seen[i].occurrences);
      for (uint64_t ahead = 0; ahead < 2 * expire + 2; ahead += 1 + expire / 3) {
        const uint64_t step = seen[i].step + ahead, id = (seen[i].id + ahead) % kIds;
        ASSERT_EQ(filter.Estimate(GenerationOf(step, expire), MakeSign(kTable, id)),
                  Truth(seen, i + 1, id, step, expire))
            << "expire " << expire << " step " << step;
      }
    }
  }
}

TEST(CountingFilter, RemembersAsLongAsARowWouldLiveAndForgetsBeforeTwiceThat) {
  for (const uint32_t expire : {1u, 2u, 5u, 64u}) {
    for (uint64_t step = 1; step <= 3 * expire; ++step) {
      CountingFilter filter(Config(expire, 1000), kTable, kShard);
      const Sign sign = MakeSign(kTable, 9);
      filter.Add(GenerationOf(step, expire), sign, 2);
      EXPECT_EQ(filter.Estimate(GenerationOf(step + expire, expire), sign), 2u);
      EXPECT_EQ(filter.Estimate(GenerationOf(step + 2 * expire, expire), sign), 0u);
      filter.Add(GenerationOf(step + expire, expire), sign, 1);
      EXPECT_EQ(filter.Estimate(GenerationOf(step + expire, expire), sign), 3u);
    }
  }
}

TEST(CountingFilter, NeverEstimatesBelowTheTruthWhereSignsShareCounters) {
  for (const uint32_t expire : {0u, 3u, 20u}) {
    const std::vector<Seen> seen = DrawSeen(expire + 100, 120);
    CountingFilter filter(Config(expire, 64), kTable, kShard);
    for (size_t i = 0; i < seen.size(); ++i) {
      filter.Add(GenerationOf(seen[i].step, expire), MakeSign(kTable, seen[i].id), seen[i].occurrences);
      for (uint64_t id = 0; id < kIds; ++id) {
        ASSERT_GE(filter.Estimate(GenerationOf(seen[i].step, expire), MakeSign(kTable, id)),
                  Truth(seen, i + 1, id, seen[i].step, expire));
      }
    }
  }
}

TEST(CountingFilter, IsTheSameWhetherSavedAtEveryStepOrNeverAndWhenItComesBackFromAnyOfItsCuts) {
  for (const uint32_t count_min : {3u, 1000u}) {
    for (const uint32_t expire : {0u, 1u, 3u, 20u}) {
      const Table config = Config(expire, 70000, count_min);  // more than a chunk
      const std::vector<Seen> seen = DrawSeen(expire + 7, 70);
      CountingFilter untouched(config, kTable, kShard);
      auto saved = std::make_unique<CountingFilter>(config, kTable, kShard);
      auto store = MakeMapStore();
      Random random(expire);
      size_t next = 0;
      for (uint64_t step = 1; step <= 90; ++step) {
        for (; next < seen.size() && seen[next].step == step; ++next) {
          for (CountingFilter* filter : {&untouched, saved.get()}) {
            filter->Add(GenerationOf(step, expire), MakeSign(kTable, seen[next].id), seen[next].occurrences);
          }
        }
        ASSERT_EQ(saved->Hash(GenerationOf(step, expire)), untouched.Hash(GenerationOf(step, expire)));
        SaveTo(store.get(), GenerationOf(step, expire), saved.get());
        ASSERT_EQ(saved->Hash(GenerationOf(step, expire)), untouched.Hash(GenerationOf(step, expire)));
        auto copy = LoadFrom(store.get(), config, step);
        ASSERT_EQ(copy != nullptr ? copy->Hash(GenerationOf(step, expire)) : 0,
                  untouched.Hash(GenerationOf(step, expire)))
            << "expire " << expire << " " << step;
        for (uint64_t id = 0; copy != nullptr && id < kIds; ++id) {
          const uint64_t later = step + random.Below(2 * expire + 2);
          ASSERT_EQ(copy->Estimate(GenerationOf(later, expire), MakeSign(kTable, id)),
                    untouched.Estimate(GenerationOf(later, expire), MakeSign(kTable, id)));
        }
        if (copy != nullptr && random.Below(4) == 0) saved = std::move(copy);
      }
    }
  }
}

TEST(CountingFilter, WritesWhatChangedAndHoldsWhatCounts) {
  const Table config = Config(10, 200000);
  CountingFilter filter(config, kTable, kShard);
  EXPECT_EQ(filter.bytes(), 0u);
  int writes = 0;
  const auto save = [&](uint64_t step) {
    writes = 0;
    filter.Save(GenerationOf(step, 10), [&](KvKey, absl::string_view) { ++writes; });
  };
  filter.Add(GenerationOf(5, 10), MakeSign(kTable, 1), 1);
  save(5);
  EXPECT_GT(writes, 0);
  EXPECT_LE(writes, 4);
  save(6);
  EXPECT_EQ(writes, 0);
  EXPECT_EQ(filter.bytes(), 200000u);
  filter.Add(GenerationOf(15, 10), MakeSign(kTable, 1), 1);
  EXPECT_EQ(filter.bytes(), 400000u);
  save(20);
  EXPECT_GT(writes, 0);
  EXPECT_EQ(filter.bytes(), 200000u) << "generation 0 counts no more";
  save(30);
  EXPECT_EQ(filter.bytes(), 0u);
  EXPECT_EQ(writes, 0);
  EXPECT_EQ(filter.Hash(3), 0u);
}

TEST(CountingFilter, TakesWhatAnotherExpiryCountedAsSeenAtThatStep) {
  for (const uint32_t before : {0u, 1u, 4u, 30u}) {
    for (const uint32_t after : {0u, 1u, 4u, 9u, 100u}) {
      if (before == after) continue;
      for (const uint64_t resumed : {1u, 8u, 29u, 31u, 60u}) {
        const std::vector<Seen> seen = DrawSeen(before * 1000 + resumed, resumed);
        auto store = MakeMapStore();
        CountingFilter old(Config(before, 100000), kTable, kShard);
        size_t count = 0;
        for (uint64_t step = 1; step <= resumed; ++step) {
          for (; count < seen.size() && seen[count].step == step; ++count) {
            old.Add(GenerationOf(step, before), MakeSign(kTable, seen[count].id), seen[count].occurrences);
          }
          SaveTo(store.get(), GenerationOf(step, before), &old);
        }
        const Table config = Config(after, 100000);
        auto filter = LoadFrom(store.get(), config, resumed);
        if (filter == nullptr) continue;
        std::vector<Seen> merged;
        for (uint64_t id = 0; id < kIds; ++id) {
          const uint32_t counts = Truth(seen, count, id, resumed, before);
          if (counts > 0) merged.push_back({resumed, id, counts});
        }
        const auto expect_merged = [&](const CountingFilter& is) {
          for (uint64_t id = 0; id < kIds; ++id) {
            for (const uint64_t step : {resumed, resumed + 1, resumed + after, resumed + 2 * after}) {
              ASSERT_EQ(is.Estimate(GenerationOf(step, after), MakeSign(kTable, id)),
                        Truth(merged, merged.size(), id, step, after));
            }
          }
        };
        expect_merged(*filter);
        const uint64_t hash = filter->Hash(GenerationOf(resumed, after));
        // Nothing of the old rule comes back behind the next cut.
        SaveTo(store.get(), GenerationOf(resumed, after), filter.get());
        auto again = LoadFrom(store.get(), config, resumed);
        if (merged.empty()) continue;
        ASSERT_NE(again, nullptr);
        EXPECT_EQ(again->Hash(GenerationOf(resumed, after)), hash);
        expect_merged(*again);
      }
    }
  }
}

TEST(CountingFilter, RefusesChunksThatAreNotItsOwn) {
  const Table config = Config(4, 1000);
  auto store = MakeMapStore();
  CountingFilter filter(config, kTable, kShard);
  filter.Add(GenerationOf(9, 4), MakeSign(kTable, 1), 1);
  SaveTo(store.get(), GenerationOf(9, 4), &filter);
  EXPECT_EQ(CountingFilter::Load(Config(4, 1001), kTable, kShard, 9, {}, store.get()).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(CountingFilter::Load(config, kTable, kShard, 7, {}, store.get()).status().code(),
            absl::StatusCode::kDataLoss)
      << "of a generation that step 7 has not reached";
  const KvKey key = FilterChunkKey(kTable, kShard, {0, true, 0});
  for (const size_t bytes : {0u, 7u, 8u, 9u}) {
    ASSERT_TRUE(store->Write({{key, std::string(bytes, '\1'), false}}).ok());
    EXPECT_EQ(CountingFilter::Load(config, kTable, kShard, 9, {}, store.get()).status().code(),
              absl::StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace hearth
