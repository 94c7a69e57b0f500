// EmbeddingTable's memory tier beside a bare flat table, in one run: pull and push (row-wise Adagrad) of batches of
// about 20 k distinct signs. `scripts/bench` builds and runs it. --rows=N: rows in each table (10 M).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "embedding/embedding_table.h"
#include "embedding/row_arena.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

constexpr uint32_t kDim = 16;
constexpr size_t kUniqueSigns = 20000;
constexpr size_t kBatches = 64;  // different ones, so that one does not warm the caches for its next turn
constexpr uint64_t kRecords = 1024;
constexpr double kZipfExponent = 1.05;

uint64_t rows_in_table = 10'000'000;

Sign SignOfRank(uint64_t rank) { return MakeSign(1, Mix64(rank)); }

// A rank in [0, count) with probability ~ 1 / (rank + 1)^s: rejection-inversion (Hörmann and Derflinger 1996).
class Zipf {
 public:
  Zipf(uint64_t count, double s)
      : s_(s), first_(H(1.5) - 1), last_(H(static_cast<double>(count) + 0.5)), count_(count) {}
  uint64_t Draw(Random* random) const {
    while (true) {
      const double u = last_ + random->Uniform() * (first_ - last_);
      const double x = std::pow(1 + u * (1 - s_), 1 / (1 - s_));
      const uint64_t k = std::clamp<uint64_t>(static_cast<uint64_t>(x + 0.5), 1, count_);
      if (u >= H(static_cast<double>(k) + 0.5) - std::pow(static_cast<double>(k), -s_)) return k - 1;
    }
  }

 private:
  double H(double x) const { return (std::pow(x, 1 - s_) - 1) / (1 - s_); }

  double s_, first_, last_;
  uint64_t count_;
};

struct Batch {
  std::vector<Sign> signs;
  std::vector<uint32_t> occurrences;
  std::vector<float> gradients;
};

std::vector<Batch> MakeBatches(bool zipf) {
  const Zipf distribution(rows_in_table, kZipfExponent);
  Random random(zipf ? 1 : 2);
  std::vector<Batch> batches(kBatches);
  for (Batch& batch : batches) {
    std::map<Sign, uint32_t> drawn;
    while (drawn.size() < std::min<uint64_t>(kUniqueSigns, rows_in_table / 2)) {
      ++drawn[SignOfRank(zipf ? distribution.Draw(&random) : random.Below(rows_in_table))];
    }
    for (const auto& [sign, occurrences] : drawn) {
      batch.signs.push_back(sign);
      batch.occurrences.push_back(occurrences);
      for (uint32_t d = 0; d < kDim; ++d) batch.gradients.push_back(static_cast<float>(random.Uniform() - 0.5));
    }
  }
  return batches;
}

const std::vector<Batch>& Batches(bool zipf) {
  static const std::vector<Batch> uniform = MakeBatches(false), skewed = MakeBatches(true);
  return zipf ? skewed : uniform;
}

// The yardstick: one open-addressing array of [sign | weights | sum of squares], software prefetch, and nothing else:
// no life cycle, no tiers, no counts, no checks.
class BareTable {
 public:
  explicit BareTable(uint64_t rows) : slots_(rows * 3 / 2 + 64) {
    HEARTH_CHECK(region_.Reserve(slots_ * sizeof(Slot)).ok() && region_.Commit(slots_ * sizeof(Slot)).ok());
    for (uint64_t rank = 0; rank < rows; ++rank) {
      Slot* slot = Find(SignOfRank(rank));
      slot->sign = SignOfRank(rank);
      for (float& w : slot->weights) w = 0.01f;
    }
  }

  void Pull(const Batch& batch, float* rows) {
    ForEach(batch, [&](size_t i, Slot* slot) { std::memcpy(rows + i * kDim, slot->weights, sizeof(slot->weights)); });
  }
  void Push(const Batch& batch, float n) {
    ForEach(batch, [&](size_t i, Slot* slot) {
      float g[kDim], squares = 0;
      for (uint32_t d = 0; d < kDim; ++d) g[d] = batch.gradients[i * kDim + d] / n;
      for (uint32_t d = 0; d < kDim; ++d) squares += g[d] * g[d];
      slot->sum += squares / kDim;
      const float scale = 0.05f / (std::sqrt(slot->sum) + 1e-8f);
      for (uint32_t d = 0; d < kDim; ++d) slot->weights[d] -= scale * g[d];
    });
  }

 private:
  struct Slot {
    Sign sign;
    float weights[kDim];
    float sum;
    uint32_t unused;
  };

  Slot* slots() const { return reinterpret_cast<Slot*>(region_.data()); }
  uint64_t Home(Sign sign) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Mix64(sign)) * slots_) >> 64);
  }
  Slot* Find(Sign sign) const {
    for (uint64_t at = Home(sign);; at = at + 1 == slots_ ? 0 : at + 1) {
      Slot* slot = slots() + at;
      if (slot->sign == sign || slot->sign == 0) return slot;
    }
  }
  template <typename Work>
  void ForEach(const Batch& batch, const Work& work) {
    constexpr size_t kAhead = 16;
    for (size_t i = 0; i < batch.signs.size() + kAhead; ++i) {
      if (i < batch.signs.size()) {
        const char* slot = reinterpret_cast<const char*>(slots() + Home(batch.signs[i]));
        __builtin_prefetch(slot);
        __builtin_prefetch(slot + sizeof(Slot) - 1);
      }
      if (i >= kAhead) work(i - kAhead, Find(batch.signs[i - kAhead]));
    }
  }

  uint64_t slots_;
  Region region_;
};

BareTable* Bare() {
  static BareTable table(rows_in_table);
  return &table;
}

struct Hearth {
  std::unique_ptr<KvStore> store = MakeMapStore();  // never asked: everything fits into memory
  std::unique_ptr<EmbeddingTable> table;
  uint64_t step = 0;

  Hearth() {
    TableOptions options;
    options.config.set_name("bench");
    options.config.set_dim(kDim);
    options.config.mutable_optimizer()->set_kind(Optimizer::ROWWISE_ADAGRAD);
    options.memory_rows_max = rows_in_table;
    auto opened = EmbeddingTable::Open(options, store.get());
    HEARTH_CHECK(opened.ok(), "", opened.status().ToString());
    table = std::move(*opened);
    constexpr uint64_t kFill = 1 << 18;
    for (uint64_t begin = 0; begin < rows_in_table; begin += kFill) {
      Batch batch;
      for (uint64_t rank = begin; rank < std::min(rows_in_table, begin + kFill); ++rank) {
        batch.signs.push_back(SignOfRank(rank));
      }
      std::sort(batch.signs.begin(), batch.signs.end());
      batch.occurrences.assign(batch.signs.size(), 1);
      batch.gradients.assign(batch.signs.size() * kDim, 0.1f);
      Push(batch);
    }
    HEARTH_CHECK(table->stats().rows_in_memory == rows_in_table);
  }
  void Push(const Batch& batch) {
    const PushPart part{batch.signs, batch.occurrences, batch.gradients};
    const absl::Status status = table->Push(++step, kRecords, {part});
    HEARTH_CHECK(status.ok(), "", status.ToString());
  }
};

Hearth* Ours() {
  static Hearth hearth;
  return &hearth;
}

template <typename Work>
void Run(benchmark::State& state, bool zipf, const Work& work) {
  const std::vector<Batch>& batches = Batches(zipf);
  size_t next = 0, rows = 0;
  for (auto _ : state) {
    work(batches[next]);
    rows += batches[next].signs.size();
    next = (next + 1) % batches.size();
  }
  state.counters["rows/s"] = benchmark::Counter(static_cast<double>(rows), benchmark::Counter::kIsRate);
}

void BarePull(benchmark::State& state, bool zipf) {
  BareTable* table = Bare();
  std::vector<float> rows(kUniqueSigns * kDim);
  Run(state, zipf, [&](const Batch& batch) { table->Pull(batch, rows.data()); });
}
void HearthPull(benchmark::State& state, bool zipf) {
  Hearth* hearth = Ours();
  std::vector<float> rows(kUniqueSigns * kDim);
  Run(state, zipf, [&](const Batch& batch) {
    HEARTH_CHECK(hearth->table->Pull(hearth->step + 1, batch.signs, batch.occurrences, rows.data()).ok());
  });
}
void BarePush(benchmark::State& state, bool zipf) {
  BareTable* table = Bare();
  Run(state, zipf, [&](const Batch& batch) { table->Push(batch, kRecords); });
}
void HearthPush(benchmark::State& state, bool zipf) {
  Hearth* hearth = Ours();
  Run(state, zipf, [&](const Batch& batch) { hearth->Push(batch); });
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (!absl::ConsumePrefix(&argument, "--rows=") || !absl::SimpleAtoi(argument, &hearth::rows_in_table) ||
        hearth::rows_in_table < 1000) {
      fprintf(stderr, "embedding_bench: %s: unknown; use --rows=N (at least 1000) or --benchmark_… flags\n", argv[i]);
      return hearth::kExitUsage;
    }
  }
  for (const bool zipf : {false, true}) {
    const std::string suffix = zipf ? "/zipf1.05" : "/uniform";
    const auto add = [&](const char* name, void (*run)(benchmark::State&, bool)) {
      benchmark::RegisterBenchmark((name + suffix).c_str(), run, zipf)->Unit(benchmark::kMicrosecond);
    };
    add("bare_pull", hearth::BarePull);
    add("hearth_pull", hearth::HearthPull);
    add("bare_push", hearth::BarePush);
    add("hearth_push", hearth::HearthPush);
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
