// One training process: leases in, gradients out. Runs the worker's side of "A run, message by message"
// (docs/ARCHITECTURE.md).
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "common/net/transport.h"
#include "common/proto/job.pb.h"
#include "ps/shard_map.h"
#include "worker/collective/collective.h"
#include "worker/collective/device_plan.h"

namespace hearth {

class DeviceCollective;

struct WorkerOptions {
  Env* env = nullptr;
  Transport* transport = nullptr;    // of this worker's rank
  Collective* collective = nullptr;  // of this worker
  Job job;                           // effective
  std::string dir;                   // DIR of the run
  Ranks ranks;
  int index = 0;                                  // worker index < ranks.workers
  DevicePlan device;                              // what the dense part computes on
  DeviceCollective* device_collective = nullptr;  // of this worker, where that is a GPU
};

// Several may live in one process, each on a thread of its own. No globals but Torch's thread pool.
class Worker {
 public:
  explicit Worker(const WorkerOptions& options);
  ~Worker();

  // From Hello to Goodbye, on the calling thread, which becomes the trainer. Ok: the scheduler said Goodbye. An error
  // is logged, and the caller's to report (Failed) and to turn into an exit code.
  absl::Status Run();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
