// Folders that are named by a number: a snapshot's and a full export's step, a delta's place in its chain.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace hearth {

// The number that `name` is in plain decimal digits: "10" is 10; "0010", "+10", "10.corrupt" and "" are none. So a
// number has one name, and StrCat(number) finds the folder again.
std::optional<uint64_t> NumberOfName(absl::string_view name);

// Entries of `folder` that are named so, ascending. Empty where the folder does not exist.
absl::StatusOr<std::vector<uint64_t>> NumbersIn(const std::string& folder);

}  // namespace hearth
