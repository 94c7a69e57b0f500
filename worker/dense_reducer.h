// One reduction a step: what all lanes add up, and what all workers must decide at the same step (protocol.md §3).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "model/multi_task_model.h"
#include "worker/collective.h"
#include "worker/pipeline.h"
#include "worker/trainer.h"

namespace hearth {

// A lane's voice in the step.
struct LaneVote {
  uint64_t records = 0;
  bool at_end = false;
  bool stop = false;
  bool cut = false;
  const LaneResult* result = nullptr;  // null: no records, adds zeros
  // Totals with this step included, for the budget of bad records.
  uint64_t read = 0;
  uint64_t bad = 0;
};

// The same on every worker.
struct StepSum {
  StepVerdict verdict;
  bool trains = false;         // there is something to apply: records, and no skip; else the sums mean nothing
  absl::Span<float> gradient;  // [parameters] divided by the step's records, clipped; the reducer's own memory
  double gradient_norm = 0;    // before clipping
  BatchMoments moments;        // pooled over lanes
  uint64_t read = 0;
  uint64_t bad = 0;
};

class DenseReducer {
 public:
  DenseReducer(Collective* collective, uint32_t lanes, int64_t parameters, int64_t moment_columns, double clip_norm);
  // votes: this worker's lanes, ascending. Called in the same step on every worker.
  absl::Status Reduce(absl::Span<const LaneVote> votes, StepSum* sum);

 private:
  struct Tail;  // what rides along for each lane, before its moments
  void WriteTail(const LaneVote& vote, char* tail) const;
  void ReadTails(StepSum* sum);

  Collective* const collective_;
  const uint32_t lanes_;
  const size_t columns_;
  const size_t tail_bytes_;
  const double clip_norm_;
  const std::vector<float> zeros_;  // [parameters] what a lane without records adds
  std::vector<float> sum_;          // [parameters]
  std::vector<char> own_tails_;     // [own lanes, tail]
  std::vector<char> tails_;         // [lanes, tail]
  std::vector<Collective::Part> parts_;
  std::vector<BatchMoments> moments_;  // [lanes]
};

}  // namespace hearth
