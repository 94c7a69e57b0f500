// Streams of text bytes: plain, gzip (any number of members) or zstd (any number of frames), told by their first bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace hearth {

// A file that stays open, so that what is read is the file that was checked: a name may come to mean another one.
// Errors name the path. Immutable; threads may share it.
class InputFile {
 public:
  static absl::StatusOr<std::shared_ptr<const InputFile>> Open(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t bytes() const { return stamp_.bytes; }  // when it was opened
  // Up to `size` bytes from `offset` on; 0 at its end.
  absl::StatusOr<size_t> ReadAt(char* out, size_t size, uint64_t offset) const;
  // XXH3-64 of its first `bytes`, or of all of it.
  absl::StatusOr<uint64_t> Digest(uint64_t bytes) const;
  // DataLoss where it was written to since it was opened: length or time of modification changed.
  absl::Status CheckUnchanged() const;

 private:
  struct Stamp {
    uint64_t bytes = 0;
    int64_t modified_s = 0;
    int64_t modified_ns = 0;
  };
  InputFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  absl::StatusOr<Stamp> Look() const;

  const int fd_;
  const std::string path_;
  Stamp stamp_;
};

enum class Compression { kNone, kGzip, kZstd };
// DataLoss, naming what it is, where the first bytes are those of another format (an archive, Parquet, UTF-16, …).
absl::StatusOr<Compression> CompressionOf(const InputFile& file);
absl::StatusOr<Compression> CompressionOf(const std::string& path);

// One thread. Offsets are of the text, after decompression.
class TextSource {
 public:
  virtual ~TextSource() = default;
  // Up to `size` > 0 bytes; 0 at the end. DataLoss where compressed data stop early or are damaged, naming file, offset
  // in the file, cause and remedy; Unavailable where the disk fails.
  virtual absl::StatusOr<size_t> Read(char* out, size_t size) = 0;
};
absl::StatusOr<std::unique_ptr<TextSource>> OpenTextSource(std::shared_ptr<const InputFile> file);
absl::StatusOr<std::unique_ptr<TextSource>> OpenTextSource(const std::string& path);
// A plain file from byte `offset` on.
std::unique_ptr<TextSource> OpenPlainSource(std::shared_ptr<const InputFile> file, uint64_t offset);

// Decompressed text kept for random access: in memory while it fits, then in one scratch file. The file has no name
// once it is open, so nothing is left behind however the process ends.
class Spool {
 public:
  // scratch: folder; needed only past memory_bytes_max (FailedPrecondition). Past bytes_max: FailedPrecondition.
  Spool(std::string scratch, uint64_t memory_bytes_max, uint64_t bytes_max);
  ~Spool();
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;

  absl::Status Append(const char* bytes, size_t size);
  uint64_t size() const { return size_; }
  // The bytes [begin, end); the spool outlives the source. REQUIRES: end <= size().
  std::unique_ptr<TextSource> Open(uint64_t begin, uint64_t end) const;

 private:
  class Source;
  absl::Status MoveToFile();

  const std::string scratch_;
  const uint64_t memory_bytes_max_;
  const uint64_t bytes_max_;
  std::string memory_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace hearth
