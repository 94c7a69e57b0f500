// What each axis of each of a model's parameters means: which run over the model's input, which over experts. It says
// in a table what the models' constructors do (model/home.cc, mmoe.cc, shared_bottom.cc), so that an array may be taken
// over by a model of another shape; a test holds it to them. Free of Torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/proto/job.pb.h"

namespace hearth {

struct ParameterAxis {
  enum class Kind {
    kPlain,    // means the same wherever it is as long
    kInput,    // the columns of v, or a share of them: FeatureLayout says whose
    kExperts,  // `each` elements an expert, stack after stack
  };
  struct Stack {
    std::string path;  // of the stack's module
    int64_t count = 0;
  };
  Kind kind = Kind::kPlain;
  int64_t size = 0;
  int64_t each = 1;
  std::vector<Stack> stacks;
};

struct Parameter {
  std::string leaf;  // its name is module.path + "." + leaf
  std::vector<ParameterAxis> axes;
  bool statistic = false;  // a buffer: BatchNorm's running statistics
};

// Parameters that mean something together alone: a stack of experts, a feature gate, a gate, a tower.
struct ParameterModule {
  enum class Kind { kExperts, kFeatureGate, kGate, kSelfGate, kTower };
  enum class Owner { kAll, kCategory, kTask };
  Kind kind = Kind::kExperts;
  Owner owner = Owner::kAll;
  std::string name;            // of the category or task
  std::string before, behind;  // of the path, around the name's step
  std::vector<Parameter> parameters;

  // As it is called where its owner is called so.
  std::string PathFor(const std::string& owner_name) const;
  std::string path() const { return PathFor(name); }
};

// Of the job's model; ordered as its constructor makes them. REQUIRES: a valid job.
std::vector<ParameterModule> ModulesOf(const Job& job);

}  // namespace hearth
