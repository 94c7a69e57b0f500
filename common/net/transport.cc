#include "common/net/transport.h"

#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "common/net/wire.h"

namespace hearth {

absl::Status CheckSend(int size, int from_port, Address to, size_t payload_bytes) {
  if (to.rank < 0 || to.rank >= size) {
    return absl::InvalidArgumentError(absl::StrCat("send: rank ", to.rank, " is not one of ", size));
  }
  if (to.port < 0 || to.port >= kPortsMax || from_port < 0 || from_port >= kPortsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("send: port ", from_port, " or ", to.port, " is not in 0 to ", kPortsMax - 1));
  }
  if (payload_bytes < sizeof(Header)) {
    return absl::InvalidArgumentError(absl::StrCat("send: ", payload_bytes, " bytes are no message"));
  }
  if (payload_bytes > kPayloadBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("send: a message of ", payload_bytes, " bytes to rank ", to.rank,
                                                   " is longer than ", kPayloadBytesMax,
                                                   "; lower training.batch_size or the width of the tables"));
  }
  return absl::OkStatus();
}

// --- in process ------------------------------------------------------------------------------------------------------

struct InProcessHub::State {
  class Endpoint : public Transport {
   public:
    Endpoint(State* hub, Env* env, int rank) : hub_(hub), rank_(rank), mailboxes_(env) {}
    int rank() const override { return rank_; }
    int size() const override { return static_cast<int>(hub_->endpoints.size()); }
    Mailbox* Open(int port) override { return mailboxes_.Get(port); }
    absl::Status Send(int from_port, Address to, Bytes payload) override {
      HEARTH_RETURN_IF_ERROR(CheckSend(size(), from_port, to, payload.size()));
      hub_->endpoints[to.rank]->Open(to.port)->Deliver({{rank_, from_port}, std::move(payload)});
      return absl::OkStatus();
    }

   private:
    State* const hub_;
    const int rank_;
    MailboxSet mailboxes_;
  };
  std::vector<std::unique_ptr<Endpoint>> endpoints;
};

InProcessHub::InProcessHub(Env* env, int size) : state_(std::make_unique<State>()) {
  HEARTH_CHECK(size > 0);
  for (int rank = 0; rank < size; ++rank) {
    state_->endpoints.push_back(std::make_unique<State::Endpoint>(state_.get(), env, rank));
  }
}

InProcessHub::~InProcessHub() = default;

Transport* InProcessHub::transport(int rank) { return state_->endpoints.at(rank).get(); }

// --- weather ---------------------------------------------------------------------------------------------------------

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
