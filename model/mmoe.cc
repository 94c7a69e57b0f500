#include "model/mmoe.h"

#include <numeric>

namespace hearth {
namespace {

using torch::Tensor;

class Mmoe : public StackedModel {
 public:
  Mmoe(const ModelSpec& spec, Form form) : StackedModel(spec, form) {
    const Model& config = spec.config;
    experts_ =
        MakeExperts("expert", config.experts(), spec.width, config.hidden_1(), config.width_1(), config.home_expert());
    for (size_t task = 0; task < spec.tasks.size(); ++task) {
      const std::string step = PathStep(spec.tasks[task]);
      gates_.push_back(MakeAffine(&tree_, "gate." + step, spec.width, config.experts()));
      towers_.push_back(
          MakeTower(&tree_, "tower." + step, config.width_1(), config.tower_hidden(), spec.base_rates[task]));
    }
  }

 protected:
  Tensor Composed(const Tensor& v, Parts* parts) final {
    std::vector<Tensor> weights;
    std::vector<Tensor> biases;
    for (const Affine& gate : gates_) {
      weights.push_back(gate.weight);
      biases.push_back(gate.bias);
    }
    const std::vector<Tensor> gate_logits =
        parts->Linear(v, torch::cat(weights), torch::cat(biases)).split(experts_.count, 1);
    const Tensor experts = parts->Experts(experts_, v);
    std::vector<Tensor> mixtures;
    for (const Tensor& logits : gate_logits) {
      mixtures.push_back(parts->Mixture(logits, Tensor(), {experts}, 0, experts_.out));
    }
    return parts->Towers(towers_, mixtures);
  }

  Tensor Reference(const Tensor& v, const NormMode& mode, Activations* seen) final {
    const std::vector<Tensor> experts = ExpertsReference(experts_, v, mode, -1, seen);
    std::vector<int> indices(experts.size());
    std::iota(indices.begin(), indices.end(), 0);
    std::vector<Tensor> mixtures;
    for (size_t task = 0; task < towers_.size(); ++task) {
      Tensor weights;
      mixtures.push_back(MixtureReference(torch::linear(v, gates_[task].weight, gates_[task].bias), experts, &weights));
      if (seen != nullptr)
        seen->gates.push_back({"gate." + spec_.tasks[task], static_cast<int>(task), indices, weights});
    }
    return TowersReference(towers_, mixtures);
  }

 private:
  ExpertStack experts_;
  std::vector<Affine> gates_;
  std::vector<Tower> towers_;
};

}  // namespace

std::shared_ptr<MultiTaskModel> MakeMmoe(const ModelSpec& spec, Form form) {
  return std::make_shared<Mmoe>(spec, form);
}

ModelCost MmoeCost(const ModelSpec& spec) {
  const Model& config = spec.config;
  const int64_t tasks = static_cast<int64_t>(spec.tasks.size());
  const int64_t n = config.experts();
  const int64_t v = spec.width;
  const int64_t h = config.hidden_1();
  const int64_t d = config.width_1();
  const int64_t ht = config.tower_hidden();
  ModelCost cost;
  cost.multiply_adds = n * (v * h + h * d) + tasks * (v * n + d * ht + ht);
  // A plain expert's second layer has a bias; HoME's has BatchNorm's weight and bias instead.
  cost.parameters = cost.multiply_adds + n * (h + (config.home_expert() ? 2 : 1) * d) + tasks * (n + ht + 1);
  return cost;
}

}  // namespace hearth
