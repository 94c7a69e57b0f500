// Expressions over a record's columns: labels, masks, filters, derived numbers.
//   or := and ("||" and)*   and := comparison ("&&" comparison)*   comparison := sum [(== != < <= > >=) sum]
//   sum := product ((+ -) product)*   product := unary ((* / %) unary)*   unary := (! -) unary | atom
//   atoms: numbers, 'strings', columns (`odd names` in back-ticks; table.column is a side table's), (…),
//   functions min max abs log1p floor if(c, a, b) missing(column)
// A column reads as a number where it is compared or computed with, as text where compared with a string. A missing or
// non-numeric column makes a number NaN; a comparison with NaN is 0, so a label `x > 0` of a missing x is 0: mask it
// with !missing(x). A label that is NaN itself (a bare column that is missing) is masked by the reader.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace hearth {

class Expression {
 public:
  // Maps a column's name to its index in the fields that Evaluate gets; negative: unknown (an error that names the
  // column).
  using Columns = std::function<int(absl::string_view name)>;
  // InvalidArgument with the position and what was expected, or where it is longer than kExpressionBytesMax.
  static absl::StatusOr<Expression> Parse(absl::string_view text, const Columns& columns);
  // fields[i] is the text of column i, empty where missing. Pure.
  double Evaluate(absl::Span<const absl::string_view> fields) const;
  bool True(absl::Span<const absl::string_view> fields) const {
    double v = Evaluate(fields);
    return v != 0 && v == v;
  }

  // The names of the columns that an expression reads, in order of appearance.
  static absl::StatusOr<std::vector<std::string>> ColumnsOf(absl::string_view text);

  struct Node;

 private:
  std::shared_ptr<const Node> root_;  // immutable
};

}  // namespace hearth
