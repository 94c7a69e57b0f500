#include "model/multi_task_model.h"

#include <algorithm>

#include "common/base/env.h"
#include "common/base/status.h"
#include "model/batch/batch.h"
#include "model/home.h"
#include "model/mmoe.h"
#include "model/shared_bottom.h"

namespace hearth {
namespace {

std::shared_ptr<MultiTaskModel> Make(const ModelSpec& spec, Form form) {
  HEARTH_CHECK(spec.width > 0 && !spec.tasks.empty(), "a model without features or tasks; ValidateJob comes first");
  HEARTH_CHECK(spec.category_of.size() == spec.tasks.size() && spec.base_rates.size() == spec.tasks.size());
  switch (spec.config.kind()) {
    case Model::HOME:
      return MakeHome(spec, form);
    case Model::MMOE:
      return MakeMmoe(spec, form);
    case Model::SHARED_BOTTOM:
      return MakeSharedBottom(spec, form);
  }
  HEARTH_CHECK(false, "a model kind that the schema does not have");
  return nullptr;
}

}  // namespace

BatchMoments PoolMoments(const std::vector<BatchMoments>& lanes) {
  double count = 0;
  std::vector<double> mean;
  std::vector<double> m2;
  for (const BatchMoments& lane : lanes) {
    if (lane.count == 0) continue;
    if (count == 0) {
      count = lane.count;
      mean.assign(lane.mean.begin(), lane.mean.end());
      m2.assign(lane.m2.begin(), lane.m2.end());
      continue;
    }
    HEARTH_CHECK(lane.mean.size() == mean.size() && lane.m2.size() == mean.size(), "moments of different models");
    const double total = count + lane.count;
    for (size_t c = 0; c < mean.size(); ++c) {
      const double delta = static_cast<double>(lane.mean[c]) - mean[c];
      mean[c] += delta * (lane.count / total);
      m2[c] += static_cast<double>(lane.m2[c]) + delta * delta * (count * lane.count / total);
    }
    count = total;
  }
  BatchMoments pooled;
  pooled.count = count;
  pooled.mean.assign(mean.begin(), mean.end());
  pooled.m2.assign(m2.begin(), m2.end());
  return pooled;
}

double RunningShare(const Model& config, double records, int64_t update) {
  if (config.batch_norm_momentum() > 0) return config.batch_norm_momentum();
  // Early parameters move fast, so old statistics are of another model: there the window is an eighth of the training
  // so far. The first update takes all.
  constexpr double kParts = 8;
  const double young = kParts / (static_cast<double>(update) + kParts - 1);
  return std::min(1.0, std::max(young, records / static_cast<double>(config.batch_norm_window_records())));
}

int64_t MultiTaskModel::ParameterCount() const {
  int64_t count = 0;
  for (const torch::Tensor& parameter : parameters()) count += parameter.numel();
  return count;
}

DenseOptimizer::Group::Match GroupOf(const std::string& parameter) {
  // A path's first step and its last are the model's own; a task or category names one between them.
  const std::string leaf = parameter.substr(parameter.rfind('.') + 1);
  if (parameter.rfind("tower.", 0) == 0) return DenseOptimizer::Group::TOWERS;
  if (leaf.rfind("norm_", 0) == 0) return DenseOptimizer::Group::BATCH_NORM;
  if (leaf.rfind("hidden_", 0) == 0 || leaf.rfind("output_", 0) == 0) return DenseOptimizer::Group::EXPERTS;
  return DenseOptimizer::Group::GATES;
}

ModelSpec MakeModelSpec(const Job& job, const std::vector<double>& base_rates) {
  HEARTH_CHECK(base_rates.size() == static_cast<size_t>(job.task_size()), "one base rate a task");
  ModelSpec spec;
  spec.config = job.model();
  spec.width = MakeFeatureLayout(job).width;
  spec.base_rates = base_rates;
  spec.seed = SeedOf(job.seed(), "dense_init");
  for (const Task& task : job.task()) {
    spec.tasks.push_back(task.name());
    auto found = std::find(spec.categories.begin(), spec.categories.end(), task.category());
    spec.category_of.push_back(static_cast<int>(found - spec.categories.begin()));
    if (found == spec.categories.end()) spec.categories.push_back(task.category());
  }
  return spec;
}

std::shared_ptr<MultiTaskModel> MakeModel(const ModelSpec& spec) { return Make(spec, Form::kFused); }
std::shared_ptr<MultiTaskModel> MakeReferenceModel(const ModelSpec& spec) { return Make(spec, Form::kReference); }
std::shared_ptr<MultiTaskModel> MakeBatchedModel(const ModelSpec& spec) { return Make(spec, Form::kBatched); }

ModelCost CostOf(const ModelSpec& spec) {
  switch (spec.config.kind()) {
    case Model::HOME:
      return HomeCost(spec);
    case Model::MMOE:
      return MmoeCost(spec);
    case Model::SHARED_BOTTOM:
      return SharedBottomCost(spec);
  }
  HEARTH_CHECK(false, "a model kind that the schema does not have");
  return {};
}

torch::Tensor MultiTaskLoss(const torch::Tensor& logits, const torch::Tensor& labels, const torch::Tensor& mask,
                            const torch::Tensor& weights) {
  return torch::binary_cross_entropy_with_logits(logits, labels, mask * weights, {}, at::Reduction::Sum);
}

}  // namespace hearth
