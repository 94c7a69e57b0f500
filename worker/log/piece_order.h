// Repeatable shuffles of pieces and records (docs/PROTOCOL.md §1).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/base/env.h"

namespace hearth {

// Of the pieces of one segment, numbered in (file, block) order.
inline uint64_t PieceShuffleSeed(uint64_t job_seed, uint32_t epoch, uint32_t segment) {
  return Mix64(Mix64(SeedOf(job_seed, "log_shuffle") + epoch) + segment);
}
// Of the valid records of one lane's window.
inline uint64_t WindowShuffleSeed(uint64_t job_seed, uint32_t epoch, uint32_t lane, uint64_t window) {
  return Mix64(Mix64(Mix64(SeedOf(job_seed, "window_shuffle") + epoch) + lane) + window);
}

// Fisher–Yates, from the end.
template <typename T>
void Shuffle(uint64_t seed, std::vector<T>* values) {
  Random random(seed);
  for (size_t i = values->size(); i > 1; --i) std::swap((*values)[i - 1], (*values)[random.Below(i)]);
}

}  // namespace hearth
