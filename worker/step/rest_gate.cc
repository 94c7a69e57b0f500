#include "worker/step/rest_gate.h"

#include "common/base/status.h"

namespace hearth {

absl::Status RestGate::Moves(uint64_t step) {
  rests_ = false;
  return report_ != nullptr ? report_(step, false) : absl::OkStatus();
}

absl::StatusOr<bool> RestGate::Joins(uint64_t step) {
  const bool joins = open_ || join_ >= step;
  rests_ = !joins;
  if (!joins && report_ != nullptr && reported_ < step) {
    reported_ = step;
    HEARTH_RETURN_IF_ERROR(report_(step, true));
  }
  return joins;
}

void RestGate::WaitForNews() { news_->WaitUntil(kNever); }

void RestGate::Join(uint64_t step) {
  uint64_t known = join_;
  while (known < step && !join_.compare_exchange_weak(known, step)) {
  }
  news_->Notify();
}

void RestGate::Open() {
  open_ = true;
  news_->Notify();
}

}  // namespace hearth
