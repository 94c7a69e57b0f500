// The lanes' sorted sign lists as one, a window at a time. The sum of a sign's gradients runs in lane order.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/types/span.h"
#include "embedding/embedding_table.h"
#include "embedding/lifecycle.h"
#include "embedding/sign.h"

namespace hearth {

class LaneMerge {
 public:
  LaneMerge(absl::Span<const PushPart> parts, uint32_t dim) : parts_(parts), dim_(dim), next_(parts.size(), 0) {}

  // At most `max` further signs; none at the end.
  void Next(size_t max, std::vector<Sign>* signs, std::vector<uint32_t>* occurrences, std::vector<float>* gradients) {
    signs->clear();
    occurrences->clear();
    gradients->resize(max * dim_);
    Sign sign = 0;
    while (signs->size() < max && Smallest(&sign)) {
      occurrences->push_back(Sum(sign, gradients->data() + signs->size() * dim_));
      signs->push_back(sign);
    }
  }

 private:
  bool Smallest(Sign* smallest) const {
    bool any = false;
    for (size_t lane = 0; lane < parts_.size(); ++lane) {
      if (next_[lane] == parts_[lane].signs.size()) continue;
      const Sign sign = parts_[lane].signs[next_[lane]];
      if (!any || sign < *smallest) *smallest = sign;
      any = true;
    }
    return any;
  }

  uint32_t Sum(Sign sign, float* sum) {
    uint32_t occurrences = 0;
    bool first = true;
    for (size_t lane = 0; lane < parts_.size(); ++lane) {
      const size_t i = next_[lane];
      if (i == parts_[lane].signs.size() || parts_[lane].signs[i] != sign) continue;
      ++next_[lane];
      occurrences = AddSaturating(occurrences, parts_[lane].occurrences[i]);
      const float* gradient = parts_[lane].gradients.data() + i * dim_;
      if (first) {
        std::memcpy(sum, gradient, dim_ * sizeof(float));
      } else {
        for (uint32_t d = 0; d < dim_; ++d) sum[d] += gradient[d];
      }
      first = false;
    }
    return occurrences;
  }

  const absl::Span<const PushPart> parts_;
  const uint32_t dim_;
  std::vector<size_t> next_;  // [lanes]
};

}  // namespace hearth
