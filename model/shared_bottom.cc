#include "model/shared_bottom.h"

namespace hearth {
namespace {

using torch::Tensor;

class SharedBottom : public StackedModel {
 public:
  SharedBottom(const ModelSpec& spec, Form form) : StackedModel(spec, form) {
    const Model& config = spec.config;
    bottom_ = MakeExperts("bottom", 1, spec.width, config.hidden_1(), config.width_1(), config.home_expert());
    for (size_t task = 0; task < spec.tasks.size(); ++task) {
      towers_.push_back(MakeTower(&tree_, "tower." + PathStep(spec.tasks[task]), config.width_1(),
                                  config.tower_hidden(), spec.base_rates[task]));
    }
  }

 protected:
  Tensor Composed(const Tensor& v, Parts* parts) final { return parts->Towers(towers_, {parts->Experts(bottom_, v)}); }
  Tensor Reference(const Tensor& v, const NormMode& mode, Activations* seen) final {
    return TowersReference(towers_, ExpertsReference(bottom_, v, mode, -1, seen));
  }

 private:
  ExpertStack bottom_;
  std::vector<Tower> towers_;
};

}  // namespace

std::shared_ptr<MultiTaskModel> MakeSharedBottom(const ModelSpec& spec, Form form) {
  return std::make_shared<SharedBottom>(spec, form);
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
