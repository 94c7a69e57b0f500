// 32-bit numbers as 16-bit ones (IEEE 754 binary16) and back, to the nearest, ties to even: the same bits on every
// machine. What is too large becomes infinite, from 65,520 on; a NaN stays one.
#pragma once

#include <cstdint>

#include "absl/types/span.h"

namespace hearth {

uint16_t ToHalf(float x);
float FromHalf(uint16_t half);

// to[i] for each from[i], by the machine's instruction where it has one. REQUIRES: room for from.size().
void ToHalf(absl::Span<const float> from, uint16_t* to);
void FromHalf(absl::Span<const uint16_t> from, float* to);

}  // namespace hearth
