#include "common/base/report.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>

#include "common/base/output_file.h"
#include "common/base/status.h"

namespace hearth {

void HoldStandardDescriptors() {
  // Descriptors are given out from the lowest. The wrong way round, so that using it is an error still.
  for (const auto& [descriptor, flags] :
       {std::make_pair(STDIN_FILENO, O_WRONLY), std::make_pair(STDOUT_FILENO, O_RDONLY),
        std::make_pair(STDERR_FILENO, O_RDONLY)}) {
    if (fcntl(descriptor, F_GETFD) < 0) static_cast<void>(open("/dev/null", flags));
  }
}

int Finish(const std::string& program, const absl::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s: %s\n", program.c_str(), std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int Finish(const std::string& program, const absl::StatusOr<std::string>& report) {
  return Finish(program, report.ok() ? WriteStandardOutput(*report) : report.status());
}

void SayNext(const std::string& command) { std::fprintf(stderr, "next: %s\n", command.c_str()); }

}  // namespace hearth
