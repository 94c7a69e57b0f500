#include "model/home.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

using torch::Tensor;

// One group of level 1 or 2: a feature gate in front of experts, a gate over what the group may see, a self gate over
// its own. At level 2 only tasks have gates.
struct Group {
  std::string path;
  FeatureGateParameters feature_gate;
  ExpertStack experts;
  Affine gate;
  Affine self;
};

// Products of one input taken together: rows of several matrices stacked, results split again.
class Reads {
 public:
  // bias may be undefined: zeros. Returns the index of the result.
  size_t Add(const Tensor& weight, const Tensor& bias) {
    weights_.push_back(weight);
    biases_.push_back(bias);
    sizes_.push_back(weight.size(0));
    return sizes_.size() - 1;
  }
  size_t Add(const Affine& affine) { return Add(affine.weight, affine.bias); }
  std::vector<Tensor> Of(const Tensor& x, Parts* parts) const {
    const int64_t longest = *std::max_element(sizes_.begin(), sizes_.end());
    const Tensor zeros = torch::zeros({longest}, x.options().requires_grad(false));
    std::vector<Tensor> biases;
    for (size_t i = 0; i < biases_.size(); ++i) {
      biases.push_back(biases_[i].defined() ? biases_[i] : zeros.narrow(0, 0, sizes_[i]));
    }
    return parts->Linear(x, torch::cat(weights_), torch::cat(biases)).split_with_sizes(sizes_, 1);
  }

 private:
  std::vector<Tensor> weights_;
  std::vector<Tensor> biases_;
  std::vector<int64_t> sizes_;
};

class Home : public StackedModel {
 public:
  Home(const ModelSpec& spec, Form form) : StackedModel(spec, form) {
    const Model& config = spec.config;
    const int64_t categories = static_cast<int64_t>(spec.categories.size());
    const int64_t n_shared = config.shared_experts_1();
    const int64_t n_category = config.category_experts_1();
    const int64_t d1 = config.width_1();
    shared_1_ = MakeLevel1("level1.shared", n_shared, n_shared + categories * n_category);
    for (const std::string& name : spec.categories) {
      categories_1_.push_back(MakeLevel1("level1.category." + PathStep(name), n_category, n_shared + n_category));
    }
    shared_2_ = MakeLevel2("level2.shared", config.shared_experts_2());
    for (const std::string& name : spec.categories) {
      categories_2_.push_back(MakeLevel2("level2.category." + PathStep(name), config.category_experts_2()));
    }
    for (size_t task = 0; task < spec.tasks.size(); ++task) {
      Group group = MakeLevel2("level2.task." + PathStep(spec.tasks[task]), config.task_experts_2());
      group.gate = MakeAffine(&tree_, group.path + ".gate", 2 * d1,
                              config.shared_experts_2() + config.category_experts_2() + config.task_experts_2());
      group.self = MakeAffine(&tree_, group.path + ".self", d1, config.task_experts_2());
      tasks_2_.push_back(std::move(group));
      towers_.push_back(MakeTower(&tree_, "tower." + PathStep(spec.tasks[task]), config.width_2(),
                                  config.tower_hidden(), spec.base_rates[task]));
    }
  }

 protected:
  Tensor Composed(const Tensor& v, Parts* parts) final {
    Tensor z_shared;
    const std::vector<Tensor> z = ComposedLevel1(v, parts, &z_shared);
    return ComposedLevel2(z, z_shared, parts);
  }

  Tensor Reference(const Tensor& v, const NormMode& mode, Activations* seen) final {
    Tensor z_shared;
    const std::vector<Tensor> z = ReferenceLevel1(v, mode, seen, &z_shared);
    return ReferenceLevel2(z, z_shared, mode, seen);
  }

 private:
  using Outputs = std::vector<Tensor>;

  Group MakeLevel1(const std::string& path, int64_t experts, int64_t visible) {
    const Model& config = spec_.config;
    Group group;
    group.path = path;
    group.feature_gate =
        MakeFeatureGate(&tree_, path + ".feature_gate", spec_.width, config.gate_subspaces(), config.gate_rank_1());
    group.experts =
        MakeExperts(path + ".expert", experts, spec_.width, config.hidden_1(), config.width_1(), /*home=*/true);
    group.gate = MakeAffine(&tree_, path + ".gate", spec_.width, visible);
    group.self = MakeAffine(&tree_, path + ".self", spec_.width, experts);
    return group;
  }

  Group MakeLevel2(const std::string& path, int64_t experts) {
    const Model& config = spec_.config;
    Group group;
    group.path = path;
    group.feature_gate = MakeFeatureGate(&tree_, path + ".feature_gate", config.width_1(), config.gate_subspaces(),
                                         config.gate_rank_2());
    group.experts = MakeExperts(path + ".expert", experts, config.width_1(), config.hidden_2(), config.width_2(),
                                /*home=*/true);
    return group;
  }

  // ---- composed of parts: everything that reads one input in one product

  struct GateReads {
    size_t down, mix;
  };
  static GateReads AddFeatureGate(const Group& group, Reads* reads) {
    return {reads->Add(group.feature_gate.down, Tensor()), reads->Add(group.feature_gate.mix)};
  }
  static Tensor ComposedGroup(const Group& group, const Tensor& u, const Outputs& read, const GateReads& at,
                              Parts* parts) {
    return parts->Experts(group.experts, parts->FeatureGate(group.feature_gate, u, read[at.down], read[at.mix]));
  }

  Outputs ComposedLevel1(const Tensor& v, Parts* parts, Tensor* z_shared) const {
    Reads reads;
    std::vector<const Group*> groups = {&shared_1_};
    for (const Group& group : categories_1_) groups.push_back(&group);
    std::vector<GateReads> feature_gates;
    std::vector<size_t> gates;
    std::vector<size_t> selves;
    for (const Group* group : groups) {
      feature_gates.push_back(AddFeatureGate(*group, &reads));
      gates.push_back(reads.Add(group->gate));
      selves.push_back(reads.Add(group->self));
    }
    const Outputs read = reads.Of(v, parts);
    Outputs experts;  // [groups] of [B, n·D]
    for (size_t i = 0; i < groups.size(); ++i) {
      experts.push_back(ComposedGroup(*groups[i], v, read, feature_gates[i], parts));
    }
    const int64_t width = spec_.config.width_1();
    *z_shared = parts->Mixture(read[gates[0]], read[selves[0]], experts, 0, width);
    Outputs z;
    for (size_t i = 1; i < groups.size(); ++i) {
      z.push_back(parts->Mixture(read[gates[i]], read[selves[i]], {experts[0], experts[i]}, 1, width));
    }
    return z;
  }

  Tensor ComposedLevel2(const Outputs& z, const Tensor& z_shared, Parts* parts) const {
    const int64_t d1 = spec_.config.width_1();
    // The gates' second halves read z_shared: all of them in its one product.
    Reads shared_reads;
    const GateReads shared_gate = AddFeatureGate(shared_2_, &shared_reads);
    std::vector<size_t> halves;
    for (const Group& task : tasks_2_) {
      halves.push_back(shared_reads.Add(task.gate.weight.narrow(1, d1, d1), Tensor()));
    }
    const Outputs shared_read = shared_reads.Of(z_shared, parts);
    const Tensor shared = ComposedGroup(shared_2_, z_shared, shared_read, shared_gate, parts);

    Outputs mixtures(tasks_2_.size());
    for (size_t c = 0; c < z.size(); ++c) {
      Reads reads;
      const GateReads category_gate = AddFeatureGate(categories_2_[c], &reads);
      struct TaskReads {
        size_t task, gate, self;
        GateReads feature_gate;
      };
      std::vector<TaskReads> own;
      for (size_t t = 0; t < tasks_2_.size(); ++t) {
        if (spec_.category_of[t] != static_cast<int>(c)) continue;
        const Group& task = tasks_2_[t];
        own.push_back({t, reads.Add(task.gate.weight.narrow(1, 0, d1), task.gate.bias), reads.Add(task.self),
                       AddFeatureGate(task, &reads)});
      }
      const Outputs read = reads.Of(z[c], parts);
      const Tensor category = ComposedGroup(categories_2_[c], z[c], read, category_gate, parts);
      for (const TaskReads& at : own) {
        const Tensor experts = ComposedGroup(tasks_2_[at.task], z[c], read, at.feature_gate, parts);
        mixtures[at.task] = parts->Mixture(read[at.gate] + shared_read[halves[at.task]], read[at.self],
                                           {shared, category, experts}, 2, spec_.config.width_2());
      }
    }
    return parts->Towers(towers_, mixtures);
  }

  // ---- module by module

  static Outputs ReferenceGroup(const Group& group, const Tensor& u, const NormMode& mode, int task,
                                Activations* seen) {
    return ExpertsReference(group.experts, FeatureGateReference(group.feature_gate, u), mode, task, seen);
  }

  // Sum(Gate(gate_input), visible) + Sum(Self(self_input), own).
  static Tensor ReferenceMixture(const Group& group, const Tensor& gate_input, const Tensor& self_input,
                                 const Outputs& visible, const Outputs& own, int task, std::vector<int> indices,
                                 Activations* seen) {
    Tensor weights;
    const Tensor mixture =
        MixtureReference(torch::linear(gate_input, group.gate.weight, group.gate.bias), visible, &weights);
    if (seen != nullptr) seen->gates.push_back({group.path, task, std::move(indices), weights});
    return mixture + SelfGateReference(torch::linear(self_input, group.self.weight, group.self.bias), own);
  }

  // The numbers in seen->experts of what a call of ReferenceGroup adds.
  static std::vector<int> NextIndices(const Activations* seen, int64_t count) {
    std::vector<int> indices;
    for (int64_t i = 0; seen != nullptr && i < count; ++i) {
      indices.push_back(static_cast<int>(seen->experts.size()) + static_cast<int>(i));
    }
    return indices;
  }
  template <typename T>
  static void Append(const std::vector<T>& more, std::vector<T>* to) {
    to->insert(to->end(), more.begin(), more.end());
  }

  Outputs ReferenceLevel1(const Tensor& v, const NormMode& mode, Activations* seen, Tensor* z_shared) const {
    const std::vector<int> shared_indices = NextIndices(seen, shared_1_.experts.count);
    const Outputs shared = ReferenceGroup(shared_1_, v, mode, -1, seen);
    Outputs everything = shared;
    std::vector<int> everything_indices = shared_indices;
    Outputs z;
    for (const Group& category : categories_1_) {
      const std::vector<int> own_indices = NextIndices(seen, category.experts.count);
      const Outputs own = ReferenceGroup(category, v, mode, -1, seen);
      Append(own, &everything);
      Append(own_indices, &everything_indices);
      Outputs visible = shared;
      std::vector<int> indices = shared_indices;
      Append(own, &visible);
      Append(own_indices, &indices);
      z.push_back(ReferenceMixture(category, v, v, visible, own, -1, indices, seen));
    }
    *z_shared = ReferenceMixture(shared_1_, v, v, everything, shared, -1, everything_indices, seen);
    return z;
  }

  Tensor ReferenceLevel2(const Outputs& z, const Tensor& z_shared, const NormMode& mode, Activations* seen) const {
    const std::vector<int> shared_indices = NextIndices(seen, shared_2_.experts.count);
    const Outputs shared = ReferenceGroup(shared_2_, z_shared, mode, -1, seen);
    std::vector<Outputs> category;
    std::vector<std::vector<int>> category_indices;
    for (size_t c = 0; c < z.size(); ++c) {
      category_indices.push_back(NextIndices(seen, categories_2_[c].experts.count));
      category.push_back(ReferenceGroup(categories_2_[c], z[c], mode, -1, seen));
    }
    Outputs mixtures;
    for (size_t t = 0; t < tasks_2_.size(); ++t) {
      const int c = spec_.category_of[t];
      std::vector<int> indices = shared_indices;
      Append(category_indices[c], &indices);
      Append(NextIndices(seen, tasks_2_[t].experts.count), &indices);
      const Outputs own = ReferenceGroup(tasks_2_[t], z[c], mode, static_cast<int>(t), seen);
      Outputs visible = shared;
      Append(category[c], &visible);
      Append(own, &visible);
      mixtures.push_back(ReferenceMixture(tasks_2_[t], torch::cat({z[c], z_shared}, 1), z[c], visible, own,
                                          static_cast<int>(t), indices, seen));
    }
    return TowersReference(towers_, mixtures);
  }

  Group shared_1_;
  std::vector<Group> categories_1_;
  Group shared_2_;
  std::vector<Group> categories_2_;
  std::vector<Group> tasks_2_;
  std::vector<Tower> towers_;
};

}  // namespace

std::shared_ptr<MultiTaskModel> MakeHome(const ModelSpec& spec, Form form) {
  return std::make_shared<Home>(spec, form);
}

ModelCost HomeCost(const ModelSpec& spec) {
  const Model& config = spec.config;
  const int64_t categories = static_cast<int64_t>(spec.categories.size());
  const int64_t tasks = static_cast<int64_t>(spec.tasks.size());
  const int64_t subspaces = config.gate_subspaces();
  const int64_t n1 = config.shared_experts_1();
  const int64_t m1 = config.category_experts_1();
  const int64_t n2 = config.shared_experts_2();
  const int64_t m2 = config.category_experts_2();
  const int64_t own = config.task_experts_2();
  const int64_t v = spec.width;
  const int64_t d1 = config.width_1();
  const int64_t d2 = config.width_2();
  ModelCost cost;
  const auto experts = [&cost](int64_t count, int64_t in, int64_t hidden, int64_t out) {
    cost.multiply_adds += count * (in * hidden + hidden * out);
    cost.parameters += count * (in * hidden + hidden + hidden * out + 2 * out);  // BatchNorm's weight and bias
  };
  const auto feature_gate = [&cost, subspaces](int64_t width, int64_t rank) {
    cost.multiply_adds += 2 * subspaces * rank * width + width * subspaces;
    cost.parameters += 2 * subspaces * rank * width + width * subspaces + subspaces;
  };
  const auto gate = [&cost](int64_t width, int64_t outputs) {
    cost.multiply_adds += width * outputs;
    cost.parameters += width * outputs + outputs;
  };
  experts(n1 + categories * m1, v, config.hidden_1(), d1);
  for (int64_t i = 0; i < 1 + categories; ++i) feature_gate(v, config.gate_rank_1());
  gate(v, n1 + categories * m1);                                           // Gate1_shared
  gate(v, n1);                                                             // Self1_shared
  for (int64_t c = 0; c < categories; ++c) gate(v, n1 + m1), gate(v, m1);  // Gate1_c, Self1_c
  experts(n2 + categories * m2 + tasks * own, d1, config.hidden_2(), d2);
  for (int64_t i = 0; i < 1 + categories + tasks; ++i) feature_gate(d1, config.gate_rank_2());
  for (int64_t t = 0; t < tasks; ++t) {
    gate(2 * d1, n2 + m2 + own);
    gate(d1, own);
    gate(d2, config.tower_hidden());
    gate(config.tower_hidden(), 1);
  }
  return cost;
}

}  // namespace hearth
