// EmbeddingTable's memory tier: pull and push (row-wise Adagrad) of batches of about 20 k distinct signs beside a bare
// flat table, in one run; new rows; the rows of the jobs' steps; and updates by each optimizer. `scripts/bench` builds
// and runs it.
//   --rows=N: rows in each table (10 M). --steps=N: of the job whose rows hearth_steps pulls and pushes (196).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "embedding/embedding_table.h"
#include "embedding/row_arena.h"
#include "embedding/sparse_optimizer.h"
#include "tests/bench/bench_data.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

constexpr size_t kUniqueSigns = 20000;
constexpr size_t kBatches = 64;  // different ones, so that one does not warm the caches for its next turn
constexpr uint64_t kRecords = 1024;

uint64_t rows_in_table = 10'000'000;
uint64_t steps_of_job = 196;

std::vector<RowBatch> MakeBatches(bool zipf) {
  const Zipf distribution(rows_in_table, kZipfExponent);
  Random random(zipf ? 1 : 2);
  std::vector<RowBatch> batches;
  while (batches.size() < kBatches) {
    std::set<Sign> distinct;
    std::vector<Sign> drawn;
    while (distinct.size() < std::min<uint64_t>(kUniqueSigns, rows_in_table / 2)) {
      drawn.push_back(SignOfRank(zipf ? distribution.Draw(&random) : random.Below(rows_in_table)));
      distinct.insert(drawn.back());
    }
    batches.push_back(BatchOf(std::move(drawn), &random));
  }
  return batches;
}

const std::vector<RowBatch>& Batches(bool zipf) {
  static const std::vector<RowBatch> uniform = MakeBatches(false), skewed = MakeBatches(true);
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

  void Pull(const RowBatch& batch, float* rows) {
    ForEach(batch, [&](size_t i, Slot* slot) { std::memcpy(rows + i * kDim, slot->weights, sizeof(slot->weights)); });
  }
  void Push(const RowBatch& batch, float n) {
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
  void ForEach(const RowBatch& batch, const Work& work) {
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

// Everything fits into memory: the store is never asked.
struct Hearth {
  std::unique_ptr<KvStore> store = MakeMapStore();
  std::unique_ptr<EmbeddingTable> table;
  uint64_t step = 0;

  explicit Hearth(uint64_t rows) {
    auto opened = EmbeddingTable::Open(BenchTable(rows + rows / 8), store.get());
    Check(opened.status());
    table = std::move(*opened);
  }
  void Push(const RowBatch& batch, uint64_t records = kRecords) {
    const PushPart part{batch.signs, batch.occurrences, batch.gradients};
    Check(table->Push(++step, records, {part}));
  }
  void Pull(const RowBatch& batch, float* rows) { Check(table->Pull(step + 1, batch.signs, batch.occurrences, rows)); }
};

Hearth* Ours() {
  static Hearth* const ours = [] {
    auto* hearth = new Hearth(rows_in_table);
    constexpr uint64_t kFill = 1 << 18;
    RowBatch batch;
    for (uint64_t begin = 0; begin < rows_in_table; begin += kFill) {
      batch.signs.clear();
      for (uint64_t rank = begin; rank < std::min(rows_in_table, begin + kFill); ++rank) {
        batch.signs.push_back(SignOfRank(rank));
      }
      std::sort(batch.signs.begin(), batch.signs.end());
      batch.occurrences.assign(batch.signs.size(), 1);
      batch.gradients.assign(batch.signs.size() * kDim, 0.1f);
      hearth->Push(batch);
    }
    HEARTH_CHECK(hearth->table->stats().rows_in_memory == rows_in_table);
    return hearth;
  }();
  return ours;
}

template <typename Work>
void Run(benchmark::State& state, bool zipf, const Work& work) {
  const std::vector<RowBatch>& batches = Batches(zipf);
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
  Run(state, zipf, [&](const RowBatch& batch) { table->Pull(batch, rows.data()); });
}
void HearthPull(benchmark::State& state, bool zipf) {
  Hearth* hearth = Ours();
  std::vector<float> rows(kUniqueSigns * kDim);
  Run(state, zipf, [&](const RowBatch& batch) { hearth->Pull(batch, rows.data()); });
}
void BarePush(benchmark::State& state, bool zipf) {
  BareTable* table = Bare();
  Run(state, zipf, [&](const RowBatch& batch) { table->Push(batch, kRecords); });
}
void HearthPush(benchmark::State& state, bool zipf) {
  Hearth* hearth = Ours();
  Run(state, zipf, [&](const RowBatch& batch) { hearth->Push(batch); });
}

// Resident memory of this process.
uint64_t RssBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    absl::string_view text = line;
    uint64_t kb = 0;
    if (!absl::ConsumePrefix(&text, "VmRSS:") || !absl::ConsumeSuffix(&text, " kB")) continue;
    HEARTH_CHECK(absl::SimpleAtoi(absl::StripAsciiWhitespace(text), &kb));
    return kb << 10;
  }
  return 0;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// New rows in batches of kUniqueSigns into an empty table, until it is full.
void Insert(benchmark::State& state) {
  std::vector<RowBatch> batches(std::max<uint64_t>(1, rows_in_table / kUniqueSigns));
  for (uint64_t rank = 0; rank < batches.size() * kUniqueSigns; ++rank) {
    batches[rank / kUniqueSigns].signs.push_back(SignOfRank(rank));
  }
  for (RowBatch& batch : batches) std::sort(batch.signs.begin(), batch.signs.end());
  const std::vector<uint32_t> occurrences(kUniqueSigns, 1);
  const std::vector<float> gradients(kUniqueSigns * kDim, 0.1f);
  const auto rows = static_cast<double>(batches.size() * kUniqueSigns);
  std::vector<double> seconds;
  seconds.reserve(batches.size());
  {  // A virtual machine is given its memory page by page when it first writes it: not the table's doing.
    const auto bytes = static_cast<uint64_t>(rows * (kRowBytes + 40));
    Region touched;
    HEARTH_CHECK(touched.Reserve(bytes).ok() && touched.Commit(bytes).ok());
    std::memset(touched.data(), 1, bytes);
  }
  for (auto _ : state) {
    Hearth hearth(static_cast<uint64_t>(rows));
    const uint64_t rss_before = RssBytes();
    for (const RowBatch& batch : batches) {
      const int64_t begin_us = Env::Real()->NowUs();
      Check(hearth.table->Push(++hearth.step, kRecords, {PushPart{batch.signs, occurrences, gradients}}));
      seconds.push_back(SecondsSince(begin_us));
    }
    const auto rss = static_cast<double>(RssBytes() - rss_before);
    state.counters["rss_bytes/row"] = rss / rows - kRowBytes;
    state.counters["stats_bytes/row"] = static_cast<double>(hearth.table->stats().bytes_memory) / rows - kRowBytes;
  }
  state.counters["rows/s"] = rows / std::accumulate(seconds.begin(), seconds.end(), 0.0);
  state.counters["pause_ms"] = (*std::max_element(seconds.begin(), seconds.end()) - Median(seconds)) * 1e3;
}

// The rows of the jobs' steps, from an empty table on: about half of a step's rows are new. What scripts/bench holds a
// pull over the network against.
void Steps(benchmark::State& state) {
  const Zipf distribution(kIdsOfSlot, kZipfExponent);
  std::vector<float> rows(kSlots * kBatchRecords * kDim);
  std::vector<double> pull_us, push_us;
  double signs = 0;
  for (auto _ : state) {
    Hearth hearth(steps_of_job * kSlots * kBatchRecords);
    Random random(3);
    for (uint64_t step = 1; step <= steps_of_job; ++step) {
      std::vector<Sign> drawn;
      for (uint64_t i = 0; i < kSlots * kBatchRecords; ++i) {
        drawn.push_back(SignOfRank(i % kSlots * kIdsOfSlot + distribution.Draw(&random)));
      }
      const RowBatch batch = BatchOf(std::move(drawn), &random);
      const int64_t begin_us = Env::Real()->NowUs();
      hearth.Pull(batch, rows.data());
      const int64_t pulled_us = Env::Real()->NowUs();
      hearth.Push(batch, kBatchRecords);
      pull_us.push_back(static_cast<double>(pulled_us - begin_us));
      push_us.push_back(static_cast<double>(Env::Real()->NowUs() - pulled_us));
      signs += static_cast<double>(batch.signs.size());
    }
  }
  state.counters["rows"] = signs / static_cast<double>(pull_us.size());
  state.counters["pull_us"] = Median(pull_us);
  state.counters["push_us"] = Median(push_us);
}

// The optimizer by itself: rows that the nearest caches hold.
void Update(benchmark::State& state, Optimizer::Kind kind, uint32_t dim) {
  constexpr size_t kRows = 256;
  Optimizer config;
  config.set_kind(kind);
  const SparseOptimizer optimizer(config, dim);
  const size_t stride = dim + optimizer.state_floats();
  std::vector<float> rows(kRows * stride), gradients(kRows * dim);
  Random random(4);
  for (size_t i = 0; i < kRows; ++i) {
    for (uint32_t d = 0; d < dim; ++d) rows[i * stride + d] = static_cast<float>(random.Uniform() - 0.5);
    optimizer.InitState(rows.data() + i * stride + dim);
  }
  for (float& g : gradients) g = static_cast<float>(random.Uniform() - 0.5);
  uint32_t t = 0;
  for (auto _ : state) {
    ++t;
    for (size_t i = 0; i < kRows; ++i) {
      float* const row = rows.data() + i * stride;
      benchmark::DoNotOptimize(optimizer.Update(row, row + dim, gradients.data() + i * dim, t, 0.05f));
    }
  }
  state.counters["rows/s"] = benchmark::Counter(static_cast<double>(t) * kRows, benchmark::Counter::kIsRate);
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    const bool rows = absl::ConsumePrefix(&argument, "--rows=") && absl::SimpleAtoi(argument, &hearth::rows_in_table) &&
                      hearth::rows_in_table >= 1000;
    const bool steps = absl::ConsumePrefix(&argument, "--steps=") &&
                       absl::SimpleAtoi(argument, &hearth::steps_of_job) && hearth::steps_of_job >= 1;
    if (!rows && !steps) {
      fprintf(stderr, "embedding_bench: %s: use --rows=N (at least 1000), --steps=N, or --benchmark_… flags\n",
              argv[i]);
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
  benchmark::RegisterBenchmark("hearth_insert", hearth::Insert)->Unit(benchmark::kMillisecond)->Iterations(1);
  benchmark::RegisterBenchmark("hearth_steps", hearth::Steps)->Unit(benchmark::kMillisecond)->Iterations(1);
  for (int kind = 0; kind < hearth::Optimizer::Kind_ARRAYSIZE; ++kind) {
    const auto optimizer = static_cast<hearth::Optimizer::Kind>(kind);
    for (const uint32_t dim : {16u, 64u}) {
      const std::string name = "update/" + hearth::Optimizer::Kind_Name(optimizer) + "/" + std::to_string(dim);
      benchmark::RegisterBenchmark(name.c_str(), hearth::Update, optimizer, dim);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
