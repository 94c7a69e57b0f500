#include "model/export/export_rows.h"

#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "embedding/row_record.h"
#include "embedding/snapshot_reader.h"

namespace hearth {
namespace {

constexpr size_t kWriteBufferBytes = size_t{1} << 20;
constexpr size_t kReadBufferBytes = size_t{64} << 10;  // a merge has hundreds of them

absl::Status BadRows(const std::string& path, absl::string_view cause) {
  return absl::DataLossError(absl::StrCat(path, ": ", cause, "; export the snapshot again"));
}

}  // namespace

// --- one file

absl::Status OutFile::Open(const std::string& path) {
  path_ = path;
  HEARTH_ASSIGN_OR_RETURN(file_, OpenForWriting(path, Writing::kReplace));
  buffer_ = std::make_unique<char[]>(kWriteBufferBytes);
  std::setvbuf(file_.get(), buffer_.get(), _IOFBF, kWriteBufferBytes);
  return absl::OkStatus();
}

absl::Status OutFile::Write(const void* bytes, size_t size) {
  return std::fwrite(bytes, 1, size, file_.get()) == size ? absl::OkStatus() : Error(errno);
}

absl::Status OutFile::Rewind() { return std::fseek(file_.get(), 0, SEEK_SET) == 0 ? absl::OkStatus() : Error(errno); }

absl::Status OutFile::Close() {
  if (std::fclose(file_.release()) != 0) return Error(errno);
  return FsyncPath(path_);
}

absl::Status OutFile::Error(int error) const { return ErrorOf(error, "cannot write", path_); }

InFile::~InFile() {
  if (file_ != nullptr) std::fclose(file_);
}

absl::Status InFile::Open(const std::string& path, size_t header_bytes, size_t record_bytes) {
  path_ = path;
  HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(path));
  if (bytes < header_bytes || (bytes - header_bytes) % record_bytes != 0) {
    return BadRows(path, absl::StrCat("its ", bytes, " bytes are no whole number of records"));
  }
  records_ = (bytes - header_bytes) / record_bytes;
  record_bytes_ = record_bytes;
  file_ = std::fopen(path.c_str(), "rb");
  if (file_ == nullptr || std::fseek(file_, static_cast<long>(header_bytes), SEEK_SET) != 0) {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  }
  buffer_ = std::make_unique<char[]>(kReadBufferBytes);
  std::setvbuf(file_, buffer_.get(), _IOFBF, kReadBufferBytes);
  return absl::OkStatus();
}

absl::Status InFile::Read(void* record) {
  if (std::fread(record, 1, record_bytes_, file_) == record_bytes_) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(path_, ": cannot be read: ", std::strerror(errno)));
}

// --- a table's files

absl::Status TableWriter::Open(const ExportFormats& formats, const std::string& folder, uint32_t dim) {
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

absl::Status TableWriter::Add(uint64_t sign, absl::Span<const float> weights) {
  ++rows_;
  weights_hash_ += WeightsHash(sign, weights);
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

absl::Status TableWriter::Close() {
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

absl::Status TableWriter::WriteHeaders() {
  HEARTH_RETURN_IF_ERROR(keys_npy_.Write(NpyHeader("<u8", rows_, 0).data(), kNpyHeaderBytes));
  return values_npy_.Write(NpyHeader("<f4", rows_, dim_).data(), kNpyHeaderBytes);
}

uint64_t WeightsHash(uint64_t sign, absl::Span<const float> weights) {
  // A short row is hashed in one go; a sum over rows then costs nothing beside reading them.
  constexpr size_t kBytesMax = 1024;
  const size_t bytes = sizeof(sign) + weights.size() * sizeof(float);
  char small[kBytesMax];
  const std::unique_ptr<char[]> large = bytes > kBytesMax ? std::make_unique<char[]>(bytes) : nullptr;
  char* const text = large != nullptr ? large.get() : small;
  std::memcpy(text, &sign, sizeof(sign));
  std::memcpy(text + sizeof(sign), weights.data(), weights.size() * sizeof(float));
  return XXH3_64bits(text, bytes);
}

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
  uint64_t rows_hash = 0;
  for (int t = 0; t < source.job.table_size(); ++t) {
    const Table& table = source.job.table(t);
    TableWriter files;
    if (writes) {
      const std::string name = JoinPath(folder, "embeddings/" + ExportTableFolder(table.name()));
      HEARTH_RETURN_IF_ERROR(files.Open(formats, name, table.dim()));
    }
    HEARTH_RETURN_IF_ERROR(VisitRows(
        source.folder, source.manifest, source.job, static_cast<TableNumber>(t) + 1,
        [&](Sign sign, const RowMeta&, absl::Span<const float> weights_and_state) {
          const auto weights = weights_and_state.subspan(0, table.dim());
          const auto found = wanted->find(sign);
          if (found != wanted->end()) {
            found->second.assign(weights.begin(), weights.end());
          }
          return files.Add(sign, weights);
        },
        &rows_hash));
    HEARTH_RETURN_IF_ERROR(files.Close());
    tables.push_back({table.name(), table.dim(), files.rows(), files.weights_hash()});
  }
  HEARTH_RETURN_IF_ERROR(CheckRowsHash(source.folder, source.manifest, rows_hash));
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
