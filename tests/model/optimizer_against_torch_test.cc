// The servers' optimizers beside LibTorch's own: a row that is updated in every step moves as a tensor does.
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <memory>

#include "common/base/env.h"
#include "embedding/sparse_optimizer.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

constexpr uint32_t kDim = 9;
constexpr uint32_t kSteps = 50;

using MakeTorch = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<torch::Tensor>)>;

void ExpectTheSamePath(const Optimizer& config, const MakeTorch& make_torch) {
  Random random(3);
  const auto draw = [&random](double scale) { return static_cast<float>((2 * random.Uniform() - 1) * scale); };
  std::vector<float> weights(kDim);
  for (float& weight : weights) weight = draw(0.05);
  torch::Tensor theirs = torch::tensor(weights).requires_grad_();
  const auto torchs = make_torch({theirs});

  const SparseOptimizer ours(config, kDim);
  std::vector<float> state(ours.state_floats());
  ours.InitState(state.data());
  for (uint32_t step = 1; step <= kSteps; ++step) {
    std::vector<float> gradient(kDim);
    for (float& g : gradient) g = draw(step % 7 == 0 ? 10 : 0.1);
    theirs.mutable_grad() = torch::tensor(gradient);
    if (config.clip_norm() > 0) torch::nn::utils::clip_grad_norm_({theirs}, config.clip_norm());
    torchs->step();
    ASSERT_TRUE(ours.Update(weights.data(), state.data(), gradient.data(), step, ours.RateAt(1)));
    for (uint32_t i = 0; i < kDim; ++i) {
      ASSERT_NEAR(weights[i], theirs[i].item<float>(), 2e-6 * (1 + std::abs(weights[i])))
          << "step " << step << ", " << i;
    }
  }
}

TEST(SparseOptimizer, SgdAndMomentumFollowTorchs) {
  for (const bool nesterov : {false, true}) {
    for (const double momentum : {0.0, 0.8}) {
      for (const double weight_decay : {0.0, 0.3}) {
        if (nesterov && momentum == 0) continue;  // Torch refuses it
        Optimizer config;
        config.set_kind(momentum == 0 ? Optimizer::SGD : Optimizer::MOMENTUM);
        config.set_learning_rate(0.03);
        config.set_momentum(momentum);
        config.set_nesterov(nesterov);
        config.set_weight_decay(weight_decay);
        ExpectTheSamePath(config, [=](auto tensors) {
          return std::make_unique<torch::optim::SGD>(
              tensors, torch::optim::SGDOptions(0.03).momentum(momentum).nesterov(nesterov).weight_decay(weight_decay));
        });
      }
    }
  }
}

TEST(SparseOptimizer, AdagradFollowsTorchs) {
  for (const double initial : {0.0, 0.1}) {
    for (const double weight_decay : {0.0, 0.3}) {
      Optimizer config;
      config.set_kind(Optimizer::ADAGRAD);
      config.set_learning_rate(0.05);
      config.set_initial_accumulator(initial);
      config.set_epsilon(1e-8);
      config.set_weight_decay(weight_decay);
      ExpectTheSamePath(config, [=](auto tensors) {
        return std::make_unique<torch::optim::Adagrad>(
            tensors,
            torch::optim::AdagradOptions(0.05).initial_accumulator_value(initial).eps(1e-8).weight_decay(weight_decay));
      });
    }
  }
}

TEST(SparseOptimizer, AdamAndAdamWFollowTorchs) {
  for (const double weight_decay : {0.0, 0.3}) {
    for (const double clip_norm : {0.0, 0.2}) {
      Optimizer config;
      config.set_kind(Optimizer::ADAM);
      config.set_learning_rate(0.01);
      config.set_beta1(0.85);
      config.set_beta2(0.99);
      config.set_epsilon(1e-7);
      config.set_weight_decay(weight_decay);
      config.set_clip_norm(clip_norm);
      const auto betas = std::make_tuple(0.85, 0.99);
      ExpectTheSamePath(config, [=](auto tensors) {
        return std::make_unique<torch::optim::Adam>(
            tensors, torch::optim::AdamOptions(0.01).betas(betas).eps(1e-7).weight_decay(weight_decay));
      });
      config.set_kind(Optimizer::ADAMW);
      ExpectTheSamePath(config, [=](auto tensors) {
        return std::make_unique<torch::optim::AdamW>(
            tensors, torch::optim::AdamWOptions(0.01).betas(betas).eps(1e-7).weight_decay(weight_decay));
      });
    }
  }
}

// Torch has no row-wise Adagrad; on rows of one element it is Adagrad.
TEST(SparseOptimizer, RowwiseAdagradOfAOneColumnRowIsAdagrad) {
  Optimizer rowwise;
  rowwise.set_kind(Optimizer::ROWWISE_ADAGRAD);
  Optimizer adagrad = rowwise;
  adagrad.set_kind(Optimizer::ADAGRAD);
  const SparseOptimizer a(rowwise, 1);
  const SparseOptimizer b(adagrad, 1);
  ASSERT_EQ(a.state_floats(), b.state_floats());
  float weight_a = 0.1f;
  float weight_b = 0.1f;
  std::vector<float> state_a(a.state_floats());
  std::vector<float> state_b(b.state_floats());
  a.InitState(state_a.data());
  b.InitState(state_b.data());
  Random random(4);
  for (uint32_t step = 1; step <= kSteps; ++step) {
    const float gradient = static_cast<float>(random.Uniform() - 0.5);
    ASSERT_TRUE(a.Update(&weight_a, state_a.data(), &gradient, step, a.RateAt(1)));
    ASSERT_TRUE(b.Update(&weight_b, state_b.data(), &gradient, step, b.RateAt(1)));
    ASSERT_NEAR(weight_a, weight_b, 1e-6);
  }
}

}  // namespace
}  // namespace hearth
