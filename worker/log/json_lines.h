// JSON lines: one object a line → the texts of the columns that a job reads. A column is a path: `user.id` is the value
// of key id in the object at key user, or of a key user.id. A number's text is its shortest decimal form (number.h,
// TextOf), so an integer and its digits in a delimited log are one id; true and false are 1 and 0; null and what is not
// there are empty.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "worker/log/delimited.h"

namespace hearth {

// An array's text: before each element stands this mark, which no element may hold. A LIST slot splits it there.
constexpr char kJsonElement = '\x1e';

// What a thread keeps between two records.
class JsonParser {
 public:
  JsonParser();
  ~JsonParser();
  JsonParser(JsonParser&&) noexcept;

 private:
  friend class JsonFields;
  friend class JsonHead;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Immutable; each thread brings its own parser and scratch.
class JsonFields {
 public:
  struct Column {
    std::string path;
    bool may_be_array = false;  // a LIST slot reads it
  };
  // Paths are distinct.
  explicit JsonFields(absl::Span<const Column> columns);
  ~JsonFields();

  // (*fields)[i] is the text of column i. They point into the parser and into `scratch`, until the next call. Empty:
  // fine; else the reason why the record is bad: it is no object of JSON, or a column's value cannot be a text.
  std::string Split(absl::string_view record, JsonParser* parser, std::vector<absl::string_view>* fields,
                    std::string* scratch) const;

 private:
  struct Node;
  struct Walk;
  const std::vector<Column> columns_;
  std::unique_ptr<const Node> root_;
};

constexpr uint64_t kJsonHeadRecords = 1000;
// The paths of all values in a file's first `records` (at most 4 MiB), as far as they can be read. DataLoss where none
// of these is an object of JSON, naming the first one's place and fault.
absl::StatusOr<std::set<std::string>> ReadJsonPaths(const std::string& path, const RecordSplitter::Options& options,
                                                    uint64_t records = kJsonHeadRecords);

}  // namespace hearth
