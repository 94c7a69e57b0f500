#include "worker/step/progress_metrics.h"

namespace hearth {

ProgressMetrics::ProgressMetrics(int rank) : registry_("worker", rank) {
  refused_ =
      registry_.NewCounter({"refused", "messages", "Dropped: they had no proof that a rank of this job sent them"});
  step_ = registry_.NewGauge({"step", "", "Last step trained"});
  pull_ = registry_.NewHistogram({"pull", "seconds", "From the first pull of a step to its last row"});
  for (const char* fate : {"read", "trained", "rejected", "filtered"}) {
    records_[fate] = registry_.NewCounter({"records", "", "Log records of this worker's lanes by what became of them"},
                                          {{"fate", fate}});
  }
  for (const char* phase : {"wait_input", "wait_pull", "forward_backward", "reduce", "push"}) {
    seconds_[phase] =
        registry_.NewCounter({"phase", "seconds", "Time in each phase of a step, since the start"}, {{"phase", phase}});
  }
  // Not a phase: what adds up phases must not count their whole as one more.
  training_ = registry_.NewCounter({"training", "seconds", "Time of all steps since the start, phases and the rest"});
}

absl::Status ProgressMetrics::Serve(const Metrics& metrics) {
  return registry_.Serve(metrics.prometheus_address(), metrics.prometheus_port());
}

void ProgressMetrics::Show(const Progress& progress) {
  step_->Set(static_cast<double>(progress.step()));
  for (const double seconds : progress.pull_seconds()) pull_->Observe(seconds);
  const Ledger& ledger = progress.ledger();
  records_["read"]->RaiseTo(static_cast<double>(ledger.read()));
  records_["trained"]->RaiseTo(static_cast<double>(ledger.trained()));
  records_["rejected"]->RaiseTo(static_cast<double>(ledger.rejected()));
  records_["filtered"]->RaiseTo(static_cast<double>(ledger.filtered()));
  const TimeShare& time = progress.time();
  seconds_["wait_input"]->RaiseTo(time.wait_input());
  seconds_["wait_pull"]->RaiseTo(time.wait_pull());
  seconds_["forward_backward"]->RaiseTo(time.forward_backward());
  seconds_["reduce"]->RaiseTo(time.reduce());
  seconds_["push"]->RaiseTo(time.push());
  training_->RaiseTo(time.total());
}

}  // namespace hearth
