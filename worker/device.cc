#include "worker/device.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status.h"

namespace hearth {
namespace {

// What a worker tells the others.
struct Place {
  char host[64];  // cut off, always with an end
  int32_t gpus;
  int32_t bf16;
};

}  // namespace

std::string NameOf(const DevicePlan& plan) {
  if (plan.gpu == kNoGpu) return "cpu";
  return plan.bf16 ? "cuda bf16" : "cuda";
}

absl::StatusOr<DevicePlan> AgreeOnDevice(const Training& training, const std::string& host, Gpus gpus,
                                         Collective* collective) {
  const Training::Device wanted = training.device();
  if (wanted == Training::CPU) return DevicePlan();
  const int workers = collective->workers();
  Place own = {};
  std::memcpy(own.host, host.data(), std::min(host.size(), sizeof(own.host) - 1));
  own.gpus = gpus.count;
  own.bf16 = gpus.bf16;
  // A reduction of nothing, whose tails are what all workers say: one lane a worker.
  std::vector<char> all(static_cast<size_t>(workers) * sizeof(Place));
  const Collective::Part part = {{}, {reinterpret_cast<const char*>(&own), sizeof(own)}};
  HEARTH_RETURN_IF_ERROR(collective->SumParts(workers, {part}, {}, absl::MakeSpan(all)));
  std::vector<Place> places(static_cast<size_t>(workers));
  std::memcpy(places.data(), all.data(), all.size());

  DevicePlan plan;
  plan.alone = true;
  plan.bf16 = training.precision() == Training::BF16;
  int before = 0;  // workers of this host that come earlier
  for (int i = 0; i < workers; ++i) {
    const Place& place = places[static_cast<size_t>(i)];
    if (place.gpus == 0) {
      if (wanted == Training::AUTO) return DevicePlan();
      return absl::FailedPreconditionError(
          absl::StrCat("training.device is CUDA, and worker ", i, " on ", place.host,
                       " sees no GPU; use AUTO or CPU, or a build by `scripts/build cuda` on a host with one"));
    }
    const auto shares_host = [&](const Place& other) { return std::strcmp(place.host, other.host) == 0; };
    const auto on_host = std::count_if(places.begin(), places.end(), shares_host);
    plan.alone = plan.alone && on_host <= place.gpus;
    plan.bf16 = plan.bf16 && place.bf16 != 0;
    before += i < collective->worker() && std::strcmp(place.host, own.host) == 0;
  }
  plan.gpu = before % gpus.count;
  return plan;
}

}  // namespace hearth
