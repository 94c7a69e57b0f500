// MMoE: experts that all tasks share, one gate a task (home-model.md §5).
#pragma once

#include <memory>

#include "model/multi_task_model.h"

namespace hearth {

std::shared_ptr<MultiTaskModel> MakeMmoe(const ModelSpec& spec, bool fused);
ModelCost MmoeCost(const ModelSpec& spec);

}  // namespace hearth
