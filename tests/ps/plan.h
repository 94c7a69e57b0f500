// A small job with everything in it, and what it must give: batches and gradients as pure functions of (seed, lane,
// step), and the sequential reference of the protocol, a std::map of rows with every step's view kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "common/base/env.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/sparse_optimizer.h"

namespace hearth {

// Shares of one batch: [tables].
struct TableBatch {
  std::vector<Sign> signs;  // ascending
  std::vector<uint32_t> occurrences;
  std::vector<float> rows;  // [count, dim]: pulled rows, or gradients
};
using LaneBatch = std::vector<TableBatch>;
constexpr uint32_t kTables = 3;
constexpr uint32_t kDims[kTables] = {4, 3, 1};

struct Plan {
  uint64_t seed = 1;
  uint32_t lanes = 2;
  uint32_t staleness = 0;
  uint32_t every_steps = 0;        // planned cuts
  uint64_t steps = 12;             // the last one is a cut, asked for like every other end of a job
  uint32_t ids = 10;               // of each table
  uint32_t signs_max = 5;          // of a lane's batch, each table
  bool announce_planned = false;   // next_cut names planned cuts too
  std::set<uint64_t> asks;         // steps whose reduction carries the flag
  std::vector<uint64_t> lane_end;  // [lanes]: the last step with records

  uint64_t Draw(uint64_t a, uint64_t b, uint64_t c = 0, uint64_t d = 0) const {
    return Mix64(Mix64(Mix64(Mix64(seed ^ a) ^ b) ^ c) ^ d);
  }

  static Plan Make(uint64_t seed, uint32_t lanes, uint32_t staleness, uint64_t steps) {
    Plan plan;
    plan.seed = seed;
    plan.lanes = lanes;
    plan.staleness = staleness;
    plan.steps = steps;
    plan.every_steps = plan.Draw(1, 1) % 3 == 0 ? 0 : 3 + plan.Draw(1, 2) % 6;
    plan.announce_planned = plan.Draw(1, 3) % 2 == 0;
    for (uint64_t f = 1; f + staleness < steps; ++f) {
      if (plan.Draw(2, f) % 6 == 0) plan.asks.insert(f);
    }
    plan.asks.insert(steps - staleness);
    for (uint32_t lane = 0; lane < lanes; ++lane)
      plan.lane_end.push_back(steps / 2 + plan.Draw(3, lane) % (steps / 2 + 1));
    return plan;
  }

  Job job() const {
    Job job;
    job.set_seed(Mix64(seed));
    job.mutable_training()->set_staleness(staleness);
    job.mutable_training()->set_lanes(lanes);
    job.mutable_training()->set_shards(16);
    job.mutable_snapshot()->set_every_steps(every_steps);
    if (seed % 3 == 0) job.mutable_store()->set_memory_bytes_max(1000 + Draw(4, 1) % 30000);
    Table* plain = job.add_table();
    plain->set_name("plain");
    plain->set_dim(kDims[0]);
    plain->mutable_optimizer()->set_kind(Optimizer::SGD);
    plain->set_memory_rows_max(8);
    Table* admitted = job.add_table();
    admitted->set_name("admitted");
    admitted->set_dim(kDims[1]);
    admitted->mutable_admission()->set_count_min(3);
    admitted->set_memory_rows_max(4);
    Table* expiring = job.add_table();
    expiring->set_name("expiring");
    expiring->set_dim(kDims[2]);
    expiring->mutable_optimizer()->set_kind(Optimizer::ADAM);
    expiring->set_expire_after_steps(2);
    expiring->set_memory_rows_max(1000);
    return job;
  }

  // ---- Cuts

  // All cuts that reductions up to step f make, planned ones included, up to the last step.
  std::set<uint64_t> CutsKnownAt(uint64_t f) const {
    std::set<uint64_t> cuts = {0};
    for (uint64_t s = every_steps; every_steps > 0 && s <= steps; s += every_steps) cuts.insert(s);
    for (uint64_t ask : asks) {
      if (ask <= f) cuts.insert(ask + staleness);
    }
    return cuts;
  }
  bool IsCut(uint64_t s) const { return CutsKnownAt(steps).count(s) > 0; }
  uint64_t View(uint64_t s) const {
    const uint64_t stale = s >= 1 + staleness ? s - 1 - staleness : 0;
    const std::set<uint64_t> cuts = CutsKnownAt(steps);
    return std::max(stale, *std::prev(cuts.lower_bound(s)));
  }
  uint64_t NextCut(uint64_t j) const {  // as the pushes of j say it
    uint64_t next = 0;
    for (uint64_t ask : asks) {
      if (ask <= j && ask + staleness >= j && (next == 0 || ask + staleness < next)) next = ask + staleness;
    }
    if (!announce_planned || every_steps == 0) return next;
    const uint64_t planned = (j + every_steps - 1) / every_steps * every_steps;
    return next == 0 ? planned : std::min(next, planned);
  }

  // ---- Steps

  bool Skip(uint64_t step) const { return Draw(4, step) % 9 == 0; }

  // Signs and occurrences; rows of the right size, zero.
  LaneBatch MakeBatch(uint32_t lane, uint64_t step) const {
    LaneBatch batch(kTables);
    if (step > lane_end[lane] || Draw(5, lane, step) % 8 == 0) return batch;
    for (uint32_t t = 0; t < kTables; ++t) {
      std::map<Sign, uint32_t> drawn;
      const uint64_t draws = Draw(6, lane, step, t) % (signs_max + 1);
      for (uint64_t i = 0; i < draws; ++i) {
        drawn[MakeSign(t + 1, 1 + Draw(7, lane, step, t * 100 + i) % ids)] += 1 + Draw(8, lane, step, i) % 2;
      }
      for (const auto& [sign, occurrences] : drawn) {
        batch[t].signs.push_back(sign);
        batch[t].occurrences.push_back(occurrences);
      }
      batch[t].rows.resize(drawn.size() * kDims[t]);
    }
    return batch;
  }
  uint64_t Records(uint64_t step) const {  // n
    uint64_t n = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      for (const TableBatch& table : MakeBatch(lane, step)) n += table.signs.size();
    }
    return n;
  }
  // Turns pulled rows into gradients that depend on them, so that no wrong row goes unnoticed.
  void Train(uint32_t lane, uint64_t step, LaneBatch* batch) const {
    for (size_t t = 0; t < batch->size(); ++t) {
      TableBatch& table = (*batch)[t];
      for (size_t i = 0; i < table.rows.size(); ++i) {
        const uint64_t draw = Draw(9, lane, step, t * 1000 + i);
        table.rows[i] = 0.5f * table.rows[i] + static_cast<float>(static_cast<int>(draw % 2001) - 1000) * 1e-2f;
      }
    }
  }
};

// The protocol in sequence: every step's tables are kept, a pull looks at the one that its view names.
class Reference {
 public:
  struct Row {
    RowMeta meta;
    std::vector<float> values;  // weights and state; empty below the threshold
  };
  using Rows = std::vector<std::map<Sign, Row>>;  // [tables]

  explicit Reference(const Plan& plan) : plan_(plan), job_(plan.job()), after_(plan.steps + 1, Rows(kTables)) {
    for (uint64_t s = 1; s <= plan.steps; ++s) {
      std::vector<LaneBatch> parts;
      for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        parts.push_back(Pull(lane, s));
        plan.Train(lane, s, &parts.back());
      }
      after_[s] = after_[s - 1];
      if (!plan.Skip(s)) Apply(s, parts);
    }
  }

  LaneBatch Pull(uint32_t lane, uint64_t s) const {
    LaneBatch batch = plan_.MakeBatch(lane, s);
    for (size_t t = 0; t < batch.size(); ++t) Look(t, after_[plan_.View(s)][t], s, &batch[t], /*read_only=*/false);
    return batch;
  }
  // Read only, after step `view`.
  void Evaluate(uint64_t view, LaneBatch* batch) const {
    for (size_t t = 0; t < batch->size(); ++t) Look(t, after_[view][t], view, &(*batch)[t], /*read_only=*/true);
  }
  uint64_t Hash(uint64_t s) const {
    uint64_t sum = 0;
    for (size_t t = 0; t < after_[s].size(); ++t) {
      for (const auto& [sign, row] : after_[s][t]) {
        if (Live(t, row, s)) sum += RowHash(static_cast<TableNumber>(t + 1), sign, row.meta, row.values);
      }
    }
    return sum;
  }
  uint64_t RowsAt(uint64_t s) const {
    uint64_t rows = 0;
    for (size_t t = 0; t < after_[s].size(); ++t) {
      for (const auto& [sign, row] : after_[s][t]) rows += row.meta.flags != 0 && Live(t, row, s) ? 1 : 0;
    }
    return rows;
  }

 private:
  bool Live(size_t t, const Row& row, uint64_t s) const {
    const uint64_t expire = job_.table(t).expire_after_steps();
    return expire == 0 || row.meta.last_step + expire >= s;
  }
  std::vector<float> Initial(size_t t, Sign sign) const {
    std::vector<float> weights;
    for (uint32_t i = 0; i < job_.table(t).dim(); ++i) {
      weights.push_back(InitialWeight(job_.seed(), sign, i, job_.table(t).init_uniform()));
    }
    return weights;
  }
  void Look(size_t t, const std::map<Sign, Row>& rows, uint64_t s, TableBatch* batch, bool read_only) const {
    const uint32_t dim = job_.table(t).dim();
    for (size_t i = 0; i < batch->signs.size(); ++i) {
      const auto found = rows.find(batch->signs[i]);
      const Row row = found != rows.end() && Live(t, found->second, s) ? found->second : Row();
      std::vector<float> weights(dim, 0.0f);
      if (!row.values.empty()) {
        weights = row.values;
      } else if (!read_only && row.meta.count + batch->occurrences[i] >= job_.table(t).admission().count_min()) {
        weights = Initial(t, batch->signs[i]);
      }
      std::copy_n(weights.begin(), dim, batch->rows.begin() + i * dim);
    }
  }
  void Apply(uint64_t s, const std::vector<LaneBatch>& parts) {
    const float n = static_cast<float>(plan_.Records(s));
    for (size_t t = 0; t < after_[s].size(); ++t) {
      const Table& config = job_.table(t);
      const SparseOptimizer optimizer(config.optimizer(), config.dim());
      std::map<Sign, std::pair<uint32_t, std::vector<float>>> sums;  // occurrences, gradient
      for (const LaneBatch& part : parts) {
        for (size_t i = 0; i < part[t].signs.size(); ++i) {
          auto& [occurrences, gradient] = sums[part[t].signs[i]];
          occurrences += part[t].occurrences[i];
          gradient.resize(config.dim());
          for (uint32_t d = 0; d < config.dim(); ++d) gradient[d] += part[t].rows[i * config.dim() + d];
        }
      }
      for (auto& [sign, sum] : sums) {
        Row& row = after_[s][t][sign];
        if (!Live(t, row, s)) row = Row();
        row.meta.count += sum.first;
        row.meta.last_step = static_cast<uint32_t>(s);
        if (row.meta.count < config.admission().count_min()) continue;
        if (row.values.empty()) {
          row.meta.flags = kRowAdmitted;
          row.values = Initial(t, sign);
          row.values.resize(config.dim() + optimizer.state_floats());
          optimizer.InitState(row.values.data() + config.dim());
        }
        for (float& g : sum.second) g /= n;
        ++row.meta.updates;
        optimizer.Update(row.values.data(), row.values.data() + config.dim(), sum.second.data(), row.meta.updates,
                         optimizer.RateAt(s));
      }
    }
  }

  const Plan plan_;
  const Job job_;
  std::vector<Rows> after_;  // [steps + 1]
};

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace hearth
