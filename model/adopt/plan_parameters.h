// The dense half of an adoption's plan: what each parameter goes on with. Private to plan.cc.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/proto/job.pb.h"
#include "model/adopt/plan.h"

namespace hearth {

// What plan.cc has decided by names.
struct MatchedNames {
  std::vector<int> tasks;                         // [of the new job] of the old job; negative: born
  std::map<std::string, std::string> categories;  // new → old; those that are born are not in it
  std::vector<int64_t> input;                     // [V] columns of the model's input: an old one, kZeros or kBornAt
};

// Fills in the plan's parameters and what becomes of the dense optimizer, adds its lines and changes. *faults: a line
// for each thing that is refused. REQUIRES: jobs with every default written out.
void PlanParameters(const Job& before, const Job& now, bool truncate, const MatchedNames& names, AdoptionPlan* plan,
                    std::vector<std::string>* faults);

}  // namespace hearth
