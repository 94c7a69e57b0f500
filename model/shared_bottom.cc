#include "model/shared_bottom.h"

#include "model/layers.h"

namespace hearth {
namespace {

using torch::Tensor;

class SharedBottom : public StackedModel {
 public:
  SharedBottom(const ModelSpec& spec, bool fused) : StackedModel(spec, fused) {
    const Model& config = spec.config;
    bottom_ = MakeExperts("bottom", 1, spec.width, config.hidden_1(), config.width_1(), config.home_expert());
    for (size_t task = 0; task < spec.tasks.size(); ++task) {
      towers_.push_back(MakeTower(&tree_, "tower." + PathStep(spec.tasks[task]), config.width_1(),
                                  config.tower_hidden(), spec.base_rates[task]));
    }
  }

 protected:
  Tensor Fused(const Tensor& v, const NormMode& mode) final { return Towers(FusedExperts(bottom_, v, mode)); }
  Tensor Reference(const Tensor& v, const NormMode& mode, Activations* seen) final {
    return Towers(ExpertsReference(bottom_, v, mode, -1, seen)[0]);
  }

 private:
  Tensor Towers(const Tensor& h) const {
    std::vector<Tensor> logits;
    for (const Tower& tower : towers_) logits.push_back(TowerLogit(tower, h));
    return torch::cat(logits, 1);
  }

  ExpertStack bottom_;
  std::vector<Tower> towers_;
};

}  // namespace

std::shared_ptr<MultiTaskModel> MakeSharedBottom(const ModelSpec& spec, bool fused) {
  return std::make_shared<SharedBottom>(spec, fused);
}

ModelCost SharedBottomCost(const ModelSpec& spec) {
  const Model& config = spec.config;
  const int64_t tasks = static_cast<int64_t>(spec.tasks.size());
  const int64_t h = config.hidden_1();
  const int64_t d = config.width_1();
  const int64_t ht = config.tower_hidden();
  ModelCost cost;
  cost.multiply_adds = spec.width * h + h * d + tasks * (d * ht + ht);
  cost.parameters = cost.multiply_adds + h + (config.home_expert() ? 2 : 1) * d + tasks * (ht + 1);
  return cost;
}

}  // namespace hearth
