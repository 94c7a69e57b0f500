// MMoE: experts that all tasks share, one gate a task (docs/MODEL.md §5).
#pragma once

#include <memory>

#include "model/layers.h"

namespace hearth {

std::shared_ptr<MultiTaskModel> MakeMmoe(const ModelSpec& spec, Form form);
ModelCost MmoeCost(const ModelSpec& spec);

}  // namespace hearth
