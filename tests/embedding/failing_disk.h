// A disk that fails, or hangs, when the test says so. In a program that has it, the system calls by which files and
// folders are made, written, synced, renamed, linked and removed go through it, whoever makes them: RocksDB, the
// standard library or Hearth.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/base/env.h"
#include "common/base/task_pool.h"

namespace hearth {

struct DiskFault {
  uint64_t at = 0;   // number of the call that fails, from 1 on; 0: none
  bool once = true;  // false: all that come after it fail, too
  int error = EIO;   // what the calls say
};

// Each kind of fault, for a suite of tests, and how its tests are called.
constexpr DiskFault kDiskFaults[] = {{0, true, EIO}, {0, false, EIO}, {0, true, ENOSPC}, {0, false, ENOSPC}};
inline std::string NameOf(const DiskFault& kind) {
  return std::string(kind.error == EIO ? "Broken" : "Full") + (kind.once ? "Once" : "FromThereOn");
}

// RocksDB waits a second after an error, so runs are side by side.
constexpr size_t kRunsAtOnce = 16;
// run(fault) with a fault of `kind` at up to runs_max calls, which lie evenly among `calls`.
template <typename Run>
auto RunWithFaults(const DiskFault& kind, uint64_t calls, uint64_t runs_max, const Run& run) {
  std::vector<decltype(run(kind))> outcomes(std::min(calls, runs_max));
  {
    TaskPool pool(Env::Real(), "run", kRunsAtOnce);
    for (uint64_t i = 0; i < outcomes.size(); ++i) {
      DiskFault fault = kind;
      fault.at = 1 + i * calls / outcomes.size();
      pool.Run([&run, fault, outcome = &outcomes[i]] { *outcome = run(fault); });
    }
  }
  return outcomes;
}

// For what lies in `folder`, as long as this lives. Any thread may make the calls. Syncs are noted there and not made.
class FailingDisk {
 public:
  explicit FailingDisk(const std::string& folder);
  ~FailingDisk();

  // Counts anew. Of the bytes of a write that fails half are on the disk.
  void Arm(const DiskFault& fault);
  uint64_t calls() const;            // since Arm
  std::string first_failed() const;  // "fsync /path"; empty: none
  // Says from now on that so much is free on it, whatever is written.
  void SetFreeBytes(uint64_t bytes);
  // From now on calls wait for Release.
  void Hold();
  void WaitForHeldCall();
  void Release();
  // No byte of it, and no name in it, is newer than its last sync.
  bool IsSynced(const std::string& path) const;

  struct State;

 private:
  const std::shared_ptr<State> state_;
};

}  // namespace hearth
