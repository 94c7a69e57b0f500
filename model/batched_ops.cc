// The batched parts: what a group's experts or sub-spaces do one by one in layers.cc, in one operation each.
#include <vector>

#include "common/base/status.h"
#include "model/layers.h"

namespace hearth {

using torch::Tensor;

// a·b + bias, of matrices or of batches of them; bias may be undefined. Every product of a layer is taken here.
Tensor BatchedParts::Product(const Tensor& a, const Tensor& b, const Tensor& bias) const {
  const bool batch = a.dim() == 3;
  if (products_ == torch::kFloat32) {
    if (bias.defined()) return batch ? torch::baddbmm(bias, a, b) : torch::addmm(bias, a, b);
    return batch ? torch::bmm(a, b) : torch::mm(a, b);
  }
  const Tensor left = a.to(products_);
  const Tensor right = b.to(products_);
  const Tensor product = (batch ? torch::bmm(left, right) : torch::mm(left, right)).to(a.scalar_type());
  return bias.defined() ? product + bias : product;
}

Tensor BatchedParts::Linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return Product(x, weight.t(), bias);
}

Tensor BatchedParts::FeatureGate(const FeatureGateParameters& gate, const Tensor& v, const Tensor& down,
                                 const Tensor& mix_logits) {
  const Tensor by_subspace = down.view({v.size(0), gate.subspaces, gate.rank}).transpose(0, 1);  // [L, B, r]
  const Tensor lora = torch::sigmoid(Product(by_subspace, gate.up, Tensor()));                   // [L, B, w]
  const Tensor weights = 2 * torch::softmax(mix_logits, 1);                                      // [B, L]
  return v * (weights.t().unsqueeze(2) * lora).sum(0);
}

Tensor BatchedParts::Experts(const ExpertStack& stack, const Tensor& x) {
  const int64_t rows = x.size(0);
  const Tensor hidden = torch::relu(Linear(x, stack.first.weight, stack.first.bias));       // [B, n·h]
  const Tensor by_expert = hidden.view({rows, stack.count, stack.hidden}).transpose(0, 1);  // [n, B, h]
  const Tensor bias = stack.home ? Tensor() : stack.output_bias.view({stack.count, 1, stack.out});
  const Tensor second = Product(by_expert, stack.output_weight.transpose(1, 2), bias);  // [n, B, D]
  const Tensor y = second.transpose(0, 1).reshape({rows, stack.count * stack.out});     // [B, n·D]
  return stack.home ? torch::silu(Normalize(stack.norm, y)) : torch::relu(y);
}

// Torch's BatchNorm without its own running statistics' update: the batch's moments come out of the normalisation.
Tensor BatchedParts::Normalize(const BatchNorm& norm, const Tensor& y) {
  const auto [out, mean, inverse_deviation] =
      at::native_batch_norm(y, norm.weight, norm.bias, mode_.by_batch ? Tensor() : norm.running_mean,
                            mode_.by_batch ? Tensor() : norm.running_var, /*training=*/mode_.by_batch,
                            /*momentum=*/0, mode_.epsilon);
  if (mode_.moments != nullptr) {
    seen_[norm.first] =
        mode_.by_batch ? Seen{mean.detach(), inverse_deviation.detach()} : Seen{y.detach().select(0, 0), Tensor()};
  }
  return out;
}

void BatchedParts::LeaveMoments() const {
  if (seen_.empty()) return;
  torch::NoGradGuard no_grad;
  std::vector<Tensor> means;
  std::vector<Tensor> inverses;
  for (const auto& [first, seen] : seen_) {
    means.push_back(seen.mean);
    inverses.push_back(seen.inverse_deviation);
  }
  const Tensor mean = torch::cat(means);
  // By the deviations that were normalised by: an error of rounding in (variance + ε), far below what ε itself changes.
  const Tensor m2 = mode_.by_batch
                        ? ((torch::cat(inverses).pow(-2) - mode_.epsilon) * mode_.moments->count).clamp_min(0)
                        : torch::zeros_like(mean);
  mode_.moments->on_device = torch::stack({mean, m2}).to(torch::kFloat32);
}

// Both gates in one product: the self gate's weights are added to those of its own experts. A sum of float32 whatever
// `products` is, for it is bound by reading the experts, and they would first be rounded.
Tensor BatchedParts::Mixture(const Tensor& gate_logits, const Tensor& self_logits, const std::vector<Tensor>& blocks,
                             int own_block, int64_t width) {
  const int64_t count = gate_logits.size(1);
  const Tensor side_by_side = blocks.size() == 1 ? blocks[0] : torch::cat(blocks, 1);
  HEARTH_CHECK(side_by_side.size(1) == count * width, "a gate over other experts");
  Tensor weights = torch::softmax(gate_logits, 1);  // [B, n]
  if (self_logits.defined()) {
    const int64_t own_count = self_logits.size(1);
    int64_t own = 0;
    for (int i = 0; i < own_block; ++i) own += blocks[i].size(1) / width;
    const Tensor self = own_count == 1 ? torch::sigmoid(self_logits) : torch::softmax(self_logits, 1);
    weights = weights + torch::constant_pad_nd(self, {own, count - own - own_count});
  }
  const Tensor experts = side_by_side.view({weights.size(0), count, width});  // [B, n, D]
  return torch::bmm(weights.unsqueeze(1), experts).squeeze(1);
}

Tensor BatchedParts::Towers(const std::vector<Tower>& towers, const std::vector<Tensor>& inputs) {
  std::vector<Tensor> weights, biases, output_weights, output_biases;
  for (const Tower& tower : towers) {
    weights.push_back(tower.hidden.weight);
    biases.push_back(tower.hidden.bias);
    output_weights.push_back(tower.output.weight);
    output_biases.push_back(tower.output.bias);
  }
  const int64_t count = static_cast<int64_t>(towers.size());
  const Tensor x = inputs.size() == 1 ? inputs[0].unsqueeze(0).expand({count, -1, -1}) : torch::stack(inputs);
  // [T, B, D] · [T, D, ht] and [T, B, ht] · [T, ht, 1]
  const Tensor hidden =
      torch::relu(Product(x, torch::stack(weights).transpose(1, 2), torch::stack(biases).unsqueeze(1)));
  const Tensor logits =
      Product(hidden, torch::stack(output_weights).transpose(1, 2), torch::stack(output_biases).unsqueeze(1));
  return logits.squeeze(2).t().contiguous();
}

}  // namespace hearth
