#include "common/base/file_lock.h"

#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int64_t kLookUs = 50'000;  // so often, whether the holder is gone
constexpr uint64_t kHolderBytesMax = 256;

// Whether `path` still is the file that is open: its last holder may have removed it.
bool Names(const std::string& path, int fd) {
  struct stat named, open;
  return lstat(path.c_str(), &named) == 0 && fstat(fd, &open) == 0 && named.st_dev == open.st_dev &&
         named.st_ino == open.st_ino;
}

std::string HolderOf(const std::string& path) {
  const absl::StatusOr<std::string> holder = ReadFile(path, kHolderBytesMax);
  if (!holder.ok() || holder->empty()) return "another process";
  return std::string(absl::StripAsciiWhitespace(*holder));
}

// For whoever finds it held. The lock does not hang on it, so a full disk is no error.
void WriteHolder(int fd) {
  const std::string holder = absl::StrCat("process ", getpid(), " on ", HostName(), "\n");
  if (ftruncate(fd, 0) == 0) static_cast<void>(!write(fd, holder.data(), holder.size()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<FileLock>> FileLock::Take(Env* env, const std::string& path, int64_t wait_us) {
  const std::unique_ptr<Event> pause = env->NewEvent();
  const int64_t until_us = env->NowUs() + wait_us;
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(const int fd, OpenDescriptorForWriting(path, Writing::kAppend));
    std::unique_ptr<FileLock> lock(new FileLock(path, fd));
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      if (errno == EINTR) continue;
      if (errno != EWOULDBLOCK) return ErrorOf(errno, "cannot lock", path);
      const int64_t now_us = env->NowUs();
      if (now_us >= until_us) return absl::FailedPreconditionError(absl::StrCat(path, ": held by ", HolderOf(path)));
      pause->WaitUntil(std::min(until_us, now_us + kLookUs));
    }
    if (!Names(path, fd)) continue;
    lock->held_ = true;
    WriteHolder(fd);
    return lock;
  }
}

FileLock::~FileLock() {
  if (fd_ < 0) return;
  if (held_) static_cast<void>(!ftruncate(fd_, 0));  // nobody has it now
  close(fd_);
}

void FileLock::Remove() {
  if (fd_ < 0) return;
  unlink(path_.c_str());  // while it is held: later it may be another's
  close(std::exchange(fd_, -1));
}

}  // namespace hearth
