// The whole of Hearth in one loop, to compare the real system with: no process, no thread, no message, no cache; the
// tables are a std::map, and a pull with staleness k looks into a copy of it that is k steps old. What it shares with
// the product is the arithmetic (the trainer's forward, backward and update; one row's update) and the reader, which
// have tests of their own.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct GoldenResult {
  uint64_t steps = 0;
  uint64_t trained = 0;
  uint64_t rejected = 0;
  uint64_t filtered = 0;
  uint64_t read = 0;
  uint64_t rows_hash = 0;
  uint64_t dense_hash = 0;
  uint64_t model_hash = 0;
};

// Trains the job from its beginning to its end. job.training.lanes is set; tables with BLOOM counters have expiry.
// `scratch`: a folder.
absl::StatusOr<GoldenResult> TrainGolden(const Job& job, const std::string& scratch);

}  // namespace hearth
