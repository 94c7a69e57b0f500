#include "common/base/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <utility>

#include "common/base/status.h"

namespace hearth {

absl::Status ErrorOf(int error, absl::string_view what, const std::string& path) {
  const std::string text = absl::StrCat(path, ": ", what, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(text);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(absl::StrCat(text, "; free some space and start again"));
    default:
      return absl::UnavailableError(text);
  }
}

namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;

// Closes what it owns; Close() reports what the kernel says.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }
  int Close() {
    const int fd = fd_;
    fd_ = -1;
    return close(fd);
  }

 private:
  int fd_;
};

absl::StatusOr<Descriptor> Open(const std::string& path, int flags, int mode = 0) {
  int fd;
  do {
    fd = open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) return ErrorOf(errno, "cannot open", path);
  return Descriptor(fd);
}

// Up to `bytes`, less only at the end of the file.
absl::StatusOr<size_t> ReadFully(const Descriptor& file, const std::string& path, char* out, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t got = read(file.get(), out + done, bytes - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrorOf(errno, "cannot read", path);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

absl::StatusOr<struct stat> StatOf(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return ErrorOf(errno, "cannot stat", path);
  return info;
}

std::string FolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

absl::Status NotOurs(const std::string& path, absl::string_view what) {
  return absl::FailedPreconditionError(
      absl::StrCat(path, ": is ", what,
                   " and not a file of Hearth's, so it is not written to; somebody put it there: "
                   "remove it, or use a folder that only you can write to"));
}

bool Appends(Writing writing) { return writing == Writing::kAppend || writing == Writing::kAppendExisting; }

// What has the name may be somebody else's. A pipe must not be waited for, and only a regular file is written to.
absl::StatusOr<Descriptor> OpenOurs(const std::string& path, Writing writing, mode_t mode = 0666) {
  if (writing == Writing::kReplace && unlink(path.c_str()) != 0 && errno != ENOENT && errno != ENOTDIR) {
    return ErrorOf(errno, "is in the way and cannot be removed", path);
  }
  int flags = O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | (Appends(writing) ? O_APPEND : O_CREAT | O_EXCL);
  if (writing == Writing::kAppend) flags |= O_CREAT;
  int fd;
  do {
    fd = open(path.c_str(), flags, mode);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0 && errno == ELOOP) return NotOurs(path, "a symbolic link");
  if (fd < 0 && errno == ENXIO) return NotOurs(path, "a pipe or a device");
  if (fd < 0 && errno == EISDIR) return NotOurs(path, "a folder");
  if (fd < 0 && errno == EEXIST && writing == Writing::kNew) {
    return absl::AlreadyExistsError(absl::StrCat(path, ": is there already"));
  }
  if (fd < 0) return ErrorOf(errno, "cannot open", path);
  Descriptor file(fd);
  struct stat info;
  if (fstat(fd, &info) != 0) return ErrorOf(errno, "cannot stat", path);
  if (!S_ISREG(info.st_mode)) return NotOurs(path, "a pipe or a device");
  return file;
}

// A new file: what has its name goes first, and what somebody puts there meanwhile, a link say, is never written to.
absl::Status WriteAndSync(const std::string& path, absl::string_view contents) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, OpenOurs(path, Writing::kReplace, 0644));
  for (size_t done = 0; done < contents.size();) {
    const ssize_t wrote = write(file.get(), contents.data() + done, contents.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return ErrorOf(errno, "cannot write", path);
    done += static_cast<size_t>(wrote);
  }
  if (fsync(file.get()) != 0) return ErrorOf(errno, "cannot fsync", path);
  if (file.Close() != 0) return ErrorOf(errno, "cannot close", path);
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> HashUpTo(const std::string& path, uint64_t bytes, const GiveUp& give_up) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, Open(path, O_RDONLY));
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash(XXH3_createState(), &XXH3_freeState);
  HEARTH_CHECK(hash != nullptr, "out of memory");
  XXH3_64bits_reset(hash.get());
  const std::unique_ptr<char[]> chunk(new char[kChunkBytes]);
  while (bytes > 0) {
    if (give_up && give_up()) return absl::CancelledError(absl::StrCat(path, ": given up while it was read"));
    const size_t want = static_cast<size_t>(std::min<uint64_t>(bytes, kChunkBytes));
    HEARTH_ASSIGN_OR_RETURN(const size_t got, ReadFully(file, path, chunk.get(), want));
    XXH3_64bits_update(hash.get(), chunk.get(), got);
    bytes -= got;
    if (got < want) break;
  }
  return XXH3_64bits_digest(hash.get());
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t bytes_max) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, Open(path, O_RDONLY));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrorOf(errno, "cannot stat", path);
  if (S_ISDIR(info.st_mode)) return ErrorOf(EISDIR, "cannot read", path);
  const auto too_long = [&](uint64_t bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": ", bytes, " bytes or more; at most ", bytes_max, " are read"));
  };
  if (static_cast<uint64_t>(info.st_size) > bytes_max) return too_long(static_cast<uint64_t>(info.st_size));
  std::string contents;
  size_t known = static_cast<size_t>(info.st_size);
  while (true) {  // the length is a guess: /proc says 0, and another process may be writing
    const size_t done = contents.size();
    const size_t want = known > done ? known - done : 4096;
    contents.resize(done + want);
    HEARTH_ASSIGN_OR_RETURN(const size_t got, ReadFully(file, path, &contents[done], want));
    contents.resize(done + got);
    if (contents.size() > bytes_max) return too_long(contents.size());
    if (got < want) return contents;
  }
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view contents) {
  const std::string aside = path + ".tmp";
  absl::Status status = WriteAndSync(aside, contents);
  if (status.ok()) status = RenamePath(aside, path);
  if (!status.ok()) unlink(aside.c_str());
  return status;
}

absl::StatusOr<int> OpenDescriptorForWriting(const std::string& path, Writing writing) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, OpenOurs(path, writing));
  return file.Release();
}

absl::StatusOr<OwnedFile> OpenForWriting(const std::string& path, Writing writing) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, OpenOurs(path, writing));
  std::FILE* const stream = fdopen(file.get(), Appends(writing) ? "ab" : "wb");
  if (stream == nullptr) return ErrorOf(errno, "cannot open", path);
  file.Release();
  return OwnedFile(stream);
}

absl::Status FsyncPath(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(Descriptor file, Open(path, O_RDONLY));
  if (fsync(file.get()) != 0) return ErrorOf(errno, "cannot fsync", path);
  return absl::OkStatus();
}

absl::Status MakeDirectories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return ErrorOf(error.value(), "cannot make the folder", path);
  return absl::OkStatus();
}

absl::Status MakePrivateDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) == 0) return absl::OkStatus();
  if (errno != EEXIST) return ErrorOf(errno, "cannot make the folder", path);
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return ErrorOf(errno, "cannot look at it", path);
  if (S_ISDIR(info.st_mode) && info.st_uid == geteuid() && (info.st_mode & 077) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(path, ": is not a folder of this user alone (mode 0700); remove it, or give another place"));
}

absl::Status RemoveTree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error && error.value() != ENOENT) return ErrorOf(error.value(), "cannot remove", path);
  return absl::OkStatus();
}

absl::Status RenamePath(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) return ErrorOf(errno, absl::StrCat("cannot rename to ", to), from);
  return FsyncPath(FolderOf(to));
}

absl::Status LinkFile(const std::string& from, const std::string& to) {
  if (link(from.c_str(), to.c_str()) == 0) return absl::OkStatus();
  return ErrorOf(errno, absl::StrCat("cannot link to ", to), from);
}

absl::Status CopyFile(const std::string& from, const std::string& to) {
  std::error_code error;
  std::filesystem::copy_file(from, to, error);
  if (error) return ErrorOf(error.value(), absl::StrCat("cannot copy to ", to), from);
  return absl::OkStatus();
}

bool CanLinkFiles(const std::string& from_folder, const std::string& to_folder) {
  std::random_device random;  // others try the same, on other hosts too
  const std::string name = absl::StrCat(".link-", absl::Hex(uint64_t{random()} << 32 | random()));
  const std::string from = JoinPath(from_folder, name), to = JoinPath(to_folder, name);
  const absl::StatusOr<OwnedFile> made = OpenForWriting(from, Writing::kReplace);
  const bool can = made.ok() && LinkFile(from, to).ok();
  if (can) RemoveTree(to).IgnoreError();
  RemoveTree(from).IgnoreError();
  return can;
}

absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(opendir(path.c_str()), [](DIR* dir) { return closedir(dir); });
  if (folder == nullptr) return ErrorOf(errno, "cannot list", path);
  std::vector<std::string> names;
  while (true) {
    errno = 0;
    const dirent* entry = readdir(folder.get());
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno != 0) return ErrorOf(errno, "cannot list", path);
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<std::unique_ptr<TemporaryFolder>> TemporaryFolder::Make(absl::string_view name) {
  const char* root = std::getenv("TMPDIR");
  std::string path = JoinPath(root != nullptr && *root != 0 ? root : "/tmp", absl::StrCat(name, "-XXXXXX"));
  if (mkdtemp(path.data()) == nullptr) {
    return absl::UnavailableError(absl::StrCat(path, ": ", std::strerror(errno), "; set TMPDIR"));
  }
  return std::unique_ptr<TemporaryFolder>(new TemporaryFolder(std::filesystem::canonical(path).string()));
}

bool PathExists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

absl::StatusOr<uint64_t> FileBytes(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const struct stat info, StatOf(path));
  if (!S_ISREG(info.st_mode)) return absl::UnavailableError(absl::StrCat(path, ": is not a regular file"));
  return static_cast<uint64_t>(info.st_size);
}

absl::StatusOr<uint64_t> HashFile(const std::string& path, const GiveUp& give_up) {
  return HashUpTo(path, UINT64_MAX, give_up);
}

absl::StatusOr<uint64_t> HashFileHead(const std::string& path, uint64_t bytes) { return HashUpTo(path, bytes, {}); }

absl::StatusOr<uint64_t> DiskFreeBytes(const std::string& path) {
  struct statvfs info;
  if (statvfs(path.c_str(), &info) != 0) return ErrorOf(errno, "cannot ask for the free space", path);
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

bool OnOneFileSystem(const std::string& path, const std::string& other) {
  const absl::StatusOr<struct stat> one = StatOf(path), two = StatOf(other);
  return one.ok() && two.ok() && one->st_dev == two->st_dev;
}

std::string JoinPath(absl::string_view folder, absl::string_view name) {
  if (folder.empty() || (!name.empty() && name[0] == '/')) return std::string(name);
  if (name.empty()) return std::string(folder);
  return absl::StrCat(folder, folder[folder.size() - 1] == '/' ? "" : "/", name);
}

}  // namespace hearth
