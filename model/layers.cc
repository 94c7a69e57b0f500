#include "model/layers.h"

#include <algorithm>
#include <cmath>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {

torch::nn::Module* ParameterTree::NodeOf(const std::string& path, std::string* leaf) {
  const size_t dot = path.rfind('.');
  *leaf = dot == std::string::npos ? path : path.substr(dot + 1);
  if (dot == std::string::npos) return root_;
  const std::string parent_path = path.substr(0, dot);
  torch::nn::Module*& node = nodes_[parent_path];
  if (node == nullptr) {
    std::string name;
    torch::nn::Module* parent = NodeOf(parent_path, &name);
    node = parent->register_module(name, std::make_shared<torch::nn::Module>(name)).get();
  }
  return node;
}

torch::Tensor ParameterTree::Uniform(const std::string& path, std::vector<int64_t> shape, double bound) {
  torch::Tensor values = torch::empty(shape, torch::kFloat32);
  float* data = values.data_ptr<float>();
  Random random(SeedOf(seed_, path));
  for (int64_t i = 0; i < values.numel(); ++i) data[i] = static_cast<float>((2 * random.Uniform() - 1) * bound);
  std::string leaf;
  torch::nn::Module* node = NodeOf(path, &leaf);
  return node->register_parameter(leaf, values);
}

torch::Tensor ParameterTree::Constant(const std::string& path, std::vector<int64_t> shape, double value) {
  std::string leaf;
  torch::nn::Module* node = NodeOf(path, &leaf);
  return node->register_parameter(leaf, torch::full(shape, value, torch::kFloat32));
}

torch::Tensor ParameterTree::Buffer(const std::string& path, std::vector<int64_t> shape, double value) {
  std::string leaf;
  torch::nn::Module* node = NodeOf(path, &leaf);
  return node->register_buffer(leaf, torch::full(shape, value, torch::kFloat32));
}

Affine MakeAffine(ParameterTree* tree, const std::string& path, int64_t in, int64_t out) {
  const double bound = 1 / std::sqrt(static_cast<double>(in));  // torch's Linear: Kaiming uniform with a = √5
  return {tree->Uniform(path + ".weight", {out, in}, bound), tree->Uniform(path + ".bias", {out}, bound)};
}

FeatureGateParameters MakeFeatureGate(ParameterTree* tree, const std::string& path, int64_t width, int64_t subspaces,
                                      int64_t rank) {
  HEARTH_CHECK(subspaces > 0 && rank > 0, "a feature gate without sub-spaces or rank: ", path);
  FeatureGateParameters gate;
  gate.subspaces = subspaces;
  gate.rank = rank;
  gate.width = width;
  gate.down = tree->Uniform(path + ".down", {subspaces * rank, width}, 1 / std::sqrt(static_cast<double>(width)));
  gate.up = tree->Constant(path + ".up", {subspaces, rank, width}, 0);  // neutral: starts as if without the gate
  gate.mix = MakeAffine(tree, path + ".mix", width, subspaces);
  return gate;
}

Tower MakeTower(ParameterTree* tree, const std::string& path, int64_t in, int64_t hidden, double base_rate) {
  const double rate = std::min(std::max(base_rate, 1e-6), 1 - 1e-6);
  Tower tower;
  tower.hidden = MakeAffine(tree, path + ".hidden", in, hidden);
  tower.output.weight = tree->Uniform(path + ".output.weight", {1, hidden}, 1 / std::sqrt(static_cast<double>(hidden)));
  tower.output.bias = tree->Constant(path + ".output.bias", {1}, std::log(rate / (1 - rate)));
  return tower;
}

ExpertStack StackedModel::MakeExperts(const std::string& path, int64_t count, int64_t in, int64_t hidden, int64_t out,
                                      bool home) {
  HEARTH_CHECK(count > 0 && hidden > 0 && out > 0, "a group without experts, or experts without width: ", path);
  ExpertStack stack;
  stack.path = path;
  stack.count = count;
  stack.in = in;
  stack.hidden = hidden;
  stack.out = out;
  stack.home = home;
  const double bound_in = 1 / std::sqrt(static_cast<double>(in));
  const double bound_hidden = 1 / std::sqrt(static_cast<double>(hidden));
  stack.first.weight = tree_.Uniform(path + ".hidden_weight", {count * hidden, in}, bound_in);
  stack.first.bias = tree_.Uniform(path + ".hidden_bias", {count * hidden}, bound_in);
  stack.output_weight = tree_.Uniform(path + ".output_weight", {count, out, hidden}, bound_hidden);
  if (!home) {
    stack.output_bias = tree_.Uniform(path + ".output_bias", {count * out}, bound_hidden);
    return stack;
  }
  BatchNorm& norm = stack.norm;
  norm.first = columns_;
  norm.columns = count * out;
  norm.weight = tree_.Constant(path + ".norm_weight", {norm.columns}, 1);
  norm.bias = tree_.Constant(path + ".norm_bias", {norm.columns}, 0);
  norm.running_mean = tree_.Buffer(path + ".running_mean", {norm.columns}, 0);
  norm.running_var = tree_.Buffer(path + ".running_var", {norm.columns}, 1);
  columns_ += norm.columns;
  norms_.push_back(norm);
  return stack;
}

torch::Tensor StackedModel::Forward(const torch::Tensor& v, Phase phase, BatchMoments* moments) {
  HEARTH_CHECK(v.dim() == 2 && v.size(1) == spec_.width, "the model's input has another width than the job's features");
  HEARTH_CHECK(v.size(0) > 0, "an empty lane does not call Forward");
  NormMode mode;
  mode.epsilon = spec_.config.batch_norm_epsilon();
  mode.by_batch = phase == Phase::kTrain && v.size(0) >= 2;
  if (phase == Phase::kTrain) {
    HEARTH_CHECK(moments != nullptr, "training needs a place for the batch's moments");
    moments->count = static_cast<double>(v.size(0));
    moments->mean.clear();
    moments->m2.clear();
    moments->on_device.reset();
    mode.moments = moments;
  }
  if (form_ == Form::kBatched || (form_ == Form::kFused && !v.device().is_cpu())) {
    BatchedParts parts(mode, spec_.products);
    const torch::Tensor logits = Composed(v, &parts);
    parts.LeaveMoments();
    return logits;
  }
  if (mode.moments != nullptr) {
    moments->mean.assign(columns_, 0);
    moments->m2.assign(columns_, 0);
  }
  if (form_ == Form::kReference) return Reference(v, mode, nullptr);
  FusedParts parts(mode);
  return Composed(v, &parts);
}

Activations StackedModel::Observe(const torch::Tensor& v) {
  NormMode mode;
  mode.epsilon = spec_.config.batch_norm_epsilon();
  Activations seen;
  seen.logits = Reference(v, mode, &seen);
  return seen;
}

void StackedModel::UpdateRunningStatistics(const BatchMoments& pooled, int64_t update) {
  if (pooled.count < 2) return;
  HEARTH_CHECK(static_cast<int64_t>(pooled.mean.size()) == columns_, "moments of another model");
  if (columns_ == 0) return;
  torch::NoGradGuard no_grad;
  const double share = RunningShare(spec_.config, pooled.count, update);
  const torch::Tensor mean = torch::tensor(pooled.mean);
  const torch::Tensor variance = torch::tensor(pooled.m2) / (pooled.count - 1);
  const torch::Tensor now = torch::stack({mean, variance}).to(norms_[0].running_mean.options());  // one copy
  for (BatchNorm& norm : norms_) {
    norm.running_mean.lerp_(now[0].narrow(0, norm.first, norm.columns), share);
    norm.running_var.lerp_(now[1].narrow(0, norm.first, norm.columns), share);
  }
}

// ---- plain versions

torch::Tensor FeatureGateReference(const FeatureGateParameters& gate, const torch::Tensor& v) {
  const torch::Tensor w = torch::softmax(torch::linear(v, gate.mix.weight, gate.mix.bias), 1);  // [B, L]
  torch::Tensor sum;
  for (int64_t l = 0; l < gate.subspaces; ++l) {
    const torch::Tensor b = gate.down.narrow(0, l * gate.rank, gate.rank);  // [r, w]
    const torch::Tensor lora = 2 * torch::sigmoid(torch::matmul(torch::matmul(v, b.t()), gate.up[l]));
    const torch::Tensor part = w.narrow(1, l, 1) * lora;
    sum = sum.defined() ? sum + part : part;
  }
  return v * sum;
}

namespace {

// Leaves the moments of y [B, D] at columns [first, first + D).
void KeepMoments(const torch::Tensor& y, int64_t first, BatchMoments* moments) {
  torch::NoGradGuard no_grad;
  const torch::Tensor wide = y.detach().to(torch::kCPU, torch::kFloat64);
  const torch::Tensor mean = wide.mean(0);
  const torch::Tensor m2 = (wide - mean).pow(2).sum(0);
  std::copy_n(mean.data_ptr<double>(), y.size(1), moments->mean.begin() + first);
  std::copy_n(m2.data_ptr<double>(), y.size(1), moments->m2.begin() + first);
}

torch::Tensor NormalizeReference(const BatchNorm& norm, const torch::Tensor& y, int64_t offset, const NormMode& mode) {
  const auto part = [&](const torch::Tensor& whole) { return whole.narrow(0, offset, y.size(1)); };
  if (mode.moments != nullptr) KeepMoments(y, norm.first + offset, mode.moments);
  torch::Tensor mean = part(norm.running_mean);
  torch::Tensor variance = part(norm.running_var);
  if (mode.by_batch) {
    mean = y.mean(0);
    variance = (y - mean).pow(2).mean(0);  // biased
  }
  return (y - mean) / torch::sqrt(variance + mode.epsilon) * part(norm.weight) + part(norm.bias);
}

}  // namespace

std::vector<torch::Tensor> ExpertsReference(const ExpertStack& stack, const torch::Tensor& x, const NormMode& mode,
                                            int task, Activations* seen) {
  std::vector<torch::Tensor> outputs;
  for (int64_t k = 0; k < stack.count; ++k) {
    const torch::Tensor hidden =
        torch::relu(torch::linear(x, stack.first.weight.narrow(0, k * stack.hidden, stack.hidden),
                                  stack.first.bias.narrow(0, k * stack.hidden, stack.hidden)));
    torch::Tensor a = torch::matmul(hidden, stack.output_weight[k].t());
    torch::Tensor out;
    if (stack.home) {
      a = NormalizeReference(stack.norm, a, k * stack.out, mode);
      out = a * torch::sigmoid(a);
    } else {
      a = a + stack.output_bias.narrow(0, k * stack.out, stack.out);
      out = torch::relu(a);
    }
    outputs.push_back(out);
    if (seen == nullptr) continue;
    const std::vector<torch::Tensor> parameters = {stack.first.weight, stack.first.bias, stack.output_weight};
    seen->experts.push_back({stack.path + "." + std::to_string(k), task, stack.home, out, a, parameters});
  }
  return outputs;
}

torch::Tensor MixtureReference(const torch::Tensor& logits, const std::vector<torch::Tensor>& experts,
                               torch::Tensor* weights) {
  const torch::Tensor g = torch::softmax(logits, 1);
  if (weights != nullptr) *weights = g;
  torch::Tensor sum = torch::zeros_like(experts[0]);
  for (size_t e = 0; e < experts.size(); ++e) sum = sum + g.narrow(1, static_cast<int64_t>(e), 1) * experts[e];
  return sum;
}

torch::Tensor SelfGateReference(const torch::Tensor& logits, const std::vector<torch::Tensor>& experts) {
  if (experts.size() == 1) return torch::sigmoid(logits) * experts[0];
  return MixtureReference(logits, experts, nullptr);
}

torch::Tensor TowersReference(const std::vector<Tower>& towers, const std::vector<torch::Tensor>& inputs) {
  std::vector<torch::Tensor> logits;
  for (size_t t = 0; t < towers.size(); ++t) {
    const torch::Tensor& x = inputs.size() == 1 ? inputs[0] : inputs[t];
    const torch::Tensor hidden = torch::relu(torch::linear(x, towers[t].hidden.weight, towers[t].hidden.bias));
    logits.push_back(torch::linear(hidden, towers[t].output.weight, towers[t].output.bias));
  }
  return torch::cat(logits, 1);
}

}  // namespace hearth
