#include "model/diagnostics.h"

#include <cmath>
#include <limits>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

using torch::Tensor;

ModelSpec TwoByTwo(Model::Kind kind) {
  ModelSpec spec;
  spec.config.set_kind(kind);
  spec.config.set_experts(3);
  spec.width = 12;
  spec.tasks = {"click", "view", "like", "follow"};
  spec.category_of = {0, 0, 1, 1};
  spec.categories = {"watch", "inter"};
  spec.base_rates = {0.5, 0.5, 0.1, 0.1};
  return spec;
}

Tensor Sample(int64_t records, int64_t columns, uint64_t seed) {
  Tensor v = torch::empty({records, columns});
  Random random(seed);
  for (int64_t i = 0; i < v.numel(); ++i) v.data_ptr<float>()[i] = static_cast<float>(2 * random.Uniform() - 1);
  return v;
}

// Two ReLU experts of which the second is dead, seen by two tasks with the given mean weights.
Activations Constructed(const Tensor& gate_0, const Tensor& gate_1) {
  Activations seen;
  const Tensor alive = torch::tensor({{1.0, 2.0}, {3.0, 4.0}});
  seen.experts.push_back({"alive", -1, false, alive, alive, {}});
  seen.experts.push_back({"dead", -1, false, torch::zeros({2, 2}), torch::full({2, 2}, -1.0), {}});
  seen.gates.push_back({"gate.a", 0, {0, 1}, gate_0});
  seen.gates.push_back({"gate.b", 1, {0, 1}, gate_1});
  return seen;
}

TEST(Diagnose, ShowsADeadExpertAndAGateThatPicksOne) {
  const Tensor one_hot = torch::tensor({{1.0, 0.0}, {1.0, 0.0}});
  const Tensor even = torch::tensor({{1.0, 0.0}, {0.0, 1.0}});
  const Tensor labels = torch::tensor({{1.0, 0.0}, {0.0, 0.0}});
  const Tensor mask = torch::tensor({{1.0, 0.0}, {1.0, 0.0}});
  const Diagnostics found = Diagnose(Constructed(one_hot, even), {"a", "b"}, labels, mask);
  ASSERT_EQ(found.experts.size(), 2u);
  EXPECT_EQ(found.experts[0].zero_rate, 0);
  EXPECT_EQ(found.experts[0].mean, 2.5);
  EXPECT_NEAR(found.experts[0].deviation, std::sqrt(1.25), 1e-12);
  EXPECT_EQ(found.experts[1].zero_rate, 1);
  ASSERT_EQ(found.gates.size(), 2u);
  EXPECT_EQ(found.gates[0].weight_max, 1);
  EXPECT_EQ(found.gates[0].entropy_of_mean, 0);
  EXPECT_EQ(found.gates[0].mean_entropy, 0);
  EXPECT_EQ(found.gates[1].weight_max, 0.5);
  EXPECT_NEAR(found.gates[1].entropy_of_mean, 1, 1e-12);  // both are used …
  EXPECT_EQ(found.gates[1].mean_entropy, 0);              // … each sample by itself picks one
  EXPECT_NEAR(found.gates[0].deviation_max_ratio, 2, 1e-12);
  EXPECT_EQ(found.tasks[0].positive_rate, 0.5);
  EXPECT_FALSE(found.tasks[1].positive_rate.has_value());  // no label known
  EXPECT_FALSE(found.tasks[0].own_gradient_ratio.has_value());
}

TEST(Diagnose, TellsAnOwnedExpertFromASharedOne) {
  const Tensor labels = torch::zeros({2, 2});
  const Tensor mask = torch::ones({2, 2});
  const Diagnostics found =
      Diagnose(Constructed(torch::tensor({{0.9, 0.1}, {0.9, 0.1}}), torch::tensor({{0.1, 0.9}, {0.1, 0.9}})),
               {"a", "b"}, labels, mask);
  ASSERT_EQ(found.shared.size(), 2u);
  EXPECT_NEAR(found.shared[0].occupancy, 0.9, 1e-6);
  EXPECT_EQ(found.shared[0].tasks_using, 1);
  const Diagnostics even =
      Diagnose(Constructed(torch::full({2, 2}, 0.5), torch::full({2, 2}, 0.5)), {"a", "b"}, labels, mask);
  EXPECT_NEAR(even.shared[0].occupancy, 0.5, 1e-12);
  EXPECT_EQ(even.shared[0].tasks_using, 2);
}

TEST(Diagnose, FindsTheCollapsedExpertOfARealMmoe) {
  for (const bool home_expert : {false, true}) {
    ModelSpec spec = TwoByTwo(Model::MMOE);
    spec.config.set_home_expert(home_expert);
    auto model = MakeModel(spec);
    {
      torch::NoGradGuard no_grad;
      const std::string bias = home_expert ? "expert.norm_bias" : "expert.output_bias";
      model->named_parameters()[bias].narrow(0, spec.config.width_1(), spec.config.width_1()).fill_(-60);
    }
    const Tensor v = Sample(50, spec.width, 1);
    const Tensor labels = (Sample(50, 4, 2) > 0).to(torch::kFloat32);
    const Diagnostics found = Diagnose(model.get(), spec.tasks, v, labels, torch::ones({50, 4}));
    ASSERT_EQ(found.experts.size(), 3u);
    EXPECT_EQ(found.experts[1].name, "expert.1");
    EXPECT_EQ(found.experts[1].zero_rate, 1);
    EXPECT_LT(found.experts[0].zero_rate, 0.9);
    EXPECT_LT(found.experts[2].zero_rate, 0.9);
    EXPECT_EQ(found.shared.size(), 3u);
    EXPECT_EQ(found.tasks[0].own_weight_uniform, 0);
    EXPECT_FALSE(found.tasks[0].own_gradient_ratio.has_value());
  }
}

TEST(Diagnose, WeighsATasksOwnExpertsInHome) {
  const ModelSpec spec = TwoByTwo(Model::HOME);
  auto model = MakeModel(spec);
  {
    torch::NoGradGuard
        no_grad;  // like's gate gives its own expert, the last of 2 + 2 + 1, everything; follow's nothing
    auto named = model->named_parameters();
    named["level2.task.like.gate.bias"][4] = 100;
    named["level2.task.follow.gate.bias"][4] = -100;
  }
  const Tensor v = Sample(40, spec.width, 3);
  const Tensor labels = (Sample(40, 4, 4) > 0.5).to(torch::kFloat32);
  const Diagnostics found = Diagnose(model.get(), spec.tasks, v, labels, torch::ones({40, 4}));
  EXPECT_EQ(found.experts.size(), 6u + 2 + 4 + 4);
  EXPECT_EQ(found.gates.size(), 3u + 4);
  EXPECT_EQ(found.shared.size(), 2u + 4);  // level 2: shared by four tasks, category experts by two
  EXPECT_NEAR(found.tasks[2].own_weight, 1, 1e-6);
  EXPECT_NEAR(found.tasks[3].own_weight, 0, 1e-6);
  EXPECT_EQ(found.tasks[2].own_weight_uniform, 0.2);
  ASSERT_TRUE(found.tasks[2].own_gradient_ratio && found.tasks[3].own_gradient_ratio);
  EXPECT_GT(*found.tasks[2].own_gradient_ratio, 0);
  // The self gate's residual still reaches the expert that the mixture ignores.
  EXPECT_GT(*found.tasks[3].own_gradient_ratio, 0);
  for (const torch::Tensor& parameter : model->parameters()) EXPECT_FALSE(parameter.grad().defined());
}

TEST(Diagnose, LeavesWhatIsNotFiniteOutOfItsMessage) {
  Activations seen = Constructed(torch::full({2, 2}, 0.5), torch::full({2, 2}, 0.5));
  seen.experts.push_back({"dead too", -1, false, torch::zeros({2, 2}), torch::full({2, 2}, -1.0), {}});
  seen.gates[0].experts = {0, 1, 2};
  seen.gates[0].weights = torch::full({2, 3}, 1.0 / 3);
  const Tensor labels = torch::zeros({2, 2});
  const Evaluation::Diagnostics message = ToMessage(Diagnose(seen, {"a", "b"}, labels, torch::zeros({2, 2})));
  ASSERT_EQ(message.gate_size(), 2);
  EXPECT_FALSE(message.gate(0).has_deviation_max_ratio());  // the median expert is dead: without limit
  EXPECT_NEAR(message.gate(0).weight_max(), 1.0 / 3, 1e-6);
  EXPECT_EQ(message.expert(1).name(), "dead");
  EXPECT_EQ(message.expert(1).zero_rate(), 1);
  EXPECT_EQ(message.shared(0).tasks_using(), 2u);
  ASSERT_EQ(message.task_size(), 2);
  EXPECT_FALSE(message.task(0).has_positive_rate());  // none of its records is labelled
  EXPECT_FALSE(message.task(0).has_own_weight());     // it has no expert of its own
}

TEST(Observe, GivesTheModelsOwnLogits) {
  for (const Model::Kind kind : {Model::HOME, Model::MMOE, Model::SHARED_BOTTOM}) {
    auto model = MakeModel(TwoByTwo(kind));
    const Tensor v = Sample(9, 12, 5);
    const Tensor logits = model->Forward(v, Phase::kEvaluate, nullptr);
    EXPECT_LT((model->Observe(v).logits - logits).abs().max().item<double>(), 1e-5);
  }
}

}  // namespace
}  // namespace hearth
