// Shared bottom: one expert below, a tower a task (docs/MODEL.md §5).
#pragma once

#include <memory>

#include "model/layers.h"

namespace hearth {

std::shared_ptr<MultiTaskModel> MakeSharedBottom(const ModelSpec& spec, Form form);
ModelCost SharedBottomCost(const ModelSpec& spec);

}  // namespace hearth
