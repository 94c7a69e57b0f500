// Rows of embedding tables as files, written and read in a stream. All of them are in the order of (logical shard,
// sign), whatever the number of servers was.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "model/export/export.h"

namespace hearth {

constexpr size_t kNpyHeaderBytes = 128;

// A file that is written front to back, in place of what has its name; a full disk is ResourceExhausted.
class OutFile {
 public:
  absl::Status Open(const std::string& path);
  bool is_open() const { return file_ != nullptr; }
  absl::Status Write(const void* bytes, size_t size);
  absl::Status Rewind();
  absl::Status Close();  // and fsyncs it

 private:
  absl::Status Error(int error) const;
  std::string path_;
  std::unique_ptr<char[]> buffer_;  // outlives file_
  OwnedFile file_;
};

// A file of records of one length, read front to back.
class InFile {
 public:
  InFile() = default;
  ~InFile();
  // DataLoss where its length is no whole number of records.
  absl::Status Open(const std::string& path, size_t header_bytes, size_t record_bytes);
  uint64_t records() const { return records_; }
  absl::Status Read(void* record);  // REQUIRES: at most records() times
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  uint64_t records_ = 0;
  size_t record_bytes_ = 0;
  std::unique_ptr<char[]> buffer_;  // outlives file_
  std::FILE* file_ = nullptr;
};

// The files of one table in those of the formats that hold rows; with none of them it counts and sums alone.
class TableWriter {
 public:
  absl::Status Open(const ExportFormats& formats, const std::string& folder, uint32_t dim);
  absl::Status Add(uint64_t sign, absl::Span<const float> weights);
  absl::Status Close();
  uint64_t rows() const { return rows_; }
  uint64_t weights_hash() const { return weights_hash_; }  // Σ mod 2^64 of WeightsHash

 private:
  absl::Status WriteHeaders();

  uint32_t dim_ = 0;
  uint64_t rows_ = 0;
  uint64_t weights_hash_ = 0;
  std::string quantized_;
  OutFile key_, vector_, keys_npy_, values_npy_, int8_;
};

// XXH3-64 of the sign (u64) and the weights, little-endian.
uint64_t WeightsHash(uint64_t sign, absl::Span<const float> weights);

}  // namespace hearth
