// Features → one logit per task. HoME, MMoE and shared bottom behind one small interface; specification: home-model.md
// (docs/ARCHITECTURE.md in this tree says what was chosen).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

// The columns of all of a model's BatchNorms side by side, in registration order. In training a lane normalises by its own
// batch's moments and leaves them here; they travel with the reduction, are pooled over lanes (PoolMoments) and move the
// running statistics of every worker alike.
struct BatchMoments {
  // Filled by Forward in training mode. count is the lane's records (0 for an empty lane); M2 the sum of squared deviations.
  double count = 0;
  std::vector<float> mean;  // [columns]
  std::vector<float> m2;    // [columns]
};
// Chan's formula over lanes in lane order. REQUIRES: the same number of columns wherever count > 0.
BatchMoments PoolMoments(const std::vector<BatchMoments>& lanes);

enum class Phase { kTrain, kEvaluate };

class MultiTaskModel : public torch::nn::Module {
 public:
  // v [B, V] → logits [B, T], tasks in the job's order. kTrain: BatchNorm uses this batch's moments and writes them into
  // *moments (B < 2: running statistics, count = B with mean and m2 of the batch). kEvaluate: running statistics; moments may be null.
  virtual torch::Tensor Forward(const torch::Tensor& v, Phase phase, BatchMoments* moments) = 0;
  // Running statistics += momentum · (pooled − running); variance unbiased (M2/(count−1)), as torch's BatchNorm. No-op at count < 2.
  virtual void UpdateRunningStatistics(const BatchMoments& pooled) = 0;
  virtual int64_t batch_norm_columns() const = 0;
  // Σ of parameters' elements, and forward multiply-adds a sample by the closed forms of home-model.md §4.
  int64_t ParameterCount() const;
};

struct ModelSpec {
  Model config;
  int64_t width = 0;                   // V
  std::vector<std::string> tasks;      // names, the job's order
  std::vector<int> category_of;        // [tasks] index into categories
  std::vector<std::string> categories; // first appearance order
  std::vector<double> base_rates;      // [tasks] in (0, 1): the towers' last biases start at their logits
  uint64_t seed = 1;                   // SeedOf(job.seed, "dense_init")
};
// base_rates as given by the job or counted (log_reader.h CountBaseRates).
ModelSpec MakeModelSpec(const Job& job, const std::vector<double>& base_rates);

// Parameters depend on the spec alone (each drawn from a generator seeded by (seed, name)). Parameters and buffers are named
// by their module path, e.g. "level1.shared.expert.0.weight"; those names are the snapshot's and the export's.
std::shared_ptr<MultiTaskModel> MakeModel(const ModelSpec& spec);
// The slow, readable module-by-module one, with the same parameters by the same names; tests compare values and gradients.
std::shared_ptr<MultiTaskModel> MakeReferenceModel(const ModelSpec& spec);

struct ModelCost {
  int64_t parameters = 0;        // closed form
  int64_t multiply_adds = 0;     // forward, a sample
};
ModelCost CostOf(const ModelSpec& spec);

// Σ over records and tasks of weight_t · mask · BCE(logit, label): a sum, never a mean. Shapes [B, T]; weights [T].
torch::Tensor MultiTaskLoss(const torch::Tensor& logits, const torch::Tensor& labels, const torch::Tensor& mask,
                            const torch::Tensor& weights);

}  // namespace hearth
