#include "worker/dense/device_step.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/dense/dense_model.h"

namespace hearth {
namespace {

using torch::Tensor;
using torch::autograd::variable_list;

// A stream of the device beside the one that computes. On the CPU, where nothing runs by itself, it does nothing.
class SideStream {
 public:
  explicit SideStream(torch::Device device) : device_(device) {
    if (!device.is_cpu()) stream_ = Guard().getStreamFromGlobalPool(device);
  }
  // The calling thread's current stream, while the result lives.
  c10::OptionalStreamGuard Enter() const {
    return stream_ ? c10::OptionalStreamGuard(*stream_) : c10::OptionalStreamGuard();
  }
  // The end of what is here by now, for CurrentWaitsFor.
  std::optional<c10::Event> Mark() const { return stream_ ? MarkOf(*stream_) : std::nullopt; }
  // Goes on after what the calling thread's current stream holds by now.
  void WaitForCurrent() const {
    if (stream_) MarkOf(Guard().getStream(device_))->block(*stream_);
  }
  // The calling thread's current stream goes on after the mark.
  void CurrentWaitsFor(const std::optional<c10::Event>& mark) const {
    if (mark) mark->block(Guard().getStream(device_));
  }
  void Synchronize() const {
    if (stream_) stream_->synchronize();
  }

 private:
  c10::impl::VirtualGuardImpl Guard() const { return c10::impl::VirtualGuardImpl(device_.type()); }
  static std::optional<c10::Event> MarkOf(const c10::Stream& stream) {
    std::optional<c10::Event> mark(std::in_place, stream.device_type());
    mark->record(stream);
    return mark;
  }

  const torch::Device device_;
  std::optional<c10::Stream> stream_;
};

struct Staged : StagedBatch {
  DenseInput input;
  std::optional<c10::Event> arrived;
};

class DeviceStep : public DenseStep {
 public:
  DeviceStep(Env* env, DenseReplica* replica, DeviceCollective* collective, const DeviceStepOptions& options)
      : env_(env),
        dense_(replica->dense_model()),
        collective_(collective),
        lanes_(options.lanes),
        clip_norm_(options.clip_norm),
        tail_(options.lanes, replica->moment_columns()),
        up_(dense_->device()),
        down_(dense_->device()),
        sum_(torch::zeros_like(dense_->weights())),
        tails_(torch::empty({options.lanes, Bytes()}, OnDevice(torch::kUInt8))),
        tails_on_host_(OnHost({options.lanes, Bytes()}, torch::kUInt8)) {
    const auto& parameters = dense_->parameters();
    buckets_.push_back({sum_.numel(), sum_.numel(), 0, 0});
    for (size_t i = parameters.size(); i-- > 0;) {
      Bucket& last = buckets_.back();
      last.begin = parameters[i].offset;
      ++last.parameters;
      Watch(parameters[i].tensor, buckets_.size() - 1);
      const int64_t bytes = (last.end - last.begin) * static_cast<int64_t>(sizeof(float));
      const bool full = options.bucket_bytes_min > 0 && bytes >= options.bucket_bytes_min;
      if (full && i > 0) buckets_.push_back({last.begin, last.begin, 0, 0});
    }
  }

  absl::Status Stage(Batch* batch) override {
    if (batch->records == 0) return absl::OkStatus();
    try {
      const auto entered = up_.Enter();
      auto staged = std::make_unique<Staged>();
      staged->input = dense_->Upload(*batch);
      staged->arrived = up_.Mark();
      batch->staged = std::move(staged);
      return absl::OkStatus();
    } catch (const std::exception& error) {
      return Fault(absl::StrCat("step ", batch->step, ", rows to the device"), error);
    }
  }

  absl::Status Run(absl::Span<const std::unique_ptr<Batch>> lanes, absl::Span<LaneVote> votes, StepSum* sum) override {
    std::string where = "step";
    try {
      Begin(lanes);
      for (size_t i = 0; i < lanes.size(); ++i) {
        where = absl::StrCat("step ", lanes[i]->step, ", lane ", lanes[i]->lane, ", ", lanes[i]->records, " records");
        HEARTH_RETURN_IF_ERROR(RunLane(i, lanes[i].get(), votes[i]));
      }
      where = "the step's sums";
      while (next_bucket_ < buckets_.size()) StartNextBucket();
      HEARTH_RETURN_IF_ERROR(bucket_status_);
      TakeFetched();
      for (const auto& lane : lanes) lane->staged.reset();  // its device memory, before the push
      const int64_t trained_us = env_->NowUs();
      HEARTH_RETURN_IF_ERROR(collective_->Finish());
      TakeSum(sum);
      reduce_us_ += env_->NowUs() - trained_us;
      return absl::OkStatus();
    } catch (const std::exception& error) {
      return Fault(where, error);
    }
  }

  absl::Status Update(uint64_t step, const StepSum& sum) override {
    try {
      torch::NoGradGuard no_grad;
      dense_->UpdateRunningStatistics(sum.moments);
      sum_.div_(static_cast<double>(sum.verdict.records));
      if (clip_norm_ > 0 && sum.gradient_norm > clip_norm_) sum_.mul_(clip_norm_ / sum.gradient_norm);
      dense_->Update(step, sum_);
      return absl::OkStatus();
    } catch (const std::exception& error) {
      return Fault("dense update", error);
    }
  }

 private:
  // Parameters [begin, end) of the flat array.
  struct Bucket {
    int64_t begin, end;
    int parameters;
    int missing;  // of this step's last backward
  };
  // What is on its way to the host.
  struct Fetched {
    Tensor from;  // kept until the copy is done
    Tensor arrived;
    std::vector<float>* to;
  };

  int64_t Bytes() const { return static_cast<int64_t>(tail_.bytes()); }
  torch::TensorOptions OnDevice(torch::ScalarType type) const {
    return torch::TensorOptions(type).device(dense_->device());
  }
  Tensor OnHost(at::IntArrayRef shape, torch::ScalarType type) const {
    return torch::empty(shape, torch::TensorOptions(type).pinned_memory(!dense_->device().is_cpu()));
  }

  // Counts the parameter as there whenever backward has added to its gradient.
  void Watch(const Tensor& parameter, size_t bucket) {
    auto accumulator = torch::autograd::impl::grad_accumulator(parameter);
    accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [this, bucket](const variable_list& outputs, const variable_list&) {
          if (watching_) {
            --buckets_[bucket].missing;
            // The last one waits for the flags. In order: all workers start the same bucket at the same time.
            while (next_bucket_ + 1 < buckets_.size() && buckets_[next_bucket_].missing == 0) StartNextBucket();
          }
          return outputs;
        }));
    accumulators_.push_back(std::move(accumulator));  // a parameter holds its own weakly
  }

  void Begin(absl::Span<const std::unique_ptr<Batch>> lanes) {
    const int64_t own = static_cast<int64_t>(lanes.size());
    if (!gradients_.defined() || gradients_.size(0) != own) {
      gradients_ = torch::empty({own, sum_.numel()}, OnDevice(torch::kFloat32));
      own_tails_ = torch::empty({own, Bytes()}, OnDevice(torch::kUInt8));
      own_tails_on_host_ = OnHost({own, Bytes()}, torch::kUInt8);
    }
    gradients_.zero_();
    results_.resize(lanes.size());
    fetched_.clear();
    watching_ = false;
    next_bucket_ = 0;
    bucket_status_ = absl::OkStatus();
    last_lane_ = lanes.size();
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (lanes[i]->records > 0) last_lane_ = i;
    }
    for (Bucket& bucket : buckets_) bucket.missing = bucket.parameters;
  }

  absl::Status RunLane(size_t i, Batch* batch, const LaneVote& vote) {
    if (batch->records == 0) {
      SendTail(i, vote, 0);
      return absl::OkStatus();
    }
    if (batch->staged == nullptr) HEARTH_RETURN_IF_ERROR(Stage(batch));
    const auto& staged = *static_cast<const Staged*>(batch->staged.get());
    up_.CurrentWaitsFor(staged.arrived);
    const DenseInput& input = staged.input;
    std::vector<Tensor> leaves(input.groups.size());
    for (size_t g = 0; g < leaves.size(); ++g) {
      leaves[g] = input.groups[g].rows;
      if (leaves[g].defined()) leaves[g].requires_grad_(true);
    }
    const Tensor gradient = gradients_[static_cast<int64_t>(i)];
    dense_->PointGradients(gradient);
    BatchMoments moments;
    const Tensor v = dense_->Features(input, batch->records);
    const Tensor logits = dense_->model()->Forward(v, Phase::kTrain, &moments);  // [B, T]
    const Tensor loss = dense_->Loss(logits, input);
    watching_ = i == last_lane_;
    loss.backward();
    watching_ = false;

    torch::NoGradGuard no_grad;
    SendTail(i, vote, moments.count);
    Tensor finite = torch::isfinite(loss.detach()) & torch::isfinite(gradient).all();
    for (const Tensor& leaf : leaves) {
      if (leaf.defined() && leaf.grad().defined()) finite = finite & torch::isfinite(leaf.grad()).all();
    }
    const Tensor both = MomentsOf(moments);
    const Tensor words = own_tails_[static_cast<int64_t>(i)].view(torch::kInt32);
    if (both.defined()) {
      finite = finite & torch::isfinite(both).all();
      words.narrow(0, static_cast<int64_t>(StepTail::moments_offset() / 4), both.numel())
          .copy_(both.reshape({-1}).view(torch::kInt32));
    }
    words.narrow(0, static_cast<int64_t>(StepTail::skip_offset() / 4), 1).copy_(finite.logical_not().reshape({1}));
    Fetch(i, leaves, logits.detach(), batch);
    return absl::OkStatus();
  }

  void SendTail(size_t i, const LaneVote& vote, double moments_count) {
    const Tensor on_host = own_tails_on_host_[static_cast<int64_t>(i)];
    tail_.Write(vote, /*finite=*/true, moments_count, nullptr, reinterpret_cast<char*>(on_host.data_ptr<uint8_t>()));
    own_tails_[static_cast<int64_t>(i)].copy_(on_host, /*non_blocking=*/true);
  }

  // [2, columns] on the device; undefined: the model has no BatchNorm.
  Tensor MomentsOf(const BatchMoments& moments) const {
    if (moments.on_device.defined() || moments.mean.empty()) return moments.on_device;
    return torch::stack({torch::tensor(moments.mean), torch::tensor(moments.m2)}).to(dense_->device());
  }

  void StartNextBucket() {
    const Bucket& bucket = buckets_[next_bucket_++];
    if (!bucket_status_.ok()) return;
    const bool last = next_bucket_ == buckets_.size();
    const auto cut = [&bucket](const Tensor& array) {
      return array.narrow(0, bucket.begin, bucket.end - bucket.begin);
    };
    std::vector<DeviceCollective::Part> parts;
    for (int64_t i = 0; i < gradients_.size(0); ++i) {
      parts.push_back({cut(gradients_[i]), last ? own_tails_[i] : Tensor()});
    }
    bucket_status_ = collective_->SumParts(static_cast<int>(lanes_), parts, cut(sum_), last ? tails_ : Tensor());
  }

  // Begins to copy what the push and the metrics read, beside what else computes.
  void Fetch(size_t i, const std::vector<Tensor>& leaves, const Tensor& logits, Batch* batch) {
    down_.WaitForCurrent();
    const auto entered = down_.Enter();
    const auto fetch = [this](const Tensor& from, std::vector<float>* to) {
      to->resize(static_cast<size_t>(from.numel()));
      Tensor arrived = OnHost(from.sizes(), torch::kFloat32);
      arrived.copy_(from, /*non_blocking=*/true);
      fetched_.push_back({from, std::move(arrived), to});
    };
    fetch(logits.contiguous(), &results_[i].logits);
    for (size_t g = 0; g < leaves.size(); ++g) {
      RowGroup& group = batch->groups[g];
      if (leaves[g].defined() && leaves[g].grad().defined()) {
        fetch(leaves[g].grad().contiguous(), &group.gradients);
      } else {  // nothing came back to it
        group.gradients.assign(group.unique.size() * group.dim, 0.0f);
      }
    }
  }

  void TakeFetched() {
    down_.Synchronize();
    for (const Fetched& fetched : fetched_) {
      std::copy_n(fetched.arrived.data_ptr<float>(), fetched.to->size(), fetched.to->data());
    }
    fetched_.clear();
  }

  void TakeSum(StepSum* sum) {
    torch::NoGradGuard no_grad;
    const Tensor squares = sum_.to(torch::kFloat64).square().sum();
    tails_on_host_.copy_(tails_);
    tail_.Read(reinterpret_cast<const char*>(tails_on_host_.data_ptr<uint8_t>()), sum);
    sum->gradient = {};
    if (!sum->trains) return;
    StepTail::Judge(std::sqrt(squares.item<double>()) / static_cast<double>(sum->verdict.records), sum);
  }

  absl::Status Fault(absl::string_view where, const std::exception& error) const {
    return absl::InternalError(absl::StrCat("worker ", collective_->worker(), " on ", dense_->device().str(), ", ",
                                            where, ": ", error.what()));
  }

  Env* const env_;
  DenseModel* const dense_;
  DeviceCollective* const collective_;
  const uint32_t lanes_;
  const double clip_norm_;
  StepTail tail_;
  const SideStream up_, down_;
  std::vector<Bucket> buckets_;  // from the array's end to its beginning
  std::vector<std::shared_ptr<torch::autograd::Node>> accumulators_;

  Tensor gradients_;                      // [own lanes, size]
  Tensor own_tails_, own_tails_on_host_;  // [own lanes, tail]
  Tensor sum_;                            // [size]
  Tensor tails_, tails_on_host_;          // [lanes, tail]

  // Of the step that runs; the hooks' too, while backward does.
  size_t last_lane_ = 0;
  bool watching_ = false;
  size_t next_bucket_ = 0;
  absl::Status bucket_status_;
  std::vector<Fetched> fetched_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DenseStep>> MakeDeviceStep(Env* env, DenseReplica* replica, DeviceCollective* collective,
                                                          const DeviceStepOptions& options) {
  HEARTH_CHECK(replica->dense_model()->off_host(), "a device's step for a model in the host's memory");
  try {
    return std::unique_ptr<DenseStep>(std::make_unique<DeviceStep>(env, replica, collective, options));
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("worker ", collective->worker(), " on ",
                                            replica->dense_model()->device().str(), ": ", error.what()));
  }
}

}  // namespace hearth
