// What a person sees while a job trains: figures of the last seconds, as one line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/proto/control.pb.h"

namespace hearth {

// AUC of a histogram of predictions: positives above negatives, those of one bucket count half. Nothing where a class
// is absent.
std::optional<double> StreamingAuc(const TaskMetric& metric);
// Mean loss of a label over all tasks. Nothing without labels.
std::optional<double> MeanLoss(const std::vector<TaskMetric>& metrics);

// Training metrics of the last one to two windows: old enough to be steady, young enough to be news.
class MetricWindow {
 public:
  absl::Status Add(const std::vector<TaskMetric>& tasks);
  // Ends the window; the one before the last is forgotten.
  void Turn();
  std::vector<TaskMetric> Sum() const;

 private:
  std::vector<TaskMetric> previous_;
  std::vector<TaskMetric> current_;
};

struct ProgressFigures {
  uint64_t step = 0;
  std::optional<double> fraction;  // of the job's records
  double samples_per_s = 0;
  std::optional<double> remaining_s;
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
