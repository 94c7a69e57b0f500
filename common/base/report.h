// How a program of ours ends: its report on standard output, an error or the next step on standard error, an exit code.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace hearth {

// Call it first. Where a program is started with a standard descriptor closed, the next file that is opened would get
// its number, and what is said would land in that file: something that cannot be read or written takes the place.
void HoldStandardDescriptors();

// "PROGRAM: message" on standard error; the status's exit code.
int Finish(const std::string& program, const absl::Status& status);
// The report on standard output; one that cannot be written is an error (74).
int Finish(const std::string& program, const absl::StatusOr<std::string>& report);

// What one would run next, for people: on standard error, where it disturbs no pipe.
void SayNext(const std::string& command);

}  // namespace hearth
