#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {

// Time that stands still but where a thread would wait: there it leaps to the deadline. For one thread.
class LeapingEnv : public Env {
 public:
  int64_t NowUs() override { return now_us_; }
  int64_t WallUs() override { return now_us_; }
  std::unique_ptr<Event> NewEvent() override { return std::make_unique<LeapingEvent>(this); }
  std::unique_ptr<Thread> StartThread(absl::string_view name, std::function<void()> run) override {
    return Env::Real()->StartThread(name, std::move(run));
  }
  std::function<void()> before_leap = [] {};

 private:
  class LeapingEvent : public Event {
   public:
    explicit LeapingEvent(LeapingEnv* env) : env_(env) {}
    void Notify() override { notified_ = true; }
    bool WaitUntil(int64_t deadline_us) override {
      if (!notified_ && deadline_us > env_->now_us_) env_->before_leap();
      if (std::exchange(notified_, false)) return true;
      HEARTH_CHECK(deadline_us != kNever, "waits for ever");
      env_->now_us_ = std::max(env_->now_us_, deadline_us);
      return false;
    }

   private:
    LeapingEnv* const env_;
    bool notified_ = false;
  };
  int64_t now_us_ = 1'000'000;
};

}  // namespace hearth
