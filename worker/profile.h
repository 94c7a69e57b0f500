// Records some steps of this worker for a person to look at (Metrics.profile): what runs in the process and on its GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

// The trainer's thread alone. It takes time while it records, and changes no bit of the model.
class StepProfile {
 public:
  // The trace becomes the file `path`, a Chrome trace. FailedPrecondition in a build without CUDA.
  static absl::StatusOr<std::unique_ptr<StepProfile>> Create(const Profile& profile, const std::string& path);
  ~StepProfile();

  // Around each step. An error is the profiler's, or that the file cannot be written.
  absl::Status Before(uint64_t step);
  absl::Status After(uint64_t step, bool last);

 private:
  struct Recording;
  StepProfile(const Profile& profile, const std::string& path);

  const uint64_t begin_, steps_;
  const std::string path_;
  std::unique_ptr<Recording> recording_;  // while one runs
  bool done_ = false;
};

}  // namespace hearth
