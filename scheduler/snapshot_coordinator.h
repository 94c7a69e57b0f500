// Collects the parts of each cut until a MANIFEST can be written. Pure state: no clock, no I/O.
//
// A cut at step S is whole when every server has saved its rows at S, every worker has told where its lanes are, and
// every split that is due at S (common/job/quality.h) was evaluated at S. Several cuts may be in flight; they are
// handed out in the order of their steps. Parts that come twice, or for a step already handed out, are ignored.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

constexpr size_t kCutsInFlightMax = 1024;
constexpr int kHistogramBucketsMax = 1 << 20;

// Adds `more` to `sum`, task by task; the first one to come sets the number of tasks and buckets. Internal where shapes
// differ.
absl::Status AddTaskMetrics(const std::vector<TaskMetric>& more, std::vector<TaskMetric>* sum);

class SnapshotCoordinator {
 public:
  struct Options {
    uint32_t servers = 1;
    uint32_t workers = 1;
    uint32_t lanes = 1;
    Job job;                               // its splits, and what is made of their figures
    std::optional<BestSnapshot> best;      // as at `after_step`
    std::vector<TaskMetric> task_metrics;  // as at `after_step`, over all lanes
    std::optional<uint64_t> after_step;    // cuts up to here are done; nothing: step 0 is still to come
  };
  explicit SnapshotCoordinator(Options options);

  // What a worker's lanes added to the training metrics since its last call, also within WorkerAtCut.progress.
  absl::Status AddMetrics(uint32_t worker, const std::vector<TaskMetric>& tasks);

  // Internal where the part contradicts others of its step: flags that differ, a lane of another worker, evaluation of
  // an unknown split. REQUIRES: server, worker in range.
  absl::Status AddServer(uint32_t server, const ServerAtCut& part);
  // True when this was the last worker's part of the step: all lanes have reached it.
  absl::StatusOr<bool> AddWorker(uint32_t worker, const WorkerAtCut& part);
  absl::Status AddEvaluation(const Evaluation& part);

  struct Cut {
    // Holds step, lanes, servers, lane, task_metric, file, table, the three hashes, job_finished, best and evaluation
    // (of this cut alone). The rest is the scheduler's.
    Manifest manifest;
    bool epoch_ended = false;
    bool without_gain = false;  // that is why the job has finished
    bool stopping = false;
  };
  // The oldest cut in flight, if it is whole.
  std::optional<Cut> TakeWhole();
  // There is a step that all workers have reached while evaluations are missing.
  bool evaluating() const;
  size_t in_flight() const { return parts_.size(); }

 private:
  struct Parts {
    std::map<uint32_t, ServerAtCut> server;
    std::map<uint32_t, WorkerAtCut> worker;
    std::map<uint32_t, std::vector<TaskMetric>> metrics;  // of each worker, when it reached the step
    std::map<std::string, Evaluation> evaluation;         // by split
  };
  bool IsWhole(uint64_t step, const Parts& parts) const;
  // With `before`, the best up to the cut: a job that ends there for want of gain needs all splits. REQUIRES: all
  // workers have reached it.
  bool AllEvaluated(uint64_t step, const Parts& parts, const std::optional<BestSnapshot>& before) const;
  bool EndsAt(const Parts& parts, const std::optional<BestSnapshot>& best) const;
  std::optional<BestSnapshot> BestAt(uint64_t step, const Parts& parts,
                                     const std::optional<BestSnapshot>& before) const;
  // The parts of `step`, or nothing where the step is done.
  absl::StatusOr<Parts*> PartsOf(uint64_t step);
  absl::Status CheckWorker(const Parts& parts, uint32_t worker, const WorkerAtCut& part) const;

  const Options options_;
  std::vector<std::vector<TaskMetric>> metrics_;  // of each worker, since this attempt's start
  std::vector<TaskMetric> shape_;                 // some worker's: tasks and buckets
  std::map<uint64_t, Parts> parts_;               // by step
  std::optional<uint64_t> done_step_;
  std::optional<BestSnapshot> best_;  // as at done_step_
};

}  // namespace hearth
