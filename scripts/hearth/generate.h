// `hearth generate`: a synthetic multi-task behaviour log from a hidden model (hidden_model.h), its attribute tables,
// its true probabilities, and a job that trains on it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/generator.pb.h"

namespace hearth {

// Reads a spec; InvalidArgument names file, line, column. Validation is apart, below.
absl::StatusOr<GeneratorSpec> LoadGeneratorSpec(const std::string& path);
// All faults at once, "field: cause; remedy".
std::vector<std::string> FaultsOfSpec(const GeneratorSpec& spec);
// The job that trains on the log: HoME over all tasks, the test log as a split with predictions, spec.snapshots cuts on
// its way. `Generate` writes it as `out`/job.txtpb; its paths are relative to that file.
Job JobForSpec(const GeneratorSpec& spec);

struct GenerateOptions {
  std::string spec_path;
  std::string out;
  std::optional<uint64_t> records;  // of the training log; the test log shrinks or grows in proportion
  std::optional<uint64_t> seed;
};

// Writes into `out`:
//   train/part-0000.csv[.zst] …, test.csv[.zst]   the log, in time order
//   user.csv, video.csv                           attributes (spec.side_tables)
//   schema.json                                   what each file and column holds; marks the folder as ours
//   bayes.tsv.zst                                 for each test record: source, offset, user, label_<task>, p_<task>
//   bayes.json                                    for each task: rates, and the figures of those probabilities
//   job.txtpb                                     written last: where it stands, the rest is whole
// `report` receives a table for people. InvalidArgument: a bad spec. FailedPrecondition: an `out` that holds something
// else; nothing of it is touched.
absl::Status Generate(const GenerateOptions& options, std::string* report);
// The same from a spec in hand.
absl::Status GenerateLog(GeneratorSpec spec, const std::string& out, std::string* report);

}  // namespace hearth
