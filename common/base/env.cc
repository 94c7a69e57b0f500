#include "common/base/env.h"

#include <pthread.h>
#include <sys/prctl.h>
#include <xxhash.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hearth {
namespace {

using SteadyClock = std::chrono::steady_clock;

int64_t SteadyUs() {
  return std::chrono::duration_cast<std::chrono::microseconds>(SteadyClock::now().time_since_epoch()).count();
}

class RealEvent : public Event {
 public:
  void Notify() override {
    // Notified under the lock: a waiter that returns may destroy the event at once.
    std::lock_guard<std::mutex> lock(mutex_);
    notified_ = true;
    changed_.notify_one();
  }

  bool WaitUntil(int64_t deadline_us) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (deadline_us == kNever) {
      changed_.wait(lock, [this] { return notified_; });
    } else if (!notified_ && SteadyUs() < deadline_us) {
      const SteadyClock::time_point deadline{std::chrono::microseconds(deadline_us)};
      changed_.wait_until(lock, deadline, [this] { return notified_; });
    }
    const bool notified = notified_;
    notified_ = false;
    return notified;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool notified_ = false;  // guarded by mutex_
};

class RealThread : public Thread {
 public:
  RealThread(absl::string_view name, std::function<void()> run)
      : thread_([name = std::string(name.substr(0, 15)), run = std::move(run)] {
          pthread_setname_np(pthread_self(), name.c_str());  // the kernel keeps 15 characters
          prctl(PR_SET_TIMERSLACK, 1);  // waits of tens of µs end when they should, not 50 µs later
          run();
        }) {}
  ~RealThread() override { thread_.join(); }

 private:
  std::thread thread_;
};

class RealEnv : public Env {
 public:
  int64_t NowUs() override { return SteadyUs(); }
  int64_t WallUs() override {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch())
        .count();
  }
  std::unique_ptr<Event> NewEvent() override { return std::make_unique<RealEvent>(); }
  std::unique_ptr<Thread> StartThread(absl::string_view name, std::function<void()> run) override {
    return std::make_unique<RealThread>(name, std::move(run));
  }
};

}  // namespace

Env* Env::Real() {
  static RealEnv* const env = new RealEnv;  // never destroyed: threads may outlive static destruction
  return env;
}

uint64_t SeedOf(uint64_t job_seed, absl::string_view purpose) {
  return Mix64(XXH3_64bits_withSeed(purpose.data(), purpose.size(), job_seed));
}

}  // namespace hearth
