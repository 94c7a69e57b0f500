#include "worker/collective/device_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"
#include "tests/conformance/world.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Place {
  std::string host;
  int gpus;
  bool bf16 = true;
  uint64_t first_id = 100;
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
    Gpus gpus;
    for (int gpu = 0; gpu < places[i].gpus; ++gpu) gpus.ids.push_back(places[i].first_id + static_cast<uint64_t>(gpu));
    gpus.bf16 = places[i].bf16;
    plans[i] = AgreeOnDevice(training, places[i].host, gpus, hub.collective(worker));
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

TEST(AgreeOnDevice, WorkersThatSeeOneGpuEachAreAloneWhereTheseDiffer) {
  for (const auto& plan : Agree(Training::AUTO, {{"a", 1, true, 7}, {"a", 1, true, 8}, {"b", 1, true, 7}})) {
    EXPECT_EQ(plan.value().gpu, 0);
    EXPECT_TRUE(plan.value().alone);
  }
  for (const auto& plan : Agree(Training::AUTO, {{"a", 1, true, 7}, {"a", 1, true, 7}})) {
    EXPECT_FALSE(plan.value().alone);
  }
}

TEST(AgreeOnDevice, AWorkerTakesNoNoticeOfMoreGpusThanFit) {
  const std::vector<Place> places(20, {"a", 20});
  const auto plans = Agree(Training::AUTO, places);
  EXPECT_EQ(plans[15].value().gpu, 15);
  EXPECT_EQ(plans[16].value().gpu, 0);
  EXPECT_FALSE(plans[0].value().alone);
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
