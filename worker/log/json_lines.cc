#include "worker/log/json_lines.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "worker/log/number.h"
#include "worker/log/text_source.h"

namespace hearth {
namespace {

namespace dom = simdjson::dom;

constexpr uint64_t kHeadBytesMax = uint64_t{4} << 20;
constexpr size_t kHeadPathsMax = 10'000;
constexpr size_t kNameBytesMax = 100;  // of a column, where one is told

std::string Named(absl::string_view path) {
  return absl::StrCat("column \"", absl::Utf8SafeCHexEscape(path.substr(0, kNameBytesMax)), "\"");
}

absl::string_view ViewOf(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace

struct JsonParser::Impl {
  dom::parser parser;
  std::vector<char> padded;  // the parser reads some bytes behind its text

  // The record as an object; empty: fine.
  std::string Parse(absl::string_view record, dom::object* object) {
    padded.resize(record.size() + simdjson::SIMDJSON_PADDING);
    std::copy(record.begin(), record.end(), padded.begin());
    std::fill(padded.begin() + static_cast<ptrdiff_t>(record.size()), padded.end(), ' ');
    dom::element element;
    simdjson::error_code fault = parser.parse(padded.data(), record.size(), /*realloc_if_needed=*/false).get(element);
    if (fault != simdjson::SUCCESS) return absl::StrCat("is no JSON: ", simdjson::error_message(fault));
    if (element.get(*object) != simdjson::SUCCESS) return "is JSON, but no object";
    return "";
  }
};

JsonParser::JsonParser() : impl_(std::make_unique<Impl>()) {}
JsonParser::~JsonParser() = default;
JsonParser::JsonParser(JsonParser&&) noexcept = default;

// A key, and what the job reads at it and below it.
struct JsonFields::Node {
  int column = -1;
  absl::flat_hash_map<std::string, std::unique_ptr<Node>> keys;

  // Where a key leads; nullptr: the job reads nothing there. A key may hold a path's points itself.
  const Node* Find(absl::string_view key) const {
    const auto found = keys.find(key);
    if (found != keys.end()) return found->second.get();
    const size_t point = key.find('.');
    if (point == absl::string_view::npos) return nullptr;
    const auto first = keys.find(key.substr(0, point));
    return first == keys.end() ? nullptr : first->second->Find(key.substr(point + 1));
  }
};

JsonFields::JsonFields(absl::Span<const Column> columns) : columns_(columns.begin(), columns.end()) {
  auto root = std::make_unique<Node>();
  for (size_t i = 0; i < columns_.size(); ++i) {
    Node* node = root.get();
    for (const absl::string_view key : absl::StrSplit(columns_[i].path, '.')) {
      std::unique_ptr<Node>& next = node->keys[std::string(key)];
      if (next == nullptr) next = std::make_unique<Node>();
      node = next.get();
    }
    HEARTH_CHECK(node->column < 0, "column twice: ", columns_[i].path);
    node->column = static_cast<int>(i);
  }
  root_ = std::move(root);
}

JsonFields::~JsonFields() = default;

// One record. Texts that are made here lie in `scratch`, whose place is known only when it has stopped to grow.
struct JsonFields::Walk {
  struct Found {
    int column;
    absl::string_view text;  // the parser's
    bool made = false;       // no: bytes of scratch
    size_t begin = 0, size = 0;
  };
  const JsonFields& plan;
  std::string* scratch;
  std::vector<Found> found;
  std::string fault;

  bool Refuse(int column, absl::string_view cause) {
    fault = absl::StrCat(Named(plan.columns_[column].path), cause);
    return false;
  }
  void AppendNumber(Number number) {
    char buffer[40];
    const absl::string_view text = TextOf(number, buffer);
    scratch->append(text.data(), text.size());
  }
  // The text of a value that is neither array nor object, behind what is in scratch; false: it is one of them.
  bool Append(const dom::element& value) {
    switch (value.type()) {
      case dom::element_type::STRING: {
        const std::string_view text = value.get_string().value_unsafe();
        scratch->append(text.data(), text.size());
        return true;
      }
      case dom::element_type::INT64:
        AppendNumber(Number::OfInteger(value.get_int64().value_unsafe()));
        return true;
      case dom::element_type::UINT64:
        AppendNumber(Number::OfInteger(static_cast<__int128>(value.get_uint64().value_unsafe())));
        return true;
      case dom::element_type::DOUBLE:
        AppendNumber(Number::OfReal(value.get_double().value_unsafe()));
        return true;
      case dom::element_type::BOOL:
        scratch->push_back(value.get_bool().value_unsafe() ? '1' : '0');
        return true;
      case dom::element_type::NULL_VALUE:
        return true;
      case dom::element_type::ARRAY:
      case dom::element_type::OBJECT:
        break;
    }
    return false;
  }
  bool TakeArray(int column, const dom::array& array) {
    if (!plan.columns_[column].may_be_array) {
      return Refuse(column, " holds an array, which a slot of kind LIST alone can read");
    }
    const size_t begin = scratch->size();
    for (const dom::element element : array) {
      scratch->push_back(kJsonElement);
      const size_t at = scratch->size();
      if (!Append(element)) return Refuse(column, " holds an array of arrays or objects");
      if (scratch->find(kJsonElement, at) != std::string::npos) {
        return Refuse(column, " holds an array with the character U+001E, which stands between elements here");
      }
    }
    found.push_back({column, {}, true, begin, scratch->size() - begin});
    return true;
  }
  bool Take(int column, const dom::element& value) {
    if (value.is_string()) {
      found.push_back({column, ViewOf(value.get_string().value_unsafe())});
      return true;
    }
    if (value.is_array()) return TakeArray(column, value.get_array().value_unsafe());
    const size_t begin = scratch->size();
    if (!Append(value)) return Refuse(column, " holds an object; name a path in it, as user.id");
    found.push_back({column, {}, true, begin, scratch->size() - begin});
    return true;
  }
  // Of a key that comes twice the later value holds.
  bool TakeAll(const dom::object& object, const Node& node) {
    for (const dom::key_value_pair field : object) {
      const Node* const at = node.Find(ViewOf(field.key));
      if (at == nullptr) continue;
      const Node& next = *at;
      dom::object inner;
      if (!next.keys.empty() && field.value.get(inner) == simdjson::SUCCESS && !TakeAll(inner, next)) return false;
      if (next.column >= 0 && !Take(next.column, field.value)) return false;
    }
    return true;
  }
};

std::string JsonFields::Split(absl::string_view record, JsonParser* parser, std::vector<absl::string_view>* fields,
                              std::string* scratch) const {
  fields->assign(columns_.size(), absl::string_view());
  scratch->clear();
  dom::object object;
  std::string fault = parser->impl_->Parse(record, &object);
  if (!fault.empty()) return fault;
  Walk walk{*this, scratch, {}, ""};
  if (!walk.TakeAll(object, *root_)) return walk.fault;
  for (const Walk::Found& one : walk.found) {
    (*fields)[static_cast<size_t>(one.column)] =
        one.made ? absl::string_view(*scratch).substr(one.begin, one.size) : one.text;
  }
  return "";
}

// Lists what a record has.
class JsonHead {
 public:
  std::string Add(absl::string_view record) {
    dom::object object;
    std::string fault = parser_.impl_->Parse(record, &object);
    if (fault.empty()) AddAll(object, "");
    return fault;
  }
  std::set<std::string> paths;

 private:
  void AddAll(const dom::object& object, const std::string& above) {
    for (const dom::key_value_pair field : object) {
      if (paths.size() >= kHeadPathsMax) return;
      const std::string path = absl::StrCat(above, ViewOf(field.key));
      dom::object inner;
      if (field.value.get(inner) == simdjson::SUCCESS) {
        AddAll(inner, path + ".");
      } else {
        paths.insert(path);
      }
    }
  }
  JsonParser parser_;
};

absl::StatusOr<std::set<std::string>> ReadJsonPaths(const std::string& path, const RecordSplitter::Options& options,
                                                    uint64_t records) {
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(path));
  RecordSplitter splitter(std::move(source), 0, options);
  JsonHead head;
  std::string text, first_fault;
  uint64_t read = 0;
  for (; read < records && splitter.offset() < kHeadBytesMax; ++read) {
    text.clear();
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter.Next(&text, &record));
    if (!more) break;
    const std::string fault = record.too_long ? "is longer than limits.record_bytes_max"
                                              : head.Add(record.offset == 0 ? StripByteOrderMark(text) : text);
    if (first_fault.empty() && !fault.empty()) first_fault = absl::StrCat("byte ", record.offset, ": ", fault);
  }
  if (head.paths.empty() && !first_fault.empty()) {
    return absl::DataLossError(absl::StrCat(path, ": ", first_fault, "; none of its first ", read,
                                            " records is an object of JSON: write one a line, or correct log.format"));
  }
  return std::move(head.paths);
}

}  // namespace hearth
