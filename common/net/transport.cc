#include "common/net/transport.h"

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

}  // namespace hearth
