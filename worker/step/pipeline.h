// A step's life around the trainer: read → pull → (trainer) → push, and the rules that fix what each step sees.
//
// clang-format off
//   read thread   every held lane's LaneReader, as far ahead as the queues allow; tells the servers the signs early
//   pull thread   takes the permit of step s − k − 1, then the next batch of each lane, and pulls in (step, lane) order
//   trainer       the caller of Next and Finish: computes, and takes part in the reduction
//   push thread   pushes each lane in order, hands the permit back, repeats what was not acknowledged
// clang-format on
//
// A permit carries what the reduction of its step decided. Everything that step f decides takes effect at f + k + 1,
// which is the step whose pull the permit unlocks: so the pull thread always knows enough, and never waits for more
// (docs/PROTOCOL.md §2, §3).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/proto/control.pb.h"
#include "model/batch/batch.h"
#include "ps/ps_client.h"
#include "worker/log/log_reader.h"
#include "worker/step/rest_gate.h"
#include "worker/step/step_clock.h"
#include "worker/step/step_verdict.h"

namespace hearth {

// One step of this worker's lanes.
struct StepBatch {
  uint64_t step = 0;
  uint64_t view = 0;
  std::vector<std::unique_ptr<Batch>> lanes;  // ascending lane; rows are in place
  int64_t input_us = 0;                       // the pull thread waited so long for the readers
  int64_t pull_us = 0;                        // from the first Send to the last row in place
};

// What a finished step is to the snapshot.
struct CutState {
  bool cut = false;
  bool epoch_ended = false;
  bool job_finished = false;
  bool stopping = false;  // the run ends here
  SegmentEnd end;         // at this step, or still to come; else none
};

// The batch's signs as the clients want them, by table, ascending.
enum class RowsOf { kNothing, kPull, kPush };  // signs alone; group.rows (sized here); group.gradients
void ListTables(Batch* batch, RowsOf rows, std::vector<TableRows>* tables);

struct PipelineOptions {
  Env* env = nullptr;
  ClientOptions clients;
  StepClock::Options clock;
  uint32_t read_ahead_batches_max = 4;  // per lane
  bool prefetch = true;
  std::vector<uint32_t> group_dims;  // FeatureLayout's groups, for batches without records
  struct Lane {
    std::unique_ptr<LaneReader> reader;
    Cursor cursor;  // end of the last applied batch; its lane and whether it is at its segment's end
  };
  std::vector<Lane> lanes;  // ascending
  // Called by the pull thread with each batch whose rows have come, while the steps before it compute. May be empty.
  std::function<absl::Status(Batch*)> pulled;
  // Of a job with a directory that grows; outlives the pipeline. Null: a lane without a record joins every step.
  RestGate* gate = nullptr;
};

class Pipeline {
 public:
  // Starts the three threads.
  explicit Pipeline(PipelineOptions options);
  // Ends them; a pull that no server answers is waited for.
  ~Pipeline();

  // The next step with its rows; nothing after the last step of the run. The first error of any thread, once.
  absl::StatusOr<std::unique_ptr<StepBatch>> Next();

  // Takes the step back after its reduction, with gradients in place, and pushes it. REQUIRES: steps in order.
  absl::StatusOr<CutState> Finish(std::unique_ptr<StepBatch> step, const StepVerdict& verdict);

  // After the last step: waits until every push is acknowledged.
  absl::Status Flush();

  // What the caller of Next waited for so far, and what the push thread worked.
  struct Times {
    int64_t wait_input_us = 0;
    int64_t wait_pull_us = 0;
    int64_t push_us = 0;
  };
  Times times() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
