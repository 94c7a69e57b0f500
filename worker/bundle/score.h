// Scores raw logs from an export bundle alone (docs/FORMATS.md, "Export bundle"): its job, weights and rows.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"
#include "worker/evaluation/predictions.h"

namespace hearth {

// One thread.
class BundleScorer {
 public:
  enum class Rows { kFloat, kInt8 };
  // Reads weights and keys; rows are mapped. Trusts the files' sums (VerifyBundle comes first), not their sizes.
  // DataLoss names a file that does not fit; FailedPrecondition: a format that the bundle was exported without.
  static absl::StatusOr<std::unique_ptr<BundleScorer>> Open(const std::string& bundle, Rows rows);
  ~BundleScorer();

  // Logits [records, tasks]. Fills the groups' rows; a sign that its table does not hold reads as zeros.
  absl::StatusOr<std::vector<float>> Predict(Batch* batch);
  // The bundle's job; its side tables are the bundle's copies.
  const Job& job() const;

 private:
  struct State;
  explicit BundleScorer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// How a log is read for scoring.
struct ScoredLog {
  Log log;
  std::string name;
  std::string user;                              // column of GAUC's user; empty: none
  uint64_t records_max = Split().records_max();  // more are refused
};
// The split or training log of this name; empty: the first split, or without splits the first log that has files.
// NotFound: none. `files`, unless empty, replace its paths.
absl::StatusOr<ScoredLog> ChooseLog(const Job& job, const std::string& name, const std::vector<std::string>& files);

// Visits the log's batches in file order until `visit` returns false or the log ends. A batch without records carries
// the counts of what was rejected and filtered behind the last one.
using BatchVisitor = std::function<absl::StatusOr<bool>(Batch* batch)>;
absl::Status VisitBatches(const Job& job, const ScoredLog& scored, bool keep_user_text, const BatchVisitor& visit);

// Predictions for up to records_max records, in file order, and how many of those read were rejected.
absl::StatusOr<PredictionRows> ScoreLog(BundleScorer* scorer, const ScoredLog& scored, bool keep_user_text,
                                        uint64_t records_max);

}  // namespace hearth
