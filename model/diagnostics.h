// The three anomalies of mixtures of experts as numbers (docs/MODEL.md §6), measured on a held-out sample with
// BatchNorm in evaluation mode: experts that collapse to zero, shared experts that degrade to one task's, own experts
// that stay unused.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/proto/control.pb.h"
#include "model/multi_task_model.h"

namespace hearth {

struct Diagnostics {
  // Collapse, by expert.
  struct Expert {
    std::string name;
    double zero_rate = 0;  // share of outputs that are 0 (ReLU), or |E| < 1e-3 with pre-activation < −4 (Swish)
    double mean = 0;       // of its outputs
    double deviation = 0;
  };
  // Collapse, by gate: over the experts that the gate sees.
  struct Gate {
    std::string name;
    double weight_max = 0;       // the largest mean weight
    double entropy_of_mean = 0;  // of the mean weights, over log n: 1 when all experts are used alike
    double mean_entropy = 0;     // mean of the samples' own entropies, over log n: 0 when each sample picks one expert
    double deviation_max_ratio = 0;  // the largest deviation of its experts over their median one
  };
  // Degradation: experts that more than one task may use.
  struct Shared {
    std::string name;
    double occupancy = 0;  // max_t ḡ_t / Σ_t ḡ_t: 1/T shared by all, 1 owned by one task
    int tasks_using = 0;   // ḡ_t > 1 / (2 n_t)
  };
  // Underfitting.
  struct Task {
    std::string name;
    std::optional<double> positive_rate;       // of its labelled samples
    double own_weight = 0;                     // Σ ḡ over the experts that this task alone sees
    double own_weight_uniform = 0;             // what equal weights would give; 0: the model has no such experts
    std::optional<double> own_gradient_ratio;  // gradient norm of its own experts over that of the shared ones it sees
  };
  std::vector<Expert> experts;
  std::vector<Gate> gates;
  std::vector<Shared> shared;
  std::vector<Task> tasks;
};

// From what a model did. labels and mask [B, tasks]; gradients are of the sum over tasks of the masked losses, and are
// only taken where seen.logits carries a graph.
Diagnostics Diagnose(const Activations& seen, const std::vector<std::string>& tasks, const torch::Tensor& labels,
                     const torch::Tensor& mask);
// Observes the model on v [B, V] first. Changes nothing in the model.
Diagnostics Diagnose(MultiTaskModel* model, const std::vector<std::string>& tasks, const torch::Tensor& v,
                     const torch::Tensor& labels, const torch::Tensor& mask);
// As it goes out with an evaluation; what is not finite is left out.
Evaluation::Diagnostics ToMessage(const Diagnostics& diagnostics);

}  // namespace hearth
