// Facts about this process, and children of it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace hearth {

std::string HostName();   // "localhost" where there is none
uint64_t PeakRssBytes();  // the most memory it has held so far
uint32_t UsableCores();   // that it may run on; at least 1

// Of what waitpid tells: the exit code, or 128 + the signal that ended it, as a shell says it.
int CodeOfWaitStatus(int wait_status);

// A child that works beside us: lower priority, no descriptor of ours, not reached by our group's signals. One thread.
class ChildProcess {
 public:
  // Standard input is /dev/null, output and errors are appended to the file `log`. The child is killed when the calling
  // thread ends, however it does. A program that cannot be started ends with 127.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(const std::vector<std::string>& argv,
                                                             const std::string& log);
  ~ChildProcess();  // kills it and waits for it

  // Exit code, or 128 + the signal that ended it; nothing while it runs.
  std::optional<int> Poll();

 private:
  explicit ChildProcess(pid_t process) : process_(process) {}
  const pid_t process_;
  std::optional<int> code_;
};

}  // namespace hearth
