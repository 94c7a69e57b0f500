// A table of attributes in memory: key → row of texts.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// Immutable after Load; threads may share it.
class AttributeTable {
 public:
  // Reads job.side_table(…) whole. NotFound names the path; InvalidArgument where the key column is missing or there
  // are more than rows_max rows; DataLoss where a row is bad or a key comes twice, where the file is not the `expected`
  // one (null: any), and where it is written to meanwhile.
  enum class Rows { kAll, kNone };  // kNone: the header alone, for checking what names its columns
  static absl::StatusOr<std::unique_ptr<const AttributeTable>> Load(const Job& job, const SideTable& table,
                                                                    const SideTableFile* expected = nullptr,
                                                                    Rows rows = Rows::kAll);

  const std::string& name() const { return name_; }
  int ColumnOf(absl::string_view column) const;  // negative: none
  const std::vector<std::string>& columns() const { return columns_; }
  // Number of the row with this key; negative: none.
  int64_t Find(absl::string_view key) const {
    const auto found = rows_.find(key);
    return found == rows_.end() ? -1 : static_cast<int64_t>(found->second);
  }
  absl::string_view Field(int64_t row, int column) const { return fields_[row * columns_.size() + column]; }
  uint64_t rows() const { return rows_.size(); }

 private:
  absl::Status Read(const Job& job, const SideTable& table, const SideTableFile* expected, Rows rows);
  absl::Status AddRow(const std::string& path, uint64_t offset, absl::Span<const absl::string_view> fields, int key);

  std::string name_;
  std::vector<std::string> columns_;
  std::vector<std::unique_ptr<std::string>> texts_;  // owns what fields_ view
  std::vector<absl::string_view> fields_;            // [rows, columns]
  absl::flat_hash_map<absl::string_view, uint64_t> rows_;
};

using AttributeTables = std::map<std::string, std::unique_ptr<const AttributeTable>>;  // by name

}  // namespace hearth
