#include "worker/log/delimited.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace hearth {

namespace {
constexpr size_t kBufferBytes = 64 << 10;
constexpr size_t kGoesOn = std::string::npos;
}  // namespace

RecordSplitter::RecordSplitter(std::unique_ptr<TextSource> source, uint64_t offset, Options options)
    : source_(std::move(source)), options_(options), buffer_(kBufferBytes), offset_(offset) {}

absl::StatusOr<bool> RecordSplitter::Fill() {
  HEARTH_ASSIGN_OR_RETURN(end_, source_->Read(buffer_.data(), buffer_.size()));
  at_ = 0;
  return end_ > 0;
}

absl::Status RecordSplitter::SkipLine() {
  while (true) {
    if (at_ == end_) {
      HEARTH_ASSIGN_OR_RETURN(const bool more, Fill());
      if (!more) return absl::OkStatus();
    }
    const void* newline = std::memchr(buffer_.data() + at_, '\n', end_ - at_);
    const size_t size =
        newline == nullptr ? end_ - at_ : static_cast<const char*>(newline) - (buffer_.data() + at_) + 1;
    at_ += size;
    offset_ += size;
    if (newline != nullptr) return absl::OkStatus();
  }
}

size_t RecordSplitter::FindEnd(uint64_t before) {
  if (!options_.multiline) {
    const void* newline = std::memchr(buffer_.data() + at_, '\n', end_ - at_);
    return newline == nullptr ? kGoesOn : static_cast<const char*>(newline) - (buffer_.data() + at_);
  }
  for (size_t i = at_; i < end_; ++i) {
    const char c = buffer_[i];
    // A quote that nobody closes would swallow the file: past the limit the record ends at the next newline.
    if (place_ == Place::kQuoted && before + (i - at_) > options_.record_bytes_max) place_ = Place::kUnquoted;
    if (place_ == Place::kQuoted) {
      if (c == '"') place_ = Place::kAfterQuote;
    } else if (c == '\n') {
      return i - at_;
    } else if (c == options_.delimiter) {
      place_ = Place::kFieldStart;
    } else if (c == '"' && place_ != Place::kUnquoted) {
      place_ = Place::kQuoted;
    } else {
      place_ = Place::kUnquoted;
    }
  }
  return kGoesOn;
}

absl::StatusOr<bool> RecordSplitter::Next(std::string* kept, RecordText* record, uint64_t start_limit) {
  while (true) {
    if (at_ == end_) {
      HEARTH_ASSIGN_OR_RETURN(const bool more, Fill());
      if (!more) return false;
    }
    if (offset_ >= start_limit) return false;
    *record = RecordText();
    record->offset = offset_;
    record->begin = kept == nullptr ? 0 : kept->size();
    place_ = Place::kFieldStart;
    uint64_t bytes = 0;
    char last = 0;
    while (true) {
      const size_t found = FindEnd(bytes);
      const size_t size = found == kGoesOn ? end_ - at_ : found;
      record->too_long |= bytes + size > options_.record_bytes_max;
      if (kept != nullptr && !record->too_long) kept->append(buffer_.data() + at_, size);
      if (size > 0) last = buffer_[at_ + size - 1];
      bytes += size;
      at_ += size;
      offset_ += size;
      if (found != kGoesOn) {
        ++at_;
        ++offset_;
        break;
      }
      HEARTH_ASSIGN_OR_RETURN(const bool more, Fill());
      if (!more) break;
    }
    if (last == '\r') --bytes;
    if (kept != nullptr) kept->resize(record->begin + (record->too_long ? 0 : bytes));
    record->size = record->too_long ? 0 : bytes;
    if (bytes > 0) return true;
  }
}

absl::string_view SplitFields(absl::string_view record, char delimiter, std::vector<absl::string_view>* fields,
                              std::string* scratch) {
  fields->clear();
  scratch->clear();
  scratch->reserve(record.size());  // views into it stay valid: it never grows past this
  const char* at = record.data();
  const char* const end = at + record.size();
  while (true) {
    if (at == end || *at != '"') {
      const char* stop = at == end ? nullptr : static_cast<const char*>(std::memchr(at, delimiter, end - at));
      if (stop == nullptr) stop = end;
      fields->emplace_back(at, stop - at);
      at = stop;
    } else {
      ++at;
      const char* close = static_cast<const char*>(std::memchr(at, '"', end - at));
      if (close == nullptr) return kUnterminatedQuote;
      if (close + 1 == end || close[1] != '"') {
        fields->emplace_back(at, close - at);
      } else {
        const size_t begin = scratch->size();
        while (close + 1 != end && close[1] == '"') {
          scratch->append(at, close + 1 - at);
          at = close + 2;
          close = static_cast<const char*>(std::memchr(at, '"', end - at));
          if (close == nullptr) return kUnterminatedQuote;
        }
        scratch->append(at, close - at);
        fields->emplace_back(scratch->data() + begin, scratch->size() - begin);
      }
      at = close + 1;
      if (at != end && *at != delimiter) return "text after a closing quote";
    }
    if (at == end) return {};
    ++at;  // the delimiter; a field follows, though it may be empty
  }
}

absl::StatusOr<char> DelimiterOf(const std::string& text, absl::string_view where) {
  if (text == "\\t") return '\t';
  if (text.size() == 1 && text[0] != '"' && text[0] != '\n') return text[0];
  return absl::InvalidArgumentError(
      absl::StrCat(where, ".delimiter: is \"", text, "\"; give one character, \"\\\\t\" for a tab"));
}

absl::string_view StripByteOrderMark(absl::string_view record) {
  absl::ConsumePrefix(&record, "\xef\xbb\xbf");
  return record;
}

}  // namespace hearth
