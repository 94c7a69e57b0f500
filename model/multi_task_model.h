// Features → one logit per task. HoME, MMoE and shared bottom behind one small interface; specification:
// docs/MODEL.md, which also says what was chosen.
#pragma once

#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

// The columns of all of a model's BatchNorms side by side, in registration order. In training a lane normalises by its
// own batch's moments and leaves them here; they travel with the reduction, are pooled over lanes (PoolMoments) and
// move the running statistics of every worker alike.
struct BatchMoments {
  // Filled by Forward in training mode. count is the lane's records (0 for an empty lane); M2 the sum of squared
  // deviations.
  double count = 0;
  std::vector<float> mean;  // [columns]
  std::vector<float> m2;    // [columns]
  // [2, columns] float: mean and M2, where the model ran the batched parts; the vectors are then empty until someone
  // fetches them. Undefined elsewhere, and where there are no columns.
  torch::Tensor on_device;
};
// Chan's formula over lanes in lane order, of the vectors. REQUIRES: the same number of columns wherever count > 0.
BatchMoments PoolMoments(const std::vector<BatchMoments>& lanes);

// What a step of so many records has in the running statistics, in (0, 1] (docs/MODEL.md §2). update: from 1.
double RunningShare(const Model& config, double records, int64_t update);

enum class Phase { kTrain, kEvaluate };

// What the experts and gates did with a sample, for diagnostics (diagnostics.h); BatchNorm in evaluation mode.
struct Activations {
  struct Expert {
    std::string name;                       // "level1.shared.0"
    int task = -1;                          // >= 0: seen by this task alone
    bool swish = true;                      // false: ReLU
    torch::Tensor output;                   // [B, D]
    torch::Tensor pre_activation;           // [B, D] before Swish or ReLU
    std::vector<torch::Tensor> parameters;  // of its stack (shared with the stack's other experts)
  };
  struct Gate {
    std::string name;          // "level2.task.click"
    int task = -1;             // the task whose tower reads the mixture; -1 below the last level
    std::vector<int> experts;  // [n] indices into `experts`, in the gate's order
    torch::Tensor weights;     // [B, n] the softmax; self gates are not in it
  };
  std::vector<Expert> experts;
  std::vector<Gate> gates;
  torch::Tensor logits;  // [B, T]
};

class MultiTaskModel : public torch::nn::Module {
 public:
  // v [B, V] → logits [B, T], tasks in the job's order. kTrain: BatchNorm uses this batch's moments and writes them
  // into *moments (B < 2: running statistics, count = B with mean and m2 of the batch). kEvaluate: running statistics;
  // moments may be null.
  virtual torch::Tensor Forward(const torch::Tensor& v, Phase phase, BatchMoments* moments) = 0;
  // Running statistics += share · (pooled − running), with RunningShare; variance unbiased (M2/(count−1)), as torch's
  // BatchNorm. update: which of the model's updates this is, from 1. No-op at count < 2.
  virtual void UpdateRunningStatistics(const BatchMoments& pooled, int64_t update) = 0;
  virtual int64_t batch_norm_columns() const = 0;
  // The module-by-module forward with BatchNorm in evaluation mode, keeping what the diagnostics need.
  virtual Activations Observe(const torch::Tensor& v) = 0;
  // Σ of parameters' elements.
  int64_t ParameterCount() const;
};

// Which of the dense optimizer's groups a parameter of any of the models is in, by its name (MakeModel).
DenseOptimizer::Group::Match GroupOf(const std::string& parameter);

struct ModelSpec {
  Model config;
  int64_t width = 0;                    // V
  std::vector<std::string> tasks;       // names, the job's order
  std::vector<int> category_of;         // [tasks] index into categories
  std::vector<std::string> categories;  // first appearance order
  std::vector<double> base_rates;       // [tasks] in (0, 1): the towers' last biases start at their logits
  uint64_t seed = 1;                    // SeedOf(job.seed, "dense_init")
  // kBFloat16: the factors of the batched parts' layers are rounded to bfloat16, and so is a product before its bias is
  // added; everything else stays float32. The fused parts and the plain ones, so MakeModel on a CPU, take no notice.
  torch::ScalarType products = torch::kFloat32;
};
// base_rates as given by the job or counted (log_reader.h CountBaseRates); the logit is taken of the rate clamped to
// [1e-6, 1 − 1e-6], for a head of the log may hold no positive. `products` stays float32: which type a worker's device
// has instructions for is not the job's to know.
ModelSpec MakeModelSpec(const Job& job, const std::vector<double>& base_rates);

// Parameters depend on the spec alone (each drawn from a generator seeded by (seed, name)). Parameters and buffers are
// named by their module path, e.g. "level1.category.watch.expert.hidden_weight" [n·h, V]: a group's n experts are one
// stack (layers.h). Those names are the snapshot's and the export's. Where v is on the CPU the fused parts run;
// elsewhere the batched ones, whose Forward and backward neither copy between host and device nor wait for the device.
std::shared_ptr<MultiTaskModel> MakeModel(const ModelSpec& spec);
// The slow, readable module-by-module one, with the same parameters by the same names; tests compare values and
// gradients.
std::shared_ptr<MultiTaskModel> MakeReferenceModel(const ModelSpec& spec);
// The batched parts on every device: tests run them on the CPU.
std::shared_ptr<MultiTaskModel> MakeBatchedModel(const ModelSpec& spec);

struct ModelCost {
  int64_t parameters = 0;     // closed form
  int64_t multiply_adds = 0;  // forward, a sample
};
// The closed forms of docs/MODEL.md §4.
ModelCost CostOf(const ModelSpec& spec);

// Σ over records and tasks of weight_t · mask · BCE(logit, label): a sum, never a mean. Shapes [B, T]; weights [T].
torch::Tensor MultiTaskLoss(const torch::Tensor& logits, const torch::Tensor& labels, const torch::Tensor& mask,
                            const torch::Tensor& weights);

}  // namespace hearth
