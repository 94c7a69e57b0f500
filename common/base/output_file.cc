#include "common/base/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {

namespace {

constexpr int kZstdLevel = 3;
constexpr int kLinksMax = 40;  // the kernel's own limit

bool SameFile(const struct stat& a, const struct stat& b) { return a.st_dev == b.st_dev && a.st_ino == b.st_ino; }

// The descriptor, standard output or error, that is open on this very file; none: -1.
int OwnDescriptor(const struct stat& info) {
  for (const int own : {STDOUT_FILENO, STDERR_FILENO}) {
    struct stat opened;
    if (fstat(own, &opened) == 0 && SameFile(opened, info)) return own;
  }
  return -1;
}

std::string FolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// All of it, or why not.
absl::Status WriteAll(int descriptor, const std::string& path, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return ErrorOf(errno, "cannot write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

}  // namespace

struct OutputFile::Target {
  std::string path;   // behind all links
  std::string aside;  // where it is written first; empty: straight into `path`
  int own = -1;       // a descriptor of ours that is this file
  mode_t mode = 0;    // of the file that is replaced; 0: there is none
};

struct OutputFile::Compressor {
  Compressor() : stream(ZSTD_createCCtx()), out(ZSTD_CStreamOutSize(), '\0') {
    ZSTD_CCtx_setParameter(stream, ZSTD_c_compressionLevel, kZstdLevel);
    ZSTD_CCtx_setParameter(stream, ZSTD_c_checksumFlag, 1);
  }
  ~Compressor() { ZSTD_freeCCtx(stream); }

  ZSTD_CCtx* const stream;
  std::string out;
};

absl::StatusOr<OutputFile::Target> OutputFile::TargetOf(const std::string& path, Links links) {
  if (path.empty()) return absl::FailedPreconditionError("an output file without a name; name it");
  Target target;
  target.path = path;
  target.aside = absl::StrCat(path, ".tmp-", getpid());
  if (links == Links::kReplace) return target;
  struct stat info;
  const bool there = stat(path.c_str(), &info) == 0;
  if (there && S_ISDIR(info.st_mode))
    return absl::FailedPreconditionError(absl::StrCat(path, ": is a folder; name a file in it"));
  if (there) target.own = OwnDescriptor(info);
  // A link leads on: one that leads nowhere yet, too.
  struct stat link;
  for (int passed = 0; lstat(target.path.c_str(), &link) == 0 && S_ISLNK(link.st_mode); ++passed) {
    char to[PATH_MAX];
    const ssize_t size = readlink(target.path.c_str(), to, sizeof(to));
    if (size <= 0 || static_cast<size_t>(size) == sizeof(to) || passed == kLinksMax)
      return absl::UnavailableError(absl::StrCat(path, ": is a link that leads nowhere; name another file"));
    std::error_code ignored;
    if (absl::StartsWith(std::filesystem::canonical(FolderOf(target.path), ignored).string(), "/proc/")) break;
    target.path = JoinPath(FolderOf(target.path), absl::string_view(to, static_cast<size_t>(size)));
  }
  const std::string folder = FolderOf(target.path);
  std::error_code error;
  const std::string canonical = std::filesystem::canonical(folder, error).string();
  if (error) {
    return absl::NotFoundError(absl::StrCat(path, ": there is no folder ", folder, "; make it, or name another file"));
  }
  const bool straight = there && (target.own >= 0 || !S_ISREG(info.st_mode) || absl::StartsWith(canonical, "/proc"));
  if (there && target.own < 0 && access(path.c_str(), W_OK) != 0) return ErrorOf(errno, "may not be written", path);
  if (straight) {
    target.aside.clear();
    return target;
  }
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    return ErrorOf(errno, absl::StrCat("its folder ", canonical, " may not be written"), path);
  }
  target.aside = absl::StrCat(target.path, ".tmp-", getpid());
  if (there) target.mode = info.st_mode & 07777;
  return target;
}

absl::Status OutputFile::Check(const std::string& path) { return TargetOf(path, Links::kFollow).status(); }

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path, Links links) {
  HEARTH_ASSIGN_OR_RETURN(const Target target, TargetOf(path, links));
  std::unique_ptr<OutputFile> file(new OutputFile(target, absl::EndsWith(path, ".zst")));
  HEARTH_RETURN_IF_ERROR(file->Open());
  return file;
}

OutputFile::OutputFile(const Target& target, bool zstd)
    : target_(new Target(target)), compressor_(zstd ? new Compressor : nullptr) {
  buffer_.reserve(kBufferBytes + 4096);
}

OutputFile::~OutputFile() {
  if (descriptor_ < 0) return;
  close(descriptor_);
  if (!target_->aside.empty()) unlink(target_->aside.c_str());
}

absl::Status OutputFile::Open() {
  const std::string& path = target_->aside.empty() ? target_->path : target_->aside;
  if (target_->own >= 0) {
    descriptor_ = fcntl(target_->own, F_DUPFD_CLOEXEC, 3);
  } else if (target_->aside.empty()) {
    descriptor_ = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    // The name has our process's number: what lies there is of one that is gone. It is never followed.
    const int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    descriptor_ = open(path.c_str(), flags, 0666);
    if (descriptor_ < 0 && errno == EEXIST && unlink(path.c_str()) == 0) descriptor_ = open(path.c_str(), flags, 0666);
  }
  if (descriptor_ < 0) return ErrorOf(errno, "cannot open", path);
  if (target_->mode != 0 && fchmod(descriptor_, target_->mode) != 0) return ErrorOf(errno, "cannot chmod", path);
  return absl::OkStatus();
}

void OutputFile::Drain(bool end) {
  if (compressor_ == nullptr) {
    if (status_.ok()) status_ = WriteAll(descriptor_, target_->path, buffer_);
  } else {
    ZSTD_inBuffer in = {buffer_.data(), buffer_.size(), 0};
    for (size_t left = 1; status_.ok() && (end ? left != 0 : in.pos < in.size);) {
      ZSTD_outBuffer out = {compressor_->out.data(), compressor_->out.size(), 0};
      left = ZSTD_compressStream2(compressor_->stream, &out, &in, end ? ZSTD_e_end : ZSTD_e_continue);
      HEARTH_CHECK(!ZSTD_isError(left), "zstd: ", ZSTD_getErrorName(left));
      status_ = WriteAll(descriptor_, target_->path, absl::string_view(compressor_->out.data(), out.pos));
    }
  }
  buffer_.clear();
}

absl::Status OutputFile::Close() {
  if (descriptor_ < 0) return status_;
  Drain(true);
  const bool renamed = !target_->aside.empty();
  if (status_.ok() && renamed && fsync(descriptor_) != 0) status_ = ErrorOf(errno, "cannot fsync", target_->aside);
  if (close(descriptor_) != 0 && status_.ok()) status_ = ErrorOf(errno, "cannot close", target_->path);
  descriptor_ = -1;
  if (status_.ok() && renamed) status_ = RenamePath(target_->aside, target_->path);
  if (!status_.ok() && renamed) unlink(target_->aside.c_str());
  return status_;
}

absl::Status CopyZstdTo(const std::string& from, const std::string& to) {
  const OwnedFile in_file(std::fopen(from.c_str(), "rbe"));
  if (in_file == nullptr) return ErrorOf(errno, "cannot open", from);
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> out_file, OutputFile::Create(to));
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
  if (std::ferror(in_file.get())) return ErrorOf(errno, "cannot read", from);
  if (left != 0) return absl::DataLossError(absl::StrCat(from, ": cut off inside a zstd frame"));
  return out_file->Close();
}

absl::Status WriteStandardOutput(absl::string_view text) { return WriteAll(STDOUT_FILENO, "standard output", text); }

}  // namespace hearth
