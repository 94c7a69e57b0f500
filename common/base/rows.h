// Rows of words and figures for a reader, in columns.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace hearth {

// One row a line; `left`: columns that are aligned there, names. The rest are figures. REQUIRES: a first row, and as
// many columns in each.
std::string FormatRows(const std::vector<std::vector<std::string>>& rows, const std::set<size_t>& left);

}  // namespace hearth
