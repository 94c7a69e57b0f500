// The dense half of a step on a GPU. Nothing but rows, their gradients, logits and the step's verdict crosses to the
// host:
//
//   copy stream    │ batch s+1 up ───────────────┐         rows' gradients, logits down ─┐
//   compute        │ forward ─ backward ─────────┴ finite? ─────┐                        ├ verdict ─ update
//   collective's   │             bucket 0 ─ bucket 1 ─ … ─ last bucket, flags, moments ──┘
//
// Parameters are summed in buckets, from the end of their array to its beginning, which is about the order in which
// backward is done with them: a bucket starts when its last gradient is there. The last one carries the lanes' flags
// and moments.
#pragma once

#include <cstdint>
#include <memory>

#include "common/base/env.h"
#include "worker/dense/dense_replica.h"
#include "worker/dense/dense_step.h"
#include "worker/device/device_collective.h"

namespace hearth {

struct DeviceStepOptions {
  uint32_t lanes = 1;  // of the job
  double clip_norm = 0;
  // A bucket is closed when it holds so many; 0: all parameters are one.
  int64_t bucket_bytes_min = int64_t{1} << 20;
};

// replica (not on the plain CPU), collective and env outlive the step; while it lives nobody else runs backward through
// the replica's model.
absl::StatusOr<std::unique_ptr<DenseStep>> MakeDeviceStep(Env* env, DenseReplica* replica, DeviceCollective* collective,
                                                          const DeviceStepOptions& options);

}  // namespace hearth
