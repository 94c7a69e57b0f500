// Whether a step for which this worker has no record is made (docs/PROTOCOL.md §3, idle lanes).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "common/base/env.h"

namespace hearth {

// A step is made where some lane of the job has a record for it. A worker of whose lanes none has one does not know of
// the others: it reports that to the scheduler and waits until it hears that another worker makes the step, or has a
// record itself. So time in which nothing comes is no step, and ages nothing.
class RestGate {
 public:
  // report(step, without_records): tells the scheduler; null in a job of one worker, where there are no others.
  using Report = std::function<absl::Status(uint64_t step, bool without_records)>;
  RestGate(Env* env, Report report) : report_(std::move(report)), news_(env->NewEvent()) {}

  // The pull thread's, steps in order. This worker has records for the step.
  absl::Status Moves(uint64_t step);
  // It has none. Whether the step is made all the same; if not, WaitForNews and ask again.
  absl::StatusOr<bool> Joins(uint64_t step);
  // Returns once something was told below.
  void WaitForNews();

  // Any thread. Another worker has records for a step up to this one.
  void Join(uint64_t step);
  // A stop is asked for, and takes steps to be decided: all are made from now on.
  void Open();
  // A lane has another batch, or everything ends.
  void Notify() { news_->Notify(); }
  // Whether the pull thread waits: nobody is held up by a lane that stays dry.
  const std::atomic<bool>& rests() const { return rests_; }

 private:
  const Report report_;
  const std::unique_ptr<Event> news_;  // the pull thread waits on it
  std::atomic<uint64_t> join_{0};
  std::atomic<bool> open_{false};
  std::atomic<bool> rests_{false};
  uint64_t reported_ = 0;  // pull thread: the newest step reported as one without records
};

}  // namespace hearth
