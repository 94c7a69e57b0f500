// docs/PROTOCOL.md §4 "Expiry" by the log's time, as plainly as can be: what Expiry is compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace hearth {

struct SlowClock {
  uint64_t hours = 1;
  uint64_t now_s = 0;
  uint64_t first_s = 0;
  std::vector<std::pair<uint64_t, uint64_t>> marks;  // (step, time after it), all there were

  void Tick(uint64_t step, uint64_t time_s) {
    if (time_s == 0) return;
    if (marks.size() == 1 && !Expired(marks[0].first) && time_s + hours * 3600 / 16 < now_s) {
      first_s = now_s = marks[0].second = time_s;
    }
    if (time_s <= now_s) return;
    if (now_s == 0) first_s = now_s = time_s;
    now_s = std::min(time_s, now_s + hours * 3600 / 16);
    if (marks.empty() || now_s - marks.back().second >= hours * 3600 / 64) marks.emplace_back(step, now_s);
  }
  bool Expired(uint64_t last_step) const {
    return std::any_of(marks.begin(), marks.end(), [&](const auto& mark) {
      return last_step <= mark.first && mark.second + hours * 3600 <= now_s;
    });
  }
  uint32_t Generation() const { return static_cast<uint32_t>((now_s - first_s) / (hours * 3600)); }
};

}  // namespace hearth
