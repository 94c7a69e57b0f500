#include "scheduler/progress.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "scheduler/snapshot_coordinator.h"

namespace hearth {
namespace {

constexpr int kBarCells = 20;
constexpr size_t kWindowsOpenMax = 65536;

}  // namespace

std::optional<double> StreamingAuc(const TaskMetric& metric) {
  double above = 0;  // positives in the buckets above
  double negatives = 0;
  double area = 0;
  for (int b = std::min(metric.positives_size(), metric.negatives_size()) - 1; b >= 0; --b) {
    const double positive = static_cast<double>(metric.positives(b));
    const double negative = static_cast<double>(metric.negatives(b));
    area += negative * (above + positive / 2);
    above += positive;
    negatives += negative;
  }
  if (above == 0 || negatives == 0) return std::nullopt;
  return area / (above * negatives);
}

std::optional<double> MeanLoss(const std::vector<TaskMetric>& metrics) {
  double loss = 0;
  double labelled = 0;
  for (const TaskMetric& metric : metrics) {
    loss += metric.loss_sum();
    labelled += static_cast<double>(metric.labelled());
  }
  if (labelled == 0) return std::nullopt;
  return loss / labelled;
}

std::optional<double> CalibrationOf(const TaskMetric& metric) {
  double positives = 0;
  for (const uint64_t count : metric.positives()) positives += static_cast<double>(count);
  if (positives == 0 || !metric.has_prediction_sum()) return std::nullopt;
  return metric.prediction_sum() / positives;
}

absl::StatusOr<std::vector<ValidationWindow>> ValidationWindows::Add(const ValidationWindow& part) {
  if (parts_.size() >= kWindowsOpenMax && parts_.count(part.last_step()) == 0) {
    return absl::InternalError(absl::StrCat(parts_.size(), " windows wait for a worker's part, the oldest up to step ",
                                            parts_.begin()->first));
  }
  Parts& parts = parts_[part.last_step()];
  if (parts.told > 0 && parts.sum.first_step() != part.first_step()) {
    return absl::InternalError(absl::StrCat("workers' windows up to step ", part.last_step(), " begin at ",
                                            parts.sum.first_step(), " and ", part.first_step()));
  }
  std::vector<TaskMetric> sum(parts.sum.task().begin(), parts.sum.task().end());
  HEARTH_RETURN_IF_ERROR(AddTaskMetrics({part.task().begin(), part.task().end()}, &sum));
  parts.sum.set_first_step(part.first_step());
  parts.sum.set_last_step(part.last_step());
  parts.sum.clear_task();
  for (TaskMetric& task : sum) *parts.sum.add_task() = std::move(task);
  ++parts.told;
  std::vector<ValidationWindow> whole;
  while (!parts_.empty() && parts_.begin()->second.told >= workers_) {
    whole.push_back(std::move(parts_.begin()->second.sum));
    parts_.erase(parts_.begin());
  }
  return whole;
}

std::string FormatCount(double value) {
  if (value < 1e3) return absl::StrFormat("%.0f", value);
  if (value < 1e6) return absl::StrFormat("%.1fk", value / 1e3);
  return absl::StrFormat("%.2fM", value / 1e6);
}

std::string FormatDuration(double seconds) {
  const int64_t whole = static_cast<int64_t>(std::llround(std::clamp(seconds, 0.0, 1e9)));
  if (whole < 3600) return absl::StrFormat("%d:%02d", whole / 60, whole % 60);
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string FormatProgress(const ProgressFigures& figures, bool bar, size_t columns) {
  std::string line = absl::StrCat("step ", figures.step);
  if (figures.fraction.has_value()) {
    const double fraction = std::clamp(*figures.fraction, 0.0, 1.0);
    absl::StrAppendFormat(&line, "  %3.0f%%", std::floor(fraction * 100));
    if (bar) {
      const int cells = static_cast<int>(fraction * kBarCells);
      absl::StrAppend(&line, " [", std::string(cells, '='), std::string(kBarCells - cells, ' '), "]");
    }
  }
  absl::StrAppend(&line, "  ", FormatCount(figures.samples_per_s), " samples/s");
  if (figures.remaining_s.has_value()) absl::StrAppend(&line, "  ETA ", FormatDuration(*figures.remaining_s));
  if (figures.loss.has_value()) absl::StrAppendFormat(&line, "  before training: loss %.4f", *figures.loss);
  if (!figures.auc.empty()) absl::StrAppend(&line, "  AUC");
  for (const auto& [task, auc] : figures.auc) {
    absl::StrAppend(&line, " ", task, " ", auc.has_value() ? absl::StrFormat("%.4f", *auc) : "-");
  }
  if (figures.hit_ratio.has_value()) absl::StrAppendFormat(&line, "  hits %.1f%%", *figures.hit_ratio * 100);
  if (figures.files_behind.has_value()) absl::StrAppend(&line, "  lag ", *figures.files_behind, " files");
  absl::StrAppend(&line, "  bad ", figures.bad_records);
  if (figures.evaluating) absl::StrAppend(&line, "  evaluating");
  if (columns > 0 && line.size() > columns) line.resize(columns);
  return line;
}

}  // namespace hearth
