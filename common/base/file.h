// Files: write aside, fsync, rename. Every status names the path and the cause (strerror).
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace hearth {

// NotFound where it does not exist; ResourceExhausted past bytes_max (checked before it is read).
absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t bytes_max = uint64_t{1} << 32);
// Writes `path`.tmp beside it, fsyncs, renames, fsyncs the folder: old or new, whole. Follows no link of either name.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view contents);

// A file of ours in a folder that others may write to, such as a run's: no link of that name is followed, and nothing
// is written into a pipe or device. FailedPrecondition says so, with file, cause and remedy.
enum class Writing {
  kAppend,          // made where it is not there
  kAppendExisting,  // NotFound where it is not there
  kNew,             // AlreadyExists where anything of that name is there
  kReplace,         // what has the name goes first, be it a link; not a folder
};
struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using OwnedFile = std::unique_ptr<std::FILE, FileCloser>;
absl::StatusOr<OwnedFile> OpenForWriting(const std::string& path, Writing writing);
// The descriptor alone, close-on-exec; the caller closes it.
absl::StatusOr<int> OpenDescriptorForWriting(const std::string& path, Writing writing);

absl::Status FsyncPath(const std::string& path);        // a file or a folder
absl::Status MakeDirectories(const std::string& path);  // like mkdir -p
// A folder of ours in a place that others may write to: made for this user alone, or of before and as private.
// FailedPrecondition where something else has that name.
absl::Status MakePrivateDirectory(const std::string& path);
absl::Status RemoveTree(const std::string& path);                         // like rm -rf; fine if absent
absl::Status RenamePath(const std::string& from, const std::string& to);  // and fsyncs the folder of `to`
// `to` is a new name: of the file `from` itself, or of a copy of it, which is not on the disk before FsyncPath.
absl::Status LinkFile(const std::string& from, const std::string& to);  // an error on another file system
absl::Status CopyFile(const std::string& from, const std::string& to);
// Whether a file of the one folder may have a name in the other. Tries it.
bool CanLinkFiles(const std::string& from_folder, const std::string& to_folder);
absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path);  // names, sorted
// A failed system call as a status, from its errno: NotFound (it does not exist), ResourceExhausted (the disk is full,
// or a quota or a file's length is reached), else Unavailable. "path: what: strerror".
absl::Status ErrorOf(int error, absl::string_view what, const std::string& path);
// A folder of this user's under TMPDIR, else /tmp, that goes with its owner. Its path has no links in it.
class TemporaryFolder {
 public:
  // Its name begins so. Unavailable.
  static absl::StatusOr<std::unique_ptr<TemporaryFolder>> Make(absl::string_view name);
  ~TemporaryFolder() { RemoveTree(path_).IgnoreError(); }
  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};
bool PathExists(const std::string& path);
absl::StatusOr<uint64_t> FileBytes(const std::string& path);
// Asked by what may take long, some times a second, whether to give up: then it ends with Cancelled. Empty: never.
using GiveUp = std::function<bool()>;
absl::StatusOr<uint64_t> HashFile(const std::string& path, const GiveUp& give_up = {});  // XXH3-64 of the whole file
absl::StatusOr<uint64_t> HashFileHead(const std::string& path, uint64_t bytes);          // of its first bytes
absl::StatusOr<uint64_t> DiskFreeBytes(const std::string& path);
// Whether two folders share what DiskFreeBytes says. False where one cannot be looked at.
bool OnOneFileSystem(const std::string& path, const std::string& other);
std::string JoinPath(absl::string_view folder, absl::string_view name);  // an absolute name stays as it is

}  // namespace hearth
