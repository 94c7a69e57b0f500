// SumParts (collective.h) between the memories of devices, without waiting: sums start while backward still computes.
#pragma once

#include <torch/torch.h>

#include <memory>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "worker/collective/collective.h"

namespace hearth {

// Called by one thread of each worker at a time, the same calls with the same sizes in the same order everywhere.
class DeviceCollective {
 public:
  virtual ~DeviceCollective() = default;
  virtual int worker() const = 0;
  virtual int workers() const = 0;

  // A lane's part, on the device, contiguous.
  struct Part {
    torch::Tensor sum;   // [n] float
    torch::Tensor tail;  // [m] bytes; undefined: none
  };
  // As Collective::SumParts: the same bits. sum_out [n] float, tails_out [lanes, m] bytes or undefined. Starts after
  // what the calling thread's current stream holds by now, and may return before it starts. Until Finish the parts must
  // not change, and nobody may read what comes out.
  virtual absl::Status SumParts(int lanes, absl::Span<const Part> parts, const torch::Tensor& sum_out,
                                const torch::Tensor& tails_out) = 0;
  // Returns when all sums are there. An error of an earlier SumParts may come only here.
  virtual absl::Status Finish() = 0;
};

// By way of the hosts, where workers share a device; SumParts waits, so it is no good from within backward where
// workers are threads of one process. `host` outlives it.
std::unique_ptr<DeviceCollective> MakeHostedCollective(Collective* host);

}  // namespace hearth
