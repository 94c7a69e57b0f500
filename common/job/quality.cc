#include "common/job/quality.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/job/config.h"

namespace hearth {
namespace {

std::optional<double> FigureOfTask(const Evaluation::Task& task, Quality::Metric metric) {
  const auto defined = [](bool has, double value) -> std::optional<double> {
    if (!has || !std::isfinite(value)) return std::nullopt;
    return value;
  };
  switch (metric) {
    case Quality::AUC:
      return defined(task.has_auc(), task.auc());
    case Quality::GAUC:
      return defined(task.has_gauc(), task.gauc());
    case Quality::LOG_LOSS:
      return defined(task.has_log_loss(), task.log_loss());
    case Quality::CALIBRATION:
      return defined(task.has_calibration(), task.calibration());
  }
  return std::nullopt;
}

bool IsBetter(Quality::Metric metric, double value, double than) {
  switch (metric) {
    case Quality::AUC:
    case Quality::GAUC:
      return value > than;
    case Quality::LOG_LOSS:
      return value < than;
    case Quality::CALIBRATION:
      return std::abs(value - 1) < std::abs(than - 1);
  }
  return false;
}

// "AUC of click on validation".
std::string NameOf(const std::string& split, const std::string& task, Quality::Metric metric) {
  return absl::StrCat(Quality::Metric_Name(metric), " of ", task.empty() ? "all tasks" : task, " on ", split);
}

}  // namespace

std::vector<int> SplitsDueAt(const Job& job, uint64_t step, bool ends) {
  std::vector<int> due;
  for (int i = 0; i < job.split_size(); ++i) {
    const uint32_t every_steps = job.split(i).every_steps();
    if (ends || (every_steps > 0 && step > 0 && step % every_steps == 0)) due.push_back(i);
  }
  return due;
}

std::optional<double> FigureOf(const std::vector<Evaluation>& evaluations, uint64_t step, const std::string& split,
                               const std::string& task, Quality::Metric metric) {
  double sum = 0;
  int count = 0;
  for (const Evaluation& evaluation : evaluations) {
    if (evaluation.split() != split || evaluation.step() != step) continue;
    for (const Evaluation::Task& one : evaluation.task()) {
      if (!task.empty() && one.name() != task) continue;
      const std::optional<double> figure = FigureOfTask(one, metric);
      if (!figure.has_value()) continue;
      sum += *figure;
      ++count;
    }
  }
  if (count == 0) return std::nullopt;
  return sum / count;
}

bool JudgeTheSame(const Job& before, const Job& now) {
  const auto judged = [](const Job& job) {
    Job same = WithDefaults(job);
    for (const Split& split : same.split()) {
      if (split.name() != job.snapshot().best().split()) continue;
      return absl::StrCat(same.snapshot().best().ShortDebugString(), split.log().ShortDebugString(), split.user(),
                          split.records_max());
    }
    return std::string();
  };
  return judged(before) == judged(now);
}

std::optional<BestSnapshot> BestAfter(const Job& job, const std::optional<BestSnapshot>& before,
                                      const std::vector<Evaluation>& evaluations, uint64_t step) {
  if (!HasBest(job)) return std::nullopt;
  const Best& wanted = job.snapshot().best();
  const std::string name = NameOf(wanted.split(), wanted.task(), wanted.metric());
  std::optional<BestSnapshot> best = before;
  if (best.has_value() && best->of() != name) best.reset();  // another figure is judged from here on
  const std::optional<double> figure = FigureOf(evaluations, step, wanted.split(), wanted.task(), wanted.metric());
  if (!figure.has_value()) return best;
  if (best.has_value() && !IsBetter(wanted.metric(), *figure, best->value())) {
    best->set_without_gain(best->without_gain() + 1);
    return best;
  }
  best.emplace();
  best->set_step(step);
  best->set_value(*figure);
  best->set_without_gain(0);
  best->set_of(name);
  return best;
}

bool EndsWithoutGain(const Job& job, const std::optional<BestSnapshot>& best) {
  const uint32_t allowed = job.training().stop_after_no_gain();
  return allowed > 0 && best.has_value() && best->without_gain() >= allowed;
}

std::string WhyItEnded(const Job& job, const BestSnapshot& best) {
  return absl::StrFormat(
      "%s got no better than %.6f, of step %d, in %d evaluations in a row (training.stop_after_no_gain = %d)",
      best.of(), best.value(), best.step(), best.without_gain(), job.training().stop_after_no_gain());
}

std::vector<std::string> UnmetRequirements(const Job& job, const std::vector<Evaluation>& evaluations, uint64_t step) {
  std::vector<std::string> unmet;
  for (const Requirement& one : job.export_().require()) {
    const std::string name = NameOf(one.split(), one.task(), one.metric());
    const std::optional<double> figure = FigureOf(evaluations, step, one.split(), one.task(), one.metric());
    if (!figure.has_value()) {
      unmet.push_back(absl::StrCat(name, " is undefined"));
    } else if (one.has_min() && *figure < one.min()) {
      unmet.push_back(absl::StrFormat("%s is %.6f, below %g", name, *figure, one.min()));
    } else if (one.has_max() && *figure > one.max()) {
      unmet.push_back(absl::StrFormat("%s is %.6f, above %g", name, *figure, one.max()));
    }
  }
  return unmet;
}

}  // namespace hearth
