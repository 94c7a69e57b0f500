#include "worker/device/device_collective.h"

#include <exception>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using torch::Tensor;

class HostedCollective : public DeviceCollective {
 public:
  explicit HostedCollective(Collective* host) : host_(host) {}
  int worker() const override { return host_->worker(); }
  int workers() const override { return host_->workers(); }

  absl::Status SumParts(int lanes, absl::Span<const Part> parts, const Tensor& sum_out,
                        const Tensor& tails_out) override {
    try {
      std::vector<Tensor> kept;  // the host's copies; on the CPU the arrays themselves
      const auto on_host = [&kept](const Tensor& array) {
        kept.push_back(array.to(torch::kCPU));
        return kept.back();
      };
      std::vector<Collective::Part> host_parts;
      for (const Part& part : parts) {
        const Tensor sum = on_host(part.sum);
        const absl::Span<const float> floats(sum.data_ptr<float>(), static_cast<size_t>(sum.numel()));
        host_parts.push_back({floats, part.tail.defined() ? BytesOf(on_host(part.tail)) : absl::Span<char>()});
      }
      const bool has_tails = tails_out.defined();
      Tensor sum = torch::empty(sum_out.sizes(), torch::kFloat32);
      Tensor tails = has_tails ? torch::empty(tails_out.sizes(), torch::kUInt8) : Tensor();
      HEARTH_RETURN_IF_ERROR(host_->SumParts(lanes, host_parts,
                                             absl::MakeSpan(sum.data_ptr<float>(), static_cast<size_t>(sum.numel())),
                                             has_tails ? BytesOf(tails) : absl::Span<char>()));
      sum_out.copy_(sum);
      if (has_tails) tails_out.copy_(tails);
      return absl::OkStatus();
    } catch (const std::exception& error) {
      return absl::InternalError(absl::StrCat("worker ", worker(), ": sum by way of the host: ", error.what()));
    }
  }
  absl::Status Finish() override { return absl::OkStatus(); }

 private:
  static absl::Span<char> BytesOf(const Tensor& bytes) {
    return absl::MakeSpan(reinterpret_cast<char*>(bytes.data_ptr<uint8_t>()), static_cast<size_t>(bytes.numel()));
  }

  Collective* const host_;
};

}  // namespace

std::unique_ptr<DeviceCollective> MakeHostedCollective(Collective* host) {
  return std::make_unique<HostedCollective>(host);
}

}  // namespace hearth
