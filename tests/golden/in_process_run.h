// A whole run as threads of this process: the product's own scheduler, servers and workers over the in-process
// transport and the local collective, with real files and a real RocksDB.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct InProcessRun {
  Job job;  // training.lanes is set
  std::string dir;
  int servers = 1;
  int workers = 1;
  uint64_t stop_after_polls = 0;  // > 0: the scheduler is asked to save and leave at its n-th look
};

// Runs to the end (or to the saved cut) and returns the newest MANIFEST; the scheduler's exit code goes to *exit_code.
absl::StatusOr<Manifest> RunInProcess(const InProcessRun& run, int* exit_code);

}  // namespace hearth
