#include "scripts/hearth/output_file.h"

#include <fcntl.h>
#include <unistd.h>
#include <zstd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int kZstdLevel = 3;

absl::Status ErrnoStatus(const std::string& path, int error) {
  const std::string text = absl::StrCat(path, ": ", std::strerror(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(text);
  return absl::ResourceExhaustedError(text);  // 74: I/O, disk full
}

}  // namespace

struct OutputFile::Compressor {
  Compressor() : stream(ZSTD_createCCtx()), out(ZSTD_CStreamOutSize(), '\0') {
    ZSTD_CCtx_setParameter(stream, ZSTD_c_compressionLevel, kZstdLevel);
    ZSTD_CCtx_setParameter(stream, ZSTD_c_checksumFlag, 1);
  }
  ~Compressor() { ZSTD_freeCCtx(stream); }
  ZSTD_CCtx* const stream;
  std::string out;
};

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path, bool zstd) {
  const int descriptor = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor < 0) return ErrnoStatus(path, errno);
  return std::unique_ptr<OutputFile>(new OutputFile(path, descriptor, zstd));
}

OutputFile::OutputFile(std::string path, int descriptor, bool zstd)
    : path_(std::move(path)), compressor_(zstd ? new Compressor : nullptr), descriptor_(descriptor) {
  buffer_.reserve(kBufferBytes + 4096);
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

void OutputFile::Write(const char* data, size_t size) {
  while (size > 0 && status_.ok()) {
    const ssize_t written = write(descriptor_, data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      status_ = ErrnoStatus(path_, errno);
      return;
    }
    data += written;
    size -= static_cast<size_t>(written);
  }
}

void OutputFile::Drain(bool end) {
  if (compressor_ == nullptr) {
    Write(buffer_.data(), buffer_.size());
  } else {
    ZSTD_inBuffer in = {buffer_.data(), buffer_.size(), 0};
    for (size_t left = 1; status_.ok() && (end ? left != 0 : in.pos < in.size);) {
      ZSTD_outBuffer out = {compressor_->out.data(), compressor_->out.size(), 0};
      left = ZSTD_compressStream2(compressor_->stream, &out, &in, end ? ZSTD_e_end : ZSTD_e_continue);
      HEARTH_CHECK(!ZSTD_isError(left), "zstd: ", ZSTD_getErrorName(left));
      Write(compressor_->out.data(), out.pos);
    }
  }
  buffer_.clear();
}

absl::Status OutputFile::Close() {
  if (descriptor_ < 0) return status_;
  Drain(true);
  if (close(descriptor_) != 0 && status_.ok()) status_ = ErrnoStatus(path_, errno);
  descriptor_ = -1;
  return status_;
}

absl::Status DecompressZstd(const std::string& from, const std::string& to) {
  const std::unique_ptr<FILE, int (*)(FILE*)> in_file(std::fopen(from.c_str(), "rbe"), std::fclose);
  if (in_file == nullptr) return ErrnoStatus(from, errno);
  const std::string aside = to + ".tmp";
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> out_file, OutputFile::Create(aside, false));
  const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> stream(ZSTD_createDCtx(), ZSTD_freeDCtx);
  std::vector<char> in_bytes(ZSTD_DStreamInSize()), out_bytes(ZSTD_DStreamOutSize());
  size_t left = 0;  // 0: at the end of a frame
  while (const size_t size = std::fread(in_bytes.data(), 1, in_bytes.size(), in_file.get())) {
    ZSTD_inBuffer in = {in_bytes.data(), size, 0};
    bool full = false;  // the last call filled its output, and may have more without more input
    while (in.pos < in.size || full) {
      ZSTD_outBuffer out = {out_bytes.data(), out_bytes.size(), 0};
      left = ZSTD_decompressStream(stream.get(), &out, &in);
      if (ZSTD_isError(left)) return absl::DataLossError(absl::StrCat(from, ": ", ZSTD_getErrorName(left)));
      out_file->Append(absl::string_view(out_bytes.data(), out.pos));
      full = left != 0 && out.pos == out.size;
    }
  }
  if (std::ferror(in_file.get())) return ErrnoStatus(from, errno);
  if (left != 0) return absl::DataLossError(absl::StrCat(from, ": cut off inside a zstd frame"));
  HEARTH_RETURN_IF_ERROR(out_file->Close());
  return RenamePath(aside, to);
}

}  // namespace hearth
