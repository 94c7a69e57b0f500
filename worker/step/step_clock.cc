#include "worker/step/step_clock.h"

#include <algorithm>

#include "common/base/status.h"

namespace hearth {

StepClock::StepClock(const Options& options)
    : options_(options), epoch_(options.epoch), end_(options.end.step >= options.step ? options.end : SegmentEnd()) {
  HEARTH_CHECK(end_.step <= options.step + options.staleness, "a segment ends at ", end_.step, ", start is ",
               options.step);
  cuts_.push_back(options.step);
  if (end_.step > options.step) cuts_.push_back(end_.step);
}

Decision StepClock::Decide(uint64_t step, const StepVerdict& verdict) {
  Decision decision;
  decision.step = step;
  const uint64_t cut = step + options_.staleness;
  // Lanes stay at their end until the segment's cut; those steps say nothing new.
  const bool ending_already = end_.step != 0 && step <= end_.step;
  decision.segment_ends = verdict.all_at_end && !ending_already;
  decision.epoch_ends = decision.segment_ends && verdict.last;
  const uint64_t stop_at = StopAt();
  decision.stop = verdict.stop && (stop_at == 0 || stop_at > cut);
  // A cut that was asked for before and is still to come answers this one too.
  const bool cut_pending = cuts_.back() >= step;
  if (decision.segment_ends || decision.stop || (verdict.cut && !cut_pending)) decision.cut = cut;
  Take(decision);
  return decision;
}

void StepClock::Take(const Decision& decision) {
  if (decision.cut != 0) AddCut(decision.cut);
  if (decision.segment_ends) {
    epoch_ = EpochOf(decision.step);
    end_ = {decision.cut, decision.epoch_ends};
  }
  if (decision.stop) asked_stop_ = decision.cut;
  while (cuts_.size() > 1 && cuts_[1] <= decision.step) cuts_.erase(cuts_.begin());
}

void StepClock::AddCut(uint64_t step) {
  if (cuts_.back() == step) return;
  HEARTH_CHECK(cuts_.back() < step, "cut ", step, " after ", cuts_.back());
  cuts_.push_back(step);
}

uint64_t StepClock::View(uint64_t step) const {
  const uint64_t before = step - 1;
  uint64_t last_cut = options_.step;
  if (options_.every_steps > 0) last_cut = std::max(last_cut, before - before % options_.every_steps);
  for (const uint64_t cut : cuts_) {
    if (cut <= before) last_cut = std::max(last_cut, cut);
  }
  const uint64_t stale = before > options_.staleness ? before - options_.staleness : 0;
  return std::max(stale, last_cut);
}

uint64_t StepClock::NextCut(uint64_t step) const {
  uint64_t next = 0;
  const auto candidate = [&](uint64_t cut) {
    if (cut >= step && (next == 0 || cut < next)) next = cut;
  };
  if (options_.every_steps > 0)
    candidate((step + options_.every_steps - 1) / options_.every_steps * options_.every_steps);
  if (options_.steps_max > 0) candidate(options_.steps_max);
  for (const uint64_t cut : cuts_) candidate(cut);
  return next;
}

uint64_t StepClock::StopAt() const {
  uint64_t stop = 0;
  const auto candidate = [&](uint64_t step) {
    if (step != 0 && (stop == 0 || step < stop)) stop = step;
  };
  candidate(options_.steps_max);
  candidate(asked_stop_);
  if (end_.of_epoch && epoch_ + 1 >= options_.epochs) candidate(end_.step);
  return stop;
}

bool StepClock::FinishedAt(uint64_t step) const {
  if (options_.steps_max > 0 && step >= options_.steps_max) return true;
  return end_.of_epoch && step >= end_.step && epoch_ + 1 >= options_.epochs;
}

}  // namespace hearth
