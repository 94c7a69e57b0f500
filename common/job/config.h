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
// (docs/PROTOCOL.md §4 Bloom admission with expiry, §1 tail with shuffling, …).
std::vector<std::string> FaultsOf(const Job& job);
absl::Status ValidateJob(const Job& job);  // InvalidArgument with all of them, one a line

// Whether `bad` of `read` records are more than the job puts up with.
bool TooManyBadRecords(const Limits& limits, uint64_t bad, uint64_t read);

// The effective job as text, with every default written out.
std::string PrintJob(const Job& job);
// Identity of a job: what decides its model. Fields that may change between resumes (training.epochs upwards,
// snapshot.*, metrics, limits, split, steps_max, read_ahead, threads) are left out.
uint64_t JobHash(const Job& job);
// Fields that a resume may not change and in which the two differ, as paths "training.batch_size: 512 != 1024": those
// that JobHash covers, but log.path (scheduler/source.h says which paths may come and go), and limits.record_bytes_max.
std::vector<std::string> JobDifferences(const Job& a, const Job& b);
// Fields that a resume may change and in which the two differ, though the bits of the model change with them
// (docs/PROTOCOL.md §9): training.threads, device and precision; at staleness > 0, snapshot.every_steps.
std::vector<std::string> BitDifferences(const Job& before, const Job& now);
// Those of them that decide what rows and dense parameters mean: where they agree, a snapshot of one may be evaluated
// by the other. How logs and side tables are read, and what counts as a positive, is free.
std::vector<std::string> ModelDifferences(const Job& a, const Job& b);

// path inside the job, resolved against job.data_dir.
std::string ResolvePath(const Job& job, const std::string& path);

}  // namespace hearth
