#include "common/base/status.h"

#include <cstdio>
#include <cstdlib>

#include "common/base/logging.h"

namespace hearth {

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
      return kExitConfig;
    case absl::StatusCode::kDataLoss:
      return kExitBadData;
    case absl::StatusCode::kNotFound:
      return kExitNoInput;
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      return kExitIo;
    default:
      return kExitInternal;
  }
}

absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

namespace internal {

void CheckFailed(const char* file, int line, const char* condition, const std::string& message) {
  const std::string text = absl::StrCat("event=check_failed at=", file, ":", line, " condition=", Quoted(condition),
                                        " message=", Quoted(message));
  spdlog::logger* logger = spdlog::default_logger_raw();
  if (logger != nullptr && !logger->name().empty()) {  // ours: it writes to stderr, too
    logger->critical(text);
    logger->flush();
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
  std::abort();
}

}  // namespace internal
}  // namespace hearth
