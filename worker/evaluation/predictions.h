// What an evaluation gathers: one row a record, merged in (file, offset) order, scored and written. Free of Torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/bytes.h"
#include "common/base/output_file.h"
#include "common/net/wire.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"

namespace hearth {

// Parallel arrays over records. Which of them are kept is the same for all parts of one evaluation. A record takes 12
// bytes and 5 a task, 8 with a user, and its user's text where predictions are written.
struct PredictionRows {
  static constexpr uint8_t kMasked = 2;
  uint32_t tasks = 0;
  std::vector<uint32_t> file;          // [records] number in the split's list of files
  std::vector<uint64_t> offset;        // [records]
  std::vector<float> logits;           // [records, tasks]
  std::vector<uint8_t> labels;         // [records, tasks] 0, 1, or kMasked
  std::vector<uint64_t> user;          // [records], or empty: no GAUC
  std::vector<std::string> user_text;  // [records], or empty: no predictions are written

  // Of all records of the split, those that are left out among them.
  uint64_t read = 0;
  uint64_t rejected = 0;
  std::string bad_record;  // one of the rejected as its dead letter: path, offset, reason

  size_t records() const { return file.size(); }
  void Append(const PredictionRows& more);
  // A batch's counts, and its records with their logits [records, tasks]. Takes its user_text.
  void Append(Batch* batch, const std::vector<float>& batch_logits);
};

// Rows [begin, end) as a kEvaluation message; the one that begins at 0 carries the counts. Header: lane = worker, step,
// split, n = number of this chunk, next_cut = number of chunks.
Bytes EncodePredictions(const PredictionRows& rows, size_t begin, size_t end, Header header);
// DataLoss when sizes do not add up.
absl::StatusOr<PredictionRows> DecodePredictions(absl::Span<const char> message);

// InvalidArgument past split.records_max: all of them are in memory.
absl::Status CheckRecordCount(uint64_t records_max, const PredictionRows& rows);
// DataLoss past the budget of bad records, as for training: an evaluation that leaves out too many says nothing.
absl::Status CheckRejected(const Limits& limits, const PredictionRows& rows);

// Into (file, offset) order. DataLoss when a record is there twice.
absl::Status SortPredictions(PredictionRows* rows);

// Per task over the records that it is unmasked for; rows in their order.
Evaluation ScorePredictions(const PredictionRows& rows, const std::vector<std::string>& tasks, const std::string& split,
                            uint64_t step);

// docs/FORMATS.md, "Predictions": tab-separated. Closes the file.
absl::Status WritePredictions(OutputFile* file, const PredictionRows& rows, const std::vector<std::string>& tasks,
                              const std::vector<LogFile>& files);

}  // namespace hearth
