#include "tests/embedding/failing_disk.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/status.h"

namespace hearth {

struct FailingDisk::State {
  std::string folder;  // constant
  std::mutex mutex;
  DiskFault fault;  // guarded by mutex, as all below
  uint64_t calls = 0;
  std::string first_failed;
  std::set<std::pair<dev_t, ino_t>> unsynced;
  std::optional<uint64_t> free_bytes;
  bool hold = false;
  int held = 0;  // calls that wait
  std::condition_variable changed;
};

namespace {

using Disk = std::shared_ptr<FailingDisk::State>;

// There when the first call is made, and when the last one is.
struct Disks {
  std::mutex mutex;
  std::vector<Disk> all;  // guarded by mutex
};
std::atomic<int> disk_count{0};
Disks& TheDisks() {
  static auto* const disks = new Disks;
  return *disks;
}

Disk DiskOf(absl::string_view path) {
  std::lock_guard<std::mutex> lock(TheDisks().mutex);
  for (const Disk& disk : TheDisks().all) {
    if (path == disk->folder || absl::StartsWith(path, disk->folder + "/")) return disk;
  }
  return nullptr;
}

// The function of this name that would have been called without this file.
template <typename Function>
Function* Real(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}
#define REAL(name)                                           \
  ([] {                                                      \
    static const auto real = ::hearth::Real(&::name, #name); \
    return real;                                             \
  }())

std::string PathOf(int fd) {
  char path[4096];
  const ssize_t bytes = readlink(absl::StrCat("/proc/self/fd/", fd).c_str(), path, sizeof(path));
  return std::string(path, bytes > 0 ? static_cast<size_t>(bytes) : 0);
}

// A disk's calls are made one after the other, so that what is known of it is what it is.
using Lock = std::unique_lock<std::mutex>;

// Counts the call. False: it is to fail, with errno set.
bool Pass(const Disk& on, Lock* lock, const char* name, const std::string& path) {
  const uint64_t call = ++on->calls;
  ++on->held;
  on->changed.notify_all();
  on->changed.wait(*lock, [&] { return !on->hold; });
  --on->held;
  if (on->fault.at == 0 || call < on->fault.at || (on->fault.once && call > on->fault.at)) return true;
  if (on->first_failed.empty()) on->first_failed = absl::StrCat(name, " ", path);
  errno = on->fault.error;
  return false;
}

// A file's bytes, or a folder's names, have yet to be synced.
void NoteUnsynced(const Disk& on, int fd) {
  struct stat info;
  if (fstat(fd, &info) == 0) on->unsynced.insert({info.st_dev, info.st_ino});
}
void NoteFolderOf(const Disk& on, const std::string& path) {
  struct stat info;
  if (stat(path.substr(0, path.rfind('/')).c_str(), &info) == 0) on->unsynced.insert({info.st_dev, info.st_ino});
}

// A call that changes `bytes` of an open file.
template <typename Call>
auto OnBytes(const char* name, int fd, size_t bytes, const Call& call) -> decltype(call(bytes)) {
  if (disk_count == 0) return call(bytes);
  const std::string path = PathOf(fd);
  const Disk on = DiskOf(path);
  if (on == nullptr) return call(bytes);
  Lock lock(on->mutex);
  NoteUnsynced(on, fd);
  if (Pass(on, &lock, name, path)) return call(bytes);
  if (bytes > 1) static_cast<void>(call(bytes / 2));
  errno = on->fault.error;
  return -1;
}

// Nobody cuts the power: a sync need not be waited for.
template <typename Call>
int OnSync(const char* name, int fd, const Call& call) {
  if (disk_count == 0) return call();
  const std::string path = PathOf(fd);
  const Disk on = DiskOf(path);
  if (on == nullptr) return call();
  Lock lock(on->mutex);
  if (!Pass(on, &lock, name, path)) return -1;
  struct stat info;
  if (fstat(fd, &info) == 0) on->unsynced.erase({info.st_dev, info.st_ino});
  return 0;
}

// A call that changes names.
template <typename Call>
int OnNames(const char* name, const std::string& from, const std::string& to, const Call& call) {
  if (disk_count == 0) return call();
  const Disk on = DiskOf(to);
  if (on == nullptr) return call();
  Lock lock(on->mutex);
  if (!Pass(on, &lock, name, to)) return -1;
  const int result = call();
  if (result >= 0) {
    NoteFolderOf(on, from);
    NoteFolderOf(on, to);
  }
  return result;
}

}  // namespace

FailingDisk::FailingDisk(const std::string& folder) : state_(std::make_shared<State>()) {
  state_->folder = folder;
  std::lock_guard<std::mutex> lock(TheDisks().mutex);
  TheDisks().all.push_back(state_);
  ++disk_count;
}
FailingDisk::~FailingDisk() {
  std::lock_guard<std::mutex> lock(TheDisks().mutex);
  auto& all = TheDisks().all;
  all.erase(std::find(all.begin(), all.end(), state_));
  --disk_count;
}

void FailingDisk::Arm(const DiskFault& fault) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->fault = fault;
  state_->calls = 0;
  state_->first_failed.clear();
}
void FailingDisk::SetFreeBytes(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->free_bytes = bytes;
}
void FailingDisk::Hold() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->hold = true;
}
void FailingDisk::WaitForHeldCall() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait(lock, [&] { return state_->held > 0; });
}
void FailingDisk::Release() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->hold = false;
  state_->changed.notify_all();
}
uint64_t FailingDisk::calls() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->calls;
}
std::string FailingDisk::first_failed() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->first_failed;
}
bool FailingDisk::IsSynced(const std::string& path) const {
  struct stat info;
  HEARTH_CHECK(stat(path.c_str(), &info) == 0, "no ", path);
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->unsynced.count({info.st_dev, info.st_ino}) == 0;
}

}  // namespace hearth

// A program's own functions go before a library's of the same name.
extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE) {
    va_list arguments;
    va_start(arguments, flags);
    mode = static_cast<mode_t>(va_arg(arguments, int));
    va_end(arguments);
  }
  const auto call = [&] { return REAL(open)(path, flags, mode); };
  return (flags & O_CREAT) == 0 ? call() : hearth::OnNames("open", path, path, call);
}
ssize_t write(int fd, const void* bytes, size_t count) {
  return hearth::OnBytes("write", fd, count, [&](size_t n) { return REAL(write)(fd, bytes, n); });
}
ssize_t pwrite(int fd, const void* bytes, size_t count, off_t at) {
  return hearth::OnBytes("pwrite", fd, count, [&](size_t n) { return REAL(pwrite)(fd, bytes, n, at); });
}
int ftruncate(int fd, off_t bytes) noexcept {
  return hearth::OnBytes("ftruncate", fd, 0, [&](size_t) { return REAL(ftruncate)(fd, bytes); });
}
int fallocate(int fd, int mode, off_t at, off_t bytes) {
  return hearth::OnBytes("fallocate", fd, 0, [&](size_t) { return REAL(fallocate)(fd, mode, at, bytes); });
}
int fsync(int fd) {
  return hearth::OnSync("fsync", fd, [&] { return REAL(fsync)(fd); });
}
int fdatasync(int fd) {
  return hearth::OnSync("fdatasync", fd, [&] { return REAL(fdatasync)(fd); });
}
int rename(const char* from, const char* to) noexcept {
  return hearth::OnNames("rename", from, to, [&] { return REAL(rename)(from, to); });
}
int link(const char* from, const char* to) noexcept {
  return hearth::OnNames("link", to, to, [&] { return REAL(link)(from, to); });
}
int unlink(const char* path) noexcept {
  return hearth::OnNames("unlink", path, path, [&] { return REAL(unlink)(path); });
}
int unlinkat(int folder, const char* name, int flags) noexcept {
  const std::string path = *name == '/' ? name : absl::StrCat(hearth::PathOf(folder), "/", name);
  return hearth::OnNames("unlinkat", path, path, [&] { return REAL(unlinkat)(folder, name, flags); });
}
int mkdir(const char* path, mode_t mode) noexcept {
  return hearth::OnNames("mkdir", path, path, [&] { return REAL(mkdir)(path, mode); });
}
int statvfs(const char* path, struct statvfs* info) noexcept {
  const int result = REAL(statvfs)(path, info);
  if (result != 0 || hearth::disk_count == 0) return result;
  const hearth::Disk on = hearth::DiskOf(path);
  if (on == nullptr) return result;
  hearth::Lock lock(on->mutex);
  if (on->free_bytes.has_value()) info->f_bavail = *on->free_bytes / info->f_frsize;
  return result;
}
int rmdir(const char* path) noexcept {
  return hearth::OnNames("rmdir", path, path, [&] { return REAL(rmdir)(path); });
}

}  // extern "C"
