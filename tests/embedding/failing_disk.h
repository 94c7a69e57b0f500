// A disk that fails, or hangs, when the test says so. In a program that has it, the system calls by which files and
// folders are made, written, synced, renamed, linked and removed go through it, whoever makes them: RocksDB, the
// standard library or Hearth.
#pragma once

#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>

namespace hearth {

struct DiskFault {
  uint64_t at = 0;   // number of the call that fails, from 1 on; 0: none
  bool once = true;  // false: all that come after it fail, too
  int error = EIO;   // what the calls say
};

// For what lies in `folder`, as long as this lives. Any thread may make the calls. Syncs are noted there and not made.
class FailingDisk {
 public:
  explicit FailingDisk(const std::string& folder);
  ~FailingDisk();

  // Counts anew. Of the bytes of a write that fails half are on the disk.
  void Arm(const DiskFault& fault);
  uint64_t calls() const;            // since Arm
  std::string first_failed() const;  // "fsync /path"; empty: none
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
