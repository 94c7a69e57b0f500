// Evaluation of the splits on the tables after a cut (docs/PROTOCOL.md §5): read only, batches fixed by (file, block),
// results merged in (file, record) order, so that figures and predictions do not depend on the number of workers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/base/file_list.h"
#include "common/net/transport.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "ps/ps_client.h"
#include "worker/dense/dense_replica.h"
#include "worker/evaluation/predictions.h"
#include "worker/log/log_reader.h"

namespace hearth {

struct EvaluatorOptions {
  Env* env = nullptr;
  Transport* transport = nullptr;
  ClientOptions clients;
  Job job;
  std::shared_ptr<const LogSchema> schema;  // of `logs`, the splits' among them
  std::vector<Log> logs;
  uint32_t first_split_log = 0;  // split i is logs[first_split_log + i]
  int worker = 0;
  int workers = 1;
  std::string dir;  // predictions go to dir/predictions
  std::string scratch;
};

// One thread. Every worker calls Run at the same cut; worker 0 gathers.
class Evaluator {
 public:
  // Lists the splits' files. NotFound names a missing one.
  static absl::StatusOr<std::unique_ptr<Evaluator>> Open(const EvaluatorOptions& options);
  ~Evaluator();

  // These of the job's splits, by number, at the cut `step`. On worker 0 one Evaluation a split, on the others none.
  absl::StatusOr<std::vector<Evaluation>> Run(DenseReplica* replica, uint64_t step, const std::vector<int>& splits);

 private:
  explicit Evaluator(const EvaluatorOptions& options);
  absl::StatusOr<std::unique_ptr<LaneReader>> OpenReader(int split, int lane, int lanes, FileList* files);
  absl::Status PullRows(uint64_t step, Batch* batch);
  absl::StatusOr<PredictionRows> Predict(DenseReplica* replica, int split, uint64_t step);
  absl::StatusOr<std::vector<std::unique_ptr<Batch>>> ReadHead(int split, uint64_t step);
  absl::Status SendToFirst(const PredictionRows& rows, int split, uint64_t step);
  absl::Status Gather(int split, uint64_t step, PredictionRows* rows);

  const EvaluatorOptions options_;
  std::vector<std::vector<LogFile>> files_;  // [splits] numbered from 0 each
  PullClient puller_;
  std::vector<Message> early_;  // worker 0: results of a split that is not gathered yet
};

}  // namespace hearth
