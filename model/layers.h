// The parts HoME and its baselines are made of (docs/MODEL.md §2): parameters under module paths, and for each part the
// plain version in tensor operations (`…Reference`) beside those that fast models are composed of: fused loops on the
// CPU (fused_ops.cc), few large operations on other devices (batched_ops.cc). Private to the room.
//
// Experts of one group share their input, so a group is stored as a stack: the first layers as one matrix [n·h, in],
// the second as [n, D, h], BatchNorm as n·D columns. Expert k owns rows or columns [k·h, (k+1)·h), [k·D, (k+1)·D).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/batch/path_step.h"
#include "model/multi_task_model.h"

namespace hearth {

// Draws parameters and registers them under paths such as "level1.shared.expert.hidden_weight". Every value is a
// function of (seed, path): adding a module elsewhere changes nothing here. Handles stay valid through Module::to.
class ParameterTree {
 public:
  ParameterTree(torch::nn::Module* root, uint64_t seed) : root_(root), seed_(seed) {}
  torch::Tensor Uniform(const std::string& path, std::vector<int64_t> shape, double bound);
  torch::Tensor Constant(const std::string& path, std::vector<int64_t> shape, double value);
  torch::Tensor Buffer(const std::string& path, std::vector<int64_t> shape, double value);

 private:
  torch::nn::Module* NodeOf(const std::string& path, std::string* leaf);

  torch::nn::Module* root_;
  uint64_t seed_;
  std::map<std::string, torch::nn::Module*> nodes_;  // owned by their parents
};

struct Affine {
  torch::Tensor weight;  // [out, in]
  torch::Tensor bias;    // [out]
};
Affine MakeAffine(ParameterTree* tree, const std::string& path, int64_t in, int64_t out);

struct FeatureGateParameters {
  int64_t subspaces = 0;
  int64_t rank = 0;
  int64_t width = 0;
  torch::Tensor down;  // [L·r, w]: B transposed, sub-space after sub-space
  torch::Tensor up;    // [L, r, w]: A
  Affine mix;          // w → L
};
FeatureGateParameters MakeFeatureGate(ParameterTree* tree, const std::string& path, int64_t width, int64_t subspaces,
                                      int64_t rank);

// One BatchNorm over a group's n·D columns; `first` is its place among the model's columns.
struct BatchNorm {
  int64_t first = 0;
  int64_t columns = 0;
  torch::Tensor weight, bias;               // [columns]
  torch::Tensor running_mean, running_var;  // [columns]
};

struct ExpertStack {
  std::string path;
  int64_t count = 0;
  int64_t in = 0;
  int64_t hidden = 0;
  int64_t out = 0;
  bool home = true;             // HoME's expert (BatchNorm, Swish); else Linear → ReLU → Linear → ReLU
  Affine first;                 // in → n·h
  torch::Tensor output_weight;  // [n, D, h]
  torch::Tensor output_bias;    // [n·D], plain expert only
  BatchNorm norm;               // HoME's expert only
};

struct Tower {
  Affine hidden;  // D → ht
  Affine output;  // ht → 1
};
Tower MakeTower(ParameterTree* tree, const std::string& path, int64_t in, int64_t hidden, double base_rate);

// How BatchNorm normalises in this call.
struct NormMode {
  bool by_batch = false;
  double epsilon = 1e-5;
  BatchMoments* moments = nullptr;  // where to leave the batch's moments; null: nowhere
};

// What a model is composed of in one call; lives as long as the forward.
class Parts {
 public:
  virtual ~Parts() = default;
  // x [B, in] → [B, out].
  virtual torch::Tensor Linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) = 0;
  // down [B, L·r] and mix_logits [B, L] are the products of v with gate.down and gate.mix, which the caller takes with
  // others.
  virtual torch::Tensor FeatureGate(const FeatureGateParameters& gate, const torch::Tensor& v,
                                    const torch::Tensor& down, const torch::Tensor& mix_logits) = 0;
  // [B, n·D], expert after expert.
  virtual torch::Tensor Experts(const ExpertStack& stack, const torch::Tensor& x) = 0;
  // blocks: outputs of stacks [B, n_i·D] in the gate's order. self_logits (may be undefined) is over the experts of
  // block `own_block`.
  virtual torch::Tensor Mixture(const torch::Tensor& gate_logits, const torch::Tensor& self_logits,
                                const std::vector<torch::Tensor>& blocks, int own_block, int64_t width) = 0;
  // inputs: [B, D] one a tower, or one for all. Logits [B, T].
  virtual torch::Tensor Towers(const std::vector<Tower>& towers, const std::vector<torch::Tensor>& inputs) = 0;
};

// One node of the autograd graph a part, on the CPU loops of kernels.h. Once differentiable. REQUIRES: CPU tensors of
// float or double.
class FusedParts : public Parts {
 public:
  explicit FusedParts(const NormMode& mode) : mode_(mode) {}
  torch::Tensor Linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) final;
  torch::Tensor FeatureGate(const FeatureGateParameters& gate, const torch::Tensor& v, const torch::Tensor& down,
                            const torch::Tensor& mix_logits) final;
  torch::Tensor Experts(const ExpertStack& stack, const torch::Tensor& x) final;
  torch::Tensor Mixture(const torch::Tensor& gate_logits, const torch::Tensor& self_logits,
                        const std::vector<torch::Tensor>& blocks, int own_block, int64_t width) final;
  torch::Tensor Towers(const std::vector<Tower>& towers, const std::vector<torch::Tensor>& inputs) final;

 private:
  const NormMode mode_;
};

// Torch's own operations under its own autograd, on any device: as few as there can be, for each is a launch, and none
// that brings a value to the host.
class BatchedParts : public Parts {
 public:
  // products: ModelSpec's.
  BatchedParts(const NormMode& mode, torch::ScalarType products) : mode_(mode), products_(products) {}
  torch::Tensor Linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) final;
  torch::Tensor FeatureGate(const FeatureGateParameters& gate, const torch::Tensor& v, const torch::Tensor& down,
                            const torch::Tensor& mix_logits) final;
  torch::Tensor Experts(const ExpertStack& stack, const torch::Tensor& x) final;
  torch::Tensor Mixture(const torch::Tensor& gate_logits, const torch::Tensor& self_logits,
                        const std::vector<torch::Tensor>& blocks, int own_block, int64_t width) final;
  torch::Tensor Towers(const std::vector<Tower>& towers, const std::vector<torch::Tensor>& inputs) final;
  // To mode.moments, those of every stack whose experts ran. After the last part.
  void LeaveMoments() const;

 private:
  torch::Tensor Product(const torch::Tensor& a, const torch::Tensor& b, const torch::Tensor& bias) const;
  torch::Tensor Normalize(const BatchNorm& norm, const torch::Tensor& y);

  const NormMode mode_;
  const torch::ScalarType products_;
  struct Seen {
    torch::Tensor mean;               // [columns] of the batch
    torch::Tensor inverse_deviation;  // [columns] 1/√(variance + ε); undefined for a lone record
  };
  std::map<int64_t, Seen> seen_;  // by the BatchNorm's first column, so in registration order
};

// What a model's Forward runs. kFused: the fused parts where its input is on the CPU, the batched ones elsewhere.
enum class Form { kReference, kFused, kBatched };

// The base of all models: keeps the BatchNorms together and prepares a call.
class StackedModel : public MultiTaskModel {
 public:
  StackedModel(const ModelSpec& spec, Form form) : spec_(spec), form_(form), tree_(this, spec.seed) {}

  torch::Tensor Forward(const torch::Tensor& v, Phase phase, BatchMoments* moments) final;
  Activations Observe(const torch::Tensor& v) final;
  void UpdateRunningStatistics(const BatchMoments& pooled, int64_t update) final;
  int64_t batch_norm_columns() const final { return columns_; }

 protected:
  virtual torch::Tensor Composed(const torch::Tensor& v, Parts* parts) = 0;
  // seen: null, or filled with every expert and gate.
  virtual torch::Tensor Reference(const torch::Tensor& v, const NormMode& mode, Activations* seen) = 0;

  ExpertStack MakeExperts(const std::string& path, int64_t count, int64_t in, int64_t hidden, int64_t out, bool home);

  const ModelSpec spec_;
  const Form form_;
  ParameterTree tree_;

 private:
  std::vector<BatchNorm> norms_;  // registration order
  int64_t columns_ = 0;
};

// ---- plain versions: module by module, in tensor operations

torch::Tensor FeatureGateReference(const FeatureGateParameters& gate, const torch::Tensor& v);
// One output [B, D] an expert.
std::vector<torch::Tensor> ExpertsReference(const ExpertStack& stack, const torch::Tensor& x, const NormMode& mode,
                                            int task, Activations* seen);
// Σ softmax(logits)_e E_e; weights, where asked for, are the softmax.
torch::Tensor MixtureReference(const torch::Tensor& logits, const std::vector<torch::Tensor>& experts,
                               torch::Tensor* weights);
// σ where there is one expert, softmax otherwise.
torch::Tensor SelfGateReference(const torch::Tensor& logits, const std::vector<torch::Tensor>& experts);
// inputs: as Parts::Towers.
torch::Tensor TowersReference(const std::vector<Tower>& towers, const std::vector<torch::Tensor>& inputs);

}  // namespace hearth
