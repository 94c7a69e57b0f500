#include <algorithm>
#include <cstring>

#include "common/base/rendezvous.h"
#include "common/base/status.h"
#include "worker/collective/collective.h"
#include "worker/collective/lane_sum.h"

namespace hearth {

struct LocalCollectiveHub::State {
  // What a worker lays open to the others between two meetings.
  struct Offer {
    int lanes = 0;
    absl::Span<const Collective::Part> parts;
    absl::Span<float> sum_out;
    size_t tail_bytes = 0;
    absl::Span<char> broadcast;
  };

  class Member : public Collective {
   public:
    Member(State* hub, int worker) : hub_(hub), worker_(worker) {}
    int worker() const override { return worker_; }
    int workers() const override { return static_cast<int>(hub_->members.size()); }
    absl::Status SumParts(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out,
                          absl::Span<char> tails_out) override;
    absl::Status Broadcast(int root, absl::Span<char> bytes) override;
    absl::Status Barrier() override;

   private:
    void Meet() { hub_->rendezvous.Meet(worker_); }
    absl::Status CheckOffers() const;
    void AddSlice();
    void CopyTails(absl::Span<char> tails_out) const;

    State* const hub_;
    const int worker_;
    Offer offer_;  // read by the others after one Meet and before the next
  };

  State(Env* env, int workers) : rendezvous(env, workers) {
    for (int worker = 0; worker < workers; ++worker) members.push_back(std::make_unique<Member>(this, worker));
  }
  Rendezvous rendezvous;
  std::vector<std::unique_ptr<Member>> members;
};

absl::Status LocalCollectiveHub::State::Member::SumParts(int lanes, absl::Span<const Part> parts,
                                                         absl::Span<float> sum_out, absl::Span<char> tails_out) {
  offer_ = {};
  offer_.lanes = lanes;
  offer_.parts = parts;
  offer_.sum_out = sum_out;
  offer_.tail_bytes = lanes > 0 ? tails_out.size() / static_cast<size_t>(lanes) : 0;
  Meet();
  const absl::Status status = CheckOffers();  // all see the same offers: all go on, or none does
  if (status.ok()) {
    AddSlice();
    CopyTails(tails_out);
  }
  Meet();
  return status;
}

// As many parts as lanes, and all of one size, on every member.
absl::Status LocalCollectiveHub::State::Member::CheckOffers() const {
  const Offer& first = hub_->members[0]->offer_;
  for (const auto& member : hub_->members) {
    const Offer& offer = member->offer_;
    bool fits = offer.lanes == first.lanes && offer.sum_out.size() == first.sum_out.size() &&
                offer.tail_bytes == first.tail_bytes &&
                offer.parts.size() == static_cast<size_t>(LanesOf(first.lanes, workers(), member->worker_));
    for (const Part& part : offer.parts) {
      fits = fits && part.sum.size() == first.sum_out.size() && part.tail.size() == first.tail_bytes;
    }
    if (!fits)
      return absl::InternalError(absl::StrCat("SumParts: the parts of worker ", member->worker_, " do not fit"));
  }
  return absl::OkStatus();
}

// Each member adds one slice, for all.
void LocalCollectiveHub::State::Member::AddSlice() {
  const Slice slice = SliceOf(offer_.sum_out.size(), workers(), worker_);
  std::vector<const float*> parts;
  for (int lane = 0; lane < offer_.lanes; ++lane) {
    const Offer& offer = hub_->members[static_cast<size_t>(lane % workers())]->offer_;
    parts.push_back(offer.parts[static_cast<size_t>(lane / workers())].sum.data() + slice.begin);
  }
  if (slice.size() == 0) return;
  AddInOrder(parts, slice.size(), offer_.sum_out.data() + slice.begin);
  for (const auto& member : hub_->members) {
    if (member.get() == this) continue;
    std::copy_n(offer_.sum_out.data() + slice.begin, slice.size(), member->offer_.sum_out.data() + slice.begin);
  }
}

void LocalCollectiveHub::State::Member::CopyTails(absl::Span<char> tails_out) const {
  if (offer_.tail_bytes == 0) return;
  for (int lane = 0; lane < offer_.lanes; ++lane) {
    const Offer& offer = hub_->members[static_cast<size_t>(lane % workers())]->offer_;
    std::memcpy(tails_out.data() + static_cast<size_t>(lane) * offer_.tail_bytes,
                offer.parts[static_cast<size_t>(lane / workers())].tail.data(), offer_.tail_bytes);
  }
}

absl::Status LocalCollectiveHub::State::Member::Broadcast(int root, absl::Span<char> bytes) {
  HEARTH_CHECK(root >= 0 && root < workers(), "broadcast from worker ", root);
  offer_ = {};
  offer_.broadcast = bytes;
  Meet();
  const absl::Span<char> source = hub_->members[static_cast<size_t>(root)]->offer_.broadcast;
  absl::Status status;
  if (source.size() != bytes.size()) {
    status = absl::InternalError(
        absl::StrCat("broadcast: worker ", root, " brings ", source.size(), " bytes, expected ", bytes.size()));
  } else if (root != worker_ && !bytes.empty()) {
    std::memcpy(bytes.data(), source.data(), bytes.size());
  }
  Meet();
  return status;
}

absl::Status LocalCollectiveHub::State::Member::Barrier() {
  Meet();
  return absl::OkStatus();
}

LocalCollectiveHub::LocalCollectiveHub(Env* env, int workers) : state_(std::make_unique<State>(env, workers)) {}

LocalCollectiveHub::~LocalCollectiveHub() = default;

Collective* LocalCollectiveHub::collective(int worker) { return state_->members.at(static_cast<size_t>(worker)).get(); }

}  // namespace hearth
