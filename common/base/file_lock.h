// A file that one process at a time has: an exclusive flock, which ends with its holder, however that ends.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "common/base/env.h"

namespace hearth {

// Until it is destroyed. Not inherited by programs that are started meanwhile. The file says who has it, and is
// empty once it was given up.
class FileLock {
 public:
  // Makes the file where it is not there; no link of that name is followed. A holder that is about to end has `wait_us`
  // to do so. FailedPrecondition: it is held still; the message is one line, "PATH: held by …", without a remedy.
  static absl::StatusOr<std::unique_ptr<FileLock>> Take(Env* env, const std::string& path, int64_t wait_us);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  // Removes the file and gives it up. Who waits for it makes a new one.
  void Remove();

 private:
  FileLock(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}

  const std::string path_;
  int fd_;
  bool held_ = false;
};

}  // namespace hearth
