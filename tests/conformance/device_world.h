// A DeviceCollective as the suite of Collective wants it: arrays go to the device and back.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "common/base/status.h"
#include "worker/collective/collective.h"
#include "worker/device/device_collective.h"

namespace hearth {

class ThroughDevice : public Collective {
 public:
  // Sums go through `device_collective` on `device`, the rest through `host`.
  ThroughDevice(DeviceCollective* device_collective, Collective* host, torch::Device device)
      : device_collective_(device_collective), host_(host), device_(device) {}
  int worker() const override { return device_collective_->worker(); }
  int workers() const override { return device_collective_->workers(); }

  absl::Status SumParts(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out,
                        absl::Span<char> tails_out) override {
    const auto on_device = [this](const auto& span, torch::ScalarType type) {
      const int64_t size = static_cast<int64_t>(span.size());
      return torch::from_blob(const_cast<char*>(reinterpret_cast<const char*>(span.data())), {size}, type)
          .to(device_, type, /*non_blocking=*/false, /*copy=*/true);
    };
    std::vector<DeviceCollective::Part> on_devices;
    for (const Part& part : parts) {
      on_devices.push_back({on_device(part.sum, torch::kFloat32), on_device(part.tail, torch::kUInt8)});
    }
    const torch::Tensor sum = on_device(sum_out, torch::kFloat32);
    torch::Tensor tails = on_device(tails_out, torch::kUInt8);
    if (lanes > 0) tails = tails.view({lanes, tails.numel() / lanes});
    HEARTH_RETURN_IF_ERROR(device_collective_->SumParts(lanes, on_devices, sum, tails));
    HEARTH_RETURN_IF_ERROR(device_collective_->Finish());
    const torch::Tensor sum_here = sum.cpu();
    const torch::Tensor tails_here = tails.cpu();
    std::copy_n(sum_here.data_ptr<float>(), sum_out.size(), sum_out.data());
    std::copy_n(reinterpret_cast<const char*>(tails_here.data_ptr<uint8_t>()), tails_out.size(), tails_out.data());
    return absl::OkStatus();
  }
  absl::Status Broadcast(int root, absl::Span<char> bytes) override { return host_->Broadcast(root, bytes); }
  absl::Status Barrier() override { return host_->Barrier(); }

 private:
  DeviceCollective* const device_collective_;
  Collective* const host_;
  const torch::Device device_;
};

}  // namespace hearth
