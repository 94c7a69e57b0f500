// Collective whose sums of floats are exchanged between GPUs by NCCL and added there, with the same bits as on hosts.
// Only in builds with HEARTH_CUDA.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/collective.h"

namespace hearth {

// GPUs that this process sees; 0 where there is no driver.
int VisibleGpus();

// `host` carries what is small: NCCL's id, tails, broadcasts, barriers; it outlives the result. REQUIRES: called on all
// its workers at once, each with a GPU of its own. Whatever NCCL or CUDA reports is a Status that names the worker; a
// sum that does not finish is given up after five minutes, and its communicator aborted.
absl::StatusOr<std::unique_ptr<Collective>> MakeNcclCollective(Env* env, int gpu, Collective* host);

}  // namespace hearth
