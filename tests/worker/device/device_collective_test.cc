// The suite of Collective over sums between devices by way of the hosts. Over NCCL: conformance_mpi.
#include "worker/device/device_collective.h"

#include "tests/conformance/collective_suite.h"
#include "tests/conformance/device_world.h"

namespace hearth {
namespace {

class HostedWorld : public CollectiveWorld {
 public:
  explicit HostedWorld(int workers) : workers_(workers), hub_(Env::Real(), workers) {}
  void Run(const CollectiveCase& run) override {
    RunInThreads(workers_, [&](int worker) {
      const auto hosted = MakeHostedCollective(hub_.collective(worker));
      ThroughDevice through(hosted.get(), hub_.collective(worker), torch::kCPU);
      run(&through);
    });
  }

 private:
  const int workers_;
  LocalCollectiveHub hub_;
};

std::vector<Implementation<CollectiveWorld>> Hosted() {
  std::vector<Implementation<CollectiveWorld>> worlds;
  for (int workers : {1, 2, 4}) {
    worlds.push_back(
        {"Hosted" + std::to_string(workers), [workers] { return std::make_unique<HostedWorld>(workers); }});
  }
  return worlds;
}
INSTANTIATE_TEST_SUITE_P(Device, CollectiveConformance, testing::ValuesIn(Hosted()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace hearth
