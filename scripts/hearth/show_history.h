// `hearth history`: what a run has been through, a line an era. Read only; beside a run, too.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace hearth {

// Text, or a JSON object of schema 1 (docs/FORMATS.md, "history.jsonl"), of the run in `dir`. NotFound where it is no
// run's folder.
absl::StatusOr<std::string> ShowHistory(const std::string& dir, bool json);

}  // namespace hearth
