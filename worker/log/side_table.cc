#include "worker/log/side_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "worker/log/delimited.h"

namespace hearth {

namespace {
constexpr size_t kTextBytes = 1 << 20;  // of one block of owned text

absl::Status CheckExpected(const InputFile& file, const SideTableFile& expected) {
  HEARTH_ASSIGN_OR_RETURN(const uint64_t digest, file.Digest(file.bytes()));
  if (file.bytes() == expected.bytes() && digest == expected.xxh3()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(file.path(), ": is not the file that the scheduler found (", expected.bytes(),
                                          " bytes, now ", file.bytes(),
                                          "); all workers need the same one: put it back, or resume with the new one "
                                          "where training does not join it"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<const AttributeTable>> AttributeTable::Load(const Job& job, const SideTable& table,
                                                                           const SideTableFile* expected, Rows rows) {
  auto loaded = std::make_unique<AttributeTable>();
  loaded->name_ = table.name();
  HEARTH_RETURN_IF_ERROR(loaded->Read(job, table, expected, rows));
  return std::unique_ptr<const AttributeTable>(std::move(loaded));
}

int AttributeTable::ColumnOf(absl::string_view column) const {
  for (size_t i = 0; i < columns_.size(); ++i) {
    if (columns_[i] == column) return static_cast<int>(i);
  }
  return -1;
}

absl::Status AttributeTable::Read(const Job& job, const SideTable& table, const SideTableFile* expected, Rows rows) {
  const std::string path = ResolvePath(job, table.path());
  const std::string where = absl::StrCat("side_table \"", name_, "\"");
  RecordSplitter::Options options;
  HEARTH_ASSIGN_OR_RETURN(options.delimiter, DelimiterOf(table.delimiter(), where));
  options.multiline = true;
  options.record_bytes_max = job.limits().record_bytes_max();
  const auto input = InputFile::Open(path);
  if (!input.ok()) return Annotate(input.status(), where);
  if (expected != nullptr) HEARTH_RETURN_IF_ERROR(Annotate(CheckExpected(**input, *expected), where));
  auto source = OpenTextSource(*input);
  if (!source.ok()) return Annotate(source.status(), where);
  RecordSplitter splitter(std::move(source).value(), 0, options);

  std::string record, scratch;
  std::vector<absl::string_view> fields;
  int key = -1;
  while (true) {
    record.clear();
    RecordText text;
    auto more = splitter.Next(&record, &text);
    if (!more.ok()) return Annotate(more.status(), where);
    if (!*more) break;
    const absl::string_view line = columns_.empty() ? StripByteOrderMark(record) : absl::string_view(record);
    absl::string_view cause = SplitFields(line, options.delimiter, &fields, &scratch);
    if (text.too_long) cause = "the record is longer than limits.record_bytes_max";
    const bool is_header = columns_.empty();
    if (cause.empty() && !is_header && fields.size() != columns_.size())
      cause = "has another number of fields than the header";
    if (!cause.empty()) {
      return absl::DataLossError(
          absl::StrCat(where, ": ", path, ": byte ", text.offset, ": ", cause, "; correct this row"));
    }
    if (is_header) {
      for (const absl::string_view field : fields) columns_.emplace_back(field);
      key = ColumnOf(table.key());
      if (key < 0) {
        return absl::InvalidArgumentError(absl::StrCat(where, ".key: ", path, " has no column \"", table.key(),
                                                       "\"; it has ", absl::StrJoin(columns_, ", ")));
      }
      if (rows == Rows::kNone) break;
      continue;
    }
    if (rows_.size() >= table.rows_max()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", path, " has more than ", table.rows_max(), " rows; raise rows_max"));
    }
    HEARTH_RETURN_IF_ERROR(AddRow(path, text.offset, fields, key));
  }
  if (columns_.empty()) return absl::DataLossError(absl::StrCat(where, ": ", path, " is empty; it needs a header"));
  return Annotate((*input)->CheckUnchanged(), where);
}

absl::Status AttributeTable::AddRow(const std::string& path, uint64_t offset,
                                    absl::Span<const absl::string_view> fields, int key) {
  size_t bytes = 0;
  for (const absl::string_view field : fields) bytes += field.size();
  if (texts_.empty() || texts_.back()->capacity() - texts_.back()->size() < bytes) {
    texts_.push_back(std::make_unique<std::string>());
    texts_.back()->reserve(std::max(bytes, kTextBytes));  // never grows past this: views stay valid
  }
  std::string& text = *texts_.back();
  const uint64_t row = rows_.size();
  for (const absl::string_view field : fields) {
    const size_t begin = text.size();
    text.append(field.data(), field.size());
    fields_.emplace_back(text.data() + begin, field.size());
  }
  if (!rows_.emplace(fields_[row * columns_.size() + key], row).second) {
    return absl::DataLossError(absl::StrCat("side_table \"", name_, "\": ", path, ": byte ", offset, ": the key \"",
                                            fields[key], "\" comes a second time; keep one row for each key"));
  }
  return absl::OkStatus();
}

}  // namespace hearth
