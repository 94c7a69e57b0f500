// A small job with every kind of input of the dense model, and batches for it.
#pragma once

#include <torch/torch.h>

#include <memory>

#include "common/base/env.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/sign.h"
#include "model/batch/batch.h"
#include "model/multi_task_model.h"

namespace hearth {

// Two widths, a table shared by two slots, sums and a mean, dense features, masks and weights.
inline Job TestJob() {
  const auto job = ParseJob(R"(
    name: "trainer-test" seed: 7
    log { name: "log" path: "log.csv" }
    task { name: "click" category: "watch" label: "click" weight: 1.0 base_rate: 0.3 }
    task { name: "like" category: "inter" label: "like" weight: 2.5 base_rate: 0.1 }
    slot { name: "user" table: "wide" }
    slot { name: "tags" table: "narrow" kind: LIST pooling: MEAN }
    slot { name: "video" table: "narrow" }
    slot { name: "history" table: "narrow" kind: LIST }
    dense { name: "age" } dense { name: "length" }
    table { name: "narrow" dim: 2 } table { name: "wide" dim: 4 }
    model { kind: HOME hidden_1: 8 hidden_2: 8 width_1: 8 width_2: 8 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 }
    training { batch_size: 64 lanes: 3 dense_optimizer { kind: ADAM learning_rate: 0.01 } })",
                            "test");
  HEARTH_CHECK(job.ok(), "", job.status().ToString());
  return *job;
}

// Random records with repeated and missing values; rows are filled as a pull would.
inline std::unique_ptr<Batch> RandomBatch(const Job& job, int64_t records, Random* random) {
  BatchBuilder builder(job);
  for (int64_t i = 0; i < records; ++i) {
    const auto sign = [&](TableNumber table) { return MakeSign(table, random->Below(9)); };
    builder.AddSign(0, sign(2));
    for (uint64_t n = random->Below(4); n > 0; --n) builder.AddSign(1, sign(1));
    if (random->Below(5) > 0) builder.AddSign(2, sign(1));
    for (uint64_t n = random->Below(4); n > 0; --n) builder.AddSign(3, sign(1));
    builder.AddDense({static_cast<float>(random->Uniform()), static_cast<float>(random->Uniform() - 0.5)});
    const float unmasked = random->Below(3) > 0;
    builder.AddLabels({static_cast<float>(random->Below(2)), unmasked * static_cast<float>(random->Below(2))},
                      {1.0f, unmasked});
    builder.EndRecord(0, static_cast<uint64_t>(i) * 10);
  }
  std::unique_ptr<Batch> batch = builder.Build();
  for (RowGroup& group : batch->groups) {
    group.rows.resize(group.unique.size() * group.dim);
    for (float& value : group.rows) value = static_cast<float>(random->Uniform() - 0.5);
  }
  return batch;
}

// logits = v Wᵀ: small enough that every gradient can be written down.
class LinearModel : public MultiTaskModel {
 public:
  LinearModel(int64_t width, int64_t tasks) {
    torch::manual_seed(5);
    weight_ = register_parameter("weight", torch::randn({tasks, width}));
    register_parameter("a_unused", torch::ones({3}));  // before "weight" in name order
  }
  torch::Tensor Forward(const torch::Tensor& v, Phase, BatchMoments*) override { return torch::linear(v, weight_); }
  void UpdateRunningStatistics(const BatchMoments&, int64_t) override {}
  int64_t batch_norm_columns() const override { return 0; }
  Activations Observe(const torch::Tensor&) override { return {}; }
  const torch::Tensor& weight() const { return weight_; }

 private:
  torch::Tensor weight_;
};

}  // namespace hearth
