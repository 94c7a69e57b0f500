#include "scheduler/curves.h"

#include <algorithm>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/schedule.h"

namespace hearth {
namespace {

constexpr int kSchedulerRank = 0;

void AddDiagnostics(const Evaluation::Diagnostics& from, std::vector<Scalar>* scalars) {
  const auto add = [scalars](bool defined, const char* figure, const std::string& of, double value) {
    if (defined) scalars->push_back({absl::StrCat("diagnostics/", figure, "/", of), static_cast<float>(value)});
  };
  for (const auto& expert : from.expert()) {
    add(expert.has_zero_rate(), "zero_rate", expert.name(), expert.zero_rate());
    add(expert.has_deviation(), "deviation", expert.name(), expert.deviation());
  }
  for (const auto& gate : from.gate()) {
    add(gate.has_weight_max(), "weight_max", gate.name(), gate.weight_max());
    add(gate.has_entropy_of_mean(), "entropy_of_mean", gate.name(), gate.entropy_of_mean());
    add(gate.has_mean_entropy(), "mean_entropy", gate.name(), gate.mean_entropy());
    add(gate.has_deviation_max_ratio(), "deviation_max_ratio", gate.name(), gate.deviation_max_ratio());
  }
  for (const auto& shared : from.shared()) {
    add(shared.has_occupancy(), "occupancy", shared.name(), shared.occupancy());
    add(true, "tasks_using", shared.name(), shared.tasks_using());
  }
  for (const auto& task : from.task()) {
    add(task.has_own_weight(), "own_weight", task.name(), task.own_weight());
    add(task.has_own_gradient_ratio(), "own_gradient_ratio", task.name(), task.own_gradient_ratio());
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Curves>> Curves::Start(Env* env, const Job& job, const std::string& dir,
                                                      uint64_t first_step) {
  std::unique_ptr<Curves> curves(new Curves(env, job, dir, first_step));
  HEARTH_RETURN_IF_ERROR(curves->registry_.Serve(job.metrics().prometheus_address(), job.metrics().prometheus_port()));
  return curves;
}

Curves::Curves(Env* env, const Job& job, const std::string& dir, uint64_t first_step)
    : env_(env),
      job_(job),
      first_step_(first_step),
      folder_(job.metrics().tensorboard() ? JoinPath(dir, "tb") : ""),
      registry_("scheduler", kSchedulerRank) {
  for (const char* fate : {"read", "trained", "rejected", "filtered"}) {
    // Each worker has hearth_records of its lanes: of one name, a sum would count every record twice.
    records_[fate] =
        registry_.NewCounter({"job_records", "", "The job's log records by what became of them"}, {{"fate", fate}});
  }
  for (const Task& task : job.task()) {
    auc_[task.name()] = registry_.NewGauge(
        {"auc", "", "AUC of the newest window of records, each scored before it was trained"}, {{"task", task.name()}});
  }
}

absl::Status Curves::OnTraining(const ProgressFigures& figures, const Ledger& ledger) {
  Count("read", ledger.read(), told_.read());
  Count("trained", ledger.trained(), told_.trained());
  Count("rejected", ledger.rejected(), told_.rejected());
  Count("filtered", ledger.filtered(), told_.filtered());
  told_ = ledger;
  step_->Set(static_cast<double>(figures.step));
  rate_->Set(figures.samples_per_s);
  if (figures.files_behind.has_value()) lag_->Set(static_cast<double>(*figures.files_behind));

  std::vector<Scalar> scalars = {{"perf/samples_per_s", static_cast<float>(figures.samples_per_s)}};
  const uint64_t step = std::max<uint64_t>(figures.step, 1);
  const auto add_rate = [&scalars](const std::string& of, double rate) {
    scalars.push_back({"learning_rate/" + of, static_cast<float>(rate)});
  };
  add_rate("dense", RateOf(job_.training().dense_optimizer(), step));
  for (const Table& table : job_.table()) add_rate("table/" + table.name(), RateOf(table.optimizer(), step));
  return Write(figures.step, scalars);
}

absl::Status Curves::OnWindow(const ValidationWindow& window) {
  std::vector<Scalar> scalars;
  const auto add = [&scalars](const std::string& tag, std::optional<double> value) {
    if (value.has_value()) scalars.push_back({"progressive/" + tag, static_cast<float>(*value)});
  };
  const std::optional<double> loss = MeanLoss({window.task().begin(), window.task().end()});
  if (loss.has_value()) loss_->Set(*loss);
  add("loss", loss);
  for (int t = 0; t < std::min(job_.task_size(), window.task_size()); ++t) {
    const std::string& name = job_.task(t).name();
    const std::optional<double> auc = StreamingAuc(window.task(t));
    if (auc.has_value()) auc_.at(name)->Set(*auc);
    add("auc/" + name, auc);
    add("log_loss/" + name, MeanLoss({window.task(t)}));
    add("calibration/" + name, CalibrationOf(window.task(t)));
  }
  return Write(window.last_step(), scalars);
}

absl::Status Curves::OnEvaluations(const std::vector<Evaluation>& evaluations) {
  for (const Evaluation& evaluation : evaluations) {
    std::vector<Scalar> scalars;
    const std::string prefix = absl::StrCat("eval/", evaluation.split());
    for (const Evaluation::Task& task : evaluation.task()) {
      if (task.has_auc())
        scalars.push_back({absl::StrCat(prefix, "/auc/", task.name()), static_cast<float>(task.auc())});
      if (task.has_gauc())
        scalars.push_back({absl::StrCat(prefix, "/gauc/", task.name()), static_cast<float>(task.gauc())});
      if (task.has_log_loss())
        scalars.push_back({absl::StrCat(prefix, "/loss/", task.name()), static_cast<float>(task.log_loss())});
    }
    AddDiagnostics(evaluation.diagnostics(), &scalars);
    HEARTH_RETURN_IF_ERROR(Write(evaluation.step(), scalars));
  }
  return absl::OkStatus();
}

// A resume from an older snapshot takes a total back; a counter only grows.
void Curves::Count(const std::string& fate, uint64_t total, uint64_t told) {
  if (total > told) records_.at(fate)->Add(static_cast<double>(total - told));
}
absl::Status Curves::Write(uint64_t step, const std::vector<Scalar>& scalars) {
  if (folder_.empty() || scalars.empty()) return absl::OkStatus();
  if (events_ == nullptr) {
    HEARTH_ASSIGN_OR_RETURN(events_, EventFile::Create(folder_, env_->WallUs(), static_cast<int64_t>(first_step_)));
  }
  return events_->Write(env_->WallUs(), static_cast<int64_t>(step), scalars);
}

}  // namespace hearth
