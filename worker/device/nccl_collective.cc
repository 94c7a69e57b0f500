#include "worker/device/nccl_collective.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>

#include <atomic>
#include <exception>
#include <functional>
#include <vector>

#include "common/base/logging.h"
#include "common/base/status.h"
#include "worker/collective/lane_sum.h"

namespace hearth {
namespace {

constexpr int64_t kSumsMaxUs = 1'800'000'000;
constexpr int64_t kWatchUs = 1'000'000;
constexpr int64_t kLookUs = 20;

using torch::Tensor;

class NcclCollective : public DeviceCollective {
 public:
  NcclCollective(Env* env, int gpu, Collective* host)
      : env_(env),
        host_(host),
        gpu_(static_cast<c10::DeviceIndex>(gpu)),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, gpu_)),
        look_(env->NewEvent()),
        closing_(env->NewEvent()) {}
  // Aborts what has not finished: no peer is waited for.
  ~NcclCollective() override {
    closing_->Notify();
    watchdog_.reset();
    if (communicator_ != nullptr && !aborted_) ncclCommAbort(communicator_);
  }

  absl::Status Start() {
    if (workers() == 1) return absl::OkStatus();
    ncclUniqueId id = {};
    if (worker() == 0) HEARTH_RETURN_IF_ERROR(Check("ncclGetUniqueId", ncclGetUniqueId(&id)));
    HEARTH_RETURN_IF_ERROR(host_->Broadcast(0, absl::MakeSpan(reinterpret_cast<char*>(&id), sizeof(id))));
    const c10::cuda::CUDAGuard guard(gpu_);
    HEARTH_RETURN_IF_ERROR(Check("ncclCommInitRank", ncclCommInitRank(&communicator_, workers(), id, worker())));
    watchdog_ = env_->StartThread("nccl-watchdog", [this] { Watch(); });
    return absl::OkStatus();
  }

  int worker() const override { return host_->worker(); }
  int workers() const override { return host_->workers(); }

  // As MpiCollective: slices of the parts to their owners, added in lane order, sums gathered; tails go to all at once.
  absl::Status SumParts(int lanes, absl::Span<const Part> parts, const Tensor& sum_out,
                        const Tensor& tails_out) override {
    try {
      if (busy_since_us_ == 0) busy_since_us_ = env_->NowUs();
      at::cuda::CUDAEvent parts_there;
      parts_there.record(c10::cuda::getCurrentCUDAStream(gpu_));
      parts_there.block(stream_);
      const c10::cuda::CUDAStreamGuard guard(stream_);
      return Enqueue(lanes, parts, sum_out, tails_out);
    } catch (const std::exception& error) {
      return Fault("CUDA", error.what());
    }
  }

  absl::Status Finish() override {
    try {
      at::cuda::CUDAEvent done;
      done.record(stream_);
      while (!aborted_ && !done.query()) look_->WaitUntil(env_->NowUs() + kLookUs);
      busy_since_us_ = 0;
      return aborted_ ? abort_status_ : absl::OkStatus();
    } catch (const std::exception& error) {
      return aborted_ ? abort_status_ : Fault("CUDA", error.what());
    }
  }

 private:
  absl::Status Enqueue(int lanes, absl::Span<const Part> parts, const Tensor& sum_out, const Tensor& tails_out) {
    const Slice slice = Of(sum_out, worker());
    std::vector<Tensor> others(static_cast<size_t>(lanes));  // [lanes] of this worker's slice; own lanes undefined
    for (int lane = 0; lane < lanes; ++lane) {
      if (lane % workers() == worker()) continue;
      others[static_cast<size_t>(lane)] = torch::empty({static_cast<int64_t>(slice.size())}, sum_out.options());
    }
    HEARTH_RETURN_IF_ERROR(Group([&](int peer, const Call& call) {
      const Slice to = Of(sum_out, peer);
      for (const Part& part : parts) {
        call(Send(part.sum, to, peer));
        if (tails_out.defined()) call(SendTail(part.tail, peer));
      }
      for (int lane = peer; lane < lanes; lane += workers()) {
        call(Receive(others[static_cast<size_t>(lane)], {0, slice.size()}, peer));
        if (tails_out.defined()) call(ReceiveTail(tails_out[lane], peer));
      }
    }));
    Tensor added = Cut(sum_out, slice);
    for (int lane = 0; lane < lanes; ++lane) {
      const Part* const own = lane % workers() == worker() ? &parts[static_cast<size_t>(lane / workers())] : nullptr;
      const Tensor part = own != nullptr ? Cut(own->sum, slice) : others[static_cast<size_t>(lane)];
      lane == 0 ? added.copy_(part) : added.add_(part);
      if (own != nullptr && tails_out.defined()) tails_out[lane].copy_(own->tail);
    }
    return Group([&](int peer, const Call& call) {
      call(Send(sum_out, slice, peer));
      call(Receive(sum_out, Of(sum_out, peer), peer));
    });
  }

  // One NCCL group of calls with every peer; the group is closed whatever they return.
  using Call = std::function<void(ncclResult_t)>;
  absl::Status Group(const std::function<void(int peer, const Call& call)>& with_peer) {
    if (workers() == 1) return absl::OkStatus();
    if (aborted_) return abort_status_;
    ncclResult_t first = ncclSuccess;
    const Call call = [&first](ncclResult_t result) {
      if (first == ncclSuccess) first = result;
    };
    call(ncclGroupStart());
    for (int peer = 0; peer < workers(); ++peer) {
      if (peer != worker()) with_peer(peer, call);
    }
    call(ncclGroupEnd());
    return aborted_ ? abort_status_ : Check("send and receive", first);
  }
  ncclResult_t Send(const Tensor& from, Slice part, int peer) {
    if (part.size() == 0) return ncclSuccess;
    return ncclSend(from.data_ptr<float>() + part.begin, part.size(), ncclFloat, peer, communicator_, stream_.stream());
  }
  ncclResult_t Receive(const Tensor& to, Slice part, int peer) {
    if (part.size() == 0) return ncclSuccess;
    return ncclRecv(to.data_ptr<float>() + part.begin, part.size(), ncclFloat, peer, communicator_, stream_.stream());
  }
  ncclResult_t SendTail(const Tensor& tail, int peer) {
    if (tail.numel() == 0) return ncclSuccess;
    return ncclSend(tail.data_ptr(), tail.nbytes(), ncclUint8, peer, communicator_, stream_.stream());
  }
  ncclResult_t ReceiveTail(const Tensor& tail, int peer) {
    if (tail.numel() == 0) return ncclSuccess;
    return ncclRecv(tail.data_ptr(), tail.nbytes(), ncclUint8, peer, communicator_, stream_.stream());
  }

  // The watchdog: a peer that died, or a link, leaves kernels that wait for ever and calls that do not return. An abort
  // ends both.
  void Watch() {
    while (!closing_->WaitUntil(env_->NowUs() + kWatchUs)) {
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = ncclCommGetAsyncError(communicator_, &state);
      const int64_t since_us = busy_since_us_;
      if (asked != ncclSuccess) {
        Abort(FaultOf("ncclCommGetAsyncError", asked));
      } else if (state != ncclSuccess && state != ncclInProgress) {
        Abort(FaultOf("sums over workers", state));
      } else if (since_us != 0 && env_->NowUs() - since_us > kSumsMaxUs) {
        Abort(Fault("sums over workers", "no end within half an hour"));
      }
      if (aborted_) return;
    }
  }
  void Abort(absl::Status status) {
    abort_status_ = std::move(status);
    aborted_ = true;
    ncclCommAbort(communicator_);
  }

  Slice Of(const Tensor& sum, int owner) const { return SliceOf(static_cast<size_t>(sum.numel()), workers(), owner); }
  static Tensor Cut(const Tensor& whole, Slice part) {
    return whole.narrow(0, static_cast<int64_t>(part.begin), static_cast<int64_t>(part.size()));
  }

  absl::Status Check(const char* what, ncclResult_t result) const {
    return result == ncclSuccess ? absl::OkStatus() : FaultOf(what, result);
  }
  absl::Status FaultOf(const char* what, ncclResult_t result) const {
    return Fault(what, absl::StrCat(ncclGetErrorString(result), ": ", ncclGetLastError(communicator_)));
  }
  absl::Status Fault(absl::string_view what, absl::string_view cause) const {
    return absl::InternalError(
        absl::StrCat("worker ", worker(), ", GPU ", static_cast<int>(gpu_), ": NCCL, ", what, ": ", cause));
  }

  Env* const env_;
  Collective* const host_;
  const c10::DeviceIndex gpu_;
  const c10::cuda::CUDAStream stream_;
  const std::unique_ptr<Event> look_;  // never notified: to wait a little
  ncclComm_t communicator_ = nullptr;  // constant after Start; none where there is one worker

  std::atomic<int64_t> busy_since_us_{0};  // 0: no sum is under way
  std::atomic<bool> aborted_{false};
  absl::Status abort_status_;  // written before aborted_ is set, read after
  const std::unique_ptr<Event> closing_;
  std::unique_ptr<hearth::Thread> watchdog_;
};

}  // namespace

Gpus VisibleGpus() {
  Gpus gpus;
  try {
    gpus.bf16 = true;
    for (int gpu = 0; gpu < c10::cuda::device_count(); ++gpu) {
      const cudaDeviceProp* const device = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(gpu));
      uint64_t id = 0;
      for (const char byte : device->uuid.bytes) id = Mix64(id + static_cast<unsigned char>(byte));
      gpus.ids.push_back(id);
      gpus.bf16 = gpus.bf16 && device->major >= 8;  // Ampere
    }
    return gpus;
  } catch (const std::exception& error) {
    spdlog::warn("event=no_gpu_can_be_used cause={}", Quoted(error.what()));
    return Gpus();
  }
}

absl::StatusOr<std::unique_ptr<DeviceCollective>> MakeNcclCollective(Env* env, int gpu, Collective* host) {
  try {
    auto collective = std::make_unique<NcclCollective>(env, gpu, host);
    HEARTH_RETURN_IF_ERROR(collective->Start());
    return collective;
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("worker ", host->worker(), ", GPU ", gpu, ": CUDA: ", error.what()));
  }
}

}  // namespace hearth
