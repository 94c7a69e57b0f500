// The one addition of parts that every host collective uses: in lane order, so that all give the same bits.
#pragma once

#include <algorithm>
#include <cstddef>

#include "absl/types/span.h"

namespace hearth {

// sum_out[j] = ((parts[0][j] + parts[1][j]) + parts[2][j]) + … for j < n. The first part is copied, not added to zero
// (−0 stays −0). No parts: zeros. sum_out may be parts[0] but overlaps none otherwise.
inline void AddInOrder(absl::Span<const float* const> parts, size_t n, float* sum_out) {
  constexpr size_t kBlock = 4096;  // floats: the sums stay in the first-level cache while the parts stream by
  constexpr size_t kWidth = 16;    // a constant trip count is what the compiler vectorises at every level
  if (parts.empty()) std::fill_n(sum_out, n, 0.0f);
  for (size_t begin = 0; begin < n && !parts.empty(); begin += kBlock) {
    const size_t end = std::min(n, begin + kBlock);
    if (parts[0] != sum_out) std::copy(parts[0] + begin, parts[0] + end, sum_out + begin);
    for (size_t p = 1; p < parts.size(); ++p) {
      const float* __restrict in = parts[p];
      float* __restrict out = sum_out;
      size_t j = begin;
      for (; j + kWidth <= end; j += kWidth) {
        for (size_t k = 0; k < kWidth; ++k) out[j + k] += in[j + k];
      }
      for (; j < end; ++j) out[j] += in[j];
    }
  }
}

// Slice s of n floats cut for `workers`: [begin, end).
struct Slice {
  size_t begin;
  size_t end;
  size_t size() const { return end - begin; }
};
inline Slice SliceOf(size_t n, int workers, int s) {
  const auto cut = [&](int i) {
    return static_cast<size_t>(static_cast<unsigned __int128>(n) * static_cast<unsigned>(i) /
                               static_cast<unsigned>(workers));
  };
  return {cut(s), cut(s + 1)};
}

// Number of lanes l < lanes with l mod workers == worker.
inline int LanesOf(int lanes, int workers, int worker) {
  return lanes > worker ? (lanes - worker - 1) / workers + 1 : 0;
}

}  // namespace hearth
