// The job file: parse, override, validate.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

// Reads a job.txtpb, applies the overrides "training.staleness=2", "table[0].dim=8", "log[1].path=x", "model.kind=MMOE"
// in order, and makes data_dir absolute (against the file's folder; "" means that folder). Overrides of a scalar
// repeated field replace its elements. InvalidArgument names file, line, column and cause; an unknown field is an
// error.
absl::StatusOr<Job> LoadJob(const std::string& path, const std::vector<std::string>& overrides);
absl::StatusOr<Job> ParseJob(const std::string& text, const std::string& name_for_errors);

// Of one expression: an evaluation recurses once for each operator of a chain, so this bounds the stack.
constexpr size_t kExpressionBytesMax = 8192;

// All faults at once: each line is "field: cause; remedy". Pure: looks at no file. Sizes, ranges, names that do not
// resolve (tables, categories, columns are checked by the log reader), duplicates, combinations that are refused
// (docs/PROTOCOL.md §1 tail with shuffling, …).
std::vector<std::string> FaultsOf(const Job& job);
absl::Status ValidateJob(const Job& job);  // InvalidArgument with all of them, one a line

// Whether `bad` of `read` records are more than the job puts up with.
bool TooManyBadRecords(const Limits& limits, uint64_t bad, uint64_t read);

// Every field written out, as it is or by its default.
Job WithDefaults(Job job);
// The effective job as text, with every default written out.
std::string PrintJob(const Job& job);
// The text that the ids of a slot with hash SALTED are hashed with: slot.salt, or the slot's name.
const std::string& SaltText(const Slot& slot);
// path inside the job, resolved against job.data_dir.
std::string ResolvePath(const Job& job, const std::string& path);

}  // namespace hearth
