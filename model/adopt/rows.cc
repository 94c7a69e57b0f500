#include "model/adopt/rows.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "embedding/expiry.h"
#include "embedding/lifecycle.h"
#include "embedding/row_record.h"
#include "embedding/snapshot_reader.h"
#include "embedding/sparse_optimizer.h"

namespace hearth {
namespace {

constexpr size_t kBatchBytes = size_t{64} << 20;  // one sorted file, as where shards are dealt anew

// Records on their way into the store.
class Writer {
 public:
  Writer(uint32_t shards, KvStore* store) : shards_(shards), store_(store) {}

  // floats: RowFloatsOf of them, or none for a counter.
  absl::Status Add(Sign sign, const RowMeta& meta, const Table& table, absl::Span<const float> floats) {
    const size_t begin = values_.size();
    values_.append(reinterpret_cast<const char*>(&meta), sizeof(meta));
    if (!floats.empty()) AppendFloats(table, floats.data(), &values_);
    records_.emplace_back(KeyOf(sign, shards_), values_.size() - begin);
    hash_ += RecordHash(sign, absl::string_view(values_).substr(begin));
    return values_.size() < kBatchBytes ? absl::OkStatus() : Flush();
  }

  absl::Status Flush() {
    std::vector<KvWrite> writes;
    size_t begin = 0;
    for (const auto& [key, bytes] : records_) {
      writes.push_back({key, absl::string_view(values_).substr(begin, bytes), false});
      begin += bytes;
    }
    HEARTH_RETURN_IF_ERROR(store_->Write(writes));
    values_.clear();
    records_.clear();
    return absl::OkStatus();
  }
  uint64_t hash() const { return hash_; }

 private:
  const uint32_t shards_;
  KvStore* const store_;
  std::string values_;
  std::vector<std::pair<KvKey, size_t>> records_;  // key and length of its value
  uint64_t hash_ = 0;
};

}  // namespace

absl::StatusOr<AdoptedRows> TakeOverRows(const HeldSnapshot& before, const Job& old_job, const Job& now,
                                         const AdoptionPlan& plan, bool restart, KvStore* store, WantedRows* wanted) {
  AdoptedRows adopted;
  Writer writer(now.training().shards(), store);
  uint64_t old_hash = 0;
  const uint64_t step = restart ? 0 : before.manifest.step();
  const auto want = [&](Sign sign, uint32_t dim, absl::Span<const float> floats) {
    const auto found = wanted->find(sign);
    if (found != wanted->end()) found->second.assign(floats.begin(), floats.begin() + dim);
  };
  for (size_t i = 0; i < plan.tables.size(); ++i) {
    AdoptedTable& counts = adopted.tables.emplace_back();
    const TableMove& move = plan.tables[i];
    if (move.from < 0) continue;
    const Table& config = now.table(static_cast<int>(i));
    const TableNumber number = static_cast<TableNumber>(i) + 1;
    const uint32_t old_dim = old_job.table(move.from).dim();
    const SparseOptimizer optimizer(config.optimizer(), config.dim());
    std::vector<float> row(config.dim() + optimizer.state_floats(), 0.0f);
    const Expiry expiry(ExpiryRule::Of(config), restart ? LogClock() : ClockOf(before.manifest.table(), move.from));
    counts.clock = expiry.clock();
    // As it is in the new run at its first step; false: the new job lets it expire.
    const auto taken = [&](RowMeta* meta) {
      if (restart) meta->last_step = 0;
      return !IsExpired(*meta, expiry.HorizonAt(step));
    };
    const auto visit = [&](Sign sign, const RowMeta& old_meta, absl::Span<const float> floats) {
      want(sign, old_dim, floats);
      RowMeta meta = old_meta;
      if (!taken(&meta)) {
        ++counts.expired;
        return absl::OkStatus();
      }
      ++counts.rows;
      std::fill(row.begin(), row.begin() + config.dim(), 0.0f);
      std::copy_n(floats.begin(), move.dims, row.begin());
      if (move.state) {
        std::copy(floats.begin() + old_dim, floats.end(), row.begin() + config.dim());
      } else {
        optimizer.InitState(row.data() + config.dim());
        meta.updates = 0;
      }
      return writer.Add(MakeSign(number, IdOf(sign)), meta, config, row);
    };
    const auto visit_counter = [&](Sign sign, const RowMeta& old_meta) {
      RowMeta meta = old_meta;
      const bool kept = move.counters && taken(&meta);
      ++(kept ? counts.counters : counts.counters_left);
      return kept ? writer.Add(MakeSign(number, IdOf(sign)), meta, config, {}) : absl::OkStatus();
    };
    HEARTH_RETURN_IF_ERROR(VisitRows(before.folder, before.manifest, old_job, static_cast<TableNumber>(move.from) + 1,
                                     visit, &old_hash, visit_counter));
  }
  for (const int table : plan.dropped_tables) {
    AdoptedTable& counts = adopted.tables.emplace_back();
    const uint32_t dim = old_job.table(table).dim();
    const auto count = [&](Sign sign, const RowMeta&, absl::Span<const float> floats) {
      want(sign, dim, floats);
      ++counts.rows;
      return absl::OkStatus();
    };
    HEARTH_RETURN_IF_ERROR(
        VisitRows(before.folder, before.manifest, old_job, static_cast<TableNumber>(table) + 1, count, &old_hash));
  }
  HEARTH_RETURN_IF_ERROR(CheckRowsHash(before.folder, before.manifest, old_hash));
  HEARTH_RETURN_IF_ERROR(writer.Flush());
  adopted.rows_hash = writer.hash();
  return adopted;
}

}  // namespace hearth
