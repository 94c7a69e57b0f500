// Where a command's output goes, whatever its user named: a file, a link, a pipe, a device. One door for all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace hearth {

// Written from its beginning to its end, plain or zstd, through a bounded buffer. What its path names decides how:
//   a regular file, or nothing yet   written aside in the same folder, fsynced, renamed by Close: old or new, whole. An
//                                    old file's permissions stay.
//   a symbolic link                  stays; what it leads to is written as said here
//   a pipe, a socket, a device       written into as it comes. So is what standard output or error already is, and what
//                                    lies below /proc (/dev/stdout, /dev/fd/3): the descriptor is used, nothing
//                                    renamed.
class OutputFile {
 public:
  // What can be said before the work that leads to it; touches nothing. NotFound: there is no such folder.
  // FailedPrecondition: `path` is empty or a folder. Unavailable: may not be written.
  static absl::Status Check(const std::string& path);
  // zstd where the name ends in .zst. The same errors; a pipe waits for its reader. kReplace: for a file of ours, whose
  // name no user chose: whatever has it, a link that somebody planted too, is replaced.
  enum class Links { kFollow, kReplace };
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path, Links links = Links::kFollow);
  ~OutputFile();  // without Close: nothing of it is left, unless it was written straight into

  // Errors are kept and told by Close.
  void Append(absl::string_view bytes) {
    buffer_.append(bytes.data(), bytes.size());
    bytes_ += bytes.size();
    if (buffer_.size() >= kBufferBytes) Drain(false);
  }
  // Of the text so far, before compression.
  uint64_t bytes() const { return bytes_; }
  // Unavailable or ResourceExhausted (the disk is full), and then no file of that name has changed.
  absl::Status Close();

 private:
  static constexpr size_t kBufferBytes = 1 << 18;
  struct Compressor;
  struct Target;
  OutputFile(const Target& target, bool zstd);
  static absl::StatusOr<Target> TargetOf(const std::string& path, Links links);
  absl::Status Open();
  void Drain(bool end);

  const std::unique_ptr<const Target> target_;
  const std::unique_ptr<Compressor> compressor_;  // null: plain
  int descriptor_ = -1;
  std::string buffer_;
  uint64_t bytes_ = 0;
  absl::Status status_;
};

// Decompresses the zstd file `from` into `to` (an OutputFile; compressed again where its name says so), in bounded
// memory. DataLoss where `from` is cut off or not zstd.
absl::Status CopyZstdTo(const std::string& from, const std::string& to);

// All of the text to standard output, or an error that says why not: a command whose output is lost has failed (74).
absl::Status WriteStandardOutput(absl::string_view text);

}  // namespace hearth
