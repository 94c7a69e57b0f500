#include "model/adopt/plan_parameters.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/adopt/parameter_shapes.h"

namespace hearth {
namespace {

class ParameterPlanner {
 public:
  ParameterPlanner(const Job& before, const Job& now, bool truncate, const MatchedNames& names, AdoptionPlan* plan,
                   std::vector<std::string>* faults)
      : before_(before), now_(now), truncate_(truncate), names_(names), plan_(*plan), faults_(*faults) {}

  void Plan() {
    const std::vector<ParameterModule> modules = ModulesOf(now_), old_modules = ModulesOf(before_);
    const bool same_kind = before_.model().kind() == now_.model().kind();
    if (!same_kind) {
      Changes(absl::StrCat("model.kind: ", Model::Kind_Name(before_.model().kind()), " -> ",
                           Model::Kind_Name(now_.model().kind()), ": the dense model is born anew"));
    }
    if (before_.model().batch_norm_epsilon() != now_.model().batch_norm_epsilon())
      Changes("model.batch_norm_epsilon is another");
    const bool adam_before = before_.training().dense_optimizer().kind() != DenseOptimizer::SGD;
    const bool adam_now = now_.training().dense_optimizer().kind() != DenseOptimizer::SGD;
    plan_.dense_state = adam_before && adam_now;
    // Moments of zero with a large count would make the first updates large.
    plan_.dense_updates = same_kind && (adam_before || !adam_now);

    const std::map<const ParameterModule*, Origin> origins = OriginsOf(modules, old_modules);
    std::map<std::string, int64_t> used;  // elements of each old parameter that go on
    for (const ParameterModule& module : modules) {
      const auto found = origins.find(&module);
      const Origin* const origin = found == origins.end() ? nullptr : &found->second;
      if (origin == nullptr && same_kind && !IsNew(module))
        Changes(absl::StrCat(module.path(), " is born anew: its shape is another"));
      PlanModule(module, origin, adam_before != adam_now, &used);
    }
    CountDropped(old_modules, used);
    for (const std::string& key : line_order_) plan_.lines.push_back(lines_[key]);
  }

 private:
  using Line = AdoptionPlan::Line;
  void Changes(const std::string& why) { plan_.changes.push_back(why); }

  // What the owner of a module was called; empty: it is new.
  std::string OldOwner(const ParameterModule& module) const {
    if (module.owner == ParameterModule::Owner::kTask) {
      for (int i = 0; i < now_.task_size(); ++i) {
        const int from = names_.tasks[static_cast<size_t>(i)];
        if (now_.task(i).name() == module.name && from >= 0) return before_.task(from).name();
      }
    } else if (module.owner == ParameterModule::Owner::kCategory) {
      const auto found = names_.categories.find(module.name);
      if (found != names_.categories.end()) return found->second;
    }
    return "";
  }
  bool IsNew(const ParameterModule& module) const {
    return module.owner != ParameterModule::Owner::kAll && OldOwner(module).empty();
  }
  // The old model's module that this one goes on with; empty: none. A new category begins as a copy of what all share,
  // so that the sum over all experts stays as it was.
  std::string OldPath(const ParameterModule& module, bool* copy) const {
    *copy = false;
    if (!IsNew(module)) return module.PathFor(OldOwner(module));
    constexpr char kLevel1[] = "level1.category.";
    const bool copied = module.before == kLevel1 && (module.kind == ParameterModule::Kind::kExperts ||
                                                     module.kind == ParameterModule::Kind::kFeatureGate);
    if (!copied) return "";
    *copy = true;
    return "level1.shared" + module.behind;
  }

  // Whether the old module's arrays fit: what is plain is as long, an expert has as many elements.
  static bool Fits(const ParameterModule& was, const ParameterModule& is) {
    if (was.kind != is.kind || was.parameters.size() != is.parameters.size()) return false;
    for (size_t p = 0; p < is.parameters.size(); ++p) {
      const Parameter &a = was.parameters[p], &b = is.parameters[p];
      if (a.leaf != b.leaf || a.axes.size() != b.axes.size()) return false;
      for (size_t i = 0; i < a.axes.size(); ++i) {
        if (a.axes[i].kind != b.axes[i].kind || a.axes[i].each != b.axes[i].each) return false;
        if (a.axes[i].kind == ParameterAxis::Kind::kPlain && a.axes[i].size != b.axes[i].size) return false;
      }
    }
    return true;
  }

  // Where an expert of a new stack comes from: a stack of the old model, which expert of it, and whether it is one
  // more.
  struct Source {
    std::string stack;
    int64_t expert = 0;
    bool copy = false;
    bool operator<(const Source& o) const { return stack != o.stack ? stack < o.stack : expert < o.expert; }
  };
  bool SourceOf(const std::string& stack, int64_t expert, Source* source) const {
    const auto found = stacks_.find(stack);
    if (found == stacks_.end()) return false;
    *source = {found->second.path, expert % found->second.count, expert >= found->second.count};
    return true;
  }

  // The old module that one goes on with, or, of a new category, begins as a copy of.
  struct Origin {
    const ParameterModule* module = nullptr;
    bool copy = false;
  };
  std::map<const ParameterModule*, Origin> OriginsOf(const std::vector<ParameterModule>& modules,
                                                     const std::vector<ParameterModule>& old_modules) {
    std::map<const ParameterModule*, Origin> origins;
    if (before_.model().kind() != now_.model().kind()) return origins;
    std::map<std::string, const ParameterModule*> old;
    for (const ParameterModule& module : old_modules) old[module.path()] = &module;
    for (const ParameterModule& module : modules) {
      Origin origin;
      const std::string path = OldPath(module, &origin.copy);
      const auto found = path.empty() ? old.end() : old.find(path);
      if (found == old.end() || !Fits(*found->second, module)) continue;
      origin.module = found->second;
      origins[&module] = origin;
      if (module.kind != ParameterModule::Kind::kExperts) continue;
      const int64_t count = found->second->parameters[0].axes[0].stacks[0].count;
      stacks_[module.path()] = {found->second->path(), count};
      if (!origin.copy) CompareCounts(module, count);
    }
    return origins;
  }

  void PlanModule(const ParameterModule& module, const Origin* origin, bool state_begins_anew,
                  std::map<std::string, int64_t>* used) {
    Line* const line = DenseLine(module, module.name);
    for (size_t p = 0; p < module.parameters.size(); ++p) {
      ParameterMove move = origin == nullptr ? Born(module, p) : Carried(module, *origin->module, p, origin->copy);
      if (!move.statistic) {
        const bool goes_on = origin != nullptr && !origin->copy;
        const uint64_t carried = goes_on ? static_cast<uint64_t>(move.Carried()) : 0;
        line->carried += carried;
        line->born += static_cast<uint64_t>(move.Elements()) - carried;
        if (state_begins_anew) line->reset += carried;
        if (goes_on) (*used)[move.from] = DistinctSources(move);
      }
      plan_.parameters.push_back(std::move(move));
    }
    const std::string was = OldOwner(module);
    if (origin != nullptr && origin->copy) {
      line->how = "new; its first level is a copy of what all share";
    } else if (!line->how.empty()) {
      return;
    } else if (module.owner == ParameterModule::Owner::kAll) {
      if (state_begins_anew) line->how = "the optimizer's state begins anew";
    } else if (was.empty()) {
      line->how = "new";
    } else if (was != module.name) {
      line->how = absl::StrCat("was ", "\"", was, "\"");
    }
  }

  void CountDropped(const std::vector<ParameterModule>& old_modules, const std::map<std::string, int64_t>& used) {
    for (const ParameterModule& module : old_modules) {
      for (const Parameter& parameter : module.parameters) {
        if (parameter.statistic) continue;
        int64_t elements = 1;
        for (const ParameterAxis& axis : parameter.axes) elements *= axis.size;
        const auto found = used.find(absl::StrCat(module.path(), ".", parameter.leaf));
        const int64_t kept = found == used.end() ? 0 : found->second;
        if (kept < elements) DenseLine(module, NewOwner(module))->dropped += static_cast<uint64_t>(elements - kept);
      }
    }
  }

  // The line of the owner, a task or category of this name, or all.
  Line* DenseLine(const ParameterModule& module, const std::string& name) {
    const char* const kinds[] = {"dense model", "category", "task"};
    const std::string kind = kinds[static_cast<int>(module.owner)];
    const bool of_all = module.owner == ParameterModule::Owner::kAll;
    const std::string key = of_all ? kind : absl::StrCat(kind, " ", name);
    const auto [found, added] = lines_.emplace(key, Line());
    Line& line = found->second;
    if (!added) return &line;
    line_order_.push_back(key);
    line.what = key;
    line.unit = "parameters";
    return &line;
  }

  // What the owner of an old module is called now, or was.
  std::string NewOwner(const ParameterModule& module) const {
    if (module.owner == ParameterModule::Owner::kTask) {
      for (int i = 0; i < now_.task_size(); ++i) {
        const int from = names_.tasks[static_cast<size_t>(i)];
        if (from >= 0 && before_.task(from).name() == module.name) return now_.task(i).name();
      }
    } else if (module.owner == ParameterModule::Owner::kCategory) {
      for (const auto& [is, was] : names_.categories) {
        if (was == module.name) return is;
      }
    }
    return module.name;
  }

  void CompareCounts(const ParameterModule& module, int64_t was) {
    const int64_t is = module.parameters[0].axes[0].stacks[0].count;
    if (is < was && !truncate_) {
      faults_.push_back(absl::StrCat(module.path(), ": ", was, " -> ", is,
                                     " experts: the last would go; keep as many, or let them go with --truncate"));
    }
    if (is < was) Changes(absl::StrCat(module.path(), " has lost experts"));
    if (is > was)
      Changes(absl::StrCat(module.path(), ": ", was, " -> ", is, " experts: the new ones are noisy copies"));
    const bool self = now_.model().kind() == Model::HOME;
    if (self && (is == 1) != (was == 1))
      Changes(absl::StrCat(module.path(), ": the self gate over one expert is a sigmoid, over several a softmax"));
  }

  static std::string NameOf(const ParameterModule& module, size_t p) {
    return absl::StrCat(module.path(), ".", module.parameters[p].leaf);
  }
  static std::vector<int64_t> ShapeOf(const Parameter& parameter) {
    std::vector<int64_t> shape;
    for (const ParameterAxis& axis : parameter.axes) shape.push_back(axis.size);
    return shape;
  }

  static ParameterMove Born(const ParameterModule& module, size_t p) {
    ParameterMove move;
    move.name = NameOf(module, p);
    move.statistic = module.parameters[p].statistic;
    move.shape = ShapeOf(module.parameters[p]);
    return move;
  }

  ParameterMove Carried(const ParameterModule& module, const ParameterModule& was, size_t p, bool copy) {
    ParameterMove move = Born(module, p);
    const Parameter &is = module.parameters[p], &old = was.parameters[p];
    move.from = NameOf(was, p);
    move.old_shape = ShapeOf(old);
    for (size_t i = 0; i < is.axes.size(); ++i) {
      std::vector<int64_t> index;
      if (is.axes[i].kind == ParameterAxis::Kind::kInput) index = names_.input;
      if (is.axes[i].kind == ParameterAxis::Kind::kExperts)
        index = ExpertsIndex(is.axes[i], old.axes[i], copy, is.axes.size() > 1, &move, module);
      move.index.push_back(std::move(index));
    }
    return move;
  }

  // The axis of a stack, or of a gate's logits over stacks.
  std::vector<int64_t> ExpertsIndex(const ParameterAxis& is, const ParameterAxis& was, bool copy, bool matrix,
                                    ParameterMove* move, const ParameterModule& module) {
    std::map<Source, int64_t> place_of;  // of the old experts along the old axis
    int64_t places = 0;
    for (const ParameterAxis::Stack& stack : was.stacks) {
      for (int64_t k = 0; k < stack.count; ++k) place_of[{stack.path, k, false}] = places++;
    }
    std::vector<int64_t> expert_from;  // [experts along the new axis] place along the old one
    std::vector<bool> more;
    std::map<int64_t, int64_t> takers;
    for (const ParameterAxis::Stack& stack : is.stacks) {
      for (int64_t k = 0; k < stack.count; ++k) {
        Source source;
        const bool known = SourceOf(stack.path, k, &source);
        const auto place = known ? place_of.find(source) : place_of.end();
        expert_from.push_back(place == place_of.end() ? kBornAt : place->second);
        more.push_back(known && source.copy);
        if (place != place_of.end()) ++takers[place->second];
      }
    }
    const bool logits = module.kind == ParameterModule::Kind::kGate || module.kind == ParameterModule::Kind::kSelfGate;
    if (logits && !IsNew(module) && std::count(expert_from.begin(), expert_from.end(), kBornAt) > 0)
      Changes(absl::StrCat(module.path(), " sees experts that it did not see"));
    std::vector<int64_t> index;
    for (size_t k = 0; k < expert_from.size(); ++k) {
      for (int64_t e = 0; e < is.each; ++e)
        index.push_back(expert_from[k] < 0 ? expert_from[k] : expert_from[k] * is.each + e);
      if (logits && !matrix) {
        const auto shared = takers.find(expert_from[k]);
        move->less.push_back(shared == takers.end() ? 0.0f : std::log(static_cast<float>(shared->second)));
      }
      const bool noise = !logits && !copy && matrix && more[k];
      for (int64_t e = 0; e < is.each && !logits; ++e) move->noisy.push_back(noise);
    }
    return index;
  }

  static int64_t DistinctSources(const ParameterMove& move) {
    int64_t product = 1;
    for (size_t i = 0; i < move.shape.size(); ++i) {
      std::set<int64_t> sources;
      for (const int64_t source : move.index[i]) {
        if (source >= 0) sources.insert(source);
      }
      product *= move.index[i].empty() ? move.shape[i] : static_cast<int64_t>(sources.size());
    }
    return product;
  }

  const Job& before_;
  const Job& now_;
  const bool truncate_;
  const MatchedNames& names_;
  AdoptionPlan& plan_;
  std::vector<std::string>& faults_;
  std::map<std::string, ParameterAxis::Stack> stacks_;  // new path → the old stack that it goes on with
  std::map<std::string, Line> lines_;                   // by what they say
  std::vector<std::string> line_order_;
};

}  // namespace

int64_t ParameterMove::Elements() const {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return elements;
}

int64_t ParameterMove::Carried() const {
  if (from.empty()) return 0;
  int64_t elements = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    elements *= index[i].empty()
                    ? shape[i]
                    : std::count_if(index[i].begin(), index[i].end(), [](int64_t source) { return source >= 0; });
  }
  return elements;
}

void PlanParameters(const Job& before, const Job& now, bool truncate, const MatchedNames& names, AdoptionPlan* plan,
                    std::vector<std::string>* faults) {
  ParameterPlanner(before, now, truncate, names, plan, faults).Plan();
}

}  // namespace hearth
