#include "worker/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/status.h"
#include "tests/conformance/world.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Place {
  std::string host;
  int gpus;
  bool bf16 = true;
};

std::vector<absl::StatusOr<DevicePlan>> Agree(Training::Device wanted, const std::vector<Place>& places,
                                              Training::Precision precision = Training::FLOAT32) {
  Training training;
  training.set_device(wanted);
  training.set_precision(precision);
  const int workers = static_cast<int>(places.size());
  LocalCollectiveHub hub(Env::Real(), workers);
  std::vector<absl::StatusOr<DevicePlan>> plans(places.size(), absl::UnknownError("not run"));
  RunInThreads(workers, [&](int worker) {
    const size_t i = static_cast<size_t>(worker);
    plans[i] = AgreeOnDevice(training, places[i].host, {places[i].gpus, places[i].bf16}, hub.collective(worker));
  });
  return plans;
}

TEST(AgreeOnDevice, CpuIsTheCpuWhereverTheWorkersAre) {
  for (const auto& plan : Agree(Training::CPU, {{"a", 2}, {"a", 2}})) EXPECT_EQ(plan.value().gpu, kNoGpu);
}

TEST(AgreeOnDevice, AutoTakesTheCpuOnAllWhereOneSeesNoGpu) {
  for (const auto& plan : Agree(Training::AUTO, {{"a", 1}, {"b", 0}, {"c", 1}})) EXPECT_EQ(plan.value().gpu, kNoGpu);
}

TEST(AgreeOnDevice, WorkersOfAHostAreDealtOverItsGpus) {
  const auto plans = Agree(Training::AUTO, {{"a", 2}, {"b", 2}, {"a", 2}, {"b", 2}});
  const int gpus[] = {0, 0, 1, 1};
  for (size_t i = 0; i < plans.size(); ++i) {
    EXPECT_EQ(plans[i].value().gpu, gpus[i]) << i;
    EXPECT_TRUE(plans[i].value().alone) << i;
  }
}

TEST(AgreeOnDevice, WorkersThatShareAGpuAreNotAloneAnywhere) {
  const auto plans = Agree(Training::CUDA, {{"a", 2}, {"a", 2}, {"a", 2}, {"b", 4}});
  const int gpus[] = {0, 1, 0, 0};
  for (size_t i = 0; i < plans.size(); ++i) {
    EXPECT_EQ(plans[i].value().gpu, gpus[i]) << i;
    EXPECT_FALSE(plans[i].value().alone) << i;
  }
}

TEST(AgreeOnDevice, CudaWithoutAGpuIsAConfigurationErrorThatNamesTheWorker) {
  for (const auto& plan : Agree(Training::CUDA, {{"a", 1}, {"node-7", 0}})) {
    EXPECT_EQ(ExitCodeOf(plan.status()), kExitConfig);
    EXPECT_THAT(std::string(plan.status().message()),
                AllOf(HasSubstr("training.device"), HasSubstr("worker 1 on node-7"), HasSubstr("CPU")));
  }
}

TEST(AgreeOnDevice, Bf16IsTakenWhereItIsAskedForAndEveryGpuHasIt) {
  const std::vector<Place> all = {{"a", 1, true}, {"b", 1, true}};
  for (const auto& plan : Agree(Training::AUTO, all, Training::BF16)) EXPECT_EQ(NameOf(plan.value()), "cuda bf16");
  for (const auto& plan : Agree(Training::AUTO, all)) EXPECT_EQ(NameOf(plan.value()), "cuda");
  const std::vector<Place> one = {{"a", 1, true}, {"b", 1, false}};
  for (const auto& plan : Agree(Training::AUTO, one, Training::BF16)) EXPECT_EQ(NameOf(plan.value()), "cuda");
  for (const auto& plan : Agree(Training::CPU, all, Training::BF16)) EXPECT_EQ(NameOf(plan.value()), "cpu");
}

}  // namespace
}  // namespace hearth
