#include "worker/log/text_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {

namespace {

constexpr size_t kBufferBytes = 256 << 10;
constexpr int kWindowLogMax = 27;  // of a zstd frame: the decoder holds as many bytes
constexpr uint64_t kWindowBytesMax = uint64_t{1} << kWindowLogMax;

absl::StatusOr<size_t> ReadAt(int fd, const std::string& path, char* out, size_t size, uint64_t offset) {
  while (true) {
    const ssize_t got = pread(fd, out, size, static_cast<off_t>(offset));
    if (got >= 0) return static_cast<size_t>(got);
    if (errno != EINTR) return ErrorOf(errno, "read", path);
  }
}

class PlainSource : public TextSource {
 public:
  PlainSource(std::shared_ptr<const InputFile> file, uint64_t offset) : file_(std::move(file)), offset_(offset) {}
  absl::StatusOr<size_t> Read(char* out, size_t size) override {
    HEARTH_ASSIGN_OR_RETURN(const size_t got, file_->ReadAt(out, size, offset_));
    offset_ += got;
    return got;
  }

 private:
  const std::shared_ptr<const InputFile> file_;
  uint64_t offset_;
};

// What gzip and zstd share: compressed bytes, a buffer at a time, and how damage is reported.
class CompressedSource : public TextSource {
 protected:
  explicit CompressedSource(std::shared_ptr<const InputFile> file) : file_(std::move(file)), buffer_(kBufferBytes) {}
  // False at the end of the file.
  absl::StatusOr<bool> Refill() {
    offset_ += filled_;
    HEARTH_ASSIGN_OR_RETURN(filled_, file_->ReadAt(buffer_.data(), buffer_.size(), offset_));
    return filled_ > 0;
  }
  absl::Status Damaged(uint64_t used, absl::string_view cause) const {
    return absl::DataLossError(absl::StrCat(file_->path(), ": byte ", offset_ + used, ": ", cause,
                                            "; copy the file again from where it was made, or take it off the log"));
  }

  const std::shared_ptr<const InputFile> file_;
  std::vector<char> buffer_;
  size_t filled_ = 0;    // bytes in buffer_
  uint64_t offset_ = 0;  // of buffer_ in the file
};

class GzipSource : public CompressedSource {
 public:
  explicit GzipSource(std::shared_ptr<const InputFile> file) : CompressedSource(std::move(file)) {}
  ~GzipSource() override {
    if (started_) inflateEnd(&stream_);
  }

  absl::StatusOr<size_t> Read(char* out, size_t size) override {
    if (!started_) {
      HEARTH_CHECK(inflateInit2(&stream_, 15 + 16) == Z_OK);
      started_ = true;
    }
    size = std::min<size_t>(size, 1u << 30);
    stream_.next_out = reinterpret_cast<Bytef*>(out);
    stream_.avail_out = static_cast<uInt>(size);
    while (stream_.avail_out == size) {
      if (stream_.avail_in == 0) {
        HEARTH_ASSIGN_OR_RETURN(const bool more, Refill());
        if (!more && in_member_) return Damaged(0, "the gzip data end in the middle (a truncated file)");
        if (!more) return 0;
        stream_.next_in = reinterpret_cast<Bytef*>(buffer_.data());
        stream_.avail_in = static_cast<uInt>(filled_);
      }
      if (!in_member_) {
        inflateReset(&stream_);
        in_member_ = true;
      }
      const int result = inflate(&stream_, Z_NO_FLUSH);
      if (result == Z_STREAM_END) {
        in_member_ = false;
      } else if (result != Z_OK && result != Z_BUF_ERROR) {
        return Damaged(filled_ - stream_.avail_in,
                       absl::StrCat("the gzip data are damaged (", stream_.msg ? stream_.msg : "inflate failed", ")"));
      }
    }
    return size - stream_.avail_out;
  }

 private:
  z_stream stream_ = {};
  bool started_ = false;
  bool in_member_ = false;
};

class ZstdSource : public CompressedSource {
 public:
  explicit ZstdSource(std::shared_ptr<const InputFile> file)
      : CompressedSource(std::move(file)), stream_(ZSTD_createDStream()) {
    ZSTD_DCtx_setParameter(stream_, ZSTD_d_windowLogMax, kWindowLogMax);
  }
  ~ZstdSource() override { ZSTD_freeDStream(stream_); }

  absl::StatusOr<size_t> Read(char* out, size_t size) override {
    ZSTD_outBuffer output = {out, size, 0};
    while (output.pos == 0) {
      // A frame may have more to say though all input is taken, so the decoder is asked before the file.
      if (input_.pos == input_.size && !may_have_more_) {
        HEARTH_ASSIGN_OR_RETURN(const bool more, Refill());
        if (!more && in_frame_) return Damaged(0, "the zstd data end in the middle (a truncated file)");
        if (!more) return 0;
        input_ = {buffer_.data(), filled_, 0};
      }
      const size_t result = ZSTD_decompressStream(stream_, &output, &input_);
      if (ZSTD_getErrorCode(result) == ZSTD_error_frameParameter_windowTooLarge) {
        return absl::DataLossError(
            absl::StrCat(file_->path(), ": was packed with a window of more than ", kWindowBytesMax >> 20,
                         " MiB (zstd --long), which each lane that reads it would hold in memory; pack it again: zstd "
                         "-d --long=31 -c FILE | zstd -o SMALLER"));
      }
      if (ZSTD_isError(result)) {
        return Damaged(input_.pos, absl::StrCat("the zstd data are damaged (", ZSTD_getErrorName(result), ")"));
      }
      in_frame_ = result != 0;
      may_have_more_ = in_frame_ && output.pos == output.size;
    }
    return output.pos;
  }

 private:
  ZSTD_DStream* const stream_;
  ZSTD_inBuffer input_ = {nullptr, 0, 0};
  bool in_frame_ = false;
  bool may_have_more_ = false;
};

// What else people put where a log is expected, by the bytes it begins with. Those that a header could begin with, too,
// are told by a byte behind them that no text has.
struct ForeignFormat {
  absl::string_view begins;
  const char* name;
  const char* remedy;
};
constexpr const char kPackAgain[] = "unpack it, or pack it with gzip or zstd";
constexpr const char kWriteText[] = "write it as delimited text, such as CSV";
constexpr const char kRecode[] = "recode it: iconv -f UTF-16 -t UTF-8";
const ForeignFormat kForeignFormats[] = {{{"PK\x03\x04", 4}, "a zip archive", kPackAgain},
                                         {{"PK\x05\x06", 4}, "an empty zip archive", kPackAgain},
                                         {{"BZh", 3}, "packed with bzip2", kPackAgain},
                                         {{"\xfd"
                                           "7zXZ",
                                           5},
                                          "packed with xz",
                                          kPackAgain},
                                         {{"\x04\x22\x4d\x18", 4}, "packed with lz4", kPackAgain},
                                         {{"7z\xbc\xaf", 4}, "a 7z archive", kPackAgain},
                                         {{"PAR1\x15", 5}, "a Parquet file", kWriteText},
                                         {{"Obj\x01", 4}, "an Avro file", kWriteText},
                                         {{"ARROW1\0", 7}, "an Arrow file", kWriteText},
                                         {{"ORC\x08", 4}, "an ORC file", kWriteText},
                                         {{"\x89HDF", 4}, "an HDF5 file", kWriteText},
                                         {{"SQLite format 3\0", 16}, "an SQLite database", kWriteText},
                                         {{"\xff\xfe", 2}, "text in UTF-16", kRecode},
                                         {{"\xfe\xff", 2}, "text in UTF-16", kRecode}};
constexpr absl::string_view kBzip2Block("1AY&SY", 6);  // behind "BZh" and a digit

absl::Status RefuseForeignFormat(absl::string_view head, const std::string& path) {
  for (const ForeignFormat& format : kForeignFormats) {
    if (head.substr(0, format.begins.size()) != format.begins) continue;
    if (format.begins == "BZh" && head.substr(4, kBzip2Block.size()) != kBzip2Block) continue;
    return absl::DataLossError(absl::StrCat(path, ": is ", format.name,
                                            ", and a log is delimited text, plain or packed with gzip or zstd; ",
                                            format.remedy));
  }
  return absl::OkStatus();
}

}  // namespace

// --- InputFile ---

absl::StatusOr<std::shared_ptr<const InputFile>> InputFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return ErrorOf(errno, "open", path);
  std::shared_ptr<InputFile> file(new InputFile(fd, path));
  HEARTH_ASSIGN_OR_RETURN(file->stamp_, file->Look());
  return std::shared_ptr<const InputFile>(std::move(file));
}

InputFile::~InputFile() { close(fd_); }

absl::StatusOr<size_t> InputFile::ReadAt(char* out, size_t size, uint64_t offset) const {
  return hearth::ReadAt(fd_, path_, out, size, offset);
}

absl::StatusOr<uint64_t> InputFile::Digest(uint64_t bytes) const {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash(XXH3_createState(), &XXH3_freeState);
  HEARTH_CHECK(hash != nullptr, "out of memory");
  XXH3_64bits_reset(hash.get());
  std::vector<char> buffer(std::min<uint64_t>(bytes, kBufferBytes));
  for (uint64_t done = 0; done < bytes;) {
    const size_t want = static_cast<size_t>(std::min<uint64_t>(buffer.size(), bytes - done));
    HEARTH_ASSIGN_OR_RETURN(const size_t got, ReadAt(buffer.data(), want, done));
    if (got == 0) break;
    XXH3_64bits_update(hash.get(), buffer.data(), got);
    done += got;
  }
  return XXH3_64bits_digest(hash.get());
}

absl::StatusOr<InputFile::Stamp> InputFile::Look() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) return ErrorOf(errno, "stat", path_);
  if (!S_ISREG(info.st_mode)) return absl::UnavailableError(absl::StrCat(path_, ": is not a regular file"));
  return Stamp{static_cast<uint64_t>(info.st_size), info.st_mtim.tv_sec, info.st_mtim.tv_nsec};
}

absl::Status InputFile::CheckUnchanged() const {
  HEARTH_ASSIGN_OR_RETURN(const Stamp now, Look());
  const bool same_time = now.modified_s == stamp_.modified_s && now.modified_ns == stamp_.modified_ns;
  if (now.bytes == stamp_.bytes && same_time) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(path_, ": was written to while it was read (", stamp_.bytes, " bytes when it was opened, ",
                   now.bytes, " now); put it back as it was, and write a new file aside and rename it next time"));
}

absl::StatusOr<Compression> CompressionOf(const InputFile& file) {
  unsigned char head[16] = {};
  HEARTH_ASSIGN_OR_RETURN(const size_t got, file.ReadAt(reinterpret_cast<char*>(head), sizeof(head), 0));
  if (got >= 2 && head[0] == 0x1f && head[1] == 0x8b) return Compression::kGzip;
  const uint32_t magic = head[0] | head[1] << 8 | head[2] << 16 | static_cast<uint32_t>(head[3]) << 24;
  // A zstd frame, or a skippable one before it.
  if (got >= 4 && (magic == ZSTD_MAGICNUMBER || (magic & 0xfffffff0u) == ZSTD_MAGIC_SKIPPABLE_START)) {
    return Compression::kZstd;
  }
  HEARTH_RETURN_IF_ERROR(RefuseForeignFormat(absl::string_view(reinterpret_cast<const char*>(head), got), file.path()));
  return Compression::kNone;
}

absl::StatusOr<Compression> CompressionOf(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const std::shared_ptr<const InputFile> file, InputFile::Open(path));
  return CompressionOf(*file);
}

absl::StatusOr<std::unique_ptr<TextSource>> OpenTextSource(std::shared_ptr<const InputFile> file) {
  HEARTH_ASSIGN_OR_RETURN(const Compression compression, CompressionOf(*file));
  switch (compression) {
    case Compression::kNone:
      return OpenPlainSource(std::move(file), 0);
    case Compression::kGzip:
      return std::unique_ptr<TextSource>(std::make_unique<GzipSource>(std::move(file)));
    case Compression::kZstd:
      return std::unique_ptr<TextSource>(std::make_unique<ZstdSource>(std::move(file)));
  }
  return absl::InternalError("no such compression");
}

absl::StatusOr<std::unique_ptr<TextSource>> OpenTextSource(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(std::shared_ptr<const InputFile> file, InputFile::Open(path));
  return OpenTextSource(std::move(file));
}

std::unique_ptr<TextSource> OpenPlainSource(std::shared_ptr<const InputFile> file, uint64_t offset) {
  return std::make_unique<PlainSource>(std::move(file), offset);
}

// --- Spool ---

class Spool::Source : public TextSource {
 public:
  Source(const Spool* spool, uint64_t begin, uint64_t end) : spool_(spool), at_(begin), end_(end) {}
  absl::StatusOr<size_t> Read(char* out, size_t size) override {
    size = static_cast<size_t>(std::min<uint64_t>(size, end_ - at_));
    if (size == 0) return 0;
    if (spool_->fd_ < 0) {
      std::memcpy(out, spool_->memory_.data() + at_, size);
    } else {
      HEARTH_ASSIGN_OR_RETURN(size, ReadAt(spool_->fd_, spool_->scratch_, out, size, at_));
      if (size == 0) return absl::UnavailableError(absl::StrCat(spool_->scratch_, ": the scratch file was cut short"));
    }
    at_ += size;
    return size;
  }

 private:
  const Spool* const spool_;
  uint64_t at_;
  const uint64_t end_;
};

Spool::Spool(std::string scratch, uint64_t memory_bytes_max, uint64_t bytes_max)
    : scratch_(std::move(scratch)), memory_bytes_max_(memory_bytes_max), bytes_max_(bytes_max) {}

Spool::~Spool() {
  if (fd_ >= 0) close(fd_);
}

absl::Status Spool::MoveToFile() {
  if (scratch_.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("shuffle.pieces on compressed logs needs a scratch folder for more than ", memory_bytes_max_,
                     " bytes of text; give one, or leave shuffle.pieces out"));
  }
  HEARTH_RETURN_IF_ERROR(MakeDirectories(scratch_));
  std::string name = JoinPath(scratch_, "spool-XXXXXX");
  fd_ = mkostemp(name.data(), O_CLOEXEC);
  if (fd_ < 0) return ErrorOf(errno, "create", name);
  unlink(name.c_str());
  const std::string text = std::move(memory_);
  memory_ = std::string();
  size_ = 0;
  return Append(text.data(), text.size());
}

absl::Status Spool::Append(const char* bytes, size_t size) {
  if (size > bytes_max_ || size_ > bytes_max_ - size) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a lane's pieces of a compressed log with shuffle.pieces are more than limits.spool_bytes_max = ", bytes_max_,
        " bytes of text; raise it, leave shuffle.pieces out, or give plain text"));
  }
  if (fd_ < 0 && size_ + size > memory_bytes_max_) HEARTH_RETURN_IF_ERROR(MoveToFile());
  if (fd_ < 0) {
    memory_.append(bytes, size);
    size_ += size;
    return absl::OkStatus();
  }
  while (size > 0) {
    const ssize_t put = pwrite(fd_, bytes, size, static_cast<off_t>(size_));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return ErrorOf(errno, "write the decompressed log here", scratch_);
    bytes += put;
    size -= static_cast<size_t>(put);
    size_ += static_cast<uint64_t>(put);
  }
  return absl::OkStatus();
}

std::unique_ptr<TextSource> Spool::Open(uint64_t begin, uint64_t end) const {
  HEARTH_CHECK(begin <= end && end <= size_);
  return std::make_unique<Source>(this, begin, end);
}

}  // namespace hearth
