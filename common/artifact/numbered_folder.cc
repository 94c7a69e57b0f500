#include "common/artifact/numbered_folder.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {

std::optional<uint64_t> NumberOfName(absl::string_view name) {
  uint64_t number = 0;
  if (!absl::SimpleAtoi(name, &number) || absl::StrCat(number) != name) return std::nullopt;
  return number;
}

absl::StatusOr<std::vector<uint64_t>> NumbersIn(const std::string& folder) {
  std::vector<uint64_t> numbers;
  const absl::StatusOr<std::vector<std::string>> names = ListDirectory(folder);
  if (absl::IsNotFound(names.status())) return numbers;
  HEARTH_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    if (const std::optional<uint64_t> number = NumberOfName(name)) numbers.push_back(*number);
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

}  // namespace hearth
