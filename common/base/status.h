// Errors of operation are absl::Status; errors of the program abort. Exit codes follow sysexits (docs/OPERATIONS.md).
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace hearth {

enum ExitCode : int {
  kExitOk = 0,
  kExitUsage = 64,
  kExitBadData = 65,
  kExitNoInput = 66,
  kExitInternal = 70,
  kExitIo = 74,
  kExitSaved = 75,
  kExitConfig = 78,
};

// One meaning a code, everywhere in Hearth:
//   InvalidArgument, FailedPrecondition → 78 (the job or the way it was started is wrong)
//   DataLoss → 65 (bad data, corrupt snapshot) · NotFound → 66 (no input)
//   ResourceExhausted, Unavailable → 74 (disk full, I/O) · everything else → 70
int ExitCodeOf(const absl::Status& status);

// "file: cause" — the status with one line of context in front; keeps the code.
absl::Status Annotate(const absl::Status& status, absl::string_view context);

namespace internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, const std::string& message);
}

}  // namespace hearth

// On in release builds. For errors of the programmer only.
#define HEARTH_CHECK(condition, ...)                                                                   \
  do {                                                                                                 \
    if (__builtin_expect(!(condition), 0))                                                             \
      ::hearth::internal::CheckFailed(__FILE__, __LINE__, #condition, ::absl::StrCat("" __VA_ARGS__)); \
  } while (false)

#define HEARTH_RETURN_IF_ERROR(expression)                                \
  do {                                                                    \
    ::absl::Status hearth_status_ = (expression);                         \
    if (__builtin_expect(!hearth_status_.ok(), 0)) return hearth_status_; \
  } while (false)

#define HEARTH_CONCAT_INNER_(a, b) a##b
#define HEARTH_CONCAT_(a, b) HEARTH_CONCAT_INNER_(a, b)
#define HEARTH_ASSIGN_OR_RETURN(declaration, expression) \
  HEARTH_ASSIGN_OR_RETURN_(HEARTH_CONCAT_(hearth_statusor_, __LINE__), declaration, expression)
#define HEARTH_ASSIGN_OR_RETURN_(temporary, declaration, expression)              \
  auto temporary = (expression);                                                  \
  if (__builtin_expect(!temporary.ok(), 0)) return std::move(temporary).status(); \
  declaration = std::move(temporary).value()
