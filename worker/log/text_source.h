// Streams of text bytes: plain, gzip (any number of members) or zstd (any number of frames), told by their first bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace hearth {

enum class Compression { kNone, kGzip, kZstd };
// DataLoss, naming what it is, where the first bytes are those of another format (an archive, Parquet, UTF-16, …).
absl::StatusOr<Compression> CompressionOf(const std::string& path);

// One thread. Offsets are of the text, after decompression.
class TextSource {
 public:
  virtual ~TextSource() = default;
  // Up to `size` > 0 bytes; 0 at the end. DataLoss where compressed data stop early or are damaged, naming file, offset
  // in the file, cause and remedy; Unavailable where the disk fails.
  virtual absl::StatusOr<size_t> Read(char* out, size_t size) = 0;
};
absl::StatusOr<std::unique_ptr<TextSource>> OpenTextSource(const std::string& path);
// A plain file (or a scratch file) from byte `offset` on.
absl::StatusOr<std::unique_ptr<TextSource>> OpenPlainSource(const std::string& path, uint64_t offset);

// Decompressed text kept for random access: in memory while it fits, then in one scratch file. The file has no name
// once it is open, so nothing is left behind however the process ends.
class Spool {
 public:
  // scratch: folder; needed only past memory_bytes_max (FailedPrecondition).
  Spool(std::string scratch, uint64_t memory_bytes_max);
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
  std::string memory_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace hearth
