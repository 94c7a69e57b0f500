// HoME: a hierarchy of multi-gate experts over groups of tasks (docs/MODEL.md §2).
//
//   v ─┬─ level1.shared     ──► z_shared ─┬───────────────► level2.shared ─────┐
//      ├─ level1.category.c ──► z_c ──────┼─┬─────────────► level2.category.c ─┼─► h_t ──► tower.t ──► logit
//      └─ …                               └─┴─(per task)──► level2.task.t ─────┘
#pragma once

#include <memory>

#include "model/layers.h"

namespace hearth {

std::shared_ptr<MultiTaskModel> MakeHome(const ModelSpec& spec, Form form);
ModelCost HomeCost(const ModelSpec& spec);

}  // namespace hearth
