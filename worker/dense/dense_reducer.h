// One reduction a step: what all lanes add up, and what all workers must decide at the same step (docs/PROTOCOL.md §3).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "model/multi_task_model.h"
#include "worker/collective/collective.h"
#include "worker/step/step_verdict.h"

namespace hearth {

// What one lane brings to the reduction. Reused from step to step.
struct LaneResult {
  std::vector<float> gradient;  // [parameters] sum over the lane's samples, parameters in name order
  BatchMoments moments;
  std::vector<float> logits;  // [records, tasks]
  bool finite = true;         // loss, dense gradient and every row gradient
};

// A lane's voice in the step.
struct LaneVote {
  uint64_t records = 0;
  bool at_end = false;  // of its segment
  bool last = false;    // and it knows that nothing follows
  bool stop = false;
  bool cut = false;
  uint32_t time_s = 0;                 // of its records; 0: none
  const LaneResult* result = nullptr;  // null: no records, adds zeros; on a GPU always
  // Totals with this step included, for the budget of bad records.
  uint64_t read = 0;
  uint64_t bad = 0;
};

// The same on every worker.
struct StepSum {
  StepVerdict verdict;
  bool trains = false;  // there is something to apply: records, and no skip; else the sums mean nothing
  // [parameters] divided by the step's records, clipped; the reducer's own memory. On a GPU it stays there: none.
  absl::Span<float> gradient;
  double gradient_norm = 0;  // before clipping
  BatchMoments moments;      // pooled over lanes
  uint64_t read = 0;
  uint64_t bad = 0;
};

// What rides along with each lane's gradients: its vote, then its moments. The same layout on all workers of a job.
class StepTail {
 public:
  StepTail(uint32_t lanes, int64_t moment_columns);
  size_t bytes() const { return bytes_; }  // of one lane; a multiple of four
  // Places in a lane's tail that a GPU writes itself: an int32 that is not 0 where the lane is not finite; and its
  // moments, mean [columns] and M2 [columns].
  static size_t skip_offset();
  static size_t moments_offset();

  // moments: null where the lane has none, or a GPU writes them.
  void Write(const LaneVote& vote, bool finite, double moments_count, const BatchMoments* moments, char* tail) const;
  // tails [lanes, bytes()] → all of *sum but its gradient.
  void Read(const char* tails, StepSum* sum);
  // After Read, with the norm of the gradient: lanes that are finite alone need not be so together, and Adam squares in
  // float. The sums are the same everywhere.
  static void Judge(double gradient_norm, StepSum* sum);

 private:
  struct Fixed;
  const uint32_t lanes_;
  const size_t columns_;
  const size_t bytes_;
  std::vector<BatchMoments> moments_;  // [lanes]
  std::vector<uint32_t> times_s_;      // scratch: of lanes that have one
};

// On hosts.
class DenseReducer {
 public:
  DenseReducer(Collective* collective, uint32_t lanes, int64_t parameters, int64_t moment_columns, double clip_norm);
  // votes: this worker's lanes, ascending. Called in the same step on every worker.
  absl::Status Reduce(absl::Span<const LaneVote> votes, StepSum* sum);

 private:
  Collective* const collective_;
  const uint32_t lanes_;
  const double clip_norm_;
  StepTail tail_;
  const std::vector<float> zeros_;  // [parameters] what a lane without records adds
  std::vector<float> sum_;          // [parameters]
  std::vector<char> own_tails_;     // [own lanes, tail]
  std::vector<char> tails_;         // [lanes, tail]
  std::vector<Collective::Part> parts_;
};

}  // namespace hearth
