// What a person sees while a job trains: figures of the last seconds, as one line.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

// AUC of a histogram of predictions: positives above negatives, those of one bucket count half. Nothing where a class
// is absent.
std::optional<double> StreamingAuc(const TaskMetric& metric);
// Mean loss of a label over all tasks. Nothing without labels.
std::optional<double> MeanLoss(const std::vector<TaskMetric>& metrics);

// Mean prediction over mean label: 1 is right. Nothing without a positive, or where the sum of predictions is not
// known.
std::optional<double> CalibrationOf(const TaskMetric& metric);

// Puts the workers' windows together: all of them end theirs at the same steps.
class ValidationWindows {
 public:
  explicit ValidationWindows(uint32_t workers) : workers_(workers) {}
  // Whole ones appear in the order of their steps. Internal where it does not fit the others' of its step.
  absl::StatusOr<std::vector<ValidationWindow>> Add(const ValidationWindow& part);

 private:
  struct Parts {
    ValidationWindow sum;
    uint32_t told = 0;
  };
  const uint32_t workers_;
  std::map<uint64_t, Parts> parts_;  // by last step
};

struct ProgressFigures {
  uint64_t step = 0;
  std::optional<double> fraction;  // of the job's records
  double samples_per_s = 0;
  std::optional<double> remaining_s;
  // Of the newest window of records, each scored before it was trained.
  std::optional<double> loss;
  std::vector<std::pair<std::string, std::optional<double>>> auc;  // by task
  std::optional<double> hit_ratio;                                 // of the memory tier
  std::optional<uint64_t> files_behind;                            // lag, where a directory is tailed
  uint64_t bad_records = 0;
  bool evaluating = false;
};

// One line without its end. `bar`: with a bar (a terminal). Never longer than `columns`, if that is above 0.
std::string FormatProgress(const ProgressFigures& figures, bool bar, size_t columns);

std::string FormatCount(double value);       // 950 · 12.3k · 4.56M
std::string FormatDuration(double seconds);  // 0:07 · 12:05 · 1:02:03

}  // namespace hearth
