// What was built, for `--version`, run.json and MANIFESTs.
#pragma once

#include <string>

namespace hearth {

std::string BuildCommit();  // 12 hex digits, or "unknown"

}  // namespace hearth
