#include "scheduler/snapshot_coordinator.h"

#include <algorithm>

#include "common/artifact/manifest.h"
#include "common/base/status.h"
#include "common/job/quality.h"
#include "scheduler/lease_table.h"

namespace hearth {
namespace {

template <typename Field>
void AddEach(const Field& more, Field* sum) {
  for (int i = 0; i < more.size(); ++i) sum->Set(i, sum->Get(i) + more.Get(i));
}

void AddTable(const TableStats& more, TableStats* sum) {
  sum->set_name(more.name());
  sum->set_rows(sum->rows() + more.rows());
  sum->set_rows_in_memory(sum->rows_in_memory() + more.rows_in_memory());
  sum->set_rows_spilled(sum->rows_spilled() + more.rows_spilled());
  sum->set_rows_expired(sum->rows_expired() + more.rows_expired());
  sum->set_rows_admitted(sum->rows_admitted() + more.rows_admitted());
  sum->set_gradients_dropped(sum->gradients_dropped() + more.gradients_dropped());
  sum->set_rows_non_finite(sum->rows_non_finite() + more.rows_non_finite());
  sum->set_memory_hits(sum->memory_hits() + more.memory_hits());
  sum->set_memory_misses(sum->memory_misses() + more.memory_misses());
  sum->set_rows_prefetched(sum->rows_prefetched() + more.rows_prefetched());
  sum->set_prefetch_hits(sum->prefetch_hits() + more.prefetch_hits());
  sum->set_bytes_memory(sum->bytes_memory() + more.bytes_memory());
  sum->set_bytes_disk(sum->bytes_disk() + more.bytes_disk());
  if (more.has_clock()) *sum->mutable_clock() = more.clock();
}

// A task without a prediction so far has no buckets.
bool HaveOneShape(const std::vector<TaskMetric>& a, const std::vector<TaskMetric>& b) {
  if (a.size() != b.size()) return false;
  for (size_t t = 0; t < a.size(); ++t) {
    const int buckets_a = a[t].positives_size();
    const int buckets_b = b[t].positives_size();
    if (buckets_a != 0 && buckets_b != 0 && buckets_a != buckets_b) return false;
  }
  return true;
}

// REQUIRES: one shape.
void AddTaskMetric(const TaskMetric& more, TaskMetric* sum) {
  sum->set_loss_sum(sum->loss_sum() + more.loss_sum());
  sum->set_labelled(sum->labelled() + more.labelled());
  if (more.has_prediction_sum()) sum->set_prediction_sum(sum->prediction_sum() + more.prediction_sum());
  if (more.positives_size() == 0) return;
  sum->mutable_positives()->Resize(more.positives_size(), 0);
  sum->mutable_negatives()->Resize(more.negatives_size(), 0);
  AddEach(more.positives(), sum->mutable_positives());
  AddEach(more.negatives(), sum->mutable_negatives());
}

}  // namespace

absl::Status AddTaskMetrics(const std::vector<TaskMetric>& more, std::vector<TaskMetric>* sum) {
  if (more.empty()) return absl::OkStatus();
  for (const TaskMetric& task : more) {
    if (task.positives_size() != task.negatives_size() || task.positives_size() > kHistogramBucketsMax) {
      return absl::InternalError(
          absl::StrCat("a task's histogram has ", task.positives_size(), " and ", task.negatives_size(), " buckets"));
    }
  }
  if (sum->empty()) {
    *sum = more;
    return absl::OkStatus();
  }
  if (!HaveOneShape(more, *sum)) {
    return absl::InternalError(absl::StrCat("metrics of ", more.size(), " tasks differ from those before (",
                                            sum->size(), " tasks) in number or in buckets"));
  }
  for (size_t t = 0; t < more.size(); ++t) AddTaskMetric(more[t], &(*sum)[t]);
  return absl::OkStatus();
}

SnapshotCoordinator::SnapshotCoordinator(Options options)
    : options_(std::move(options)), metrics_(options_.workers), done_step_(options_.after_step), best_(options_.best) {}

absl::Status SnapshotCoordinator::AddMetrics(uint32_t worker, const std::vector<TaskMetric>& tasks) {
  HEARTH_CHECK(worker < options_.workers);
  const auto agrees = [&](const std::vector<TaskMetric>& known) {
    return tasks.empty() || known.empty() || HaveOneShape(tasks, known);
  };
  if (!agrees(shape_) || !agrees(options_.task_metrics)) {
    return absl::InternalError(
        absl::StrCat("worker ", worker, ": its metrics differ in tasks or buckets from the job's so far"));
  }
  HEARTH_RETURN_IF_ERROR(Annotate(AddTaskMetrics(tasks, &metrics_[worker]), absl::StrCat("worker ", worker)));
  if (shape_.empty()) shape_ = tasks;
  for (size_t t = 0; t < tasks.size(); ++t) {
    if (shape_[t].positives_size() == 0) shape_[t] = tasks[t];
  }
  return absl::OkStatus();
}

absl::StatusOr<SnapshotCoordinator::Parts*> SnapshotCoordinator::PartsOf(uint64_t step) {
  if (done_step_.has_value() && step <= *done_step_) return nullptr;
  if (parts_.size() >= kCutsInFlightMax && parts_.count(step) == 0) {
    return absl::InternalError(
        absl::StrCat(parts_.size(), " cuts wait for their parts, the oldest at step ", parts_.begin()->first));
  }
  return &parts_[step];
}

absl::Status SnapshotCoordinator::AddServer(uint32_t server, const ServerAtCut& part) {
  HEARTH_CHECK(server < options_.servers);
  HEARTH_ASSIGN_OR_RETURN(Parts* const parts, PartsOf(part.step()));
  if (parts == nullptr) return absl::OkStatus();
  const ServerAtCut& mine = parts->server.emplace(server, part).first->second;
  const ServerAtCut& other = parts->server.begin()->second;
  for (int t = 0; t < std::min(mine.table_size(), other.table_size()); ++t) {
    if (mine.table(t).clock().SerializeAsString() == other.table(t).clock().SerializeAsString()) continue;
    return absl::InternalError(absl::StrCat("server ", server, " at the cut of step ", part.step(),
                                            ": the clock of table \"", mine.table(t).name(), "\" is not server ",
                                            parts->server.begin()->first, "'s"));
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> SnapshotCoordinator::AddWorker(uint32_t worker, const WorkerAtCut& part) {
  HEARTH_CHECK(worker < options_.workers);
  HEARTH_ASSIGN_OR_RETURN(Parts* const parts, PartsOf(part.step()));
  if (parts == nullptr || parts->worker.count(worker) > 0) return false;
  HEARTH_RETURN_IF_ERROR(CheckWorker(*parts, worker, part));
  HEARTH_RETURN_IF_ERROR(AddMetrics(worker, {part.progress().task().begin(), part.progress().task().end()}));
  parts->metrics[worker] = metrics_[worker];
  parts->worker.emplace(worker, part);
  return parts->worker.size() == options_.workers;
}

absl::Status SnapshotCoordinator::CheckWorker(const Parts& parts, uint32_t worker, const WorkerAtCut& part) const {
  const std::string who = absl::StrCat("worker ", worker, " at the cut of step ", part.step());
  uint32_t expected = worker;
  for (const LaneState& lane : part.lane()) {
    if (lane.cursor().lane() != expected) {
      return absl::InternalError(
          absl::StrCat(who, ": brought lane ", lane.cursor().lane(), " where lane ", expected, " was due"));
    }
    HEARTH_RETURN_IF_ERROR(Annotate(CheckLedger(lane.ledger()), absl::StrCat(who, ", lane ", expected)));
    expected += options_.workers;
  }
  if (expected < options_.lanes || expected >= options_.lanes + options_.workers) {
    return absl::InternalError(absl::StrCat(who, ": brought ", part.lane_size(), " lanes"));
  }
  if (worker == 0 && !part.has_dense_hash()) return absl::InternalError(absl::StrCat(who, ": brought no dense_hash"));
  if (parts.worker.empty()) return absl::OkStatus();
  const WorkerAtCut& other = parts.worker.begin()->second;
  if (other.epoch_ended() != part.epoch_ended() || other.job_finished() != part.job_finished() ||
      other.stopping() != part.stopping()) {
    return absl::InternalError(absl::StrCat(who,
                                            ": its flags (epoch_ended, job_finished, stopping) differ from worker ",
                                            parts.worker.begin()->first, "'s"));
  }
  return absl::OkStatus();
}

absl::Status SnapshotCoordinator::AddEvaluation(const Evaluation& part) {
  const auto& splits = options_.job.split();
  if (std::none_of(splits.begin(), splits.end(), [&](const Split& split) { return split.name() == part.split(); })) {
    return absl::InternalError(absl::StrCat("an evaluation of \"", part.split(), "\", which is no split of the job"));
  }
  HEARTH_ASSIGN_OR_RETURN(Parts* const parts, PartsOf(part.step()));
  if (parts != nullptr) parts->evaluation.emplace(part.split(), part);
  return absl::OkStatus();
}

std::optional<BestSnapshot> SnapshotCoordinator::BestAt(uint64_t step, const Parts& parts,
                                                        const std::optional<BestSnapshot>& before) const {
  std::vector<Evaluation> evaluations;
  for (const auto& [split, evaluation] : parts.evaluation) evaluations.push_back(evaluation);
  return BestAfter(options_.job, before, evaluations, step);
}

// Not where the last steps were skipped: such a cut is no end to stop at. The workers judge the same.
bool SnapshotCoordinator::EndsAt(const Parts& parts, const std::optional<BestSnapshot>& best) const {
  const bool skipped = parts.worker.at(0).lane(0).skipped_in_row() > 0;
  return !parts.evaluation.empty() && !skipped && EndsWithoutGain(options_.job, best);
}

bool SnapshotCoordinator::AllEvaluated(uint64_t step, const Parts& parts,
                                       const std::optional<BestSnapshot>& before) const {
  const auto all = [&](bool ends) {
    const std::vector<int> due = SplitsDueAt(options_.job, step, ends);
    return std::all_of(due.begin(), due.end(),
                       [&](int split) { return parts.evaluation.count(options_.job.split(split).name()) > 0; });
  };
  if (!all(parts.worker.begin()->second.epoch_ended())) return false;
  return !EndsAt(parts, BestAt(step, parts, before)) || all(/*ends=*/true);
}

bool SnapshotCoordinator::IsWhole(uint64_t step, const Parts& parts) const {
  if (parts.server.size() < options_.servers || parts.worker.size() < options_.workers) return false;
  return AllEvaluated(step, parts, best_);
}

bool SnapshotCoordinator::evaluating() const {
  std::optional<BestSnapshot> best = best_;
  for (const auto& [step, parts] : parts_) {
    if (parts.worker.size() < options_.workers) continue;
    if (!AllEvaluated(step, parts, best)) return true;
    best = BestAt(step, parts, best);
  }
  return false;
}

std::optional<SnapshotCoordinator::Cut> SnapshotCoordinator::TakeWhole() {
  if (parts_.empty() || !IsWhole(parts_.begin()->first, parts_.begin()->second)) return std::nullopt;
  const uint64_t step = parts_.begin()->first;
  const Parts parts = std::move(parts_.begin()->second);
  parts_.erase(parts_.begin());
  done_step_ = step;

  Cut cut;
  Manifest& manifest = cut.manifest;
  manifest.set_step(step);
  manifest.set_lanes(options_.lanes);
  manifest.set_servers(options_.servers);
  for (uint32_t lane = 0; lane < options_.lanes; ++lane) {
    *manifest.add_lane() = parts.worker.at(lane % options_.workers).lane(static_cast<int>(lane / options_.workers));
  }
  std::vector<TaskMetric> metrics = options_.task_metrics;
  for (const auto& [worker, more] : parts.metrics) {
    // AddMetrics let only one shape in.
    HEARTH_CHECK(AddTaskMetrics(more, &metrics).ok(), "worker ", worker);
  }
  for (TaskMetric& metric : metrics) *manifest.add_task_metric() = std::move(metric);
  const WorkerAtCut& first = parts.worker.at(0);
  for (const auto& [worker, part] : parts.worker) manifest.mutable_file()->MergeFrom(part.file());
  uint64_t rows_hash = 0;
  for (const auto& [server, part] : parts.server) {
    manifest.mutable_file()->MergeFrom(part.file());
    rows_hash += part.rows_hash();
    for (int t = 0; t < part.table_size(); ++t) {
      if (t == manifest.table_size()) manifest.add_table();
      AddTable(part.table(t), manifest.mutable_table(t));
    }
  }
  manifest.set_rows_hash(rows_hash);
  manifest.set_dense_hash(first.dense_hash());
  manifest.set_model_hash(ModelHash(rows_hash, first.dense_hash()));
  best_ = BestAt(step, parts, best_);
  if (best_.has_value()) *manifest.mutable_best() = *best_;
  cut.without_gain = !first.job_finished() && EndsAt(parts, best_);
  manifest.set_job_finished(first.job_finished() || cut.without_gain);
  cut.epoch_ended = first.epoch_ended();
  cut.stopping = first.stopping();
  for (const Split& split : options_.job.split()) {
    const auto found = parts.evaluation.find(split.name());
    if (found != parts.evaluation.end()) *manifest.add_evaluation() = found->second;
  }
  return cut;
}

}  // namespace hearth
