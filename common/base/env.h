// The only door to time, waiting, threads and seeds. Rooms that use nothing else non-deterministic can later run,
// unchanged, in a seeded simulation that passes one baton: a thread gives it up in Event::WaitUntil and nowhere else.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace hearth {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// A sticky, auto-reset signal for ONE waiting thread; any thread may notify. The single primitive under mailboxes,
// queues, permits and collectives.
class Event {
 public:
  virtual ~Event() = default;
  // Wakes the waiter, or lets its next WaitUntil return at once.
  virtual void Notify() = 0;
  // Returns true when notified, false once Env::NowUs() >= deadline_us. May not return early.
  virtual bool WaitUntil(int64_t deadline_us) = 0;
};

// A running thread; the destructor joins.
class Thread {
 public:
  virtual ~Thread() = default;
};

// Thread-safe. Outlives everything made from it.
class Env {
 public:
  virtual ~Env() = default;
  virtual int64_t NowUs() = 0;   // monotonic
  virtual int64_t WallUs() = 0;  // since 1970; for names and logs, never for decisions
  virtual std::unique_ptr<Event> NewEvent() = 0;
  virtual std::unique_ptr<Thread> StartThread(absl::string_view name, std::function<void()> run) = 0;

  // The process's real one.
  static Env* Real();
};

// A random stream's seed: a function of the job's seed and the stream's purpose ("log_shuffle", "dense_init").
uint64_t SeedOf(uint64_t job_seed, absl::string_view purpose);

// The mixing function behind every derived value (splitmix64's finaliser). Stable for ever: snapshots depend on it.
inline uint64_t Mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// A small generator for shuffles and tests: a counter through Mix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() { return Mix64(state_++); }
  uint64_t Below(uint64_t bound) {  // REQUIRES: bound > 0. Multiply-shift; bias < 2^-32 for bounds below 2^32
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * bound) >> 64);
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1.0p-53; }  // [0, 1)

 private:
  uint64_t state_;
};

}  // namespace hearth
