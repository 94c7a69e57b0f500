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

absl::Status CheckListed(const LogFile& file, const InputFile& input) {
  const std::string& path = input.path();
  const uint64_t bytes = input.bytes();
  const char* const remedy =
      "; the list of files was made from another file: put that one back, or start a new run (--fresh)";
  if (bytes != file.bytes()) {
    return absl::DataLossError(
        absl::StrCat(path, ": has ", bytes, " bytes where file ", file.number(), " has ", file.bytes(), remedy));
  }
  HEARTH_ASSIGN_OR_RETURN(const uint64_t digest, input.Digest(kHeadBytes));
  if (digest != file.digest()) {
    return absl::DataLossError(absl::StrCat(path, ": its first ", kHeadBytes >> 10, " KiB have digest ", digest,
                                            " where file ", file.number(), " has ", file.digest(), remedy));
  }
  return absl::OkStatus();
}

// The first record and its place; false: the file has none.
absl::StatusOr<bool> ReadFirstRecord(const std::shared_ptr<const InputFile>& input,
                                     const RecordSplitter::Options& options, std::string* text, RecordText* record) {
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(input));
  RecordSplitter splitter(std::move(source), 0, options);
  HEARTH_ASSIGN_OR_RETURN(const bool found, splitter.Next(text, record));
  if (found && record->too_long) {
    return absl::DataLossError(absl::StrCat(input->path(), ": byte ", record->offset,
                                            ": the header is longer than limits.record_bytes_max = ",
                                            options.record_bytes_max, "; raise the limit, or correct the header"));
  }
  return found;
}

}  // namespace

LogFileReader::LogFileReader(const LogFile& file, std::shared_ptr<const InputFile> input, const Options& options)
    : file_(file), input_(std::move(input)), options_(options) {}

absl::StatusOr<std::unique_ptr<LogFileReader>> LogFileReader::Open(const LogFile& file, const std::string& path,
                                                                   const Options& options) {
  HEARTH_CHECK(options.piece_bytes > 0 && options.records_per_block > 0);
  HEARTH_ASSIGN_OR_RETURN(std::shared_ptr<const InputFile> input, InputFile::Open(path));
  HEARTH_RETURN_IF_ERROR(CheckListed(file, *input));
  HEARTH_ASSIGN_OR_RETURN(const Compression compression, CompressionOf(*input));
  std::unique_ptr<LogFileReader> reader(new LogFileReader(file, std::move(input), options));
  reader->plain_ = compression == Compression::kNone && !options.records.multiline;
  if (options.header) HEARTH_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

absl::Status LogFileReader::ReadHeader() {
  RecordText record;
  HEARTH_ASSIGN_OR_RETURN(has_header_, ReadFirstRecord(input_, options_.records, &header_, &record));
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
  if (spool_ != nullptr) return ReadSpooled(block, piece);
  const auto got = plain_ ? ReadPlain(block, piece) : ReadSequential(block, piece);
  // After the bytes were read: whoever changed them has left a trace. What else is wrong with them says less.
  HEARTH_RETURN_IF_ERROR(input_->CheckUnchanged());
  return got;
}

absl::StatusOr<bool> LogFileReader::ReadPlain(uint64_t block, Piece* piece) {
  if (block >= (file_.bytes() + options_.piece_bytes - 1) / options_.piece_bytes) return false;
  const uint64_t begin = block * options_.piece_bytes;
  const uint64_t end = std::min(file_.bytes(), begin + options_.piece_bytes);
  // A record starts at `begin` only if the byte before it ends a line.
  const uint64_t from = begin == 0 ? 0 : begin - 1;
  RecordSplitter splitter(OpenPlainSource(input_, from), from, options_.records);
  if (begin > 0) HEARTH_RETURN_IF_ERROR(splitter.SkipLine());
  HEARTH_RETURN_IF_ERROR(Take(&splitter, kNoLimit, end, piece));
  return true;
}

absl::StatusOr<bool> LogFileReader::ReadSequential(uint64_t block, Piece* piece) {
  const uint64_t first = block * options_.records_per_block;
  if (splitter_ == nullptr) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(input_));
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

absl::StatusOr<uint64_t> LogFileReader::CountBlocks() {
  if (plain_) return (file_.bytes() + options_.piece_bytes - 1) / options_.piece_bytes;
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(input_));
  RecordSplitter splitter(std::move(source), 0, options_.records);
  uint64_t records = 0;
  while (true) {
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter.Next(nullptr, &record));
    if (!more) break;
    records += !has_header_ || record.offset != header_offset_;
  }
  HEARTH_RETURN_IF_ERROR(input_->CheckUnchanged());
  return (records + options_.records_per_block - 1) / options_.records_per_block;
}

absl::Status LogFileReader::Keep(const std::vector<uint64_t>& blocks, Spool* spool) {
  if (plain_) return absl::OkStatus();
  // Remembers the text that flows into the splitter until it is known whether it is kept.
  class Window : public TextSource {
   public:
    explicit Window(std::unique_ptr<TextSource> from) : from_(std::move(from)) {}
    absl::StatusOr<size_t> Read(char* out, size_t size) override {
      HEARTH_ASSIGN_OR_RETURN(const size_t got, from_->Read(out, size));
      text_.append(out, got);
      return got;
    }
    // The text before byte `offset` of the file is dropped, or goes into *to first.
    absl::Status MoveTo(uint64_t offset, Spool* to) {
      const size_t size = static_cast<size_t>(std::min<uint64_t>(offset - begin_, text_.size()));
      if (to != nullptr) HEARTH_RETURN_IF_ERROR(to->Append(text_.data(), size));
      text_.erase(0, size);
      begin_ += size;
      return absl::OkStatus();
    }

   private:
    const std::unique_ptr<TextSource> from_;
    std::string text_;
    uint64_t begin_ = 0;  // of text_ in the file
  };
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(input_));
  auto window = std::make_unique<Window>(std::move(source));
  Window* const text = window.get();
  RecordSplitter splitter(std::move(window), 0, options_.records);
  spool_ = spool;
  auto next = blocks.begin();
  uint64_t records = 0;
  bool keeps = false;
  while (next != blocks.end()) {
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter.Next(nullptr, &record));
    if (more && has_header_ && record.offset == header_offset_) continue;
    if (more && records % options_.records_per_block != 0) {
      ++records;
      continue;
    }
    // A block begins here, or the file ends.
    HEARTH_RETURN_IF_ERROR(text->MoveTo(more ? record.offset : splitter.offset(), keeps ? spool : nullptr));
    if (keeps) kept_[*next++].end = spool->size();
    if (!more) break;
    keeps = next != blocks.end() && records / options_.records_per_block == *next;
    if (keeps) kept_[*next] = {spool->size(), 0, record.offset};
    ++records;
  }
  return input_->CheckUnchanged();
}

absl::StatusOr<bool> LogFileReader::ReadSpooled(uint64_t block, Piece* piece) {
  const auto found = kept_.find(block);
  if (found == kept_.end()) return false;
  const Kept& kept = found->second;
  RecordSplitter splitter(spool_->Open(kept.begin, kept.end), kept.offset, options_.records);
  HEARTH_RETURN_IF_ERROR(Take(&splitter, options_.records_per_block, kNoLimit, piece));
  return true;
}

absl::StatusOr<std::string> ReadHeader(const std::string& path, const RecordSplitter::Options& options) {
  std::string text;
  RecordText record;
  HEARTH_ASSIGN_OR_RETURN(const std::shared_ptr<const InputFile> input, InputFile::Open(path));
  HEARTH_RETURN_IF_ERROR(ReadFirstRecord(input, options, &text, &record).status());
  return text;
}

}  // namespace hearth
