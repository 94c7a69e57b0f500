#include "worker/nccl_collective.h"

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>
#include <torch/types.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <vector>

#include "common/status.h"
#include "worker/lane_sum.h"

namespace hearth {
namespace {

constexpr int64_t kSumMaxUs = 300'000'000;
constexpr int64_t kLookUs = 20;

using torch::Tensor;

Tensor OnHost(absl::Span<const float> values) {
  return torch::from_blob(const_cast<float*>(values.data()), {static_cast<int64_t>(values.size())}, torch::kFloat32);
}

class NcclCollective : public Collective {
 public:
  NcclCollective(Env* env, int gpu, Collective* host)
      : env_(env),
        host_(host),
        gpu_(static_cast<c10::DeviceIndex>(gpu)),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, gpu_)),
        wake_(env->NewEvent()) {}
  // Aborts what has not finished: no peer is waited for.
  ~NcclCollective() override {
    if (communicator_ != nullptr) ncclCommAbort(communicator_);
  }

  absl::Status Start() {
    ncclUniqueId id = {};
    if (worker() == 0) HEARTH_RETURN_IF_ERROR(Check("ncclGetUniqueId", ncclGetUniqueId(&id)));
    HEARTH_RETURN_IF_ERROR(host_->Broadcast(0, absl::MakeSpan(reinterpret_cast<char*>(&id), sizeof(id))));
    const c10::cuda::CUDAGuard guard(gpu_);
    return Check("ncclCommInitRank", ncclCommInitRank(&communicator_, workers(), id, worker()));
  }

  int worker() const override { return host_->worker(); }
  int workers() const override { return host_->workers(); }

  absl::Status SumParts(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out,
                        absl::Span<char> tails_out) override {
    std::vector<Part> tails;
    for (const Part& part : parts) tails.push_back({{}, part.tail});
    HEARTH_RETURN_IF_ERROR(host_->SumParts(lanes, tails, {}, tails_out));
    if (sum_out.empty()) return absl::OkStatus();
    try {
      const c10::cuda::CUDAStreamGuard guard(stream_);
      return SumOnGpus(lanes, parts, sum_out);
    } catch (const std::exception& error) {
      return Fault("CUDA", error.what());
    }
  }
  absl::Status Broadcast(int root, absl::Span<char> bytes) override { return host_->Broadcast(root, bytes); }
  absl::Status Barrier() override { return host_->Barrier(); }

 private:
  // As MpiCollective: slices of the parts to their owners, added in lane order, sums gathered.
  absl::Status SumOnGpus(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out) {
    const int64_t n = static_cast<int64_t>(sum_out.size());
    const auto on_gpu = torch::TensorOptions(torch::kFloat32).device(torch::kCUDA, gpu_);
    std::vector<Tensor> own;  // [own lanes] of [n]
    for (const Part& part : parts) own.push_back(OnHost(part.sum).to(on_gpu.device()));
    const Slice slice = Of(sum_out, worker());
    std::vector<Tensor> others(static_cast<size_t>(lanes));  // [lanes] of this worker's slice; own lanes undefined
    for (int lane = 0; lane < lanes; ++lane) {
      if (lane % workers() != worker()) {
        others[static_cast<size_t>(lane)] = torch::empty({static_cast<int64_t>(slice.size())}, on_gpu);
      }
    }
    HEARTH_RETURN_IF_ERROR(Group([&](int peer, const Call& call) {
      const Slice to = Of(sum_out, peer);
      for (const Tensor& part : own) call(Send(part, to, peer));
      for (int lane = peer; lane < lanes; lane += workers()) {
        call(Receive(others[static_cast<size_t>(lane)], {0, slice.size()}, peer));
      }
    }));
    const Tensor sum = torch::empty({n}, on_gpu);
    Tensor added = Cut(sum, slice);
    for (int lane = 0; lane < lanes; ++lane) {
      const Tensor& other = others[static_cast<size_t>(lane)];
      const Tensor part = other.defined() ? other : Cut(own[static_cast<size_t>(lane / workers())], slice);
      lane == 0 ? added.copy_(part) : added.add_(part);
    }
    HEARTH_RETURN_IF_ERROR(Group([&](int peer, const Call& call) {
      call(Send(sum, slice, peer));
      call(Receive(sum, Of(sum_out, peer), peer));
    }));
    const Tensor pinned = torch::empty({n}, torch::TensorOptions(torch::kFloat32).pinned_memory(true));
    pinned.copy_(sum, /*non_blocking=*/true);
    HEARTH_RETURN_IF_ERROR(Wait());
    std::copy_n(pinned.data_ptr<float>(), sum_out.size(), sum_out.data());
    return absl::OkStatus();
  }

  // One NCCL group of calls with every peer; the group is closed whatever they return.
  using Call = std::function<void(ncclResult_t)>;
  absl::Status Group(const std::function<void(int peer, const Call& call)>& with_peer) {
    ncclResult_t first = ncclSuccess;
    const Call call = [&first](ncclResult_t result) {
      if (first == ncclSuccess) first = result;
    };
    call(ncclGroupStart());
    for (int peer = 0; peer < workers(); ++peer) {
      if (peer != worker()) with_peer(peer, call);
    }
    call(ncclGroupEnd());
    return Check("send and receive", first);
  }
  ncclResult_t Send(const Tensor& from, Slice part, int peer) {
    if (part.size() == 0) return ncclSuccess;
    return ncclSend(from.data_ptr<float>() + part.begin, part.size(), ncclFloat, peer, communicator_, stream_.stream());
  }
  ncclResult_t Receive(const Tensor& to, Slice part, int peer) {
    if (part.size() == 0) return ncclSuccess;
    return ncclRecv(to.data_ptr<float>() + part.begin, part.size(), ncclFloat, peer, communicator_, stream_.stream());
  }

  // Until the stream is done, or NCCL tells an error, or too long.
  absl::Status Wait() {
    at::cuda::CUDAEvent done;
    done.record(stream_);
    const int64_t deadline_us = env_->NowUs() + kSumMaxUs;
    while (!done.query()) {
      ncclResult_t state = ncclSuccess;
      HEARTH_RETURN_IF_ERROR(Check("ncclCommGetAsyncError", ncclCommGetAsyncError(communicator_, &state)));
      HEARTH_RETURN_IF_ERROR(Check("sum over workers", state));
      if (env_->NowUs() >= deadline_us) return Abort(Fault("sum over workers", "no end within five minutes"));
      wake_->WaitUntil(env_->NowUs() + kLookUs);
    }
    return absl::OkStatus();
  }

  Slice Of(absl::Span<float> sum, int owner) const { return SliceOf(sum.size(), workers(), owner); }
  static Tensor Cut(const Tensor& whole, Slice part) {
    return whole.narrow(0, static_cast<int64_t>(part.begin), static_cast<int64_t>(part.size()));
  }

  absl::Status Check(const char* what, ncclResult_t result) {
    if (result == ncclSuccess) return absl::OkStatus();
    const char* const detail = communicator_ != nullptr ? ncclGetLastError(communicator_) : ncclGetLastError(nullptr);
    return Abort(Fault(what, absl::StrCat(ncclGetErrorString(result), ": ", detail)));
  }
  absl::Status Fault(absl::string_view what, absl::string_view cause) const {
    return absl::InternalError(
        absl::StrCat("worker ", worker(), ", GPU ", static_cast<int>(gpu_), ": NCCL, ", what, ": ", cause));
  }
  absl::Status Abort(absl::Status status) {
    if (communicator_ != nullptr) ncclCommAbort(communicator_);
    communicator_ = nullptr;
    return status;
  }

  Env* const env_;
  Collective* const host_;
  const c10::DeviceIndex gpu_;
  const c10::cuda::CUDAStream stream_;
  const std::unique_ptr<Event> wake_;  // never notified: to wait a little
  ncclComm_t communicator_ = nullptr;
};

}  // namespace

int VisibleGpus() { return c10::cuda::device_count(); }

absl::StatusOr<std::unique_ptr<Collective>> MakeNcclCollective(Env* env, int gpu, Collective* host) {
  try {
    auto collective = std::make_unique<NcclCollective>(env, gpu, host);
    HEARTH_RETURN_IF_ERROR(collective->Start());
    return collective;
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("worker ", host->worker(), ", GPU ", gpu, ": CUDA: ", error.what()));
  }
}

}  // namespace hearth
