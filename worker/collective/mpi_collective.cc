#include "worker/collective/mpi_collective.h"

#include <cstring>

#include "common/base/bytes.h"
#include "common/base/status.h"
#include "worker/collective/lane_sum.h"

namespace hearth {
namespace {

using SendBuffer = MpiRuntime::SendBuffer;
using ReceiveBuffer = MpiRuntime::ReceiveBuffer;

constexpr size_t kExchangeBytesMax = size_t{1} << 30;

class MpiCollective : public Collective {
 public:
  MpiCollective(MpiRuntime* runtime, int first_rank, int worker, int workers)
      : runtime_(runtime), first_rank_(first_rank), worker_(worker), workers_(workers) {}
  int worker() const override { return worker_; }
  int workers() const override { return workers_; }

  absl::Status SumParts(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out,
                        absl::Span<char> tails_out) override {
    const size_t tail_bytes = lanes > 0 ? tails_out.size() / static_cast<size_t>(lanes) : 0;
    HEARTH_CHECK(parts.size() == static_cast<size_t>(LanesOf(lanes, workers_, worker_)), "parts: ", parts.size(),
                 " of ", lanes, " lanes");
    for (const Part& part : parts) {
      HEARTH_CHECK(part.sum.size() == sum_out.size() && part.tail.size() == tail_bytes, "sizes of the parts differ");
    }
    HEARTH_RETURN_IF_ERROR(ScatterParts(lanes, parts, sum_out.size(), tail_bytes));
    AddOwnSlice(lanes, parts, sum_out);
    TakeTails(lanes, parts, sum_out.size(), tail_bytes, tails_out);
    return GatherSlices(sum_out);
  }

  absl::Status Broadcast(int root, absl::Span<char> bytes) override {
    HEARTH_CHECK(root >= 0 && root < workers_, "broadcast from worker ", root);
    for (size_t begin = 0; begin < bytes.size(); begin += kExchangeBytesMax) {
      const absl::Span<char> chunk = bytes.subspan(begin, kExchangeBytesMax);
      std::vector<SendBuffer> sends;
      std::vector<ReceiveBuffer> receives;
      if (root == worker_) {
        ForEachPeer([&](int peer) { sends.push_back({RankOf(peer), chunk}); });
      } else {
        receives.push_back({RankOf(root), chunk});
      }
      HEARTH_RETURN_IF_ERROR(runtime_->Exchange(sends, receives));
    }
    return absl::OkStatus();
  }

  absl::Status Barrier() override {
    const char here = 1;
    std::vector<char> there(static_cast<size_t>(workers_));
    std::vector<SendBuffer> sends;
    std::vector<ReceiveBuffer> receives;
    ForEachPeer([&](int peer) {
      sends.push_back({RankOf(peer), absl::MakeSpan(&here, 1)});
      receives.push_back({RankOf(peer), absl::MakeSpan(&there[static_cast<size_t>(peer)], 1)});
    });
    return runtime_->Exchange(sends, receives);
  }

 private:
  // To the owner of slice s: [own lanes × floats of s][own lanes × tail].
  absl::Status ScatterParts(int lanes, absl::Span<const Part> parts, size_t n, size_t tail_bytes) {
    std::vector<SendBuffer> sends;
    std::vector<ReceiveBuffer> receives;
    outbox_.resize(static_cast<size_t>(workers_));
    inbox_.resize(static_cast<size_t>(workers_));
    ForEachPeer([&](int peer) {
      Bytes& out = outbox_[static_cast<size_t>(peer)];
      const Slice slice = SliceOf(n, workers_, peer);
      Reserve(parts.size() * (slice.size() * sizeof(float) + tail_bytes), &out);
      char* at = out.data();
      for (const Part& part : parts) at = Append(at, part.sum.data() + slice.begin, slice.size() * sizeof(float));
      for (const Part& part : parts) at = Append(at, part.tail.data(), tail_bytes);
      sends.push_back({RankOf(peer), out.span().subspan(0, static_cast<size_t>(at - out.data()))});

      Bytes& in = inbox_[static_cast<size_t>(peer)];
      const size_t bytes = static_cast<size_t>(LanesOf(lanes, workers_, peer)) *
                           (SliceOf(n, workers_, worker_).size() * sizeof(float) + tail_bytes);
      Reserve(bytes, &in);
      receives.push_back({RankOf(peer), absl::MakeSpan(in.data(), bytes)});
    });
    return runtime_->Exchange(sends, receives);
  }

  void AddOwnSlice(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out) {
    const Slice slice = SliceOf(sum_out.size(), workers_, worker_);
    if (slice.size() == 0) return;
    std::vector<const float*> in_order;
    for (int lane = 0; lane < lanes; ++lane) {
      const size_t held = static_cast<size_t>(lane / workers_);  // its number among its worker's lanes
      const int owner = lane % workers_;
      in_order.push_back(owner == worker_ ? parts[held].sum.data() + slice.begin
                                          : reinterpret_cast<const float*>(inbox_[static_cast<size_t>(owner)].data()) +
                                                held * slice.size());
    }
    AddInOrder(in_order, slice.size(), sum_out.data() + slice.begin);
  }

  void TakeTails(int lanes, absl::Span<const Part> parts, size_t n, size_t tail_bytes, absl::Span<char> tails_out) {
    if (tail_bytes == 0) return;
    const size_t slice_bytes = SliceOf(n, workers_, worker_).size() * sizeof(float);
    for (int lane = 0; lane < lanes; ++lane) {
      const size_t held = static_cast<size_t>(lane / workers_);
      const int owner = lane % workers_;
      const char* tail = owner == worker_ ? parts[held].tail.data()
                                          : inbox_[static_cast<size_t>(owner)].data() +
                                                static_cast<size_t>(LanesOf(lanes, workers_, owner)) * slice_bytes +
                                                held * tail_bytes;
      std::memcpy(tails_out.data() + static_cast<size_t>(lane) * tail_bytes, tail, tail_bytes);
    }
  }

  absl::Status GatherSlices(absl::Span<float> sum_out) {
    std::vector<SendBuffer> sends;
    std::vector<ReceiveBuffer> receives;
    const absl::Span<char> own = BytesOf(sum_out, worker_);
    ForEachPeer([&](int peer) {
      sends.push_back({RankOf(peer), own});
      receives.push_back({RankOf(peer), BytesOf(sum_out, peer)});
    });
    return runtime_->Exchange(sends, receives);
  }

  absl::Span<char> BytesOf(absl::Span<float> sum, int owner) const {
    const Slice slice = SliceOf(sum.size(), workers_, owner);
    return absl::MakeSpan(reinterpret_cast<char*>(sum.data() + slice.begin), slice.size() * sizeof(float));
  }

  static void Reserve(size_t bytes, Bytes* buffer) {
    if (buffer->size() < bytes) *buffer = Bytes(bytes);
  }

  static char* Append(char* at, const void* data, size_t bytes) {
    if (bytes > 0) std::memcpy(at, data, bytes);
    return at + bytes;
  }

  // The next worker first, so that not all send to worker 0 at once.
  template <typename F>
  void ForEachPeer(F f) const {
    for (int i = 1; i < workers_; ++i) f((worker_ + i) % workers_);
  }

  int RankOf(int worker) const { return first_rank_ + worker; }

  MpiRuntime* const runtime_;
  const int first_rank_;
  const int worker_;
  const int workers_;
  std::vector<Bytes> outbox_;  // by peer; kept between calls: first touch is what costs
  std::vector<Bytes> inbox_;
};

}  // namespace

std::unique_ptr<Collective> MakeMpiCollective(MpiRuntime* runtime, int first_rank, int worker, int workers) {
  return std::make_unique<MpiCollective>(runtime, first_rank, worker, workers);
}

}  // namespace hearth
