// Logging through spdlog: one event, one line, `event=name key=value …` behind time, level and role (docs/FORMATS.md,
// "Logs of the roles"). A text that is not a word of our own is Quoted. Roles write DIR/logs/<role>-<index>.log,
// warnings and errors also stderr.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace hearth {

// Sets spdlog's default logger. `file` empty: stderr alone. `who`, e.g. "worker-1", begins each line after time and
// level.
absl::Status StartLogging(const std::string& who, const std::string& file);
// In quotes, with quotes, backslashes and what does not print escaped as in C: one line always.
std::string Quoted(absl::string_view text);
// Writes what is buffered.
void FlushLogging();

}  // namespace hearth
