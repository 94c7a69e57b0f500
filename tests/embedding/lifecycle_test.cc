#include "embedding/lifecycle.h"

#include <cmath>

#include "common/base/env.h"
#include "embedding/expiry.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

Admission Bloom(uint64_t counters, uint32_t hashes, uint32_t count_min) {
  Admission config;
  config.set_counter(Admission::BLOOM);
  config.set_bloom_counters(counters);
  config.set_bloom_hashes(hashes);
  config.set_count_min(count_min);
  return config;
}

TEST(Lifecycle, ARecordExpiresAfterItsStepsAndNotAtThem) {
  const RowMeta meta{1, 10, 0, 0};
  const auto expired = [](const RowMeta& meta, uint32_t steps, uint64_t step) {
    return IsExpired(meta, Expiry(ExpiryRule{steps, 0}).HorizonAt(step));
  };
  EXPECT_FALSE(expired(meta, 0, 1000000));
  EXPECT_FALSE(expired(meta, 3, 13));
  EXPECT_TRUE(expired(meta, 3, 14));
  EXPECT_FALSE(expired(RowMeta{1, 0, 0, 0}, 5, 5));
  EXPECT_TRUE(expired(RowMeta{1, 0, 0, 0}, 5, 6));
  EXPECT_FALSE(expired(RowMeta{1, 0xffffffff, 0, 0}, 0x7fffffff, 0xffffffff));
}

TEST(Lifecycle, CountsSaturate) {
  EXPECT_EQ(AddSaturating(0xfffffffe, 1), 0xffffffffu);
  EXPECT_EQ(AddSaturating(0xfffffffe, 2), 0xffffffffu);
}

TEST(Lifecycle, ScoresOrderByWhatTheyAreNamedAfter) {
  const RowMeta often_long_ago{100, 10, 0, 0}, once_now{1, 5000, 0, 0}, twice_now{2, 4999, 0, 0};
  EXPECT_LT(ScoreOf(Table::LRU, often_long_ago), ScoreOf(Table::LRU, once_now));
  EXPECT_GT(ScoreOf(Table::LFU, often_long_ago), ScoreOf(Table::LFU, once_now));
  EXPECT_LT(ScoreOf(Table::LRU_LFU, often_long_ago), ScoreOf(Table::LRU_LFU, once_now));
  EXPECT_LT(ScoreOf(Table::LRU_LFU, once_now), ScoreOf(Table::LRU_LFU, twice_now));
}

TEST(CountingBloom, NeverEstimatesBelowTheTruth) {
  CountingBloom filter(Bloom(500, 3, 100));
  std::vector<uint32_t> truth(400);
  Random random(1);
  for (int i = 0; i < 3000; ++i) {
    const uint64_t id = random.Below(truth.size());
    const uint32_t occurrences = 1 + static_cast<uint32_t>(random.Below(3));
    filter.Add(MakeSign(1, id), occurrences);
    truth[id] += occurrences;
  }
  for (uint64_t id = 0; id < truth.size(); ++id) EXPECT_GE(filter.Estimate(MakeSign(1, id)), truth[id]);
}

TEST(CountingBloom, MistakesUnseenSignsForSeenOnesNoMoreOftenThanItsBound) {
  for (const uint32_t hashes : {1u, 4u, 7u}) {
    const double counters = 50000, seen = 8000, unseen = 40000;
    CountingBloom filter(Bloom(static_cast<uint64_t>(counters), hashes, 2));
    for (uint64_t id = 0; id < seen; ++id) filter.Add(MakeSign(1, id), 1);
    double mistakes = 0;
    for (uint64_t id = 0; id < unseen; ++id) mistakes += filter.Estimate(MakeSign(1, 1000000 + id)) > 0 ? 1 : 0;
    const double bound = std::pow(1 - std::exp(-seen * hashes / counters), hashes);
    EXPECT_LT(mistakes / unseen, bound * 1.1 + 4 * std::sqrt(bound / unseen)) << hashes;
  }
}

TEST(CountingBloom, StopsAtItsLargestCounterInsteadOfWrapping) {
  CountingBloom bytes(Bloom(100, 2, 200)), words(Bloom(100, 2, 1000));
  for (CountingBloom* filter : {&bytes, &words}) filter->Add(MakeSign(1, 1), 0xffffffff);
  bytes.Add(MakeSign(1, 1), 10);
  words.Add(MakeSign(1, 1), 10);
  EXPECT_EQ(bytes.Estimate(MakeSign(1, 1)), 255u);
  EXPECT_EQ(words.Estimate(MakeSign(1, 1)), 0xffffffffu);
  EXPECT_EQ(bytes.bytes(), 100u);
  EXPECT_EQ(words.bytes(), 400u);
}

TEST(CountingBloom, ComesBackFromItsChunks) {
  for (const uint32_t count_min : {2u, 1000u}) {
    CountingBloom filter(Bloom(200001, 4, count_min));
    EXPECT_GT(filter.chunks(), 2u);
    for (uint64_t id = 0; id < 20; ++id) filter.Add(MakeSign(1, id), 3);
    CountingBloom copy(Bloom(200001, 4, count_min));
    for (uint64_t chunk = 0; chunk < filter.chunks(); ++chunk) {
      if (!filter.ChunkChanged(chunk)) continue;
      EXPECT_TRUE(copy.LoadChunk(chunk, filter.Chunk(chunk)));
    }
    EXPECT_EQ(copy.Hash({1, 2}), filter.Hash({1, 2}));
    EXPECT_NE(copy.Hash({1, 3}), filter.Hash({1, 2}));
    EXPECT_FALSE(copy.LoadChunk(filter.chunks(), "x"));
    EXPECT_FALSE(copy.LoadChunk(0, "x"));
    filter.MarkSaved();
    for (uint64_t chunk = 0; chunk < filter.chunks(); ++chunk) EXPECT_FALSE(filter.ChunkChanged(chunk));
  }
}

}  // namespace
}  // namespace hearth
