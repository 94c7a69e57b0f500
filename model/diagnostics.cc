#include "model/diagnostics.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "common/base/status.h"

namespace hearth {
namespace {

using torch::Tensor;

double Scalar(const Tensor& x) { return x.to(torch::kFloat64).item<double>(); }

Diagnostics::Expert DiagnoseExpert(const Activations::Expert& expert) {
  Tensor zero = expert.output == 0;
  if (expert.swish) zero = (expert.output.abs() < 1e-3).logical_and(expert.pre_activation < -4);
  const Tensor output = expert.output.to(torch::kFloat64);
  const Tensor mean = output.mean();
  return {expert.name, Scalar(zero.to(torch::kFloat64).mean()), Scalar(mean),
          std::sqrt(Scalar((output - mean).pow(2).mean()))};
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Over log n, with 0 · log 0 = 0; one expert: 1, for it is used as much as can be.
Tensor Entropy(const Tensor& weights) {
  const int64_t n = weights.size(-1);
  if (n == 1) return torch::ones_like(weights.select(-1, 0));
  return -torch::xlogy(weights, weights).sum(-1) / std::log(static_cast<double>(n));
}

Diagnostics::Gate DiagnoseGate(const Activations::Gate& gate, const Tensor& mean,
                               const std::vector<Diagnostics::Expert>& experts) {
  std::vector<double> deviations;
  for (int e : gate.experts) deviations.push_back(experts[e].deviation);
  Diagnostics::Gate result;
  result.name = gate.name;
  result.weight_max = Scalar(mean.max());
  result.entropy_of_mean = Scalar(Entropy(mean));
  result.mean_entropy = Scalar(Entropy(gate.weights.to(torch::kFloat64)).mean());
  const double median = Median(deviations);
  const double largest = *std::max_element(deviations.begin(), deviations.end());
  // All dead: no expert stands out. Half of them dead: one does, without limit.
  result.deviation_max_ratio = largest == 0 ? 1 : largest / median;
  return result;
}

// Norm of the loss's gradient by parameter tensor; the same tensor is counted once.
class GradientNorms {
 public:
  GradientNorms(const Activations& seen, const Tensor& labels, const Tensor& mask) {
    std::vector<Tensor> parameters;
    for (const Activations::Expert& expert : seen.experts) {
      for (const Tensor& parameter : expert.parameters) {
        if (squares_.emplace(parameter.unsafeGetTensorImpl(), 0).second) parameters.push_back(parameter);
      }
    }
    if (parameters.empty()) return;
    const Tensor loss = MultiTaskLoss(seen.logits, labels, mask, torch::ones({labels.size(1)}, seen.logits.options()));
    const auto gradients = torch::autograd::grad({loss}, parameters, {}, /*retain_graph=*/true, /*create_graph=*/false,
                                                 /*allow_unused=*/true);
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!gradients[i].defined()) continue;
      squares_[parameters[i].unsafeGetTensorImpl()] = Scalar(gradients[i].to(torch::kFloat64).pow(2).sum());
    }
  }
  double Of(const std::vector<const Activations::Expert*>& experts) const {
    std::set<const void*> once;
    double sum = 0;  // in the experts' order, not that of addresses: the same bits each time
    for (const Activations::Expert* expert : experts) {
      for (const Tensor& parameter : expert->parameters) {
        const void* const key = parameter.unsafeGetTensorImpl();
        if (once.insert(key).second) sum += squares_.at(key);
      }
    }
    return std::sqrt(sum);
  }

 private:
  std::map<const void*, double> squares_;
};

Diagnostics::Shared DiagnoseShared(const std::string& name, const std::vector<double>& weights,
                                   const std::vector<double>& thresholds) {
  Diagnostics::Shared shared;
  shared.name = name;
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    sum += weights[i];
    shared.occupancy = std::max(shared.occupancy, weights[i]);
    shared.tasks_using += weights[i] > thresholds[i] ? 1 : 0;
  }
  shared.occupancy = sum > 0 ? shared.occupancy / sum : 0;
  return shared;
}

void DiagnoseUnderfitting(const Activations::Gate& gate, const Tensor& mean, const Activations& seen,
                          const std::optional<GradientNorms>& gradients, Diagnostics::Task* task) {
  std::vector<const Activations::Expert*> own;
  std::vector<const Activations::Expert*> shared;
  for (size_t i = 0; i < gate.experts.size(); ++i) {
    const Activations::Expert& expert = seen.experts[gate.experts[i]];
    if (expert.task == gate.task) {
      own.push_back(&expert);
      task->own_weight += mean[static_cast<int64_t>(i)].item<double>();
    } else {
      shared.push_back(&expert);
    }
  }
  task->own_weight_uniform = static_cast<double>(own.size()) / static_cast<double>(gate.experts.size());
  if (!gradients || own.empty() || shared.empty()) return;
  const double below = gradients->Of(shared);
  if (below > 0) task->own_gradient_ratio = gradients->Of(own) / below;
}

}  // namespace

Diagnostics Diagnose(const Activations& seen, const std::vector<std::string>& tasks, const Tensor& labels,
                     const Tensor& mask) {
  std::optional<GradientNorms> gradients;
  if (seen.logits.defined() && seen.logits.requires_grad()) gradients.emplace(seen, labels, mask);
  torch::NoGradGuard no_grad;
  Diagnostics result;
  for (const Activations::Expert& expert : seen.experts) result.experts.push_back(DiagnoseExpert(expert));
  for (size_t t = 0; t < tasks.size(); ++t) {
    Diagnostics::Task task;
    task.name = tasks[t];
    const Tensor known = mask.select(1, static_cast<int64_t>(t)).to(torch::kFloat64);
    const double labelled = Scalar(known.sum());
    const Tensor positive = labels.select(1, static_cast<int64_t>(t)).to(torch::kFloat64) * known;
    if (labelled > 0) task.positive_rate = Scalar(positive.sum()) / labelled;
    result.tasks.push_back(task);
  }
  std::vector<std::vector<double>> weights(seen.experts.size());     // [experts] of every task gate that sees it
  std::vector<std::vector<double>> thresholds(seen.experts.size());  // beside them: 1 / (2 n_t)
  for (const Activations::Gate& gate : seen.gates) {
    const Tensor mean = gate.weights.to(torch::kFloat64).mean(0);
    result.gates.push_back(DiagnoseGate(gate, mean, result.experts));
    if (gate.task < 0) continue;
    for (size_t i = 0; i < gate.experts.size(); ++i) {
      weights[gate.experts[i]].push_back(mean[static_cast<int64_t>(i)].item<double>());
      thresholds[gate.experts[i]].push_back(0.5 / static_cast<double>(gate.experts.size()));
    }
    DiagnoseUnderfitting(gate, mean, seen, gradients, &result.tasks[gate.task]);
  }
  for (size_t e = 0; e < seen.experts.size(); ++e) {
    if (weights[e].size() < 2) continue;
    result.shared.push_back(DiagnoseShared(seen.experts[e].name, weights[e], thresholds[e]));
  }
  return result;
}

Diagnostics Diagnose(MultiTaskModel* model, const std::vector<std::string>& tasks, const Tensor& v,
                     const Tensor& labels, const Tensor& mask) {
  torch::AutoGradMode with_graph(true);
  return Diagnose(model->Observe(v), tasks, labels, mask);
}

Evaluation::Diagnostics ToMessage(const Diagnostics& diagnostics) {
  Evaluation::Diagnostics message;
  for (const Diagnostics::Expert& expert : diagnostics.experts) {
    Evaluation::Diagnostics::Expert* const to = message.add_expert();
    to->set_name(expert.name);
    to->set_zero_rate(expert.zero_rate);
    if (std::isfinite(expert.mean)) to->set_mean(expert.mean);
    if (std::isfinite(expert.deviation)) to->set_deviation(expert.deviation);
  }
  for (const Diagnostics::Gate& gate : diagnostics.gates) {
    Evaluation::Diagnostics::Gate* const to = message.add_gate();
    to->set_name(gate.name);
    if (std::isfinite(gate.weight_max)) to->set_weight_max(gate.weight_max);
    if (std::isfinite(gate.entropy_of_mean)) to->set_entropy_of_mean(gate.entropy_of_mean);
    if (std::isfinite(gate.mean_entropy)) to->set_mean_entropy(gate.mean_entropy);
    if (std::isfinite(gate.deviation_max_ratio)) to->set_deviation_max_ratio(gate.deviation_max_ratio);
  }
  for (const Diagnostics::Shared& shared : diagnostics.shared) {
    Evaluation::Diagnostics::Shared* const to = message.add_shared();
    to->set_name(shared.name);
    if (std::isfinite(shared.occupancy)) to->set_occupancy(shared.occupancy);
    to->set_tasks_using(static_cast<uint32_t>(shared.tasks_using));
  }
  for (const Diagnostics::Task& task : diagnostics.tasks) {
    Evaluation::Diagnostics::Task* const to = message.add_task();
    to->set_name(task.name);
    if (task.positive_rate) to->set_positive_rate(*task.positive_rate);
    if (task.own_weight_uniform > 0) {  // else the model has no experts of its own for a task
      if (std::isfinite(task.own_weight)) to->set_own_weight(task.own_weight);
      to->set_own_weight_uniform(task.own_weight_uniform);
    }
    if (task.own_gradient_ratio && std::isfinite(*task.own_gradient_ratio)) {
      to->set_own_gradient_ratio(*task.own_gradient_ratio);
    }
  }
  return message;
}

}  // namespace hearth
