// Figures for other programs' charts: TensorBoard's event files under DIR/tb, and Prometheus' page. The scheduler is
// the only one that knows them for the whole job.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
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
  virtual ~Curves() = default;

  // Training: figures of the last seconds, counts of records since the job's first start.
  virtual absl::Status OnTraining(const ProgressFigures& figures, const Ledger& ledger) = 0;
  // One for each split that was evaluated.
  virtual absl::Status OnEvaluations(const std::vector<Evaluation>& evaluations) = 0;
  virtual void OnSnapshot() = 0;
};

}  // namespace hearth
