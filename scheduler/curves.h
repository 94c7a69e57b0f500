// Figures for other programs' charts: TensorBoard's event files under DIR/tb, and Prometheus' page. The scheduler is
// the only one that knows them for the whole job.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/base/metrics.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "scheduler/event_file.h"
#include "scheduler/progress.h"

namespace hearth {

// One thread.
class Curves {
 public:
  // An event file from the first figure on where job.metrics.tensorboard is set, a page where it names a port.
  // `first_step`: the first that this start trains; what DIR/tb holds of it and of later steps is void from then on.
  // Unavailable where the port is taken.
  static absl::StatusOr<std::unique_ptr<Curves>> Start(Env* env, const Job& job, const std::string& dir,
                                                       uint64_t first_step);

  // Training: its rate over the last seconds, counts of records since the job's first start.
  absl::Status OnTraining(const ProgressFigures& figures, const Ledger& ledger);
  // Progressive validation: drawn at the window's last step.
  absl::Status OnWindow(const ValidationWindow& window);
  // One for each split that was evaluated.
  absl::Status OnEvaluations(const std::vector<Evaluation>& evaluations);
  void OnSnapshot() { snapshots_->Add(1); }

 private:
  Curves(Env* env, const Job& job, const std::string& dir, uint64_t first_step);
  void Count(const std::string& fate, uint64_t total, uint64_t told);
  absl::Status Write(uint64_t step, const std::vector<Scalar>& scalars);

  Env* const env_;
  const Job job_;
  const uint64_t first_step_;
  const std::string folder_;  // of event files; empty: none
  MetricRegistry registry_;
  std::map<std::string, Counter*> records_;  // by fate
  std::map<std::string, Gauge*> auc_;        // by task
  Gauge* const step_ = registry_.NewGauge({"step", "", "Last step that a worker told of"});
  Gauge* const rate_ =
      registry_.NewGauge({"samples_per_second", "", "Records trained a second, over the last seconds"});
  Gauge* const loss_ =
      registry_.NewGauge({"loss", "", "Mean loss of a label in the newest window of records, before each was trained"});
  Gauge* const lag_ = registry_.NewGauge({"log_lag", "files", "Files listed that the slowest lane has not reached"});
  Counter* const snapshots_ = registry_.NewCounter({"snapshots", "", "Snapshots committed"});
  std::unique_ptr<EventFile> events_;  // made with the first figure
  Ledger told_;
};

}  // namespace hearth
