// Logging: an event is one line of fixed keys, through spdlog. Roles write DIR/logs/<role>-<index>.log, warnings and
// errors also stderr.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

#include "absl/status/status.h"

namespace hearth {

// Sets spdlog's default logger. `file` empty: stderr alone. `who`, e.g. "worker-1", begins each line after time and
// level.
absl::Status StartLogging(const std::string& who, const std::string& file);
// Writes what is buffered.
void FlushLogging();

}  // namespace hearth
