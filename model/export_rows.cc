// Embedding rows in open formats, in a stream.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/file.h"
#include "common/status.h"
#include "embedding/snapshot_reader.h"
#include "model/export.h"

namespace hearth {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr size_t kNpyHeaderBytes = 128;

// A file that is written front to back; a full disk is ResourceExhausted.
class OutFile {
 public:
  OutFile() = default;
  ~OutFile() {
    if (file_ != nullptr) std::fclose(file_);
  }
  absl::Status Open(const std::string& path) {
    path_ = path;
    file_ = std::fopen(path.c_str(), "wb");
    if (file_ == nullptr) return Error(errno);
    buffer_ = std::make_unique<char[]>(kBufferBytes);
    std::setvbuf(file_, buffer_.get(), _IOFBF, kBufferBytes);
    return absl::OkStatus();
  }
  bool is_open() const { return file_ != nullptr; }
  absl::Status Write(const void* bytes, size_t size) {
    return std::fwrite(bytes, 1, size, file_) == size ? absl::OkStatus() : Error(errno);
  }
  absl::Status Rewind() { return std::fseek(file_, 0, SEEK_SET) == 0 ? absl::OkStatus() : Error(errno); }
  absl::Status Close() {
    std::FILE* file = std::exchange(file_, nullptr);
    if (std::fclose(file) != 0) return Error(errno);
    return FsyncPath(path_);
  }

 private:
  absl::Status Error(int error) const {
    const std::string text = absl::StrCat(path_, ": cannot be written: ", std::strerror(error));
    if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
      return absl::ResourceExhaustedError(absl::StrCat(text, "; free some space and start again"));
    }
    return absl::UnavailableError(text);
  }
  std::string path_;
  std::unique_ptr<char[]> buffer_;  // outlives file_
  std::FILE* file_ = nullptr;
};

// The files of one table.
class TableFiles {
 public:
  absl::Status Open(const ExportFormats& formats, const std::string& folder, uint32_t dim) {
    dim_ = dim;
    quantized_.resize(QuantizedBytes(dim));
    HEARTH_RETURN_IF_ERROR(MakeDirectories(folder));
    if (formats.hps) {
      HEARTH_RETURN_IF_ERROR(key_.Open(JoinPath(folder, "key")));
      HEARTH_RETURN_IF_ERROR(vector_.Open(JoinPath(folder, "emb_vector")));
    }
    if (formats.npy) {
      HEARTH_RETURN_IF_ERROR(keys_npy_.Open(JoinPath(folder, "keys.npy")));
      HEARTH_RETURN_IF_ERROR(values_npy_.Open(JoinPath(folder, "values.npy")));
      HEARTH_RETURN_IF_ERROR(WriteHeaders());  // of no rows; written again when their number is known
    }
    if (formats.int8) HEARTH_RETURN_IF_ERROR(int8_.Open(JoinPath(folder, "rows.i8")));
    return absl::OkStatus();
  }

  absl::Status Add(Sign sign, absl::Span<const float> weights) {
    ++rows_;
    for (OutFile* file : {&key_, &keys_npy_}) {
      if (file->is_open()) HEARTH_RETURN_IF_ERROR(file->Write(&sign, sizeof(sign)));
    }
    for (OutFile* file : {&vector_, &values_npy_}) {
      if (file->is_open()) HEARTH_RETURN_IF_ERROR(file->Write(weights.data(), weights.size() * sizeof(float)));
    }
    if (!int8_.is_open()) return absl::OkStatus();
    QuantizeRow(weights, quantized_.data());
    return int8_.Write(quantized_.data(), quantized_.size());
  }

  absl::Status Close() {
    if (keys_npy_.is_open()) {
      HEARTH_RETURN_IF_ERROR(keys_npy_.Rewind());
      HEARTH_RETURN_IF_ERROR(values_npy_.Rewind());
      HEARTH_RETURN_IF_ERROR(WriteHeaders());
    }
    for (OutFile* file : {&key_, &vector_, &keys_npy_, &values_npy_, &int8_}) {
      if (file->is_open()) HEARTH_RETURN_IF_ERROR(file->Close());
    }
    return absl::OkStatus();
  }
  uint64_t rows() const { return rows_; }

 private:
  absl::Status WriteHeaders() {
    HEARTH_RETURN_IF_ERROR(keys_npy_.Write(NpyHeader("<u8", rows_, 0).data(), kNpyHeaderBytes));
    return values_npy_.Write(NpyHeader("<f4", rows_, dim_).data(), kNpyHeaderBytes);
  }

  uint32_t dim_ = 0;
  uint64_t rows_ = 0;
  std::string quantized_;
  OutFile key_, vector_, keys_npy_, values_npy_, int8_;
};

}  // namespace

std::string NpyHeader(absl::string_view descr, uint64_t rows, uint64_t columns) {
  std::string header = absl::StrCat("{'descr': '", descr, "', 'fortran_order': False, 'shape': (", rows, ",",
                                    columns > 0 ? absl::StrCat(" ", columns) : "", "), }");
  constexpr size_t kPreamble = 10;
  header.resize(kNpyHeaderBytes - kPreamble - 1, ' ');
  header += '\n';
  const uint16_t length = static_cast<uint16_t>(header.size());
  std::string all("\x93NUMPY\x01\x00", 8);
  all.append(reinterpret_cast<const char*>(&length), sizeof(length));
  return all + header;
}

void QuantizeRow(absl::Span<const float> row, char* out) {
  const auto [low, high] = std::minmax_element(row.begin(), row.end());
  const float bias = row.empty() ? 0.0f : *low;
  const float scale = row.empty() ? 0.0f : (*high - *low) / 255.0f;
  for (size_t i = 0; i < row.size(); ++i) {
    const float q = scale > 0 ? std::nearbyint((row[i] - bias) / scale) : 0.0f;
    out[i] = static_cast<char>(static_cast<unsigned char>(std::min(std::max(q, 0.0f), 255.0f)));
  }
  std::memcpy(out + row.size(), &scale, sizeof(scale));
  std::memcpy(out + row.size() + sizeof(scale), &bias, sizeof(bias));
}

void DequantizeRow(const char* row, absl::Span<float> out) {
  float scale, bias;
  std::memcpy(&scale, row + out.size(), sizeof(scale));
  std::memcpy(&bias, row + out.size() + sizeof(scale), sizeof(bias));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<float>(static_cast<unsigned char>(row[i])) * scale + bias;
  }
}

absl::StatusOr<std::vector<ExportedTable>> ExportTables(const ExportSource& source, const ExportFormats& formats,
                                                        const std::string& folder, ExportedRows* wanted) {
  const bool writes = formats.hps || formats.npy;
  std::vector<ExportedTable> tables;
  for (int t = 0; t < source.job.table_size(); ++t) {
    const Table& table = source.job.table(t);
    TableFiles files;
    if (writes) {
      const std::string name = JoinPath(folder, "embeddings/" + ExportTableFolder(table.name()));
      HEARTH_RETURN_IF_ERROR(files.Open(formats, name, table.dim()));
    }
    uint64_t rows = 0;
    HEARTH_RETURN_IF_ERROR(VisitRows(source.folder, source.manifest, source.job, static_cast<TableNumber>(t) + 1,
                                     [&](Sign sign, const RowMeta&, absl::Span<const float> weights_and_state) {
                                       const auto weights = weights_and_state.subspan(0, table.dim());
                                       ++rows;
                                       const auto found = wanted->find(sign);
                                       if (found != wanted->end()) {
                                         found->second.assign(weights.begin(), weights.end());
                                       }
                                       return writes ? files.Add(sign, weights) : absl::OkStatus();
                                     }));
    if (writes) HEARTH_RETURN_IF_ERROR(files.Close());
    tables.push_back({table.name(), table.dim(), rows});
  }
  for (auto it = wanted->begin(); it != wanted->end();) {
    if (it->second.empty()) {
      wanted->erase(it++);
    } else {
      ++it;
    }
  }
  return tables;
}

}  // namespace hearth
