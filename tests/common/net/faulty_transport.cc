#include "tests/common/net/faulty_transport.h"

#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

class FaultyTransport : public Transport {
 public:
  FaultyTransport(Transport* base, Weather weather) : base_(base), weather_(weather), random_(weather.seed) {}

  int rank() const override { return base_->rank(); }
  int size() const override { return base_->size(); }
  Mailbox* Open(int port) override { return base_->Open(port); }

  absl::Status Send(int from_port, Address to, Bytes payload) override {
    HEARTH_RETURN_IF_ERROR(CheckSend(size(), from_port, to, payload.size()));
    std::lock_guard<std::mutex> lock(mutex_);
    // Three draws a message, whatever they decide: a message's fate depends on its number alone.
    const bool lose = random_.Uniform() < weather_.lose;
    const bool repeat = random_.Uniform() < weather_.repeat;
    const bool hold = random_.Uniform() < weather_.reorder;
    std::deque<Held> due;
    if (!hold || held_.size() >= kHeldMax) due.swap(held_);  // what was held goes after the present message
    if (!lose) {
      if (repeat) HEARTH_RETURN_IF_ERROR(base_->Send(from_port, to, payload.Clone()));
      if (hold) {
        held_.push_back({from_port, to, std::move(payload)});
      } else {
        HEARTH_RETURN_IF_ERROR(base_->Send(from_port, to, std::move(payload)));
      }
    }
    while (!due.empty()) {  // the newest first: they overtake each other, too
      HEARTH_RETURN_IF_ERROR(base_->Send(due.back().from_port, due.back().to, std::move(due.back().payload)));
      due.pop_back();
    }
    return absl::OkStatus();
  }

 private:
  static constexpr size_t kHeldMax = 64;
  struct Held {
    int from_port;
    Address to;
    Bytes payload;
  };

  Transport* const base_;
  const Weather weather_;
  std::mutex mutex_;
  Random random_;          // guarded by mutex_
  std::deque<Held> held_;  // guarded by mutex_
};

}  // namespace

std::unique_ptr<Transport> MakeFaultyTransport(Transport* base, Weather weather) {
  return std::make_unique<FaultyTransport>(base, weather);
}

}  // namespace hearth
