#include "embedding/expiry.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace hearth {
namespace {

constexpr uint64_t kStepsPerSpan = 16;  // that move the clock as far as they may
constexpr uint64_t kMarksPerSpan = 64;

}  // namespace

Expiry::Expiry(ExpiryRule rule, const LogClock& saved) : rule_(rule) {
  if (!rule_.by_time()) return;
  time_s_ = saved.time_s();
  first_time_s_ = saved.first_time_s();
  horizon_ = saved.horizon();
  for (const LogClock::Mark& mark : saved.mark()) marks_.push_back({mark.before_step(), mark.time_s()});
  MoveHorizon();  // by fewer hours than before it may be further on
}

uint32_t Expiry::GenerationAt(uint64_t step) const {
  if (rule_.by_time()) return static_cast<uint32_t>((time_s_ - first_time_s_) / span_s());
  return rule_.steps == 0 ? 0 : static_cast<uint32_t>(step / rule_.steps);
}

bool Expiry::Tick(uint64_t step, uint32_t time_s) {
  if (!rule_.by_time() || time_s == 0) return false;
  // It began with a broken clock's time, it seems. Nothing has expired by it yet.
  if (marks_.size() == 1 && horizon_ == 0 && time_s + span_s() / kStepsPerSpan < time_s_) {
    time_s_ = first_time_s_ = marks_.front().time_s = time_s;
    return false;
  }
  if (time_s <= time_s_) return false;
  if (time_s_ == 0) {
    time_s_ = first_time_s_ = time_s;
  } else {
    time_s_ += static_cast<uint32_t>(std::min<uint64_t>(time_s - time_s_, span_s() / kStepsPerSpan));
  }
  const bool mark = marks_.empty() || time_s_ - marks_.back().time_s >= span_s() / kMarksPerSpan;
  if (mark) marks_.push_back({step + 1, time_s_});
  MoveHorizon();
  return mark;
}

void Expiry::MoveHorizon() {
  size_t reached = 0;
  while (reached < marks_.size() && marks_[reached].time_s + span_s() <= time_s_) ++reached;
  if (reached == 0) return;
  horizon_ = std::max(horizon_, marks_[reached - 1].before_step);
  marks_.erase(marks_.begin(), marks_.begin() + static_cast<ptrdiff_t>(reached - 1));
}

uint64_t Expiry::QuarterAfter(uint64_t step) const {
  if (!rule_.by_time()) return HorizonAt(step) + std::max<uint32_t>(1, rule_.steps / 4);
  return marks_.size() > kMarksPerSpan / 4 ? marks_[kMarksPerSpan / 4].before_step : horizon_ + 1;
}

std::vector<uint64_t> Expiry::Marks() const {
  std::vector<uint64_t> steps;
  for (const Mark& mark : marks_) steps.push_back(mark.before_step);
  return steps;
}

LogClock Expiry::clock() const {
  LogClock clock;
  if (!rule_.by_time()) return clock;
  clock.set_time_s(time_s_);
  clock.set_first_time_s(first_time_s_);
  clock.set_horizon(horizon_);
  for (const Mark& mark : marks_) {
    LogClock::Mark* const kept = clock.add_mark();
    kept->set_before_step(mark.before_step);
    kept->set_time_s(mark.time_s);
  }
  return clock;
}

absl::Status Expiry::Check(const LogClock& saved) {
  bool whole = saved.first_time_s() <= saved.time_s();
  uint64_t step = 0;
  uint32_t time_s = saved.first_time_s();
  for (const LogClock::Mark& mark : saved.mark()) {
    whole = whole && mark.before_step() > step && mark.time_s() >= time_s && mark.time_s() <= saved.time_s();
    step = mark.before_step();
    time_s = mark.time_s();
  }
  if (whole) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("its clock is at ", saved.time_s(), " with ", saved.mark_size(),
                                          " marks that do not ascend up to there; use an older snapshot"));
}

}  // namespace hearth
