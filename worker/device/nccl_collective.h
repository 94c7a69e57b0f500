// DeviceCollective over NCCL: parts go from GPU to GPU and are added there, with the bits of a sum on hosts. Only in
// builds with HEARTH_CUDA.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/collective/collective.h"
#include "worker/collective/device_plan.h"
#include "worker/device/device_collective.h"

namespace hearth {

// GPUs that this process sees; none where there is no driver.
Gpus VisibleGpus();

// `host` carries NCCL's id and outlives the result. REQUIRES: called on all its workers at once, each with a GPU of its
// own (one worker needs no NCCL and gets a sum on its GPU). Whatever NCCL or CUDA reports is a Status that names the
// worker; a watchdog aborts the communicator when NCCL reports an error, or sums have not finished after half an hour.
absl::StatusOr<std::unique_ptr<DeviceCollective>> MakeNcclCollective(Env* env, int gpu, Collective* host);

}  // namespace hearth
