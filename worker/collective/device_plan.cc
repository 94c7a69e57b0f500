#include "worker/collective/device_plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// What a worker tells the others.
struct Place {
  char host[64];  // cut off, always with an end
  int32_t gpus;
  int32_t bf16;
  uint64_t ids[kGpusMax];
};

bool ShareHost(const Place& a, const Place& b) { return std::strcmp(a.host, b.host) == 0; }

// The number of a worker's GPU: a host's workers are dealt over what each sees, in their order.
size_t GpuOf(const std::vector<Place>& places, size_t worker) {
  const Place& place = places[worker];
  const auto before = std::count_if(places.begin(), places.begin() + static_cast<ptrdiff_t>(worker),
                                    [&](const Place& other) { return ShareHost(place, other); });
  return static_cast<size_t>(before) % static_cast<size_t>(place.gpus);
}

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
  own.gpus = static_cast<int32_t>(std::min(gpus.ids.size(), kGpusMax));
  own.bf16 = gpus.bf16;
  std::copy_n(gpus.ids.begin(), own.gpus, own.ids);
  // A reduction of nothing, whose tails are what all workers say: one lane a worker.
  std::vector<char> all(static_cast<size_t>(workers) * sizeof(Place));
  const Collective::Part part = {{}, {reinterpret_cast<const char*>(&own), sizeof(own)}};
  HEARTH_RETURN_IF_ERROR(collective->SumParts(workers, {part}, {}, absl::MakeSpan(all)));
  std::vector<Place> places(static_cast<size_t>(workers));
  std::memcpy(places.data(), all.data(), all.size());

  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].gpus > 0) continue;
    if (wanted == Training::AUTO) return DevicePlan();
    return absl::FailedPreconditionError(
        absl::StrCat("training.device is CUDA, and worker ", i, " on ", places[i].host,
                     " sees no GPU; use AUTO or CPU, or a build by `scripts/build cuda` on a host with one"));
  }
  DevicePlan plan;
  plan.gpu = static_cast<int>(GpuOf(places, static_cast<size_t>(collective->worker())));
  plan.alone = true;
  plan.bf16 = training.precision() == Training::BF16;
  for (size_t i = 0; i < places.size(); ++i) {
    plan.bf16 = plan.bf16 && places[i].bf16 != 0;
    for (size_t j = 0; j < i; ++j) {
      const bool same_gpu = places[i].ids[GpuOf(places, i)] == places[j].ids[GpuOf(places, j)];
      plan.alone = plan.alone && !(ShareHost(places[i], places[j]) && same_gpu);
    }
  }
  return plan;
}

}  // namespace hearth
