#include "worker/dense/host_step.h"

#include <exception>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/dense/dense_model.h"
#include "worker/step/dense_optimizer.h"

namespace hearth {
namespace {

torch::Tensor ViewOf(absl::Span<const float> values, at::IntArrayRef shape) {
  return torch::from_blob(const_cast<float*>(values.data()), shape, torch::kFloat32);
}

class HostStep : public DenseStep {
 public:
  HostStep(Env* env, DenseReplica* replica, Collective* collective, uint32_t lanes, double clip_norm)
      : env_(env),
        model_(replica->dense_model()),
        reducer_(collective, lanes, replica->parameters(), replica->moment_columns(), clip_norm) {}

  absl::Status Stage(Batch*) override { return absl::OkStatus(); }

  absl::Status Run(absl::Span<const std::unique_ptr<Batch>> lanes, absl::Span<LaneVote> votes, StepSum* sum) override {
    results_.resize(lanes.size());
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (lanes[i]->records == 0) continue;
      HEARTH_RETURN_IF_ERROR(TrainLane(model_, lanes[i].get(), &results_[i]));
      votes[i].result = &results_[i];
    }
    const int64_t trained_us = env_->NowUs();
    HEARTH_RETURN_IF_ERROR(reducer_.Reduce(votes, sum));
    reduce_us_ += env_->NowUs() - trained_us;
    return absl::OkStatus();
  }

  absl::Status Update(uint64_t step, const StepSum& sum) override {
    return UpdateModel(model_, step, sum.gradient, sum.moments);
  }

 private:
  Env* const env_;
  DenseModel* const model_;
  DenseReducer reducer_;
};

}  // namespace

std::unique_ptr<DenseStep> MakeHostStep(Env* env, DenseReplica* replica, Collective* collective, uint32_t lanes,
                                        double clip_norm) {
  HEARTH_CHECK(!replica->dense_model()->off_host(), "a host's step for a model that is not in the host's memory");
  return std::make_unique<HostStep>(env, replica, collective, lanes, clip_norm);
}

absl::Status TrainLane(DenseModel* model, Batch* batch, LaneResult* result) {
  HEARTH_CHECK(batch->records > 0, "lane ", batch->lane, " trains nothing");
  try {
    const int64_t parameters = model->weights().numel();
    result->gradient.assign(static_cast<size_t>(parameters), 0.0f);
    model->PointGradients(ViewOf(result->gradient, {parameters}));
    for (RowGroup& group : batch->groups) group.gradients.assign(group.unique.size() * group.dim, 0.0f);
    DenseInput input = model->View(*batch);
    for (size_t i = 0; i < input.groups.size(); ++i) {
      torch::Tensor& rows = input.groups[i].rows;
      if (!rows.defined()) continue;
      rows.requires_grad_(true);
      rows.mutable_grad() = ViewOf(batch->groups[i].gradients, rows.sizes());
    }
    const torch::Tensor v = model->Features(input, batch->records);
    const torch::Tensor logits = model->model()->Forward(v, Phase::kTrain, &result->moments);  // [B, T]
    const torch::Tensor loss = model->Loss(logits, input);
    loss.backward();
    const torch::Tensor plain = logits.detach().contiguous();
    result->logits.assign(plain.data_ptr<float>(), plain.data_ptr<float>() + plain.numel());
    const float total = loss.item<float>();
    result->finite = AllFinite({&total, 1}) && AllFinite(result->gradient) && AllFinite(result->moments.mean) &&
                     AllFinite(result->moments.m2);
  } catch (const std::exception& error) {
    return absl::InternalError(
        absl::StrCat("step ", batch->step, ", lane ", batch->lane, ", ", batch->records, " records: ", error.what()));
  }
  for (const RowGroup& group : batch->groups) {
    result->finite = result->finite && AllFinite(group.gradients);
  }
  return absl::OkStatus();
}

absl::Status UpdateModel(DenseModel* model, uint64_t step, absl::Span<const float> gradient,
                         const BatchMoments& pooled) {
  const int64_t parameters = model->weights().numel();
  HEARTH_CHECK(static_cast<int64_t>(gradient.size()) == parameters, "gradient of ", gradient.size(), " elements");
  try {
    model->UpdateRunningStatistics(pooled);
    model->Update(step, ViewOf(gradient, {parameters}));
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("dense update: ", error.what()));
  }
  return absl::OkStatus();
}

}  // namespace hearth
