#include "tests/golden/golden_trainer.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/artifact/manifest.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/file_list.h"
#include "common/base/half.h"
#include "common/base/status.h"
#include "embedding/embedding_table.h"
#include "embedding/lifecycle.h"
#include "embedding/row_record.h"
#include "embedding/sparse_optimizer.h"
#include "tests/embedding/slow_clock.h"
#include "worker/dense/dense_replica.h"
#include "worker/dense/host_step.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

struct Row {
  RowMeta meta;
  std::vector<float> values;  // weights, then state; empty until admitted
};
struct Tables {
  std::map<Sign, Row> rows;
  std::map<std::tuple<TableNumber, uint32_t, uint32_t>, CountingBloom> filters;  // by logical shard and generation
  std::vector<SlowClock> clocks;                                                 // [tables]
};

class Golden {
 public:
  Golden(const Job& job, std::string scratch) : job_(job), scratch_(std::move(scratch)) {}

  absl::StatusOr<GoldenResult> Run() {
    HEARTH_RETURN_IF_ERROR(Open());
    const uint64_t k = job_.training().staleness();
    uint64_t epoch = 0, segment_ends_at = 0;
    bool last = false;
    std::vector<bool> ended(lanes_, false);
    for (uint64_t step = 1;; ++step) {
      std::vector<std::unique_ptr<Batch>> batches(lanes_);
      for (uint32_t lane = 0; lane < lanes_; ++lane) {
        if (ended[lane]) continue;
        HEARTH_ASSIGN_OR_RETURN(batches[lane], readers_[lane]->Next());
        HEARTH_CHECK(batches[lane] != nullptr);
        ended[lane] = batches[lane]->kind == Batch::Kind::kAtEnd;
        last = batches[lane]->cursor.end_of_epoch();
      }
      HEARTH_RETURN_IF_ERROR(Train(step, &batches));
      if (std::find(ended.begin(), ended.end(), false) == ended.end() && segment_ends_at == 0) {
        segment_ends_at = step + k;
        cuts_.push_back(segment_ends_at);
      }
      if (step == segment_ends_at) {
        epoch += last ? 1 : 0;
        if (epoch == job_.training().epochs()) return Result(step);
        segment_ends_at = 0;
        ended.assign(lanes_, false);
      }
    }
  }

 private:
  absl::Status Open() {
    lanes_ = job_.training().lanes();
    const std::vector<Log> logs(job_.log().begin(), job_.log().end());
    HEARTH_ASSIGN_OR_RETURN(auto schema, LogSchema::Open(job_, logs));
    HEARTH_ASSIGN_OR_RETURN(const auto files, ListLogFiles(job_, logs));
    files_.Append(files, true);
    HEARTH_ASSIGN_OR_RETURN(const auto base_rates, CountBaseRates(job_, schema, files, 65536));
    HEARTH_ASSIGN_OR_RETURN(replica_, DenseReplica::Create(job_, base_rates));
    for (uint32_t lane = 0; lane < lanes_; ++lane) {
      LaneReaderOptions options;
      options.job = job_;
      options.logs = logs;
      options.schema = schema;
      options.files = &files_;
      options.lane = lane;
      options.lanes = lanes_;
      options.epochs = job_.training().epochs();
      options.start.set_lane(lane);
      options.scratch = JoinPath(scratch_, "lane-" + std::to_string(lane));
      HEARTH_RETURN_IF_ERROR(MakeDirectories(options.scratch));
      options.env = Env::Real();
      HEARTH_ASSIGN_OR_RETURN(auto reader, LaneReader::Open(options));
      readers_.push_back(std::move(reader));
    }
    history_.emplace_back(0, Tables());
    for (const Table& table : job_.table()) {
      history_.back().second.clocks.emplace_back().hours = std::max<uint32_t>(1, table.expire_after_hours());
    }
    return absl::OkStatus();
  }

  const Table& TableOfSign(Sign sign) const { return job_.table(static_cast<int>(TableOf(sign)) - 1); }

  // tables: of the view that is looked at, or that is changed.
  bool Live(const Tables& tables, Sign sign, const Row& row, uint64_t step) const {
    if (TableOfSign(sign).expire_after_hours() > 0)
      return !tables.clocks[TableOf(sign) - 1].Expired(row.meta.last_step);
    const uint64_t expire = TableOfSign(sign).expire_after_steps();
    return expire == 0 || row.meta.last_step + expire >= step;
  }

  std::string RecordOf(Sign sign, const Row& row) const {
    std::string record(reinterpret_cast<const char*>(&row.meta), sizeof(row.meta));
    if (!row.values.empty()) AppendFloats(TableOfSign(sign), row.values.data(), &record);
    return record;
  }

  bool HasFilters(Sign sign) const { return TableOfSign(sign).admission().counter() == Admission::BLOOM; }

  uint32_t Generation(const Tables& tables, TableNumber table, uint64_t step) const {
    if (job_.table(static_cast<int>(table) - 1).expire_after_hours() > 0) return tables.clocks[table - 1].Generation();
    return static_cast<uint32_t>(step / job_.table(static_cast<int>(table) - 1).expire_after_steps());
  }

  // The count of a sign without a live row: of this step's generation and of the one before.
  uint32_t Seen(const Tables& tables, Sign sign, uint64_t step) const {
    const TableNumber table = TableOf(sign);
    uint32_t seen = 0;
    for (const auto& [key, filter] : tables.filters) {
      const auto& [of, shard, generation] = key;
      if (of != table || shard != LogicalShardOf(sign, job_.training().shards())) continue;
      if (generation + 1 >= Generation(tables, table, step)) seen += filter.Estimate(sign);
    }
    return seen;
  }

  std::vector<float> InitialWeights(Sign sign) const {
    const Table& table = TableOfSign(sign);
    std::vector<float> weights(table.dim());
    for (uint32_t i = 0; i < table.dim(); ++i) weights[i] = InitialWeight(job_.seed(), sign, i, table.init_uniform());
    RowWeights(table, job_.seed()).Round(weights.data());
    return weights;
  }

  // protocol: view(s) = max(s − 1 − k, last cut before s)
  const Tables& View(uint64_t step) {
    const uint64_t k = job_.training().staleness();
    const uint64_t every = job_.snapshot().every_steps();
    uint64_t view = step > k + 1 ? step - 1 - k : 0;
    view = std::max(view, (step - 1) / every * every);
    for (const uint64_t cut : cuts_) {
      if (cut < step) view = std::max(view, cut);
    }
    while (history_.front().first < view) history_.pop_front();
    HEARTH_CHECK(history_.front().first == view);
    return history_.front().second;
  }

  float OnTheWire(float x) const { return job_.training().wire() == Wire::FLOAT16 ? FromHalf(ToHalf(x)) : x; }

  void Pull(const Tables& tables, uint64_t step, RowGroup* group) const {
    group->rows.assign(group->unique.size() * group->dim, 0);
    for (size_t i = 0; i < group->unique.size(); ++i) {
      const Sign sign = group->unique[i];
      const auto found = tables.rows.find(sign);
      const bool live = found != tables.rows.end() && Live(tables, sign, found->second, step);
      std::vector<float> weights;
      if (live && (found->second.meta.flags & kRowAdmitted)) {
        weights.assign(found->second.values.begin(), found->second.values.begin() + group->dim);
      } else if ((live ? found->second.meta.count : Seen(tables, sign, step)) + uint64_t{group->occurrences[i]} >=
                 TableOfSign(sign).admission().count_min()) {
        weights = InitialWeights(sign);
      }
      std::copy(weights.begin(), weights.end(), group->rows.begin() + i * group->dim);
    }
    for (float& x : group->rows) x = OnTheWire(x);
  }

  absl::Status Train(uint64_t step, std::vector<std::unique_ptr<Batch>>* batches) {
    const Tables& view = View(step);
    std::vector<LaneResult> results(lanes_);
    uint64_t n = 0;
    bool skip = false;
    for (uint32_t lane = 0; lane < lanes_; ++lane) {
      Batch* batch = (*batches)[lane].get();
      if (batch == nullptr || batch->records == 0) continue;
      for (RowGroup& group : batch->groups) Pull(view, step, &group);
      HEARTH_RETURN_IF_ERROR(TrainLane(replica_->dense_model(), batch, &results[lane]));
      n += batch->records;
      skip |= !results[lane].finite;
    }
    for (const auto& batch : *batches) {
      if (batch == nullptr) continue;
      result_.read += batch->delta.read();
      result_.filtered += batch->delta.filtered();
      result_.rejected += batch->delta.rejected() + (skip ? batch->records : 0);
      result_.trained += skip ? 0 : batch->records;
    }
    Tables next = history_.back().second;
    if (n > 0 && !skip) {
      HEARTH_RETURN_IF_ERROR(UpdateDense(step, n, results));
      UpdateRows(step, n, *batches, &next);
      Tick(step, *batches, &next);
    }
    history_.emplace_back(step, std::move(next));
    return absl::OkStatus();
  }

  // The lower median of the lanes' times.
  static void Tick(uint64_t step, const std::vector<std::unique_ptr<Batch>>& batches, Tables* tables) {
    std::vector<uint32_t> times_s;
    for (const auto& batch : batches) {
      if (batch != nullptr && batch->time_s > 0) times_s.push_back(batch->time_s);
    }
    if (times_s.empty()) return;
    std::sort(times_s.begin(), times_s.end());
    for (SlowClock& clock : tables->clocks) clock.Tick(step, times_s[(times_s.size() - 1) / 2]);
  }

  absl::Status UpdateDense(uint64_t step, uint64_t n, const std::vector<LaneResult>& results) {
    std::vector<float> sum(replica_->parameters(), 0);
    std::vector<BatchMoments> moments;
    for (const LaneResult& result : results) {
      // A lane without records adds zeros, which change no bit of a sum that starts at +0.
      for (size_t i = 0; i < result.gradient.size(); ++i) sum[i] += result.gradient[i];
      moments.push_back(result.moments);
    }
    for (float& g : sum) g /= static_cast<float>(n);
    HEARTH_CHECK(job_.training().clip_norm() == 0, "the golden trainer does not clip");
    return UpdateModel(replica_->dense_model(), step, sum, PoolMoments(moments));
  }

  void UpdateRows(uint64_t step, uint64_t n, const std::vector<std::unique_ptr<Batch>>& batches, Tables* tables) const {
    struct Sum {
      uint64_t occurrences = 0;
      std::vector<float> gradient;
    };
    std::map<Sign, Sum> sums;
    for (const auto& batch : batches) {
      if (batch == nullptr || batch->records == 0) continue;
      for (const RowGroup& group : batch->groups) {
        for (size_t i = 0; i < group.unique.size(); ++i) {
          Sum& sum = sums[group.unique[i]];
          sum.occurrences += group.occurrences[i];
          std::vector<float> gradient(group.gradients.begin() + static_cast<ptrdiff_t>(i * group.dim),
                                      group.gradients.begin() + static_cast<ptrdiff_t>((i + 1) * group.dim));
          for (float& g : gradient) g = OnTheWire(g);
          if (sum.gradient.empty()) {
            sum.gradient = gradient;
          } else {
            for (uint32_t d = 0; d < group.dim; ++d) sum.gradient[d] += gradient[d];
          }
        }
      }
    }
    for (auto& [sign, sum] : sums) {
      const Table& table = TableOfSign(sign);
      const SparseOptimizer optimizer(table.optimizer(), table.dim());
      const auto found = tables->rows.find(sign);
      if (found != tables->rows.end() && !Live(*tables, sign, found->second, step)) tables->rows.erase(found);
      if (HasFilters(sign) && tables->rows.count(sign) == 0) {
        const uint32_t seen = Seen(*tables, sign, step);
        const uint32_t shard = LogicalShardOf(sign, job_.training().shards());
        tables->filters.try_emplace({TableOf(sign), shard, Generation(*tables, TableOf(sign), step)}, table.admission())
            .first->second.Add(sign, static_cast<uint32_t>(sum.occurrences));
        if (seen + sum.occurrences < table.admission().count_min()) continue;
        tables->rows[sign].meta.count = seen;
      }
      Row& row = tables->rows[sign];
      row.meta.count += sum.occurrences;
      row.meta.last_step = step;
      if (!(row.meta.flags & kRowAdmitted)) {
        if (row.meta.count < table.admission().count_min()) continue;
        row.meta.flags |= kRowAdmitted;
        row.values = InitialWeights(sign);
        row.values.resize(table.dim() + optimizer.state_floats());
        optimizer.InitState(row.values.data() + table.dim());
      }
      for (float& g : sum.gradient) g /= static_cast<float>(n);
      if (optimizer.Update(row.values.data(), row.values.data() + table.dim(), sum.gradient.data(),
                           row.meta.updates + 1, optimizer.RateAt(step))) {
        ++row.meta.updates;
        RoundByChance(table, sign, step, row.values.data());
      }
    }
  }

  void RoundByChance(const Table& table, Sign sign, uint64_t step, float* values) const {
    const RowWeights weights(table, job_.seed());
    std::string words(weights.words() * sizeof(float), '\0');
    weights.EncodeByChance(sign, step, values, words.data());
    weights.Decode(words.data(), values);
  }

  absl::StatusOr<GoldenResult> Result(uint64_t step) {
    result_.steps = step;
    const Tables& tables = history_.back().second;
    for (const auto& [sign, row] : tables.rows) {
      if (Live(tables, sign, row, step)) result_.rows_hash += RecordHash(sign, RecordOf(sign, row));
    }
    for (const auto& [key, filter] : tables.filters) {
      const auto& [table, shard, generation] = key;
      if (generation + 1 >= Generation(tables, table, step))
        result_.rows_hash += filter.Hash({table, shard, generation});
    }
    HEARTH_ASSIGN_OR_RETURN(result_.dense_hash, replica_->Hash());
    result_.model_hash = ModelHash(result_.rows_hash, result_.dense_hash);
    return result_;
  }

  const Job job_;
  const std::string scratch_;
  uint32_t lanes_ = 1;
  FileList files_{Env::Real()};
  std::unique_ptr<DenseReplica> replica_;
  std::vector<std::unique_ptr<LaneReader>> readers_;
  std::vector<uint64_t> cuts_;                       // asked for
  std::deque<std::pair<uint64_t, Tables>> history_;  // (step, tables after it), oldest first
  GoldenResult result_;
};

}  // namespace

absl::StatusOr<GoldenResult> TrainGolden(const Job& job, const std::string& scratch) {
  return Golden(job, scratch).Run();
}

}  // namespace hearth
