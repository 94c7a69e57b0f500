#include "embedding/memory_budget.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/base/env.h"
#include "common/base/status.h"
#include "gtest/gtest.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

// Some tables over one store, with one bound on their memory or with room for all rows.
class Tables {
 public:
  Tables(const std::vector<uint32_t>& dims, uint64_t bytes_max) : store_(MakeMapStore()) {
    std::vector<EmbeddingTable*> borrowed;
    for (const uint32_t dim : dims) {
      TableOptions options;
      options.number = static_cast<TableNumber>(tables_.size() + 1);
      options.shards = 4;
      options.config.set_dim(dim);
      options.config.mutable_optimizer()->set_kind(Optimizer::ROWWISE_ADAGRAD);
      options.memory_rows_max = bytes_max > 0 ? MemoryBudget::RowsWithin(bytes_max, dim * sizeof(float)) : 10'000'000;
      tables_.push_back(EmbeddingTable::Open(options, store_.get()).value());
      borrowed.push_back(tables_.back().get());
    }
    if (bytes_max > 0) budget_ = std::make_unique<MemoryBudget>(bytes_max, borrowed);
  }

  // One step for table `number`: `ids` ascending.
  void Train(size_t table, const std::vector<uint64_t>& ids) {
    if (budget_ != nullptr) HEARTH_CHECK(budget_->Deal(true).ok());
    std::vector<Sign> signs;
    for (const uint64_t id : ids) signs.push_back(MakeSign(static_cast<TableNumber>(table + 1), id));
    const std::vector<uint32_t> occurrences(signs.size(), 1);
    std::vector<float> rows(signs.size() * dim(table));
    ++step_;
    for (size_t other = 0; other < tables_.size(); ++other) {  // as a server does it
      if (other != table) HEARTH_CHECK(tables_[other]->Push(step_, 0, {}).ok());
    }
    HEARTH_CHECK(tables_[table]->Pull(step_, signs, occurrences, rows.data()).ok());
    for (float& x : rows) x = 0.5f - x;
    HEARTH_CHECK(tables_[table]->Push(step_, 2, {PushPart{signs, occurrences, rows}}).ok());
  }
  uint64_t Hash() {
    uint64_t hash = 0;
    for (auto& table : tables_) hash += table->Snapshot(step_).value();
    return hash;
  }
  uint64_t Bytes() const {
    uint64_t bytes = 0;
    for (const auto& table : tables_) bytes += table->stats().bytes_memory;
    return bytes;
  }
  EmbeddingTableStats stats(size_t table) const { return tables_[table]->stats(); }

 private:
  uint32_t dim(size_t table) const {
    return static_cast<uint32_t>(table == 0 ? 4 : 64);  // as the tests below make them
  }

  std::unique_ptr<KvStore> store_;
  std::vector<std::unique_ptr<EmbeddingTable>> tables_;
  std::unique_ptr<MemoryBudget> budget_;
  uint64_t step_ = 0;
};

std::vector<uint64_t> Ids(Random* random, uint64_t below, size_t count) {
  std::vector<uint64_t> ids;
  while (ids.size() < count) ids.push_back(random->Below(below));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

constexpr uint64_t kBytesMax = uint64_t{64} << 20;
constexpr double kBytesMost = 1.1 * kBytesMax;  // here a step's rows are 2 % of it, and those of one write 7 %

TEST(MemoryBudget, HoldsSmallTablesWholeAndDealsTheRestToTheLargeOnesWithinItsBound) {
  Tables bound({4, 64, 64}, kBytesMax), whole({4, 64, 64}, 0);
  Random random(1);
  uint64_t most = 0;
  for (int round = 0; round < 150; ++round) {
    for (size_t table = 0; table < 3; ++table) {
      const std::vector<uint64_t> ids = Ids(&random, table == 0 ? 1500 : 250'000, 4000);
      bound.Train(table, ids);
      whole.Train(table, ids);
      most = std::max(most, bound.Bytes());
    }
    if (round % 10 != 9) continue;
    ASSERT_EQ(bound.Hash(), whole.Hash()) << "a cut needs buffers, and gives them back";
  }
  EXPECT_EQ(bound.stats(0).rows_in_memory, bound.stats(0).rows) << "it is small";
  for (size_t table : {1, 2}) {
    EXPECT_LT(bound.stats(table).rows_in_memory, bound.stats(table).rows);
    EXPECT_GT(bound.stats(table).rows_in_memory, 60'000u);
  }
  EXPECT_LE(static_cast<double>(most), kBytesMost);
  EXPECT_GE(static_cast<double>(bound.Bytes()), 0.8 * kBytesMax);
  EXPECT_EQ(bound.Hash(), whole.Hash());
}

TEST(MemoryBudget, FollowsTheUse) {
  Tables bound({4, 64, 64}, kBytesMax), whole({4, 64, 64}, 0);
  Random random(2);
  uint64_t most = 0;
  const auto train = [&](size_t table, int rounds) {
    for (int round = 0; round < rounds; ++round) {
      const std::vector<uint64_t> ids = Ids(&random, 200'000, 4000);
      bound.Train(table, ids);
      whole.Train(table, ids);
      most = std::max(most, bound.Bytes());
    }
  };
  train(1, 150);
  const uint64_t before = bound.stats(1).rows_in_memory;
  train(2, 300);
  EXPECT_GT(before, 100'000u) << "alone it has all";
  EXPECT_LT(bound.stats(1).rows_in_memory, before / 2);
  EXPECT_GT(bound.stats(2).rows_in_memory, bound.stats(1).rows_in_memory);
  EXPECT_LE(static_cast<double>(most), kBytesMost) << "what has left gives its memory back";
  train(1, 300);
  EXPECT_GT(bound.stats(1).rows_in_memory, bound.stats(2).rows_in_memory) << "and back again";
  EXPECT_EQ(bound.Hash(), whole.Hash());
}

}  // namespace
}  // namespace hearth
