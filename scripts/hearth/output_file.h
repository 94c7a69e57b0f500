// A file written from its beginning to its end, plain or zstd, through a bounded buffer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace hearth {

class OutputFile {
 public:
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path, bool zstd);
  ~OutputFile();  // closes; whoever wants to know whether all was written calls Close

  // Errors are kept and told by Close.
  void Append(absl::string_view bytes) {
    buffer_.append(bytes.data(), bytes.size());
    bytes_ += bytes.size();
    if (buffer_.size() >= kBufferBytes) Drain(false);
  }
  // Of the text so far, before compression.
  uint64_t bytes() const { return bytes_; }
  absl::Status Close();

 private:
  static constexpr size_t kBufferBytes = 1 << 18;
  struct Compressor;

  OutputFile(std::string path, int descriptor, bool zstd);
  void Drain(bool end);
  void Write(const char* data, size_t size);

  const std::string path_;
  const std::unique_ptr<Compressor> compressor_;  // null: plain
  int descriptor_;
  std::string buffer_;
  uint64_t bytes_ = 0;
  absl::Status status_;
};

// Decompresses the zstd file `from` into `to`, in bounded memory, by one rename. DataLoss where `from` is cut off or
// not zstd.
absl::Status DecompressZstd(const std::string& from, const std::string& to);

}  // namespace hearth
