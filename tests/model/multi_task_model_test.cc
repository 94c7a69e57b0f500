#include "model/multi_task_model.h"

#include <ATen/record_function.h>

#include <cmath>
#include <map>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

using torch::Tensor;

// Three categories, five tasks; odd sizes, so that no loop meets its vector width.
ModelSpec SmallSpec(Model::Kind kind, bool home_expert = false) {
  ModelSpec spec;
  spec.config.set_kind(kind);
  spec.config.set_home_expert(home_expert);
  spec.config.set_shared_experts_1(2);
  spec.config.set_category_experts_1(3);
  spec.config.set_shared_experts_2(1);
  spec.config.set_category_experts_2(2);
  spec.config.set_task_experts_2(1);
  spec.config.set_hidden_1(7);
  spec.config.set_hidden_2(6);
  spec.config.set_width_1(5);
  spec.config.set_width_2(4);
  spec.config.set_gate_subspaces(3);
  spec.config.set_gate_rank_1(4);
  spec.config.set_gate_rank_2(2);
  spec.config.set_tower_hidden(6);
  spec.config.set_experts(4);
  spec.width = 19;
  spec.tasks = {"click", "long.view", "like", "follow", "buy"};
  spec.category_of = {0, 0, 1, 1, 2};
  spec.categories = {"watch", "inter", "shop"};
  spec.base_rates = {0.4, 0.2, 0.01, 0.002, 0.03};
  return spec;
}

std::vector<ModelSpec> AllModels() {
  ModelSpec two = SmallSpec(Model::HOME);
  two.config.set_task_experts_2(2);  // the self gate of level 2 is a softmax
  two.config.set_shared_experts_1(1);
  two.config.set_gate_subspaces(1);
  ModelSpec one = SmallSpec(Model::MMOE, true);
  one.config.set_experts(1);
  return {SmallSpec(Model::HOME),
          two,
          SmallSpec(Model::MMOE),
          SmallSpec(Model::MMOE, true),
          one,
          SmallSpec(Model::SHARED_BOTTOM),
          SmallSpec(Model::SHARED_BOTTOM, true)};
}
std::string NameOf(const ModelSpec& spec) {
  return Model::Kind_Name(spec.config.kind()) + (spec.config.home_expert() ? "*" : "");
}

// Moves every parameter and running statistic away from its special start (A = 0, weight 1, …), by name.
void Disturb(MultiTaskModel* model) {
  torch::NoGradGuard no_grad;
  const auto disturb = [](const std::string& name, Tensor tensor, double least) {
    Random random(SeedOf(17, name));
    Tensor noise = torch::empty(tensor.sizes(), torch::kFloat64);
    for (int64_t i = 0; i < noise.numel(); ++i) noise.data_ptr<double>()[i] = random.Uniform() - 0.5 + least;
    tensor.add_(noise.to(tensor.options()));
  };
  for (auto& parameter : model->named_parameters()) disturb(parameter.key(), parameter.value(), 0);
  for (auto& buffer : model->named_buffers()) disturb(buffer.key(), buffer.value(), 0.5);
}

Tensor RandomTensor(std::vector<int64_t> shape, uint64_t seed, torch::Dtype dtype = torch::kFloat64) {
  Tensor tensor = torch::empty(shape, torch::kFloat64);
  Random random(seed);
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.data_ptr<double>()[i] = 3 * random.Uniform() - 1.5;
  return tensor.to(dtype);
}

// The forms that are compared with the module-by-module one.
struct Composed {
  const char* name;
  std::shared_ptr<MultiTaskModel> (*make)(const ModelSpec&);
};
constexpr Composed kComposed[] = {{"fused", MakeModel}, {"batched", MakeBatchedModel}};

double Difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

struct Step {
  Tensor logits;
  Tensor dv;
  BatchMoments moments;
};
Step RunStep(MultiTaskModel* model, Tensor v, Phase phase, const Tensor& direction) {
  Step step;
  v = v.detach().clone().requires_grad_();
  model->zero_grad();
  step.logits = model->Forward(v, phase, phase == Phase::kTrain ? &step.moments : nullptr);
  (step.logits * direction).sum().backward();
  step.dv = v.grad().clone();
  const Tensor& fetched = step.moments.on_device;
  if (fetched.defined()) {
    EXPECT_TRUE(step.moments.mean.empty() && step.moments.m2.empty());
    EXPECT_EQ(fetched.sizes(), (at::IntArrayRef{2, model->batch_norm_columns()}));
    const float* data = fetched.data_ptr<float>();
    step.moments.mean.assign(data, data + fetched.size(1));
    step.moments.m2.assign(data + fetched.size(1), data + 2 * fetched.size(1));
  }
  return step;
}

// Parameters, gradients and moments of one step in double beside those of the module-by-module form.
void ExpectEqualsModuleByModule(MultiTaskModel* model, const ModelSpec& spec, Phase phase, int64_t records) {
  auto reference = MakeReferenceModel(spec);
  model->to(torch::kFloat64);
  reference->to(torch::kFloat64);
  Disturb(model);
  Disturb(reference.get());
  const Tensor v = RandomTensor({records, spec.width}, 3);
  const Tensor direction = RandomTensor({records, 5}, 4);
  const Step a = RunStep(model, v, phase, direction);
  const Step b = RunStep(reference.get(), v, phase, direction);
  EXPECT_LT(Difference(a.logits, b.logits), 1e-11);
  // Two records differ in a column by little now and then: 1/deviation amplifies rounding.
  const double tolerance = records == 2 ? 1e-6 : 1e-9;
  EXPECT_LT(Difference(a.dv, b.dv), tolerance);
  const auto theirs = reference->named_parameters();
  for (const auto& parameter : model->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    EXPECT_LT(Difference(parameter.value().grad(), theirs[parameter.key()].grad()), tolerance) << parameter.key();
  }
  EXPECT_EQ(a.moments.count, b.moments.count);
  ASSERT_EQ(a.moments.mean.size(), b.moments.mean.size());
  for (size_t c = 0; c < a.moments.mean.size(); ++c) {
    EXPECT_NEAR(a.moments.mean[c], b.moments.mean[c], 1e-6);
    EXPECT_NEAR(a.moments.m2[c], b.moments.m2[c], 1e-5 * (1 + b.moments.m2[c]));
  }
}

TEST(MultiTaskModel, FusedAndBatchedEqualModuleByModuleInValuesGradientsAndMoments) {
  for (const Composed& composed : kComposed) {
    for (const ModelSpec& spec : AllModels()) {
      for (const Phase phase : {Phase::kTrain, Phase::kEvaluate}) {
        for (const int64_t records : {1, 2, 37, 300}) {
          SCOPED_TRACE(testing::Message() << composed.name << " " << NameOf(spec) << ", " << records << " records");
          ExpectEqualsModuleByModule(composed.make(spec).get(), spec, phase, records);
        }
      }
    }
  }
}

TEST(MultiTaskModel, FusedAndBatchedEqualModuleByModuleInFloatToo) {
  for (const Composed& composed : kComposed) {
    for (const ModelSpec& spec : AllModels()) {
      SCOPED_TRACE(testing::Message() << composed.name << " " << NameOf(spec));
      auto model = composed.make(spec);
      auto reference = MakeReferenceModel(spec);
      Disturb(model.get());
      Disturb(reference.get());
      const Tensor v = RandomTensor({129, spec.width}, 5, torch::kFloat32);
      const Tensor direction = RandomTensor({129, 5}, 6, torch::kFloat32);
      const Step a = RunStep(model.get(), v, Phase::kTrain, direction);
      const Step b = RunStep(reference.get(), v, Phase::kTrain, direction);
      EXPECT_LT(Difference(a.logits, b.logits), 2e-5);
      const auto theirs = reference->named_parameters();
      for (const auto& parameter : model->named_parameters()) {
        const Tensor other = theirs[parameter.key()].grad();
        EXPECT_LT(Difference(parameter.value().grad(), other), 1e-4 * (1 + other.abs().max().item<double>()))
            << parameter.key();
      }
      for (size_t c = 0; c < a.moments.mean.size(); ++c) {
        EXPECT_NEAR(a.moments.mean[c], b.moments.mean[c], 1e-5);
        EXPECT_NEAR(a.moments.m2[c], b.moments.m2[c], 1e-4 * (1 + b.moments.m2[c]));
      }
    }
  }
}

// Of the whole: single elements may move by more, where rounding turns a ReLU on or off.
double RelativeDifference(const Tensor& a, const Tensor& b) { return ((a - b).norm() / b.norm()).item<double>(); }
Tensor AllGradients(const MultiTaskModel& model) {
  std::vector<Tensor> gradients;
  for (const Tensor& parameter : model.parameters()) gradients.push_back(parameter.grad().flatten());
  return torch::cat(gradients);
}

TEST(BatchedModel, ProductsOfBfloat16AreNearThoseOfFloat32) {
  for (const ModelSpec& spec : AllModels()) {
    SCOPED_TRACE(NameOf(spec));
    ModelSpec rounded_spec = spec;
    rounded_spec.products = torch::kBFloat16;
    auto exact = MakeBatchedModel(spec);
    auto rounded = MakeBatchedModel(rounded_spec);
    Disturb(exact.get());
    Disturb(rounded.get());
    const Tensor v = RandomTensor({129, spec.width}, 5, torch::kFloat32);
    const Tensor direction = RandomTensor({129, 5}, 6, torch::kFloat32);
    const Step a = RunStep(rounded.get(), v, Phase::kTrain, direction);
    const Step b = RunStep(exact.get(), v, Phase::kTrain, direction);
    EXPECT_EQ(a.logits.scalar_type(), torch::kFloat32);
    EXPECT_LT(RelativeDifference(a.logits, b.logits), 0.01);
    EXPECT_GT(Difference(a.logits, b.logits), 0);  // it did take bfloat16
    EXPECT_LT(RelativeDifference(a.dv, b.dv), 0.25);
    EXPECT_LT(RelativeDifference(AllGradients(*rounded), AllGradients(*exact)), 0.25);
    for (size_t c = 0; c < a.moments.mean.size(); ++c) {
      EXPECT_NEAR(a.moments.mean[c], b.moments.mean[c], 0.03);
      EXPECT_NEAR(a.moments.m2[c], b.moments.m2[c], 0.05 * (1 + b.moments.m2[c]));
    }
  }
}

TEST(MultiTaskModel, OnlyTheBatchedPartsRoundTheirFactors) {
  for (const ModelSpec& spec : AllModels()) {
    ModelSpec rounded = spec;
    rounded.products = torch::kBFloat16;
    const Tensor v = RandomTensor({16, spec.width}, 5, torch::kFloat32);
    for (const auto make : {MakeModel, MakeReferenceModel}) {
      EXPECT_TRUE(torch::equal(make(rounded)->Forward(v, Phase::kEvaluate, nullptr),
                               make(spec)->Forward(v, Phase::kEvaluate, nullptr)));
    }
  }
}

// How often each of Torch's operations runs on this thread in a step, those that an operation calls included.
std::map<std::string, int> OperationsOf(MultiTaskModel* model, Phase phase, int64_t records) {
  static std::map<std::string, int> operations;  // a callback is a plain function
  operations.clear();
  const Tensor v = RandomTensor({records, 19}, 3, torch::kFloat32).requires_grad_();
  BatchMoments moments;
  const auto count = [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
    ++operations[function.name()];
    return nullptr;
  };
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(count).scopes({at::RecordScope::FUNCTION}));
  model->Forward(v, phase, &moments).sum().backward();
  at::removeCallback(handle);
  return operations;
}

// On a device each of these would wait for all that was launched.
TEST(BatchedModel, ForwardAndBackwardAskForNoValue) {
  for (const ModelSpec& spec : AllModels()) {
    for (const Phase phase : {Phase::kTrain, Phase::kEvaluate}) {
      for (const int64_t records : {1, 37}) {
        SCOPED_TRACE(testing::Message() << NameOf(spec) << ", " << records << " records");
        const std::map<std::string, int> operations = OperationsOf(MakeBatchedModel(spec).get(), phase, records);
        EXPECT_EQ(operations.count("aten::relu"), 1u);
        for (const char* name : {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
                                 "aten::equal", "aten::masked_select"}) {
          EXPECT_EQ(operations.count(name), 0u) << name;
        }
      }
    }
  }
}

TEST(BatchedModel, ItsOperationsAreAsManyForTwoExpertsAndSubspacesAsForMore) {
  for (const Model::Kind kind : {Model::HOME, Model::MMOE}) {
    ModelSpec few = SmallSpec(kind, true);
    few.config.set_experts(2);
    few.config.set_shared_experts_1(2);
    few.config.set_category_experts_1(2);
    few.config.set_shared_experts_2(2);
    few.config.set_task_experts_2(2);
    few.config.set_gate_subspaces(2);
    ModelSpec many = few;
    many.config.set_experts(9);
    many.config.set_shared_experts_1(8);
    many.config.set_category_experts_1(7);
    many.config.set_shared_experts_2(6);
    many.config.set_category_experts_2(5);
    many.config.set_task_experts_2(4);
    many.config.set_gate_subspaces(3);
    std::map<std::string, int> of_few = OperationsOf(MakeBatchedModel(few).get(), Phase::kTrain, 37);
    std::map<std::string, int> of_many = OperationsOf(MakeBatchedModel(many).get(), Phase::kTrain, 37);
    EXPECT_GT(of_few["aten::baddbmm"], 0);
    for (const char* name : {"aten::addmm", "aten::baddbmm", "aten::bmm", "aten::mm", "aten::cat", "aten::mul",
                             "aten::sum", "aten::relu", "aten::_softmax", "aten::native_batch_norm"}) {
      EXPECT_EQ(of_few[name], of_many[name]) << name;
    }
  }
}

TEST(BatchedModel, LeavesNoMomentsWhereThereIsNoBatchNormAndNoneOfTheCallBefore) {
  auto with = MakeBatchedModel(SmallSpec(Model::MMOE, true));
  auto without = MakeBatchedModel(SmallSpec(Model::MMOE));
  const Tensor v = RandomTensor({8, 19}, 3, torch::kFloat32);
  BatchMoments moments;
  with->Forward(v, Phase::kTrain, &moments);
  EXPECT_TRUE(moments.on_device.defined());
  EXPECT_FALSE(moments.on_device.requires_grad());
  without->Forward(v, Phase::kTrain, &moments);
  EXPECT_FALSE(moments.on_device.defined());
  EXPECT_EQ(moments.count, 8);
}

TEST(MultiTaskModel, GradientsAgreeWithFiniteDifferences) {
  for (const ModelSpec& spec : AllModels()) {
    for (const Phase phase : {Phase::kTrain, Phase::kEvaluate}) {
      SCOPED_TRACE(NameOf(spec));
      auto model = MakeModel(spec);
      model->to(torch::kFloat64);
      Disturb(model.get());
      const Tensor v = RandomTensor({11, spec.width}, 7);
      const Tensor direction = RandomTensor({11, 5}, 8);
      const Step step = RunStep(model.get(), v, phase, direction);
      torch::NoGradGuard no_grad;
      BatchMoments moments;
      const auto value = [&](const Tensor& input) {
        return (model->Forward(input, phase, &moments) * direction).sum().item<double>();
      };
      Random random(9);
      const auto check = [&](const std::string& name, Tensor place, const Tensor& gradient, const Tensor& input) {
        for (int trial = 0; trial < 4; ++trial) {
          const int64_t i = static_cast<int64_t>(random.Below(place.numel()));
          double* x = place.data_ptr<double>() + i;
          const double before = *x;
          const double h = 1e-6;
          *x = before + h;
          const double up = value(input);
          *x = before - h;
          const double down = value(input);
          *x = before;
          const double expected = (up - down) / (2 * h);
          EXPECT_NEAR(gradient.contiguous().data_ptr<double>()[i], expected, 2e-6 * (1 + std::abs(expected)))
              << name << "[" << i << "]";
        }
      };
      for (const auto& parameter : model->named_parameters()) {
        check(parameter.key(), parameter.value(), parameter.value().grad(), v);
      }
      Tensor moved = v.clone();
      check("v", moved, step.dv, moved);
    }
  }
}

// docs/MODEL.md §2: a loss on a task of one category gives exactly zero gradient to the other categories' level-2 parts
// and to other tasks' experts, while their level-1 experts still receive gradient through z_shared.
TEST(Home, HierarchyMaskLetsATasksGradientReachWhatItMayAndNothingElse) {
  const ModelSpec spec = SmallSpec(Model::HOME);
  for (const auto make : {MakeModel, MakeReferenceModel, MakeBatchedModel}) {
    auto model = make(spec);
    Disturb(model.get());
    const Tensor v = RandomTensor({64, spec.width}, 10, torch::kFloat32);
    BatchMoments moments;
    model->Forward(v, Phase::kTrain, &moments).select(1, 2).sum().backward();  // "like", of category inter
    const auto starts_with = [](const std::string& name, const std::string& prefix) {
      return name.rfind(prefix, 0) == 0;
    };
    int reached = 0;
    int untouched = 0;
    for (const auto& parameter : model->named_parameters()) {
      const std::string& name = parameter.key();
      const bool own = starts_with(name, "level1.") || starts_with(name, "level2.shared.") ||
                       starts_with(name, "level2.category.inter.") || starts_with(name, "level2.task.like.") ||
                       starts_with(name, "tower.like.");
      const Tensor gradient = parameter.value().grad();
      const double largest = gradient.defined() ? gradient.abs().max().item<double>() : 0;
      // A category's mixture z_c is read by its own tasks alone; so are its gates over z_c.
      const bool other_gates = starts_with(name, "level1.category.") && !starts_with(name, "level1.category.inter.") &&
                               (name.find(".gate.") != std::string::npos || name.find(".self.") != std::string::npos);
      if (own && !other_gates) {
        EXPECT_GT(largest, 0) << name;
        ++reached;
      } else {
        EXPECT_EQ(largest, 0) << name;
        ++untouched;
      }
    }
    EXPECT_GT(reached, 40);
    EXPECT_GT(untouched, 40);
  }
}

TEST(MultiTaskModel, CostOfTheDocumentedExampleIsTheDocumentedOne) {
  ModelSpec spec;
  spec.width = 1024;
  spec.config.set_width_1(256);
  spec.config.set_width_2(256);
  spec.config.set_hidden_1(512);
  spec.config.set_hidden_2(256);
  spec.config.set_tower_hidden(128);
  spec.config.set_gate_rank_1(32);
  spec.config.set_gate_rank_2(16);
  for (int task = 0; task < 8; ++task) {
    spec.tasks.push_back("task" + std::to_string(task));
    spec.category_of.push_back(task < 6 ? 0 : 1);
    spec.base_rates.push_back(0.1);
  }
  spec.categories = {"watch", "inter"};
  struct Documented {
    Model::Kind kind;
    double multiply_adds, parameters;
  };
  for (const Documented& row : {Documented{Model::HOME, 6.66e6, 6.677e6}, Documented{Model::MMOE, 5.57e6, 5.579e6},
                                Documented{Model::SHARED_BOTTOM, 0.92e6, 0.920e6}}) {
    spec.config.set_kind(row.kind);
    const ModelCost cost = CostOf(spec);
    EXPECT_NEAR(cost.multiply_adds, row.multiply_adds, 0.005e6);
    EXPECT_NEAR(cost.parameters, row.parameters, 0.0006e6);
    EXPECT_EQ(MakeModel(spec)->ParameterCount(), cost.parameters);
  }
}

TEST(MultiTaskModel, ClosedFormsCountWhatTheModelsHold) {
  for (const ModelSpec& spec : AllModels()) {
    EXPECT_EQ(MakeModel(spec)->ParameterCount(), CostOf(spec).parameters) << NameOf(spec);
    EXPECT_EQ(MakeReferenceModel(spec)->ParameterCount(), CostOf(spec).parameters) << NameOf(spec);
    // Every weight matrix is used once a sample and has one multiply-add an element; vectors are biases and
    // BatchNorm's.
    int64_t matrices = 0;
    for (const Tensor& parameter : MakeModel(spec)->parameters())
      matrices += parameter.dim() > 1 ? parameter.numel() : 0;
    EXPECT_EQ(matrices, CostOf(spec).multiply_adds) << NameOf(spec);
  }
}

// One expert whose BatchNorm torch's own can stand beside.
TEST(LaneBatchNorm, EqualsTorchsBatchNormInOutputsGradientsAndRunningStatistics) {
  ModelSpec spec = SmallSpec(Model::SHARED_BOTTOM, true);
  spec.config.set_batch_norm_momentum(0.1);
  auto model = MakeModel(spec);
  model->to(torch::kFloat64);
  Disturb(model.get());
  auto named = model->named_parameters();
  auto buffers = model->named_buffers();
  torch::nn::BatchNorm1d norm(torch::nn::BatchNorm1dOptions(5).momentum(0.1).eps(1e-5));
  norm->to(torch::kFloat64);
  {
    torch::NoGradGuard no_grad;
    norm->weight.copy_(named["bottom.norm_weight"]);
    norm->bias.copy_(named["bottom.norm_bias"]);
    norm->running_mean.copy_(buffers["bottom.running_mean"]);
    norm->running_var.copy_(buffers["bottom.running_var"]);
  }
  const auto expected_logits = [&](const Tensor& v) {
    const Tensor hidden = torch::relu(torch::linear(v, named["bottom.hidden_weight"], named["bottom.hidden_bias"]));
    const Tensor a = norm->forward(torch::matmul(hidden, named["bottom.output_weight"][0].t()));
    const Tensor h = a * torch::sigmoid(a);
    const Tensor tower =
        torch::relu(torch::linear(h, named["tower.like.hidden.weight"], named["tower.like.hidden.bias"]));
    return torch::linear(tower, named["tower.like.output.weight"], named["tower.like.output.bias"]).select(1, 0);
  };
  for (int step = 0; step < 4; ++step) {
    const Tensor v = RandomTensor({23, spec.width}, 20 + step);
    BatchMoments moments;
    model->zero_grad();
    const Tensor logits = model->Forward(v, Phase::kTrain, &moments).select(1, 2);
    logits.pow(2).sum().backward();
    const Tensor gradient = named["bottom.hidden_weight"].grad().clone();
    const Tensor norm_gradient = named["bottom.norm_weight"].grad().clone();
    model->zero_grad();
    norm->zero_grad();
    norm->train();
    const Tensor expected = expected_logits(v);
    expected.pow(2).sum().backward();
    EXPECT_LT(Difference(logits, expected), 1e-12);
    EXPECT_LT(Difference(gradient, named["bottom.hidden_weight"].grad()), 1e-10);
    EXPECT_LT(Difference(norm_gradient, norm->weight.grad()), 1e-10);
    model->UpdateRunningStatistics(moments, step + 1);
    // The moments travel in float.
    EXPECT_LT(Difference(buffers["bottom.running_mean"], norm->running_mean), 1e-6);
    EXPECT_LT(Difference(buffers["bottom.running_var"], norm->running_var), 1e-5);
    norm->eval();
    const Tensor evaluated = model->Forward(v, Phase::kEvaluate, nullptr).select(1, 2);
    EXPECT_LT(Difference(evaluated, expected_logits(v)), 1e-5);
  }
}

// In numbers: what each of 2,000 steps weighs in the end. Drawn by the rule itself, for a column whose k-th batch has
// mean k and variance k.
TEST(LaneBatchNorm, RunningStatisticsForgetTheStartAndSpanAWindowOfRecords) {
  ModelSpec spec = SmallSpec(Model::SHARED_BOTTOM, true);
  spec.config.set_batch_norm_window_records(6400);
  auto model = MakeModel(spec);
  const auto buffers = model->named_buffers();
  const Tensor mean = buffers["bottom.running_mean"], variance = buffers["bottom.running_var"];
  const size_t columns = static_cast<size_t>(model->batch_norm_columns());
  const auto step = [&](int k) {
    BatchMoments moments;
    moments.count = 64;
    moments.mean.assign(columns, static_cast<float>(k));
    moments.m2.assign(columns, static_cast<float>(k) * 63);
    model->UpdateRunningStatistics(moments, k);
  };
  step(1);  // what a fresh model starts with, 0 and 1, has no part in it
  EXPECT_EQ(mean[0].item<float>(), 1);
  EXPECT_EQ(variance[0].item<float>(), 1);
  for (int k = 2; k <= 80; ++k) step(k);
  // Young: the mean age is about a ninth of the steps so far.
  EXPECT_NEAR(mean[0].item<float>(), 80 - 80 / 9.0, 2);
  for (int k = 81; k <= 2000; ++k) step(k);
  // Grown: a window of 6400 / 64 = 100 steps, so the mean age of what is in it is 99.
  EXPECT_NEAR(mean[0].item<float>(), 2000 - 99, 0.5);
  EXPECT_NEAR(variance[0].item<float>(), 2000 - 99, 0.5);
}

TEST(LaneBatchNorm, AStepOfMoreRecordsThanTheWindowIsAllThereIs) {
  Model config;
  EXPECT_EQ(RunningShare(config, 65536, 1000), 1);
  EXPECT_EQ(RunningShare(config, 4096, 1000), 0.25);
  EXPECT_EQ(RunningShare(config, 16, 1), 1);
  config.set_batch_norm_momentum(0.01);
  EXPECT_EQ(RunningShare(config, 65536, 1), 0.01);
}

TEST(LaneBatchNorm, ALoneRecordIsNormalisedByRunningStatistics) {
  const ModelSpec spec = SmallSpec(Model::HOME);
  auto model = MakeModel(spec);
  Disturb(model.get());
  const Tensor v = RandomTensor({1, spec.width}, 30, torch::kFloat32);
  BatchMoments moments;
  const Tensor trained = model->Forward(v, Phase::kTrain, &moments);
  const Tensor evaluated = model->Forward(v, Phase::kEvaluate, nullptr);
  EXPECT_TRUE(torch::equal(trained, evaluated));
  EXPECT_EQ(moments.count, 1);
  EXPECT_EQ(static_cast<int64_t>(moments.mean.size()), model->batch_norm_columns());
  EXPECT_EQ(moments.m2, std::vector<float>(model->batch_norm_columns(), 0.0f));
  const Tensor before = model->named_buffers()["level1.shared.expert.running_mean"].clone();
  model->UpdateRunningStatistics(moments, 1);  // count 1: nothing to estimate a variance from
  EXPECT_TRUE(torch::equal(before, model->named_buffers()["level1.shared.expert.running_mean"]));
}

TEST(LaneBatchNorm, ForwardLeavesRunningStatisticsAlone) {
  auto model = MakeModel(SmallSpec(Model::HOME));
  std::map<std::string, Tensor> before;
  for (const auto& buffer : model->named_buffers()) before[buffer.key()] = buffer.value().clone();
  BatchMoments moments;
  model->Forward(RandomTensor({40, 19}, 31, torch::kFloat32), Phase::kTrain, &moments);
  for (const auto& buffer : model->named_buffers()) EXPECT_TRUE(torch::equal(before[buffer.key()], buffer.value()));
  model->UpdateRunningStatistics(moments, 1);
  for (const auto& buffer : model->named_buffers()) EXPECT_FALSE(torch::equal(before[buffer.key()], buffer.value()));
}

TEST(PoolMoments, EqualsTheMomentsOfTheConcatenatedBatch) {
  Random random(40);
  const int64_t columns = 7;
  std::vector<std::vector<double>> all;
  std::vector<BatchMoments> lanes;
  for (const int records : {5, 0, 1, 12, 3}) {
    std::vector<std::vector<double>> own;
    for (int i = 0; i < records; ++i) {
      own.emplace_back();
      for (int64_t c = 0; c < columns; ++c) own.back().push_back(100 * c + random.Uniform());
    }
    BatchMoments lane;
    lane.count = records;
    for (int64_t c = 0; c < columns && records > 0; ++c) {
      double mean = 0;
      double m2 = 0;
      for (const auto& record : own) mean += record[c] / records;
      for (const auto& record : own) m2 += (record[c] - mean) * (record[c] - mean);
      lane.mean.push_back(static_cast<float>(mean));
      lane.m2.push_back(static_cast<float>(m2));
    }
    lanes.push_back(lane);
    all.insert(all.end(), own.begin(), own.end());
  }
  const BatchMoments pooled = PoolMoments(lanes);
  EXPECT_EQ(pooled.count, 21);
  for (int64_t c = 0; c < columns; ++c) {
    double mean = 0;
    double m2 = 0;
    for (const auto& record : all) mean += record[c] / 21;
    for (const auto& record : all) m2 += (record[c] - mean) * (record[c] - mean);
    EXPECT_NEAR(pooled.mean[c], mean, 1e-4);
    EXPECT_NEAR(pooled.m2[c], m2, 1e-3 * m2);
  }
  EXPECT_EQ(PoolMoments({}).count, 0);
  EXPECT_EQ(PoolMoments({lanes[0]}).m2, lanes[0].m2);
}

TEST(MultiTaskLoss, IsTheWeightedSumOverUnmaskedLabels) {
  const Tensor logits = torch::tensor({{0.5, -2.0}, {3.0, 90.0}, {-1.0, 0.0}}, torch::kFloat64).requires_grad_();
  const Tensor labels = torch::tensor({{1.0, 0.0}, {0.0, 0.0}, {1.0, 1.0}}, torch::kFloat64);
  const Tensor mask = torch::tensor({{1.0, 1.0}, {1.0, 0.0}, {0.0, 1.0}}, torch::kFloat64);
  const Tensor weights = torch::tensor({2.0, 0.5}, torch::kFloat64);
  const auto cross_entropy = [](double logit, double label) {
    const double p = 1 / (1 + std::exp(-logit));
    return -(label * std::log(p) + (1 - label) * std::log(1 - p));
  };
  const double expected =
      2 * (cross_entropy(0.5, 1) + cross_entropy(3, 0)) + 0.5 * (cross_entropy(-2, 0) + cross_entropy(0, 1));
  const Tensor loss = MultiTaskLoss(logits, labels, mask, weights);
  EXPECT_NEAR(loss.item<double>(), expected, 1e-12);
  loss.backward();
  EXPECT_EQ(logits.grad()[1][1].item<double>(), 0);  // masked: exactly nothing
  EXPECT_EQ(logits.grad()[2][0].item<double>(), 0);
  EXPECT_NEAR(logits.grad()[0][0].item<double>(), 2 * (1 / (1 + std::exp(-0.5)) - 1), 1e-12);
}

// Names that look like parts of a model are names all the same.
TEST(GroupOf, TellsEveryParameterOfEveryModelByItsName) {
  using Group = DenseOptimizer::Group;
  for (ModelSpec spec : AllModels()) {
    spec.tasks = {"gate", "norm_weight", "tower", "hidden_weight", "expert"};
    spec.categories = {"gate", "expert", "self"};
    std::map<Group::Match, int64_t> elements;
    const std::shared_ptr<MultiTaskModel> model = MakeModel(spec);
    for (const auto& item : model->named_parameters()) {
      elements[GroupOf(item.key())] += item.value().numel();
    }
    EXPECT_EQ(elements[Group::BATCH_NORM], 2 * model->batch_norm_columns()) << NameOf(spec);
    const auto kind = spec.config.kind();
    EXPECT_EQ(elements[Group::GATES] == 0, kind == Model::SHARED_BOTTOM) << NameOf(spec);
    const int64_t in = kind == Model::HOME ? spec.config.width_2() : spec.config.width_1();
    const int64_t tower = spec.config.tower_hidden() * (in + 2) + 1;
    EXPECT_EQ(elements[Group::TOWERS], 5 * tower) << NameOf(spec);
    if (kind == Model::MMOE) {
      EXPECT_EQ(elements[Group::GATES], 5 * spec.config.experts() * (spec.width + 1)) << NameOf(spec);
    }
  }
}

TEST(Initialisation, SameSpecSameBitsAndAnotherSeedOthers) {
  for (const ModelSpec& spec : AllModels()) {
    auto a = MakeModel(spec);
    auto b = MakeReferenceModel(spec);
    ModelSpec other_spec = spec;
    other_spec.seed = 2;
    auto c = MakeModel(other_spec);
    const auto in_b = b->named_parameters();
    const auto in_c = c->named_parameters();
    ASSERT_EQ(a->named_parameters().size(), in_b.size());
    for (const auto& parameter : a->named_parameters()) {
      EXPECT_TRUE(torch::equal(parameter.value(), in_b[parameter.key()])) << parameter.key();
      const bool drawn = parameter.value().numel() > 1 && parameter.value().std().item<double>() > 0;
      if (drawn) {
        EXPECT_FALSE(torch::equal(parameter.value(), in_c[parameter.key()])) << parameter.key();
      }
    }
  }
}

TEST(Initialisation, AParametersValuesDoNotDependOnOtherModules) {
  ModelSpec small = SmallSpec(Model::HOME);
  ModelSpec large = small;
  large.tasks.push_back("share");
  large.category_of.push_back(1);
  large.base_rates.push_back(0.1);
  const auto in_large = MakeModel(large)->named_parameters();
  for (const auto& parameter : MakeModel(small)->named_parameters()) {
    EXPECT_TRUE(torch::equal(parameter.value(), in_large[parameter.key()])) << parameter.key();
  }
}

TEST(Initialisation, FollowsTheSpecification) {
  const ModelSpec spec = SmallSpec(Model::HOME);
  const auto named = MakeModel(spec)->named_parameters();
  const auto bound_of = [&](const std::string& name) { return named[name].abs().max().item<double>(); };
  EXPECT_EQ(bound_of("level1.shared.feature_gate.up"), 0);
  EXPECT_LE(bound_of("level1.shared.feature_gate.down"), 1 / std::sqrt(19.0));
  EXPECT_GT(bound_of("level1.shared.feature_gate.down"), 0.9 / std::sqrt(19.0));
  EXPECT_LE(bound_of("level1.category.watch.expert.hidden_weight"), 1 / std::sqrt(19.0));
  EXPECT_LE(bound_of("level1.category.watch.expert.output_weight"), 1 / std::sqrt(7.0));
  EXPECT_GT(bound_of("level1.category.watch.expert.output_weight"), 0.9 / std::sqrt(7.0));
  EXPECT_TRUE(torch::equal(named["level2.task.buy.expert.norm_weight"], torch::ones({4})));
  EXPECT_TRUE(torch::equal(named["level2.task.buy.expert.norm_bias"], torch::zeros({4})));
  EXPECT_TRUE(named.contains("level2.task.long%2eview.gate.weight"));
}

TEST(Initialisation, ModelStartsAsIfWithoutFeatureGates) {
  ModelSpec spec = SmallSpec(Model::HOME);
  ModelSpec other = spec;
  other.config.set_gate_subspaces(1);
  other.config.set_gate_rank_1(1);
  other.config.set_gate_rank_2(1);
  const Tensor v = RandomTensor({16, spec.width}, 50, torch::kFloat32);
  const Tensor a = MakeModel(spec)->Forward(v, Phase::kEvaluate, nullptr);
  const Tensor b = MakeModel(other)->Forward(v, Phase::kEvaluate, nullptr);
  EXPECT_LT(Difference(a, b), 1e-5);
}

TEST(Initialisation, LastBiasesAreTheLogitsOfTheBaseRates) {
  ModelSpec spec = SmallSpec(Model::MMOE);
  spec.base_rates[4] = 0;  // no positive in the counted head: clamped
  const auto named = MakeModel(spec)->named_parameters();
  EXPECT_NEAR(named["tower.click.output.bias"].item<double>(), std::log(0.4 / 0.6), 1e-6);
  EXPECT_NEAR(named["tower.follow.output.bias"].item<double>(), std::log(0.002 / 0.998), 1e-6);
  EXPECT_NEAR(named["tower.buy.output.bias"].item<double>(), std::log(1e-6 / (1 - 1e-6)), 1e-5);
}

TEST(MakeModelSpec, TakesCategoriesInOrderOfAppearanceAndTheLayoutsWidth) {
  Job job;
  job.set_seed(5);
  Table* table = job.add_table();
  table->set_name("t");
  table->set_dim(8);
  for (const char* name : {"a", "b"}) {
    Slot* slot = job.add_slot();
    slot->set_name(name);
    slot->set_table("t");
  }
  job.add_dense()->set_name("x");
  for (const auto& [name, category] :
       std::vector<std::pair<std::string, std::string>>{{"like", "inter"}, {"click", "watch"}, {"follow", "inter"}}) {
    Task* task = job.add_task();
    task->set_name(name);
    task->set_category(category);
  }
  const ModelSpec spec = MakeModelSpec(job, {0.1, 0.2, 0.3});
  EXPECT_EQ(spec.width, 17);
  EXPECT_EQ(spec.tasks, (std::vector<std::string>{"like", "click", "follow"}));
  EXPECT_EQ(spec.categories, (std::vector<std::string>{"inter", "watch"}));
  EXPECT_EQ(spec.category_of, (std::vector<int>{0, 1, 0}));
  EXPECT_EQ(spec.seed, SeedOf(5, "dense_init"));
}

TEST(MultiTaskModel, NonFiniteInputShowsInTheLogits) {
  for (const ModelSpec& spec : AllModels()) {
    Tensor v = RandomTensor({8, spec.width}, 60, torch::kFloat32);
    v[3][2] = std::nanf("");
    for (const Composed& composed : kComposed) {
      BatchMoments moments;
      EXPECT_FALSE(torch::isfinite(composed.make(spec)->Forward(v, Phase::kTrain, &moments)).all().item<bool>());
    }
  }
}

TEST(MultiTaskModel, TheSameStepTwiceGivesTheSameBits) {
  for (const ModelSpec& spec : AllModels()) {
    const Tensor v = RandomTensor({1500, spec.width}, 61, torch::kFloat32);
    const Tensor direction = RandomTensor({1500, 5}, 62, torch::kFloat32);
    auto one = MakeModel(spec);
    auto other = MakeModel(spec);
    const Step a = RunStep(one.get(), v, Phase::kTrain, direction);
    const Step b = RunStep(other.get(), v.clone(), Phase::kTrain, direction);
    EXPECT_TRUE(torch::equal(a.logits, b.logits));
    EXPECT_TRUE(torch::equal(a.dv, b.dv));
    EXPECT_EQ(a.moments.mean, b.moments.mean);
    EXPECT_EQ(a.moments.m2, b.moments.m2);
    const auto theirs = other->named_parameters();
    for (const auto& parameter : one->named_parameters()) {
      EXPECT_TRUE(torch::equal(parameter.value().grad(), theirs[parameter.key()].grad())) << parameter.key();
    }
  }
}

}  // namespace
}  // namespace hearth
