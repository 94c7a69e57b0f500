// docs/PROTOCOL.md §4 "What an apply does" over a std::map, as plainly as can be: the truth that EmbeddingTable is
// compared with.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "embedding/embedding_table.h"
#include "embedding/lifecycle.h"
#include "embedding/row_record.h"
#include "embedding/sparse_optimizer.h"
#include "gtest/gtest.h"
#include "tests/embedding/slow_clock.h"

namespace hearth {

inline std::string NewTestFolder() {
  static std::atomic<int> made{0};  // runs side by side each have one
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("hearth-embedding-", getpid(), "-", ++made));
  EXPECT_TRUE(RemoveTree(path).ok());
  EXPECT_TRUE(MakeDirectories(path).ok());
  return path;
}

// A lane's part of a step, owning what a PushPart points to.
struct Part {
  std::vector<Sign> signs;
  std::vector<uint32_t> occurrences;
  std::vector<float> gradients;

  PushPart span() const { return {signs, occurrences, gradients}; }
};

inline std::vector<PushPart> SpansOf(const std::vector<Part>& parts) {
  std::vector<PushPart> spans;
  for (const Part& part : parts) spans.push_back(part.span());
  return spans;
}

// `count` or fewer distinct signs of ids below `ids`, ascending, with gradients around 0.
inline Part RandomPart(Random* random, TableNumber table, uint64_t ids, size_t count, uint32_t dim) {
  std::map<Sign, uint32_t> drawn;
  for (size_t i = 0; i < count; ++i) ++drawn[MakeSign(table, random->Below(ids))];
  Part part;
  for (const auto& [sign, occurrences] : drawn) {
    part.signs.push_back(sign);
    part.occurrences.push_back(occurrences);
    for (uint32_t d = 0; d < dim; ++d) part.gradients.push_back(static_cast<float>(random->Uniform() - 0.5));
  }
  return part;
}

// Weights and state as a row has them. Empty: of a counter.
inline std::vector<float> StoredWords(const Table& table, const std::vector<float>& floats) {
  if (floats.empty()) return {};
  std::string bytes;
  AppendFloats(table, floats.data(), &bytes);
  std::vector<float> words(bytes.size() / sizeof(float));
  std::memcpy(words.data(), bytes.data(), bytes.size());
  return words;
}

class ReferenceTable {
 public:
  explicit ReferenceTable(const TableOptions& options)
      : options_(options),
        dim_(options.config.dim()),
        optimizer_(options.config.optimizer(), dim_),
        weights_(options.config, options.seed) {
    clock_.hours = options.config.expire_after_hours();
  }

  void Push(uint64_t step, uint64_t n, const std::vector<Part>& parts) {
    std::map<Sign, uint32_t> occurrences;
    std::map<Sign, std::vector<float>> sums;
    for (const Part& part : parts) {
      for (size_t i = 0; i < part.signs.size(); ++i) {
        const float* gradient = &part.gradients[i * dim_];
        occurrences[part.signs[i]] += part.occurrences[i];
        auto [sum, first] = sums.try_emplace(part.signs[i], gradient, gradient + dim_);
        for (uint32_t d = 0; d < dim_ && !first; ++d) sum->second[d] += gradient[d];
      }
    }
    for (const auto& [sign, count] : occurrences) {
      auto it = rows_.find(sign);
      if (it != rows_.end() && Expired(it->second.meta, step)) {
        rows_.erase(it);
        it = rows_.end();
      }
      if (it == rows_.end() && Bloom()) {
        const uint32_t seen = Estimate(step, sign);
        FilterOf(Shard(sign), Generation(step))->Add(sign, count);
        if (seen + count < CountMin()) continue;
        it = rows_.emplace(sign, Row()).first;
        it->second.meta.count = seen;
      }
      Row& row = rows_[sign];
      row.meta.count += count;
      row.meta.last_step = static_cast<uint32_t>(step);
      if (row.meta.count < CountMin()) continue;
      if (row.meta.flags == 0) {
        row.meta.flags = kRowAdmitted;
        row.floats = Initial(sign);
        row.floats.resize(dim_ + optimizer_.state_floats());
        optimizer_.InitState(row.floats.data() + dim_);
      }
      std::vector<float> g = sums[sign];
      for (float& x : g) x /= static_cast<float>(n);
      if (!optimizer_.Update(row.floats.data(), row.floats.data() + dim_, g.data(), row.meta.updates + 1,
                             optimizer_.RateAt(step))) {
        continue;
      }
      ++row.meta.updates;
      if (!weights_.packed()) continue;
      std::vector<float> words(weights_.words());
      weights_.EncodeByChance(sign, step, row.floats.data(), reinterpret_cast<char*>(words.data()));
      weights_.Decode(reinterpret_cast<const char*>(words.data()), row.floats.data());
    }
  }

  void Tick(uint64_t step, uint32_t time_s) {
    if (ByTime()) clock_.Tick(step, time_s);
  }

  // The step after which another job goes on: what has expired by the old rule is gone, what counts in a filter was
  // seen now.
  void ChangeExpiry(uint64_t step, uint32_t expire_after_steps, uint32_t expire_after_hours) {
    for (auto it = rows_.begin(); it != rows_.end();) {
      const bool expired = Expired(it->second.meta, step);
      it = expired ? rows_.erase(it) : std::next(it);
    }
    if (options_.config.expire_after_steps() == expire_after_steps &&
        options_.config.expire_after_hours() == expire_after_hours) {
      return;
    }
    const auto before = std::move(filters_);
    filters_.clear();
    const uint32_t generation = Generation(step);  // by the old rule
    // The clock goes on where there is one.
    if (!ByTime()) clock_ = SlowClock();
    clock_.hours = expire_after_hours;
    options_.config.set_expire_after_steps(expire_after_steps);
    options_.config.set_expire_after_hours(expire_after_hours);
    for (const auto& [key, filter] : before) {
      if (key.second + 1 < generation) continue;
      CountingBloom* merged = FilterOf(key.first, Generation(step));
      for (uint64_t chunk = 0; chunk < filter.chunks(); ++chunk) merged->AddChunk(chunk, filter.Chunk(chunk));
    }
  }

  // occurrences 0: read-only.
  std::vector<float> Pull(uint64_t step, Sign sign, uint32_t occurrences) const {
    const auto it = rows_.find(sign);
    const bool live = it != rows_.end() && !Expired(it->second.meta, step);
    if (live && it->second.meta.flags != 0) return {it->second.floats.begin(), it->second.floats.begin() + dim_};
    const uint32_t count = live ? it->second.meta.count : Bloom() ? Estimate(step, sign) : 0;
    if (occurrences > 0 && count + occurrences >= CountMin()) return Initial(sign);
    return std::vector<float>(dim_, 0.0f);
  }

  uint64_t Hash(uint64_t step) const {
    uint64_t hash = 0;
    for (const auto& [sign, row] : rows_) {
      if (Expired(row.meta, step)) continue;
      hash += RowHash(options_.number, sign, row.meta, StoredWords(options_.config, row.floats));
    }
    for (const auto& [key, filter] : filters_) {
      const auto& [shard, generation] = key;
      if (generation + 1 < Generation(step)) continue;
      const bool never = options_.config.expire_after_steps() == 0 && !ByTime();
      hash += never ? filter.Hash({options_.number, shard}) : filter.Hash({options_.number, shard, generation});
    }
    return hash;
  }

  uint64_t RowsAt(uint64_t step) const {
    uint64_t count = 0;
    for (const auto& [sign, row] : rows_) {
      count += row.meta.flags != 0 && !Expired(row.meta, step) ? 1 : 0;
    }
    return count;
  }

  struct Row {
    RowMeta meta;
    std::vector<float> floats;
  };
  const std::map<Sign, Row>& rows() const { return rows_; }

 private:
  uint32_t CountMin() const { return options_.config.admission().count_min(); }
  bool Bloom() const { return options_.config.admission().counter() == Admission::BLOOM && CountMin() > 1; }
  uint32_t Shard(Sign sign) const { return LogicalShardOf(sign, options_.shards); }
  bool ByTime() const { return options_.config.expire_after_hours() > 0; }
  bool Expired(const RowMeta& meta, uint64_t step) const {
    if (ByTime()) return clock_.Expired(meta.last_step);
    const uint64_t span = options_.config.expire_after_steps();
    return span != 0 && meta.last_step + span < step;
  }
  uint32_t Generation(uint64_t step) const {
    if (ByTime()) return clock_.Generation();
    const uint32_t span = options_.config.expire_after_steps();
    return span == 0 ? 0 : static_cast<uint32_t>(step / span);
  }
  CountingBloom* FilterOf(uint32_t shard, uint32_t generation) {
    return &filters_.try_emplace({shard, generation}, options_.config.admission()).first->second;
  }
  uint32_t Estimate(uint64_t step, Sign sign) const {
    uint32_t sum = 0;
    for (const auto& [key, filter] : filters_) {
      if (key.first == Shard(sign) && key.second + 1 >= Generation(step)) sum += filter.Estimate(sign);
    }
    return sum;
  }
  std::vector<float> Initial(Sign sign) const {
    std::vector<float> weights(dim_);
    for (uint32_t d = 0; d < dim_; ++d) {
      weights[d] = InitialWeight(options_.seed, sign, d, options_.config.init_uniform());
    }
    weights_.Round(weights.data());
    return weights;
  }

  TableOptions options_;
  uint32_t dim_;
  SparseOptimizer optimizer_;
  RowWeights weights_;
  SlowClock clock_;
  std::map<Sign, Row> rows_;
  std::map<std::pair<uint32_t, uint32_t>, CountingBloom> filters_;  // by logical shard and generation, all there were
};

}  // namespace hearth
