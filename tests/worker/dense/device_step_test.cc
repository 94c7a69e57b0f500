// The device's step against the host's. Where no GPU is, the device is the CPU with arrays of its own: everything but
// streams, pinned memory and NCCL.
#include "worker/dense/device_step.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "tests/conformance/world.h"
#include "tests/worker/dense/dense_cases.h"
#include "worker/dense/dense_model.h"
#include "worker/dense/dense_step.h"
#include "worker/dense/host_step.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::FloatNear;
using ::testing::HasSubstr;
using ::testing::Pointwise;

constexpr uint32_t kLanes = 5;
constexpr int64_t kEveryParameterABucket = 1;

struct Shape {
  int gpu = kCopiesOnCpu;  // kNoGpu: the host's step
  int workers = 1;
  int64_t bucket_bytes_min = 0;
  bool staged = true;    // the pull thread's part is done
  bool batched = false;  // the model's parts as on a GPU
};

// What a run of four steps gave.
struct Outcome {
  std::vector<std::vector<float>> logits;         // [steps × lanes]
  std::vector<std::vector<float>> row_gradients;  // [steps × lanes]
  std::vector<double> gradient_norms;             // [steps]
  std::vector<BatchMoments> moments;              // [steps]
  std::vector<bool> skipped;                      // [steps]
  std::vector<uint64_t> hashes;                   // [workers] at the end
  std::vector<float> predictions;                 // at the end
};

// Lane 3 is empty in step 2, and lane 2 has one record in step 3.
std::unique_ptr<Batch> BatchOf(const Job& job, int step, uint32_t lane) {
  Random random(static_cast<uint64_t>(step) * 100 + lane);
  int64_t records = 12 + lane;
  if (step == 2 && lane == 3) records = 0;
  if (step == 3 && lane == 2) records = 1;
  std::unique_ptr<Batch> batch = RandomBatch(job, records, &random);
  batch->step = static_cast<uint64_t>(step);
  batch->lane = lane;
  return batch;
}

// By SGD: Adam makes steps as large of gradients that are nothing but rounding as of others.
Job SgdJob() {
  Job job = TestJob();
  job.mutable_training()->mutable_dense_optimizer()->set_kind(DenseOptimizer::SGD);
  job.mutable_training()->mutable_dense_optimizer()->set_learning_rate(0.1);
  return job;
}

std::unique_ptr<DenseReplica> MakeReplica(const Job& job, const Shape& shape) {
  const ModelSpec spec = MakeModelSpec(job, {0.3, 0.1});
  auto replica = DenseReplica::Wrap(job, shape.batched ? MakeBatchedModel(spec) : MakeModel(spec), shape.gpu);
  HEARTH_CHECK(replica.ok(), "", replica.status().ToString());
  return *std::move(replica);
}

std::unique_ptr<DenseStep> MakeStep(const Job& job, const Shape& shape, DenseReplica* replica, Collective* collective,
                                    DeviceCollective* device_collective) {
  const double clip_norm = job.training().clip_norm();
  if (shape.gpu == kNoGpu) return MakeHostStep(Env::Real(), replica, collective, kLanes, clip_norm);
  auto step = MakeDeviceStep(Env::Real(), replica, device_collective, {kLanes, clip_norm, shape.bucket_bytes_min});
  HEARTH_CHECK(step.ok(), "", step.status().ToString());
  return *std::move(step);
}

// poison: (step, lane) of which a row is infinite; step 0: none.
Outcome TrainFourSteps(const Job& job, const Shape& shape, int poison_step = 0, uint32_t poison_lane = 0) {
  Outcome outcome;
  outcome.logits.resize(4 * kLanes);
  outcome.row_gradients.resize(4 * kLanes);
  outcome.hashes.resize(static_cast<size_t>(shape.workers));
  LocalCollectiveHub hub(Env::Real(), shape.workers);
  RunInThreads(shape.workers, [&](int worker) {
    const std::unique_ptr<DenseReplica> replica = MakeReplica(job, shape);
    const auto hosted = MakeHostedCollective(hub.collective(worker));
    const auto dense_step = MakeStep(job, shape, replica.get(), hub.collective(worker), hosted.get());
    for (int step = 1; step <= 4; ++step) {
      std::vector<std::unique_ptr<Batch>> lanes;
      std::vector<LaneVote> votes;
      for (uint32_t lane = static_cast<uint32_t>(worker); lane < kLanes; lane += static_cast<uint32_t>(shape.workers)) {
        lanes.push_back(BatchOf(job, step, lane));
        if (step == poison_step && lane == poison_lane) {
          lanes.back()->groups[0].rows[0] = std::numeric_limits<float>::infinity();
        }
        votes.emplace_back();
        votes.back().records = static_cast<uint64_t>(lanes.back()->records);
        votes.back().read = 20 + lane;
        votes.back().stop = step == 4 && lane == 1;
        if (!shape.staged) continue;
        const absl::Status status = dense_step->Stage(lanes.back().get());
        ASSERT_TRUE(status.ok()) << status;
      }
      StepSum sum;
      const absl::Status status = dense_step->Run(lanes, absl::MakeSpan(votes), &sum);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(sum.read, 5u * 20 + 10);
      EXPECT_EQ(sum.verdict.stop, step == 4);
      EXPECT_EQ(sum.trains, step != poison_step);
      for (size_t i = 0; i < lanes.size(); ++i) {
        const size_t at = static_cast<size_t>(step - 1) * kLanes + lanes[i]->lane;
        if (lanes[i]->records == 0) continue;
        outcome.logits[at].assign(dense_step->logits(i).begin(), dense_step->logits(i).end());
        std::vector<float>& rows = outcome.row_gradients[at];
        for (const RowGroup& group : lanes[i]->groups) {
          rows.insert(rows.end(), group.gradients.begin(), group.gradients.end());
        }
      }
      if (worker == 0) {
        outcome.gradient_norms.push_back(sum.trains ? sum.gradient_norm : 0);
        outcome.moments.push_back(sum.trains ? sum.moments : BatchMoments());
        outcome.skipped.push_back(sum.verdict.skip);
      }
      if (!sum.trains) continue;
      const absl::Status updated = dense_step->Update(static_cast<uint64_t>(step), sum);
      ASSERT_TRUE(updated.ok()) << updated;
    }
    outcome.hashes[static_cast<size_t>(worker)] = *replica->Hash();
    if (worker == 0) outcome.predictions = *replica->Predict(*BatchOf(job, 9, 0));
  });
  return outcome;
}

// Bits as long as no update came between: formulas are evaluated in another order then.
void ExpectLikeHost(const Outcome& host, const Outcome& device, bool first_step_bits, float tolerance) {
  ASSERT_EQ(host.logits.size(), device.logits.size());
  for (size_t at = 0; at < host.logits.size(); ++at) {
    if (first_step_bits && at < kLanes) {
      EXPECT_EQ(host.logits[at], device.logits[at]) << at;
      EXPECT_EQ(host.row_gradients[at], device.row_gradients[at]) << at;
    }
    EXPECT_THAT(device.logits[at], Pointwise(FloatNear(tolerance), host.logits[at])) << at;
    EXPECT_THAT(device.row_gradients[at], Pointwise(FloatNear(tolerance), host.row_gradients[at])) << at;
  }
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(host.gradient_norms[i], device.gradient_norms[i], tolerance * (1 + host.gradient_norms[i])) << i;
    EXPECT_EQ(host.moments[i].count, device.moments[i].count) << i;
    EXPECT_THAT(device.moments[i].mean, Pointwise(FloatNear(tolerance), host.moments[i].mean)) << i;
    EXPECT_THAT(device.moments[i].m2, Pointwise(FloatNear(100 * tolerance), host.moments[i].m2)) << i;
  }
  EXPECT_EQ(host.skipped, device.skipped);
  EXPECT_THAT(device.predictions, Pointwise(FloatNear(tolerance), host.predictions));
}

TEST(DeviceStep, EqualsTheHostsHoweverWorkersAndBucketsAreCut) {
  const Job job = SgdJob();
  const Outcome host = TrainFourSteps(job, {kNoGpu});
  std::vector<uint64_t> hashes;
  for (const int workers : {1, 2, 3}) {
    for (const int64_t bucket_bytes_min : {int64_t{0}, kEveryParameterABucket, int64_t{1} << 11}) {
      SCOPED_TRACE(absl::StrCat(workers, " workers, buckets of ", bucket_bytes_min));
      const Outcome device = TrainFourSteps(job, {kCopiesOnCpu, workers, bucket_bytes_min});
      ExpectLikeHost(host, device, /*first_step_bits=*/true, 2e-5f);
      hashes.insert(hashes.end(), device.hashes.begin(), device.hashes.end());
    }
  }
  EXPECT_THAT(hashes, Each(hashes[0])) << "the same bits on any number of workers";
}

TEST(DeviceStep, ClipsALongGradient) {
  Job job = SgdJob();
  job.mutable_training()->set_clip_norm(0.05);
  const Outcome host = TrainFourSteps(job, {kNoGpu});
  EXPECT_GT(host.gradient_norms[0], 0.05);
  ExpectLikeHost(host, TrainFourSteps(job, {kCopiesOnCpu, 2, kEveryParameterABucket}), true, 2e-5f);
}

void ExpectUpdatesAsTheHosts(const Job& job) {
  const std::unique_ptr<DenseReplica> host = MakeReplica(job, {kNoGpu});
  const std::unique_ptr<DenseReplica> device = MakeReplica(job, {});
  DenseModel* const models[] = {host->dense_model(), device->dense_model()};
  torch::manual_seed(3);
  for (int t = 0; t < 50; ++t) {
    torch::Tensor gradients[] = {torch::zeros_like(models[0]->weights()), torch::zeros_like(models[1]->weights())};
    for (size_t p = 0; p < models[0]->parameters().size(); ++p) {
      const torch::Tensor gradient = torch::randn({models[0]->parameters()[p].tensor.numel()}) * (t % 7 == 0 ? 100 : 1);
      for (int i = 0; i < 2; ++i) {
        gradients[i].narrow(0, models[i]->parameters()[p].offset, gradient.numel()).copy_(gradient);
      }
    }
    for (int i = 0; i < 2; ++i) models[i]->Update(static_cast<uint64_t>(t + 1), gradients[i]);
  }
  const std::unique_ptr<DenseReplica> before = MakeReplica(job, {kNoGpu});
  for (size_t p = 0; p < models[0]->parameters().size(); ++p) {
    const torch::Tensor moved = models[0]->parameters()[p].tensor.detach();
    const torch::Tensor difference = moved - models[1]->parameters()[p].tensor.detach();
    EXPECT_LT(difference.abs().max().item<float>(), 1e-5f) << models[0]->parameters()[p].name;
    const torch::Tensor way = moved - before->dense_model()->parameters()[p].tensor.detach();
    EXPECT_GT(way.abs().max().item<float>(), 0.01f) << models[0]->parameters()[p].name;
  }
}

TEST(DeviceStep, UpdatesByAdamAsTheHostDoes) { ExpectUpdatesAsTheHosts(TestJob()); }

TEST(DeviceStep, UpdatesByAScheduleDecayAndGroupsAsTheHostDoes) {
  for (const char* kind : {"ADAMW weight_decay: 0.2", "SGD"}) {
    Job job = TestJob();
    *job.mutable_training()->mutable_dense_optimizer() =
        ParseJob(absl::StrCat("training { dense_optimizer { learning_rate: 0.01 kind: ", kind,
                              " schedule { kind: POLYNOMIAL warmup_steps: 5 decay_steps: 40 end_fraction: 0.5 } "
                              "group { match: EXPERTS learning_rate_factor: 0.5 } ema_decay: 0.9 } }"),
                 "test")
            ->training()
            .dense_optimizer();
    ExpectUpdatesAsTheHosts(job);
  }
}

TEST(DeviceStep, ARowThatIsNotFiniteSkipsTheStepOnEveryWorker) {
  const Job job = SgdJob();
  for (const uint32_t lane : {0u, 3u, 4u}) {
    const Outcome host = TrainFourSteps(job, {kNoGpu}, 3, lane);
    const Outcome device = TrainFourSteps(job, {kCopiesOnCpu, 2, kEveryParameterABucket}, 3, lane);
    EXPECT_THAT(device.skipped, ElementsAre(false, false, true, false));
    EXPECT_EQ(device.hashes[0], device.hashes[1]);
    EXPECT_THAT(device.predictions, Pointwise(FloatNear(2e-5f), host.predictions));
  }
}

TEST(DeviceStep, TheModelsPartsForAGpuGiveTheHostsNumbers) {
  const Job job = SgdJob();
  Shape shape = {kCopiesOnCpu, 2, kEveryParameterABucket};
  shape.batched = true;
  ExpectLikeHost(TrainFourSteps(job, {kNoGpu}), TrainFourSteps(job, shape), /*first_step_bits=*/false, 1e-4f);
}

TEST(DeviceStep, ABatchThatNobodyStagedIsTrainedAlike) {
  const Job job = TestJob();
  Shape shape = {kCopiesOnCpu, 1, kEveryParameterABucket};
  const Outcome staged = TrainFourSteps(job, shape);
  shape.staged = false;
  EXPECT_EQ(TrainFourSteps(job, shape).hashes, staged.hashes);
}

TEST(DeviceStep, ASnapshotGoesFromHostToDeviceAndBack) {
  const Job job = TestJob();
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("device_step_test-", getpid(), ".safetensors"));
  LocalCollectiveHub hub(Env::Real(), 1);
  const auto hosted = MakeHostedCollective(hub.collective(0));
  const auto host = MakeReplica(job, {kNoGpu});
  const auto device = MakeReplica(job, {});
  const auto host_step = MakeStep(job, {kNoGpu}, host.get(), hub.collective(0), nullptr);
  const auto device_step = MakeStep(job, {}, device.get(), nullptr, hosted.get());
  const std::pair<DenseReplica*, DenseStep*> both[] = {{host.get(), host_step.get()},
                                                       {device.get(), device_step.get()}};
  for (int step = 1; step <= 4; ++step) {
    for (const auto& [replica, dense_step] : both) {
      std::vector<std::unique_ptr<Batch>> lanes;
      std::vector<LaneVote> votes(kLanes);
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        lanes.push_back(BatchOf(job, step, lane));
        votes[lane].records = static_cast<uint64_t>(lanes.back()->records);
      }
      StepSum sum;
      ASSERT_TRUE(dense_step->Run(lanes, absl::MakeSpan(votes), &sum).ok());
      ASSERT_TRUE(dense_step->Update(static_cast<uint64_t>(step), sum).ok());
    }
    DenseReplica* const from = step % 2 == 1 ? host.get() : device.get();
    DenseReplica* const to = step % 2 == 1 ? device.get() : host.get();
    const auto hash = from->Save(path, static_cast<uint64_t>(step));
    ASSERT_TRUE(hash.ok()) << hash.status();
    EXPECT_NE(*to->Hash(), *hash);
    const absl::Status restored = to->Restore(path);
    ASSERT_TRUE(restored.ok()) << restored;
    EXPECT_EQ(*to->Hash(), *hash);
    EXPECT_EQ(*to->Predict(*BatchOf(job, 9, 1)), *from->Predict(*BatchOf(job, 9, 1)));
  }
}

// Keeps what it is asked for and sums nothing.
class RecordingCollective : public DeviceCollective {
 public:
  struct Sum {
    int64_t size;
    bool has_tails;
    bool first_parameter_is_there;  // the last one that backward comes to
  };
  int worker() const override { return 0; }
  int workers() const override { return 1; }
  absl::Status SumParts(int lanes, absl::Span<const Part> parts, const torch::Tensor& sum_out,
                        const torch::Tensor& tails_out) override {
    EXPECT_EQ(lanes, static_cast<int>(kLanes));
    const int64_t parameters = static_cast<int64_t>(parts.back().sum.storage().nbytes() / sizeof(float) / kLanes);
    const torch::Tensor last_lane = parts.back().sum.as_strided({parameters}, {1}, (kLanes - 1) * parameters);
    sums.push_back({sum_out.numel(), tails_out.defined(), last_lane.narrow(0, 0, 8).abs().sum().item<float>() > 0});
    return status;
  }
  absl::Status Finish() override { return absl::OkStatus(); }

  std::vector<Sum> sums;
  absl::Status status;
};

absl::Status RunOnce(const Job& job, const Shape& shape, RecordingCollective* collective) {
  const auto replica = MakeReplica(job, shape);
  const auto dense_step = MakeStep(job, shape, replica.get(), nullptr, collective);
  std::vector<std::unique_ptr<Batch>> lanes;
  for (uint32_t lane = 0; lane < kLanes; ++lane) lanes.push_back(BatchOf(job, 1, lane));
  std::vector<LaneVote> votes(kLanes);
  StepSum sum;
  return dense_step->Run(lanes, absl::MakeSpan(votes), &sum);
}

TEST(DeviceStep, BucketsStartWhileBackwardStillComputesAndTheLastCarriesTheFlags) {
  const Job job = TestJob();
  RecordingCollective one;
  ASSERT_TRUE(RunOnce(job, {kCopiesOnCpu, 1, 0}, &one).ok());
  ASSERT_EQ(one.sums.size(), 1u);
  EXPECT_TRUE(one.sums[0].has_tails);
  RecordingCollective many;
  ASSERT_TRUE(RunOnce(job, {kCopiesOnCpu, 1, 1024}, &many).ok());
  ASSERT_GT(many.sums.size(), 3u);
  EXPECT_FALSE(many.sums[0].first_parameter_is_there);
  EXPECT_FALSE(many.sums[1].first_parameter_is_there);
  EXPECT_TRUE(many.sums.back().first_parameter_is_there);
  int64_t parameters = 0;
  for (size_t i = 0; i < many.sums.size(); ++i) {
    EXPECT_EQ(many.sums[i].has_tails, i + 1 == many.sums.size()) << i;
    parameters += many.sums[i].size;
  }
  EXPECT_EQ(parameters, one.sums[0].size);
}

TEST(DeviceStep, AnErrorOfASumEndsTheStepWithIt) {
  RecordingCollective collective;
  collective.status = absl::InternalError("the link is down");
  EXPECT_EQ(RunOnce(TestJob(), {kCopiesOnCpu, 1, 1024}, &collective), collective.status);
  EXPECT_EQ(collective.sums.size(), 1u) << "nothing is asked of it after that";
}

TEST(DeviceStep, TurnsTorchsExceptionsIntoAStatus) {
  const auto replica =
      DenseReplica::Wrap(TestJob(), std::make_shared<LinearModel>(3, 2), kCopiesOnCpu);  // of another width
  ASSERT_TRUE(replica.ok());
  RecordingCollective collective;
  const auto dense_step = MakeStep(TestJob(), {}, replica->get(), nullptr, &collective);
  std::vector<std::unique_ptr<Batch>> lanes;
  lanes.push_back(BatchOf(TestJob(), 7, 0));
  std::vector<LaneVote> votes(1);
  StepSum sum;
  const absl::Status status = dense_step->Run(lanes, absl::MakeSpan(votes), &sum);
  EXPECT_TRUE(absl::IsInternal(status));
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("worker 0 on cpu"), HasSubstr("step 7, lane 0")));
}

TEST(DeviceStep, OnAGpuItGivesTheHostsNumbers) {
  if (torch::cuda::device_count() == 0) GTEST_SKIP() << "no GPU is here";
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);  // as `hearth` does, for the same bits each time
  const Job job = SgdJob();
  const Outcome host = TrainFourSteps(job, {kNoGpu});
  std::vector<uint64_t> hashes;
  // Two workers of one process share the thread that runs backward on the GPU: a sum that waits in it never ends.
  const std::pair<int, int64_t> shapes[] = {{1, 0}, {1, kEveryParameterABucket}, {2, 0}};
  for (const auto& [workers, bucket_bytes_min] : shapes) {
    const Outcome device = TrainFourSteps(job, {0, workers, bucket_bytes_min});
    ExpectLikeHost(host, device, /*first_step_bits=*/false, 1e-3f);
    hashes.insert(hashes.end(), device.hashes.begin(), device.hashes.end());
  }
  EXPECT_THAT(hashes, Each(hashes[0])) << "the same bits on any number of workers";
}

}  // namespace
}  // namespace hearth
