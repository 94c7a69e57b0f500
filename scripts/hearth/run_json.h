// A run's run.json, as the front command reads it and tells its ends in it. The scheduler writes the rest
// (docs/FORMATS.md). Whatever the file holds, reading it ends well: what is not there, or is of another type, is empty.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace hearth {

struct RunState {
  std::string status;  // "running", "saved", "finished", "failed"
  bool ended = false;  // `exit` says a code
  int code = 0;
  std::string reason;
};
RunState ReadRunState(const std::string& folder);

// Sets status, exit code and reason, keeping the rest; makes a file where there is none, or none that is JSON.
absl::Status WriteRunEnd(const std::string& folder, const std::string& job_name, const std::string& status, int code,
                         const std::string& reason);

// The same into the run's history, for an end that the scheduler did not see.
absl::Status AppendEnd(const std::string& folder, const std::string& status, int code, const std::string& reason);

}  // namespace hearth
