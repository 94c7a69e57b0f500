// Delimited text: bytes → records → fields. Fields may be quoted with "; "" inside quotes is one quote. A quote that
// does not begin a field is an ordinary character. Empty lines are not records. Lines may end in \n or \r\n.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/log/text_source.h"

namespace hearth {

// Where a record lies in a text that someone keeps.
struct RecordText {
  uint64_t offset = 0;    // of its first byte in the file (in its decompressed text)
  size_t begin = 0;       // in the kept text
  size_t size = 0;        // without the line's end
  bool too_long = false;  // longer than record_bytes_max: none of it is kept
};

// Cuts a stream into records. One thread.
class RecordSplitter {
 public:
  struct Options {
    char delimiter = ',';
    bool multiline = false;  // a newline inside quotes belongs to the record
    uint64_t record_bytes_max = 1 << 20;
  };
  // `offset`: of the source's first byte in the file.
  RecordSplitter(std::unique_ptr<TextSource> source, uint64_t offset, Options options);

  // Skips to the byte after the next newline.
  absl::Status SkipLine();
  // The next record; false at the end, or where it would start at or past `start_limit`. Its text is appended to
  // `kept`; nullptr: only stepped over.
  absl::StatusOr<bool> Next(std::string* kept, RecordText* record,
                            uint64_t start_limit = std::numeric_limits<uint64_t>::max());
  // Of the first byte not yet handed out.
  uint64_t offset() const { return offset_; }

 private:
  // Where in a record the scan for its end stands; AfterQuote: behind a quote that closes the field, unless another
  // follows.
  enum class Place { kFieldStart, kUnquoted, kQuoted, kAfterQuote };

  absl::StatusOr<bool> Fill();
  // Bytes up to the newline that ends the record; npos: it goes on. `before`: bytes of the record already seen.
  size_t FindEnd(uint64_t before);

  const std::unique_ptr<TextSource> source_;
  const Options options_;
  std::vector<char> buffer_;
  size_t at_ = 0, end_ = 0;  // unread bytes of buffer_
  uint64_t offset_;
  Place place_ = Place::kFieldStart;  // multiline
};

// A reason of SplitFields: a quote that begins a field and is not closed, as a newline inside quotes leaves it behind.
constexpr absl::string_view kUnterminatedQuote = "unterminated quote";

// Splits one record into fields. Views point into `record`, or into `scratch` where "" had to be undone; both live as
// long as the fields are used. Empty: fine; else the reason why the record is bad.
absl::string_view SplitFields(absl::string_view record, char delimiter, std::vector<absl::string_view>* fields,
                              std::string* scratch);

// The one character that `Log.delimiter` or `SideTable.delimiter` means ("\\t" is a tab); InvalidArgument names
// `where`.
absl::StatusOr<char> DelimiterOf(const std::string& text, absl::string_view where);

// A first record without a byte order mark.
absl::string_view StripByteOrderMark(absl::string_view record);

}  // namespace hearth
