// Which device each worker computes the dense part on: the same kind everywhere, so that all hold the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"
#include "worker/collective/collective.h"

namespace hearth {

constexpr int kNoGpu = -1;
constexpr int kCopiesOnCpu = -2;  // as on a GPU, for tests

// What a worker sees on its host.
struct Gpus {
  std::vector<uint64_t> ids;  // [GPUs] the same for whoever sees the same one
  bool bf16 = false;          // all of them have instructions for it
};
constexpr size_t kGpusMax = 16;  // of those that one worker sees; it takes no notice of more

struct DevicePlan {
  int gpu = kNoGpu;    // number of this worker's GPU on its host; kNoGpu: the CPU
  bool alone = false;  // no two workers share a GPU: they may reduce with NCCL
  bool bf16 = false;   // matrix products take bfloat16: asked for, and every worker's GPU can
};
// run.json's `device`: "cpu", "cuda", "cuda bf16".
std::string NameOf(const DevicePlan& plan);

// Called on every worker, with its host's name. AUTO takes GPUs where every worker sees one. CUDA where one sees none
// is FailedPrecondition, on all of them.
absl::StatusOr<DevicePlan> AgreeOnDevice(const Training& training, const std::string& host, Gpus gpus,
                                         Collective* collective);

}  // namespace hearth
