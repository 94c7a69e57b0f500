// Expressions over a record's columns: labels, masks, filters, derived numbers.
//   or := and ("||" and)*   and := comparison ("&&" comparison)*   comparison := sum [(== != < <= > >=) sum]
//   sum := product ((+ -) product)*   product := unary ((* / %) unary)*   unary := (! -) unary | atom
//   atoms: numbers, 'strings', columns (`odd names` in back-ticks; table.column is a side table's), (…),
//   functions min max abs log1p floor if(c, a, b) missing(column)
// docs/EXPRESSIONS.md says what each means. A column reads as a number where it is compared or computed with, as text
// where compared with a string. Integers stay exact. A column that is missing, or holds no number, makes what is
// computed from it or compared with it missing; && and || are missing where neither side decides alone.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "worker/log/number.h"

namespace hearth {

class Expression {
 public:
  // Maps a column's name to its index in the fields that Evaluate gets; negative: unknown (an error that names the
  // column).
  using Columns = std::function<int(absl::string_view name)>;
  // InvalidArgument with the position and what was expected, or where it is longer than kExpressionBytesMax.
  static absl::StatusOr<Expression> Parse(absl::string_view text, const Columns& columns);
  // fields[i] is the text of column i, empty where missing. `unreadable` (or nullptr) gets each column that was read as
  // a number and holds something else. Pure.
  Number Evaluate(absl::Span<const absl::string_view> fields, std::vector<int>* unreadable = nullptr) const;

  // The names of the columns that an expression reads, in order of appearance.
  static absl::StatusOr<std::vector<std::string>> ColumnsOf(absl::string_view text);

  struct Node;

 private:
  std::shared_ptr<const Node> root_;  // immutable
};

}  // namespace hearth
