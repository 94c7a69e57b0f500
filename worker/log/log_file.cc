#include "worker/log/log_file.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {

namespace {

constexpr uint64_t kHeadBytes = 64 << 10;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

absl::Status CheckListed(const LogFile& file, const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(path));
  const char* const remedy =
      "; the list of files was made from another file: put that one back, or start a new run (--fresh)";
  if (bytes != file.bytes()) {
    return absl::DataLossError(
        absl::StrCat(path, ": has ", bytes, " bytes where file ", file.number(), " has ", file.bytes(), remedy));
  }
  HEARTH_ASSIGN_OR_RETURN(const uint64_t digest, HashFileHead(path, kHeadBytes));
  if (digest != file.digest()) {
    return absl::DataLossError(absl::StrCat(path, ": its first ", kHeadBytes >> 10, " KiB have digest ", digest,
                                            " where file ", file.number(), " has ", file.digest(), remedy));
  }
  return absl::OkStatus();
}

// The first record and its place; false: the file has none.
absl::StatusOr<bool> ReadFirstRecord(const std::string& path, const RecordSplitter::Options& options, std::string* text,
                                     RecordText* record) {
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(path));
  RecordSplitter splitter(std::move(source), 0, options);
  HEARTH_ASSIGN_OR_RETURN(const bool found, splitter.Next(text, record));
  if (found && record->too_long) {
    return absl::DataLossError(absl::StrCat(path, ": byte ", record->offset,
                                            ": the header is longer than limits.record_bytes_max = ",
                                            options.record_bytes_max, "; raise the limit, or correct the header"));
  }
  return found;
}

}  // namespace

LogFileReader::LogFileReader(const LogFile& file, std::string path, const Options& options)
    : file_(file), path_(std::move(path)), options_(options) {}

absl::StatusOr<std::unique_ptr<LogFileReader>> LogFileReader::Open(const LogFile& file, const std::string& path,
                                                                   const Options& options) {
  HEARTH_CHECK(options.piece_bytes > 0 && options.records_per_block > 0);
  HEARTH_RETURN_IF_ERROR(CheckListed(file, path));
  HEARTH_ASSIGN_OR_RETURN(const Compression compression, CompressionOf(path));
  std::unique_ptr<LogFileReader> reader(new LogFileReader(file, path, options));
  reader->plain_ = compression == Compression::kNone && !options.records.multiline;
  if (options.header) HEARTH_RETURN_IF_ERROR(reader->ReadHeader());
  if (options.spool != nullptr && !reader->plain_) HEARTH_RETURN_IF_ERROR(reader->FillSpool());
  return reader;
}

absl::Status LogFileReader::ReadHeader() {
  RecordText record;
  HEARTH_ASSIGN_OR_RETURN(has_header_, ReadFirstRecord(path_, options_.records, &header_, &record));
  header_offset_ = record.offset;
  return absl::OkStatus();
}

absl::Status LogFileReader::Take(RecordSplitter* splitter, uint64_t count, uint64_t start_limit, Piece* piece) {
  while (piece->records.size() < count) {
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter->Next(&piece->text, &record, start_limit));
    if (!more) break;
    if (has_header_ && record.offset == header_offset_) {
      piece->text.resize(record.begin);
      continue;
    }
    piece->records.push_back(record);
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> LogFileReader::ReadBlock(uint64_t block, Piece* piece) {
  piece->file = file_.number();
  piece->block = block;
  piece->text.clear();
  piece->records.clear();
  if (plain_) return ReadPlain(block, piece);
  return options_.spool != nullptr ? ReadSpooled(block, piece) : ReadSequential(block, piece);
}

absl::StatusOr<bool> LogFileReader::ReadPlain(uint64_t block, Piece* piece) {
  if (block >= (file_.bytes() + options_.piece_bytes - 1) / options_.piece_bytes) return false;
  const uint64_t begin = block * options_.piece_bytes;
  const uint64_t end = std::min(file_.bytes(), begin + options_.piece_bytes);
  // A record starts at `begin` only if the byte before it ends a line.
  const uint64_t from = begin == 0 ? 0 : begin - 1;
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenPlainSource(path_, from));
  RecordSplitter splitter(std::move(source), from, options_.records);
  if (begin > 0) HEARTH_RETURN_IF_ERROR(splitter.SkipLine());
  HEARTH_RETURN_IF_ERROR(Take(&splitter, kNoLimit, end, piece));
  return true;
}

absl::StatusOr<bool> LogFileReader::ReadSequential(uint64_t block, Piece* piece) {
  const uint64_t first = block * options_.records_per_block;
  if (splitter_ == nullptr) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(path_));
    splitter_ = std::make_unique<RecordSplitter>(std::move(source), 0, options_.records);
    if (has_header_) {
      RecordText header;
      HEARTH_RETURN_IF_ERROR(splitter_->Next(nullptr, &header).status());
    }
  }
  HEARTH_CHECK(first >= next_record_);
  for (; next_record_ < first; ++next_record_) {
    RecordText other;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter_->Next(nullptr, &other));
    if (!more) return false;
  }
  HEARTH_RETURN_IF_ERROR(Take(splitter_.get(), options_.records_per_block, kNoLimit, piece));
  next_record_ += piece->records.size();
  return !piece->records.empty();
}

absl::Status LogFileReader::FillSpool() {
  // The splitter finds the blocks while the text flows through it into the spool.
  class Tee : public TextSource {
   public:
    Tee(std::unique_ptr<TextSource> from, Spool* to) : from_(std::move(from)), to_(to) {}
    absl::StatusOr<size_t> Read(char* out, size_t size) override {
      HEARTH_ASSIGN_OR_RETURN(const size_t got, from_->Read(out, size));
      HEARTH_RETURN_IF_ERROR(to_->Append(out, got));
      return got;
    }

   private:
    const std::unique_ptr<TextSource> from_;
    Spool* const to_;
  };
  spool_begin_ = options_.spool->size();
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(path_));
  RecordSplitter splitter(std::make_unique<Tee>(std::move(source), options_.spool), 0, options_.records);
  uint64_t records = 0;
  while (true) {
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter.Next(nullptr, &record));
    if (!more) break;
    if (has_header_ && record.offset == header_offset_) continue;
    if (records++ % options_.records_per_block == 0) block_at_.push_back(record.offset);
  }
  block_at_.push_back(options_.spool->size() - spool_begin_);
  return absl::OkStatus();
}

absl::StatusOr<bool> LogFileReader::ReadSpooled(uint64_t block, Piece* piece) {
  if (block >= blocks()) return false;
  const uint64_t begin = block_at_[block];
  RecordSplitter splitter(options_.spool->Open(spool_begin_ + begin, spool_begin_ + block_at_[block + 1]), begin,
                          options_.records);
  HEARTH_RETURN_IF_ERROR(Take(&splitter, options_.records_per_block, kNoLimit, piece));
  return true;
}

uint64_t LogFileReader::blocks() const {
  HEARTH_CHECK(options_.spool != nullptr);
  if (plain_) return (file_.bytes() + options_.piece_bytes - 1) / options_.piece_bytes;
  return block_at_.size() - 1;
}

absl::StatusOr<std::string> ReadHeader(const std::string& path, const RecordSplitter::Options& options) {
  std::string text;
  RecordText record;
  HEARTH_RETURN_IF_ERROR(ReadFirstRecord(path, options, &text, &record).status());
  return text;
}

}  // namespace hearth
