// Which device each worker computes the dense part on: the same kind everywhere, so that all hold the same bits.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"
#include "worker/collective.h"

namespace hearth {

constexpr int kNoGpu = -1;
constexpr int kCopiesOnCpu = -2;  // Trainer's

struct DevicePlan {
  int gpu = kNoGpu;    // number of this worker's GPU on its host; kNoGpu: the CPU
  bool alone = false;  // no two workers share a GPU: they may reduce with NCCL
};

// Called on every worker, with its host's name and the number of GPUs that it sees. AUTO takes GPUs where every worker
// sees one. CUDA where one sees none is FailedPrecondition, on all of them.
absl::StatusOr<DevicePlan> AgreeOnDevice(Training::Device wanted, const std::string& host, int gpus,
                                         Collective* collective);

}  // namespace hearth
