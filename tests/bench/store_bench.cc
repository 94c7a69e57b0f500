// EmbeddingTable over RocksDB, with a tenth of its rows in memory: rows that leave it, and pulls of rows that are not
// in it. One thread calls. `scripts/bench` builds and runs it.
//   --rows=N: of the table (4 M). --dir=PATH: where the stores lie; the folder for temporary files if it is not given.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "common/base/env.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "embedding/embedding_table.h"
#include "embedding/rocksdb_store.h"
#include "embedding/store_io.h"
#include "tests/bench/bench_data.h"

namespace hearth {
namespace {

constexpr uint64_t kBatchRows = 20000;
constexpr uint64_t kMaintainRows = 4096;  // a server's slice
constexpr int kColdBatches = 10;

uint64_t rows_in_table = 4'000'000;
std::string dir;

// A table in a folder of its own, which goes with it.
class StoredTable {
 public:
  StoredTable() {
    std::string path = dir + "/store-XXXXXX";
    HEARTH_CHECK(mkdtemp(path.data()) != nullptr, "", path);
    folder_ = path;
    auto store = OpenRocksDbStore(path + "/rocksdb", RocksDbOptions());
    Check(store.status());
    store_ = std::move(*store);
    // As a server has it.
    io_ = std::make_unique<StoreIo>(Env::Real(), store_.get(), std::clamp(UsableCores(), 2u, 16u));
    auto table = EmbeddingTable::Open(BenchTable(std::max<uint64_t>(1, rows_in_table / 10)), io_.get());
    Check(table.status());
    table_ = std::move(*table);
  }
  ~StoredTable() {
    table_.reset();
    io_.reset();
    store_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  EmbeddingTable* table() { return table_.get(); }
  uint64_t next_step() const { return step_ + 1; }

  void Push(absl::Span<const Sign> signs) {
    occurrences_.assign(signs.size(), 1);
    gradients_.assign(signs.size() * kDim, 0.1f);
    Check(table_->Push(++step_, signs.size(), {PushPart{signs, occurrences_, gradients_}}));
  }
  // As a server between two messages, until there is no more to do.
  void Maintain() {
    while (true) {
      auto more = table_->Maintain(step_, kMaintainRows);
      Check(more.status());
      if (!*more) return;
    }
  }
  void Pull(absl::Span<const Sign> signs) {
    occurrences_.assign(signs.size(), 1);
    rows_.resize(signs.size() * kDim);
    Check(table_->Pull(next_step(), signs, occurrences_, rows_.data()));
  }

 private:
  std::string folder_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<StoreIo> io_;
  std::unique_ptr<EmbeddingTable> table_;
  uint64_t step_ = 0;
  std::vector<uint32_t> occurrences_;
  std::vector<float> gradients_, rows_;
};

std::vector<std::vector<Sign>> NewRows() {
  std::vector<std::vector<Sign>> batches(std::max<uint64_t>(1, rows_in_table / kBatchRows));
  for (uint64_t rank = 0; rank < batches.size() * kBatchRows; ++rank) {
    batches[rank / kBatchRows].push_back(SignOfRank(rank));
  }
  for (auto& batch : batches) std::sort(batch.begin(), batch.end());
  return batches;
}

// New rows, ten times what the memory tier holds. The time is that of the pushes and of the upkeep between them;
// RocksDB's compactions run beside both.
void Spill(benchmark::State& state) {
  const std::vector<std::vector<Sign>> batches = NewRows();
  for (auto _ : state) {
    StoredTable stored;
    double push_s = 0, maintain_s = 0;
    for (const auto& batch : batches) {
      const int64_t begin_us = Env::Real()->NowUs();
      stored.Push(batch);
      push_s += SecondsSince(begin_us);
      const int64_t maintain_us = Env::Real()->NowUs();
      stored.Maintain();
      maintain_s += SecondsSince(maintain_us);
    }
    const auto spilled = static_cast<double>(stored.table()->stats().rows_spilled);
    state.counters["rows/s"] = spilled / (push_s + maintain_s);
    state.counters["push_s"] = push_s;
    state.counters["maintain_s"] = maintain_s;
  }
}

std::unique_ptr<StoredTable> cold_table;  // of all repetitions; main ends it

// Most signs of a batch are not in memory. Each batch is pulled, once more now that it was just here, and pushed.
void Cold(benchmark::State& state, bool prefetch) {
  static Random random(4);
  if (cold_table == nullptr) {
    cold_table = std::make_unique<StoredTable>();
    for (const auto& batch : NewRows()) {
      cold_table->Push(batch);
      cold_table->Maintain();
    }
  }
  StoredTable* const stored = cold_table.get();
  EmbeddingTable* const table = stored->table();
  double cold_rows = 0, all_rows = 0, prefetch_s = 0, pull_s = 0, warm_s = 0;
  for (auto _ : state) {
    for (int i = 0; i < kColdBatches; ++i) {
      std::vector<Sign> signs;
      // A batch that the tier has room for.
      const uint64_t count = std::min(kBatchRows, rows_in_table / 40);
      for (uint64_t k = 0; k < count; ++k) signs.push_back(SignOfRank(random.Below(rows_in_table)));
      std::sort(signs.begin(), signs.end());
      signs.erase(std::unique(signs.begin(), signs.end()), signs.end());
      const EmbeddingTableStats before = table->stats();
      if (prefetch) {
        const int64_t begin_us = Env::Real()->NowUs();
        Check(table->Prefetch(stored->next_step(), signs));
        prefetch_s += SecondsSince(begin_us);
      }
      const int64_t pull_us = Env::Real()->NowUs();
      stored->Pull(signs);
      pull_s += SecondsSince(pull_us);
      const EmbeddingTableStats after = table->stats();
      cold_rows += static_cast<double>(after.rows_prefetched - before.rows_prefetched + after.memory_misses -
                                       before.memory_misses);
      all_rows += static_cast<double>(signs.size());
      const int64_t warm_us = Env::Real()->NowUs();
      stored->Pull(signs);
      warm_s += SecondsSince(warm_us);
      stored->Push(signs);
      stored->Maintain();
    }
  }
  state.counters["cold_rows/s"] = cold_rows / (prefetch_s + pull_s);
  state.counters["pull_rows/s"] = all_rows / pull_s;
  state.counters["warm_rows/s"] = all_rows / warm_s;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::dir = std::filesystem::temp_directory_path().string();
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (absl::ConsumePrefix(&argument, "--dir=")) {
      hearth::dir = std::string(argument);
    } else if (!absl::ConsumePrefix(&argument, "--rows=") || !absl::SimpleAtoi(argument, &hearth::rows_in_table) ||
               hearth::rows_in_table < 10 * hearth::kBatchRows) {
      fprintf(stderr, "store_bench: %s: use --rows=N (at least 200000), --dir=PATH or --benchmark_… flags\n", argv[i]);
      return hearth::kExitUsage;
    }
  }
  const auto add = [](const char* name, auto&&... work) {
    benchmark::RegisterBenchmark(name, work...)->Unit(benchmark::kMillisecond)->Iterations(1);
  };
  add("spill", hearth::Spill);
  add("cold_pull", hearth::Cold, false);
  add("cold_pull_prefetched", hearth::Cold, true);
  benchmark::RunSpecifiedBenchmarks();
  hearth::cold_table.reset();
  return 0;
}
