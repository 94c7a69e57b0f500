#include "worker/dense/dense_step.h"

#include "common/base/status.h"

namespace hearth {
namespace {

class HostStep : public DenseStep {
 public:
  HostStep(Env* env, Trainer* trainer, Collective* collective, uint32_t lanes, double clip_norm)
      : env_(env),
        trainer_(trainer),
        reducer_(collective, lanes, trainer->parameters(), trainer->moment_columns(), clip_norm) {}

  absl::Status Stage(Batch*) override { return absl::OkStatus(); }

  absl::Status Run(absl::Span<const std::unique_ptr<Batch>> lanes, absl::Span<LaneVote> votes, StepSum* sum) override {
    results_.resize(lanes.size());
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (lanes[i]->records == 0) continue;
      HEARTH_RETURN_IF_ERROR(trainer_->Train(lanes[i].get(), &results_[i]));
      votes[i].result = &results_[i];
    }
    const int64_t trained_us = env_->NowUs();
    HEARTH_RETURN_IF_ERROR(reducer_.Reduce(votes, sum));
    reduce_us_ += env_->NowUs() - trained_us;
    return absl::OkStatus();
  }

  absl::Status Update(const StepSum& sum) override { return trainer_->Apply(sum.gradient, sum.moments); }

 private:
  Env* const env_;
  Trainer* const trainer_;
  DenseReducer reducer_;
};

}  // namespace

std::unique_ptr<DenseStep> MakeHostStep(Env* env, Trainer* trainer, Collective* collective, uint32_t lanes,
                                        double clip_norm) {
  return std::make_unique<HostStep>(env, trainer, collective, lanes, clip_norm);
}

}  // namespace hearth
