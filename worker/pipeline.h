// A step's life around the trainer: read → pull → (trainer) → push, and the rules that fix what each step sees.
//
//   read thread    every held lane's LaneReader, as far ahead as the queues allow; tells the servers the signs early
//   pull thread    takes the permit of step s − k − 1, then the next batch of each lane, and pulls in (step, lane)
//   order trainer        the caller of Next and Finish: computes, and takes part in the reduction push thread    pushes
//   each lane in order, hands the permit back, repeats what was not acknowledged
//
// A permit carries what the reduction of its step decided. Everything that step f decides takes effect at f + k + 1,
// which is the step whose pull the permit unlocks: so the pull thread always knows enough, and never waits for more
// (protocol.md §2–3).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/env.h"
#include "common/proto/control.pb.h"
#include "model/batch.h"
#include "ps/ps_client.h"
#include "worker/log_reader.h"

namespace hearth {

// What all lanes together said in the reduction of a step: the same on every worker.
struct StepVerdict {
  uint64_t records = 0;     // n
  bool skip = false;        // a loss or gradient was not finite, of some lane or of all together
  bool all_at_end = false;  // every lane is at the end of its epoch
  bool stop = false;        // someone asked for a cut that ends the run
  bool cut = false;         // someone asked for a cut
};

// What follows from step `step`'s verdict. Rides on the step's permit.
struct Decision {
  uint64_t step = 0;
  uint64_t cut = 0;         // step + staleness; 0: nothing was asked for
  bool epoch_ends = false;  // at `cut`
  bool stop = false;        // at `cut`
};

// Cuts, epochs and views as protocol.md §2–3 fixes them. Pure; the trainer's side decides, the pull thread's side
// follows, and every worker's clock says the same. Steps are taken in order.
class StepClock {
 public:
  struct Options {
    uint32_t staleness = 0;    // k
    uint32_t every_steps = 0;  // multiples of it are cuts; 0: none
    uint64_t steps_max = 0;    // > 0: a cut, and the job's last step
    uint32_t epochs = 1;
    uint64_t step = 0;           // the cut that everything starts from
    uint32_t epoch = 0;          // of that cut's own step, 0-based
    uint64_t epoch_ends_at = 0;  // LaneState.epoch_ends_at of that cut; REQUIRES: <= step + staleness
  };
  explicit StepClock(const Options& options);

  // Derives what step's verdict means and takes it in.
  Decision Decide(uint64_t step, const StepVerdict& verdict);
  // Takes in what another clock decided.
  void Take(const Decision& decision);

  // max(step − 1 − k, last cut before step). REQUIRES: step − k − 1 is decided, or not after the start; step itself is
  // not.
  uint64_t View(uint64_t step) const;
  // First cut >= step that is known; 0: none.
  uint64_t NextCut(uint64_t step) const;
  bool EpochEndsAt(uint64_t step) const { return epoch_ends_at_ != 0 && step == epoch_ends_at_; }
  uint32_t EpochOf(uint64_t step) const { return epoch_ + (epoch_ends_at_ != 0 && step > epoch_ends_at_ ? 1 : 0); }
  // The run ends after this step; 0: not known yet. A job that was finished before it started ends at or before its
  // start.
  uint64_t StopAt() const;
  // All epochs are trained, or steps_max is reached, once `step` is applied.
  bool FinishedAt(uint64_t step) const;
  uint64_t epoch_ends_at() const { return epoch_ends_at_; }

 private:
  void AddCut(uint64_t step);

  const Options options_;
  std::vector<uint64_t> cuts_;  // asked for, ascending; of those passed only the last is kept
  uint32_t epoch_;              // of the steps up to epoch_ends_at_
  uint64_t epoch_ends_at_;      // the newest one decided; 0: none
  uint64_t asked_stop_ = 0;
};

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
  bool stopping = false;       // the run ends here
  uint64_t epoch_ends_at = 0;  // LaneState.epoch_ends_at
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
    Cursor cursor;  // end of the last applied batch; its lane and whether it is at its end
  };
  std::vector<Lane> lanes;  // ascending
  // Called by the pull thread with each batch whose rows have come, while the steps before it compute. May be empty.
  std::function<absl::Status(Batch*)> pulled;
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
