#include "model/adopt/parameter_shapes.h"

#include <algorithm>
#include <utility>

#include "model/batch/batch.h"
#include "model/batch/path_step.h"

namespace hearth {
namespace {

using Owner = ParameterModule::Owner;
using Kind = ParameterModule::Kind;
using Stack = ParameterAxis::Stack;

ParameterAxis Plain(int64_t size) { return {ParameterAxis::Kind::kPlain, size, 1, {}}; }

ParameterAxis OverExperts(std::vector<Stack> stacks, int64_t each = 1) {
  ParameterAxis axis;
  axis.kind = ParameterAxis::Kind::kExperts;
  axis.each = each;
  for (const Stack& stack : stacks) axis.size += stack.count * each;
  axis.stacks = std::move(stacks);
  return axis;
}

// Where a module stands: of all, or of the category or task `name`, whose step is between `before` and `behind`.
struct Place {
  Owner owner = Owner::kAll;
  std::string before;
  std::string name;
  std::string behind;

  Place At(const std::string& part) const { return {owner, before, name, behind + part}; }
  std::string path() const { return owner == Owner::kAll ? before + behind : before + PathStep(name) + behind; }
};

class Modules {
 public:
  std::vector<ParameterModule> Take() { return std::move(modules_); }

  Stack Experts(const Place& place, int64_t count, const ParameterAxis& in, int64_t hidden, int64_t out, bool home) {
    const Stack stack = {place.path(), count};
    ParameterModule* const module = Add(Kind::kExperts, place);
    module->parameters = {{"hidden_weight", {OverExperts({stack}, hidden), in}},
                          {"hidden_bias", {OverExperts({stack}, hidden)}},
                          {"output_weight", {OverExperts({stack}), Plain(out), Plain(hidden)}}};
    if (!home) {
      module->parameters.push_back({"output_bias", {OverExperts({stack}, out)}});
      return stack;
    }
    module->parameters.push_back({"norm_weight", {OverExperts({stack}, out)}});
    module->parameters.push_back({"norm_bias", {OverExperts({stack}, out)}});
    module->parameters.push_back({"running_mean", {OverExperts({stack}, out)}, /*statistic=*/true});
    module->parameters.push_back({"running_var", {OverExperts({stack}, out)}, /*statistic=*/true});
    return stack;
  }

  void FeatureGate(const Place& place, const ParameterAxis& width, int64_t subspaces, int64_t rank) {
    Add(Kind::kFeatureGate, place)->parameters = {{"down", {Plain(subspaces * rank), width}},
                                                  {"up", {Plain(subspaces), Plain(rank), width}},
                                                  {"mix.weight", {Plain(subspaces), width}},
                                                  {"mix.bias", {Plain(subspaces)}}};
  }

  void Gate(Kind kind, const Place& place, const ParameterAxis& in, std::vector<Stack> visible) {
    const ParameterAxis experts = OverExperts(std::move(visible));
    Add(kind, place)->parameters = {{"weight", {experts, in}}, {"bias", {experts}}};
  }

  void Tower(const Place& place, int64_t in, int64_t hidden) {
    Add(Kind::kTower, place)->parameters = {{"hidden.weight", {Plain(hidden), Plain(in)}},
                                            {"hidden.bias", {Plain(hidden)}},
                                            {"output.weight", {Plain(1), Plain(hidden)}},
                                            {"output.bias", {Plain(1)}}};
  }

 private:
  ParameterModule* Add(Kind kind, const Place& place) {
    ParameterModule module;
    module.kind = kind;
    module.owner = place.owner;
    module.name = place.name;
    module.before = place.before;
    module.behind = place.behind;
    modules_.push_back(std::move(module));
    return &modules_.back();
  }

  std::vector<ParameterModule> modules_;
};

Place OfAll(const std::string& path) { return {Owner::kAll, path, "", ""}; }
Place OfCategory(const std::string& before, const std::string& name) { return {Owner::kCategory, before, name, ""}; }
Place OfTask(const std::string& before, const std::string& name) { return {Owner::kTask, before, name, ""}; }

std::vector<std::string> CategoriesOf(const Job& job) {
  std::vector<std::string> categories;
  for (const Task& task : job.task()) {
    if (std::find(categories.begin(), categories.end(), task.category()) == categories.end())
      categories.push_back(task.category());
  }
  return categories;
}

void AddHome(const Job& job, const ParameterAxis& input, Modules* modules) {
  const Model& config = job.model();
  const auto group = [&](const Place& place, const ParameterAxis& in, int64_t count, int64_t hidden, int64_t out,
                         int64_t rank) {
    modules->FeatureGate(place.At(".feature_gate"), in, config.gate_subspaces(), rank);
    return modules->Experts(place.At(".expert"), count, in, hidden, out, /*home=*/true);
  };
  const auto level1 = [&](const Place& place, int64_t count) {
    return group(place, input, count, config.hidden_1(), config.width_1(), config.gate_rank_1());
  };
  const ParameterAxis z = Plain(config.width_1());
  const auto level2 = [&](const Place& place, int64_t count) {
    return group(place, z, count, config.hidden_2(), config.width_2(), config.gate_rank_2());
  };
  const std::vector<std::string> categories = CategoriesOf(job);

  const Place shared_1 = OfAll("level1.shared");
  const Stack shared_stack_1 = level1(shared_1, config.shared_experts_1());
  std::vector<Stack> everything = {shared_stack_1};
  for (const std::string& name : categories) {
    const Place place = OfCategory("level1.category.", name);
    const Stack own = level1(place, config.category_experts_1());
    everything.push_back(own);
    modules->Gate(Kind::kGate, place.At(".gate"), input, {shared_stack_1, own});
    modules->Gate(Kind::kSelfGate, place.At(".self"), input, {own});
  }
  modules->Gate(Kind::kGate, shared_1.At(".gate"), input, everything);
  modules->Gate(Kind::kSelfGate, shared_1.At(".self"), input, {shared_stack_1});

  const Stack shared_stack_2 = level2(OfAll("level2.shared"), config.shared_experts_2());
  std::vector<Stack> of_category;
  for (const std::string& name : categories) {
    of_category.push_back(level2(OfCategory("level2.category.", name), config.category_experts_2()));
  }
  for (const Task& task : job.task()) {
    const Place place = OfTask("level2.task.", task.name());
    const Stack own = level2(place, config.task_experts_2());
    const auto category = std::find(categories.begin(), categories.end(), task.category()) - categories.begin();
    modules->Gate(Kind::kGate, place.At(".gate"), Plain(2 * config.width_1()),
                  {shared_stack_2, of_category[static_cast<size_t>(category)], own});
    modules->Gate(Kind::kSelfGate, place.At(".self"), z, {own});
    modules->Tower(OfTask("tower.", task.name()), config.width_2(), config.tower_hidden());
  }
}

}  // namespace

std::string ParameterModule::PathFor(const std::string& owner_name) const {
  return owner == Owner::kAll ? before + behind : before + PathStep(owner_name) + behind;
}

std::vector<ParameterModule> ModulesOf(const Job& job) {
  const Model& config = job.model();
  ParameterAxis input;
  input.kind = ParameterAxis::Kind::kInput;
  input.size = MakeFeatureLayout(job).width;
  Modules modules;
  if (config.kind() == Model::HOME) {
    AddHome(job, input, &modules);
    return modules.Take();
  }
  const bool mmoe = config.kind() == Model::MMOE;
  const Stack experts = modules.Experts(OfAll(mmoe ? "expert" : "bottom"), mmoe ? config.experts() : 1, input,
                                        config.hidden_1(), config.width_1(), config.home_expert());
  for (const Task& task : job.task()) {
    if (mmoe) modules.Gate(Kind::kGate, OfTask("gate.", task.name()), input, {experts});
    modules.Tower(OfTask("tower.", task.name()), config.width_1(), config.tower_hidden());
  }
  return modules.Take();
}

}  // namespace hearth
