#include "worker/dense/dense_replica.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "tests/worker/dense/dense_cases.h"
#include "worker/collective/collective.h"
#include "worker/dense/dense_model.h"
#include "worker/dense/dense_reducer.h"
#include "worker/dense/host_step.h"
#include "worker/step/dense_optimizer.h"

namespace hearth {
namespace {

// v of one record by loops over its bags.
std::vector<double> FeaturesOf(const Job& job, const Batch& batch, int64_t record) {
  const FeatureLayout layout = MakeFeatureLayout(job);
  std::vector<double> v(static_cast<size_t>(layout.width), 0.0);
  for (const FeatureLayout::SlotPlace& place : layout.slots) {
    const RowGroup& group = batch.groups[static_cast<size_t>(place.group)];
    const size_t bag = static_cast<size_t>(place.bag * batch.records + record);
    const double values = static_cast<double>(group.offsets[bag + 1] - group.offsets[bag]);
    const double scale = job.slot(place.slot).pooling() == Slot::MEAN && values > 0 ? 1 / values : 1;
    for (int64_t at = group.offsets[bag]; at < group.offsets[bag + 1]; ++at) {
      for (int d = 0; d < place.dim; ++d) {
        v[static_cast<size_t>(place.offset + d)] +=
            scale * group.rows[static_cast<size_t>(group.row_of[static_cast<size_t>(at)] * place.dim + d)];
      }
    }
  }
  for (int i = 0; i < job.dense_size(); ++i) {
    v[static_cast<size_t>(layout.dense_offset + i)] = batch.dense[static_cast<size_t>(record * job.dense_size() + i)];
  }
  return v;
}

absl::Status Update(DenseReplica* replica, int step, const LaneResult& result) {
  return UpdateModel(replica->dense_model(), static_cast<uint64_t>(step + 1), result.gradient,
                     PoolMoments({result.moments}));
}

// One step on the batch.
void Train(DenseReplica* replica, int step, Batch* batch) {
  LaneResult result;
  ASSERT_TRUE(TrainLane(replica->dense_model(), batch, &result).ok());
  ASSERT_TRUE(Update(replica, step, result).ok());
}

TEST(DenseReplica, GradientsEqualTheOnesWrittenOutByHand) {
  const Job job = TestJob();
  const FeatureLayout layout = MakeFeatureLayout(job);
  auto model = std::make_shared<LinearModel>(layout.width, 2);
  auto replica = DenseReplica::Wrap(job, model);
  ASSERT_TRUE(replica.ok()) << replica.status();
  Random random(11);
  for (const int64_t records : {1, 7, 40}) {
    std::unique_ptr<Batch> batch = RandomBatch(job, records, &random);
    LaneResult result;
    ASSERT_TRUE(TrainLane((*replica)->dense_model(), batch.get(), &result).ok());
    EXPECT_TRUE(result.finite);

    const float* weight = model->weight().data_ptr<float>();  // [2, V]
    std::vector<double> dense(static_cast<size_t>(3 + 2 * layout.width), 0.0);
    std::vector<std::vector<double>> rows;
    for (const RowGroup& group : batch->groups) rows.emplace_back(group.rows.size(), 0.0);
    for (int64_t i = 0; i < records; ++i) {
      const std::vector<double> v = FeaturesOf(job, *batch, i);
      std::vector<double> dv(v.size(), 0.0);
      for (int t = 0; t < 2; ++t) {
        double logit = 0;
        for (size_t c = 0; c < v.size(); ++c) logit += v[c] * weight[static_cast<size_t>(t) * v.size() + c];
        const size_t cell = static_cast<size_t>(i * 2 + t);
        EXPECT_NEAR(result.logits[cell], logit, 1e-4);
        const double d = job.task(t).weight() * batch->mask[cell] * (1 / (1 + std::exp(-logit)) - batch->labels[cell]);
        for (size_t c = 0; c < v.size(); ++c) {
          dense[3 + static_cast<size_t>(t) * v.size() + c] += d * v[c];
          dv[c] += d * weight[static_cast<size_t>(t) * v.size() + c];
        }
      }
      for (const FeatureLayout::SlotPlace& place : layout.slots) {
        const RowGroup& group = batch->groups[static_cast<size_t>(place.group)];
        const size_t bag = static_cast<size_t>(place.bag * records + i);
        const double values = static_cast<double>(group.offsets[bag + 1] - group.offsets[bag]);
        const double scale = job.slot(place.slot).pooling() == Slot::MEAN && values > 0 ? 1 / values : 1;
        for (int64_t at = group.offsets[bag]; at < group.offsets[bag + 1]; ++at) {
          for (int c = 0; c < place.dim; ++c) {
            rows[static_cast<size_t>(place.group)]
                [static_cast<size_t>(group.row_of[static_cast<size_t>(at)] * place.dim + c)] +=
                scale * dv[static_cast<size_t>(place.offset + c)];
          }
        }
      }
    }
    ASSERT_EQ(result.gradient.size(), dense.size());
    for (size_t i = 0; i < dense.size(); ++i) EXPECT_NEAR(result.gradient[i], dense[i], 1e-3) << i;
    for (size_t g = 0; g < rows.size(); ++g) {
      ASSERT_EQ(batch->groups[g].gradients.size(), rows[g].size());
      for (size_t i = 0; i < rows[g].size(); ++i) EXPECT_NEAR(batch->groups[g].gradients[i], rows[g][i], 1e-3);
    }
  }
}

TEST(DenseReplica, ABatchWithoutAnySignTrainsTheDenseFeatures) {
  const Job job = TestJob();
  auto replica = DenseReplica::Create(job, {0.3, 0.1});
  ASSERT_TRUE(replica.ok()) << replica.status();
  BatchBuilder builder(job);
  for (uint64_t i = 0; i < 4; ++i) {
    builder.AddDense({static_cast<float>(i), 1.0f});
    builder.AddLabels({1, 0}, {1, 1});
    builder.EndRecord(0, i);
  }
  std::unique_ptr<Batch> batch = builder.Build();
  LaneResult result;
  ASSERT_TRUE(TrainLane((*replica)->dense_model(), batch.get(), &result).ok());
  EXPECT_TRUE(result.finite);
}

TEST(DenseReplica, RepeatsItsBitsFromTheSameJobAndBatches) {
  const Job job = TestJob();
  std::vector<uint64_t> hashes;
  for (int run = 0; run < 2; ++run) {
    auto replica = DenseReplica::Create(job, {0.3, 0.1});
    ASSERT_TRUE(replica.ok());
    Random random(9);
    for (int step = 0; step < 5; ++step) {
      std::unique_ptr<Batch> batch = RandomBatch(job, 20, &random);
      LaneResult result;
      ASSERT_TRUE(TrainLane((*replica)->dense_model(), batch.get(), &result).ok());
      ASSERT_TRUE(Update(replica->get(), step, result).ok());
    }
    hashes.push_back(*(*replica)->Hash());
  }
  EXPECT_EQ(hashes[0], hashes[1]);
}

TEST(DenseReplica, GoesOnFromASavedFileBitForBit) {
  const Job job = TestJob();
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("trainer_test-", getpid()));
  ASSERT_TRUE(MakeDirectories(folder).ok());
  const std::string path = JoinPath(folder, "dense.safetensors");
  auto whole = DenseReplica::Create(job, {0.3, 0.1});
  auto resumed = DenseReplica::Create(job, {0.5, 0.5});
  ASSERT_TRUE(whole.ok() && resumed.ok());
  Random random(10);
  for (int step = 0; step < 6; ++step) {
    if (step == 3) {
      const auto hash = (*whole)->Save(path, 3);
      ASSERT_TRUE(hash.ok()) << hash.status();
      EXPECT_NE(*(*resumed)->Hash(), *hash);
      const absl::Status restored = (*resumed)->Restore(path);
      ASSERT_TRUE(restored.ok()) << restored;
      EXPECT_EQ(*(*resumed)->Hash(), *hash);
    }
    std::unique_ptr<Batch> batch = RandomBatch(job, 20, &random);
    for (auto* replica : {&whole, &resumed}) {
      if (replica == &resumed && step < 3) continue;
      LaneResult result;
      ASSERT_TRUE(TrainLane((**replica)->dense_model(), batch.get(), &result).ok());
      ASSERT_TRUE(Update((*replica)->get(), step, result).ok());
    }
  }
  EXPECT_EQ(*(*whole)->Hash(), *(*resumed)->Hash());
  Random fresh(12);
  std::unique_ptr<Batch> batch = RandomBatch(job, 9, &fresh);
  EXPECT_EQ(*(*whole)->Predict(*batch), *(*resumed)->Predict(*batch));

  Job other = job;
  other.mutable_model()->set_hidden_1(16);
  auto stranger = DenseReplica::Create(other, {0.3, 0.1});
  ASSERT_TRUE(stranger.ok());
  EXPECT_EQ((*stranger)->Restore(path).code(), absl::StatusCode::kDataLoss);
}

// With all that depends on the step: a schedule, decay, groups, and the mean of the weights.
TEST(DenseReplica, GoesOnFromASavedFileBitForBitWhateverTheOptimizer) {
  Job job = TestJob();
  *job.mutable_training()->mutable_dense_optimizer() =
      ParseJob(
          "training { dense_optimizer { kind: ADAMW learning_rate: 0.05 weight_decay: 0.1 ema_decay: 0.5 "
          "schedule { kind: COSINE warmup_steps: 4 decay_steps: 9 } "
          "group { match: TOWERS learning_rate_factor: 2 weight_decay: 0.3 } } }",
          "test")
          ->training()
          .dense_optimizer();
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("trainer_test-optimizer-", getpid()));
  auto whole = DenseReplica::Create(job, {0.3, 0.1});
  auto resumed = DenseReplica::Create(job, {0.5, 0.5});
  Random random(10);
  for (int step = 0; step < 6; ++step) {
    std::unique_ptr<Batch> batch = RandomBatch(job, 20, &random);
    Train(whole->get(), step, batch.get());
    if (step >= 3) Train(resumed->get(), step, batch.get());
    if (step != 2) continue;
    ASSERT_TRUE((*whole)->Save(path, 3).ok());
    const absl::Status restored = (*resumed)->Restore(path);
    ASSERT_TRUE(restored.ok()) << restored;
  }
  EXPECT_EQ(*(*whole)->Hash(), *(*resumed)->Hash());
}

// The weights' mean by hand: from before the first update that keeps one.
TEST(DenseReplica, KeepsAMeanOfTheWeightsFromTheStepOnThatAsksForIt) {
  const Job plain = TestJob();
  Job job = plain;
  job.mutable_training()->mutable_dense_optimizer()->set_ema_decay(0.4);
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("trainer_test-mean-", getpid()));
  auto before = DenseReplica::Create(plain, {0.3, 0.1});
  auto kept = DenseReplica::Create(job, {0.3, 0.1});
  auto left_off = DenseReplica::Create(plain, {0.3, 0.1});
  Random random(16);
  std::unique_ptr<Batch> batch = RandomBatch(plain, 20, &random);
  Train(before->get(), 0, batch.get());
  const auto hash = (*before)->Save(path, 1);
  ASSERT_TRUE((*kept)->Restore(path).ok());
  EXPECT_EQ(*(*kept)->Hash(), *hash) << "restored is what was saved: the mean begins with the next update";

  torch::Tensor mean = (*kept)->dense_model()->weights().clone();
  for (int step = 1; step < 7; ++step) {
    batch = RandomBatch(plain, 20, &random);
    Train(kept->get(), step, batch.get());
    Train(before->get(), step, batch.get());
    const double decay = std::min(0.4, (2.0 + step) / (11.0 + step));
    mean = decay * mean + (1 - decay) * (*kept)->dense_model()->weights();
  }
  ASSERT_TRUE(torch::equal((*kept)->dense_model()->weights(), (*before)->dense_model()->weights()));
  size_t means = 0;
  for (const NamedTensor& tensor : (*kept)->dense_model()->Tensors()) means += DenseModel::IsMean(tensor.name);
  EXPECT_EQ(means, (*kept)->dense_model()->parameters().size());
  const auto serves = [&](bool mean_serves) {
    Job serving = job;
    serving.mutable_training()->mutable_dense_optimizer()->set_ema_serves(mean_serves);
    auto replica = DenseReplica::Create(serving, {0.5, 0.5});
    EXPECT_TRUE((*kept)->Save(path, 7).ok());
    EXPECT_TRUE((*replica)->Restore(path).ok());
    return *std::move(replica);
  };
  EXPECT_EQ(*serves(false)->Predict(*batch), *(*before)->Predict(*batch));
  const std::vector<float> served = *serves(true)->Predict(*batch);
  EXPECT_NE(served, *(*before)->Predict(*batch));
  // The same running statistics with the mean written into the weights.
  {
    torch::NoGradGuard no_grad;
    const_cast<torch::Tensor&>((*before)->dense_model()->weights()).copy_(mean);
  }
  const std::vector<float> by_hand = *(*before)->Predict(*batch);
  for (size_t i = 0; i < served.size(); ++i) EXPECT_NEAR(served[i], by_hand[i], 1e-5);

  // A job that asks for none any more drops it with its first update.
  ASSERT_TRUE((*kept)->Save(path, 7).ok());
  ASSERT_TRUE((*left_off)->Restore(path).ok());
  EXPECT_EQ(*(*left_off)->Hash(), *(*kept)->Hash());
  Train(left_off->get(), 7, batch.get());
  for (const NamedTensor& tensor : (*left_off)->dense_model()->Tensors()) {
    EXPECT_FALSE(DenseModel::IsMean(tensor.name)) << tensor.name;
  }
}

// A decay of 1 at a rate of 1 takes all of a weight away.
TEST(DenseReplica, DecaysMatricesAloneAndGivesAGroupItsOwnRate) {
  Job job = TestJob();
  DenseOptimizer* optimizer = job.mutable_training()->mutable_dense_optimizer();
  optimizer->set_kind(DenseOptimizer::ADAMW);
  optimizer->set_learning_rate(1);
  optimizer->set_weight_decay(1);
  auto* group = optimizer->add_group();
  group->set_match(DenseOptimizer::Group::TOWERS);
  group->set_learning_rate_factor(0.5);
  for (const int gpu : {kNoGpu, kCopiesOnCpu}) {
    auto replica = DenseReplica::Wrap(job, MakeModel(MakeModelSpec(job, {0.3, 0.1})), gpu);
    ASSERT_TRUE(replica.ok()) << replica.status();
    DenseModel* const model = (*replica)->dense_model();
    std::vector<torch::Tensor> before;
    for (const auto& parameter : model->parameters()) before.push_back(parameter.tensor.detach().clone());
    model->Update(1, torch::zeros_like(model->weights()));
    for (size_t i = 0; i < before.size(); ++i) {
      const auto& parameter = model->parameters()[i];
      const double left = parameter.shape.size() < 2 ? 1 : GroupOf(parameter.name) == group->match() ? 0.5 : 0;
      EXPECT_TRUE(torch::equal(parameter.tensor.detach(), before[i] * left)) << parameter.name;
    }
  }
}

TEST(DenseReplica, EvaluationChangesNothing) {
  const Job job = TestJob();
  auto replica = DenseReplica::Create(job, {0.3, 0.1});
  ASSERT_TRUE(replica.ok());
  Random random(13);
  std::unique_ptr<Batch> batch = RandomBatch(job, 30, &random);
  const uint64_t before = *(*replica)->Hash();
  const auto first = (*replica)->Predict(*batch);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first->size(), 60u);
  EXPECT_EQ(*first, *(*replica)->Predict(*batch));
  std::vector<std::unique_ptr<Batch>> batches;
  for (int i = 0; i < 2; ++i) batches.push_back(RandomBatch(job, 30, &random));
  const auto diagnostics = (*replica)->Diagnose(batches, 40);
  ASSERT_TRUE(diagnostics.ok()) << diagnostics.status();
  EXPECT_EQ(diagnostics->records(), 40u);
  EXPECT_EQ(diagnostics->task_size(), 2);
  EXPECT_EQ(*first, *(*replica)->Predict(*batch));
  EXPECT_EQ(*(*replica)->Hash(), before);
}

TEST(DenseReplica, SeesANonFiniteRow) {
  const Job job = TestJob();
  auto replica = DenseReplica::Create(job, {0.3, 0.1});
  ASSERT_TRUE(replica.ok());
  for (const float poison : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    Random random(14);
    std::unique_ptr<Batch> batch = RandomBatch(job, 30, &random);
    LaneResult result;
    ASSERT_TRUE(TrainLane((*replica)->dense_model(), batch.get(), &result).ok());
    EXPECT_TRUE(result.finite);
    batch->groups[0].rows[0] = poison;
    ASSERT_TRUE(TrainLane((*replica)->dense_model(), batch.get(), &result).ok());
    EXPECT_FALSE(result.finite);
  }
}

TEST(DenseReplica, TurnsTorchsExceptionsIntoAStatus) {
  const Job job = TestJob();
  auto replica = DenseReplica::Wrap(job, std::make_shared<LinearModel>(3, 2));  // of another width
  ASSERT_TRUE(replica.ok());
  Random random(15);
  std::unique_ptr<Batch> batch = RandomBatch(job, 3, &random);
  batch->step = 12;
  LaneResult result;
  const absl::Status status = TrainLane((*replica)->dense_model(), batch.get(), &result);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(std::string(status.message()).find("step 12"), std::string::npos);
}

template <typename TorchOptimizer>
void ExpectLikeTorch(const DenseOptimizer& config, TorchOptimizer* optimizer, torch::Tensor parameter) {
  std::vector<float> weights(parameter.data_ptr<float>(), parameter.data_ptr<float>() + parameter.numel());
  DenseUpdater updater(config, parameter.numel(), {{parameter.numel(), 1, config.weight_decay()}});
  for (int t = 0; t < 60; ++t) {
    const torch::Tensor gradient = torch::randn({parameter.numel()}) * (t % 7 == 0 ? 100 : 1);
    parameter.mutable_grad() = gradient.clone();
    optimizer->step();
    updater.Update(1, weights.data(), gradient.data_ptr<float>());
    for (size_t i = 0; i < weights.size(); ++i)
      ASSERT_NEAR(weights[i], parameter.data_ptr<float>()[i], 3e-6) << "t " << t;
  }
}

TEST(DenseUpdater, EqualsTorchsAdamAdamWAndSgd) {
  torch::manual_seed(1);
  DenseOptimizer config;
  config.set_learning_rate(0.003);
  torch::Tensor parameter = torch::randn({101}).requires_grad_(true);
  torch::optim::Adam adam({parameter}, torch::optim::AdamOptions(0.003).betas({0.9, 0.999}).eps(1e-8));
  ExpectLikeTorch(config, &adam, parameter);
  config.set_kind(DenseOptimizer::ADAMW);
  config.set_weight_decay(0.7);
  torch::Tensor decayed = torch::randn({101}).requires_grad_(true);
  torch::optim::AdamW adamw({decayed}, torch::optim::AdamWOptions(0.003).weight_decay(0.7).eps(1e-8));
  ExpectLikeTorch(config, &adamw, decayed);
  config.set_kind(DenseOptimizer::SGD);
  torch::Tensor other = torch::randn({101}).requires_grad_(true);
  torch::optim::SGD sgd({other}, torch::optim::SGDOptions(0.003));
  ExpectLikeTorch(config, &sgd, other);
}

// --- the reduction ---

LaneResult RandomResult(Random* random, size_t parameters, size_t columns) {
  LaneResult result;
  result.gradient.resize(parameters);
  for (float& g : result.gradient) g = static_cast<float>(random->Uniform() - 0.5);
  result.moments.count = 1 + static_cast<double>(random->Below(50));
  result.moments.mean.resize(columns);
  result.moments.m2.resize(columns);
  for (float& value : result.moments.mean) value = static_cast<float>(random->Uniform());
  for (float& value : result.moments.m2) value = static_cast<float>(random->Uniform());
  return result;
}

struct Reduced {
  StepSum sum;
  std::vector<float> gradient;
};

// The votes of all lanes through `workers` workers; what each of them got.
std::vector<Reduced> ReduceAll(const std::vector<LaneVote>& votes, int workers, size_t parameters, size_t columns,
                               double clip) {
  Env* env = Env::Real();
  LocalCollectiveHub hub(env, workers);
  std::vector<Reduced> reduced(static_cast<size_t>(workers));
  std::vector<std::unique_ptr<Thread>> threads;
  for (int w = 0; w < workers; ++w) {
    threads.push_back(env->StartThread("reduce", [&, w] {
      DenseReducer reducer(hub.collective(w), static_cast<uint32_t>(votes.size()), static_cast<int64_t>(parameters),
                           static_cast<int64_t>(columns), clip);
      std::vector<LaneVote> own;
      for (size_t lane = static_cast<size_t>(w); lane < votes.size(); lane += static_cast<size_t>(workers)) {
        own.push_back(votes[lane]);
      }
      Reduced& mine = reduced[static_cast<size_t>(w)];
      const absl::Status status = reducer.Reduce(own, &mine.sum);
      HEARTH_CHECK(status.ok(), "", status.ToString());
      mine.gradient.assign(mine.sum.gradient.begin(), mine.sum.gradient.end());
    }));
  }
  threads.clear();
  return reduced;
}

TEST(DenseReducer, GivesEveryWorkerTheSameBitsHoweverTheLanesAreDealt) {
  constexpr size_t kLanes = 5, kParameters = 103, kColumns = 6;
  Random random(21);
  std::vector<LaneResult> results;
  std::vector<LaneVote> votes(kLanes);
  for (size_t lane = 0; lane < kLanes; ++lane) results.push_back(RandomResult(&random, kParameters, kColumns));
  std::vector<BatchMoments> moments(kLanes);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    votes[lane].read = 10 + lane;
    votes[lane].bad = lane;
    if (lane == 2) {
      votes[lane].at_end = true;  // brings zeros
      continue;
    }
    votes[lane].records = static_cast<uint64_t>(results[lane].moments.count);
    votes[lane].result = &results[lane];
    moments[lane] = results[lane].moments;
  }
  votes[4].stop = true;
  uint64_t n = 0;
  for (const LaneVote& vote : votes) n += vote.records;
  std::vector<float> truth(kParameters, 0.0f);
  for (size_t i = 0; i < kParameters; ++i) {
    float sum = results[0].gradient[i];
    for (size_t lane = 1; lane < kLanes; ++lane) sum += lane == 2 ? 0.0f : results[lane].gradient[i];
    truth[i] = sum / static_cast<float>(n);
  }
  const double norm = ClipNorm(absl::MakeSpan(truth), 0.01);
  const BatchMoments pooled = PoolMoments(moments);
  for (int workers = 1; workers <= 5; ++workers) {
    for (const Reduced& reduced : ReduceAll(votes, workers, kParameters, kColumns, 0.01)) {
      EXPECT_EQ(reduced.gradient, truth);
      EXPECT_EQ(reduced.sum.gradient_norm, norm);
      EXPECT_EQ(reduced.sum.moments.count, pooled.count);
      EXPECT_EQ(reduced.sum.moments.mean, pooled.mean);
      EXPECT_EQ(reduced.sum.moments.m2, pooled.m2);
      EXPECT_TRUE(reduced.sum.trains);
      EXPECT_EQ(reduced.sum.verdict.records, n);
      EXPECT_TRUE(reduced.sum.verdict.stop);
      EXPECT_FALSE(reduced.sum.verdict.cut);
      EXPECT_FALSE(reduced.sum.verdict.skip);
      EXPECT_FALSE(reduced.sum.verdict.all_at_end);
      EXPECT_EQ(reduced.sum.read, 60u);
      EXPECT_EQ(reduced.sum.bad, 10u);
    }
  }
}

TEST(DenseReducer, TheStepsTimeIsTheMiddleOneOfLanesThatHaveOne) {
  for (const auto& [times_s, middle_s] : std::vector<std::pair<std::vector<uint32_t>, uint32_t>>{
           {{0, 0, 0}, 0}, {{0, 7, 0}, 7}, {{9, 0, 5}, 5}, {{9, 4000000000u, 5}, 9}, {{4, 3, 2, 1}, 2}}) {
    std::vector<LaneVote> votes(times_s.size());
    for (size_t lane = 0; lane < votes.size(); ++lane) votes[lane].time_s = times_s[lane];
    for (int workers = 1; workers <= static_cast<int>(votes.size()); ++workers) {
      for (const Reduced& reduced : ReduceAll(votes, workers, 3, 0, 0)) {
        EXPECT_EQ(reduced.sum.verdict.time_s, middle_s);
      }
    }
  }
}

TEST(DenseReducer, OneLaneThatIsNotFiniteSkipsTheStepEverywhere) {
  Random random(22);
  std::vector<LaneResult> results = {RandomResult(&random, 8, 2), RandomResult(&random, 8, 2)};
  results[1].finite = false;
  results[1].gradient[3] = std::nanf("");
  std::vector<LaneVote> votes(2);
  for (size_t lane = 0; lane < 2; ++lane) {
    votes[lane].records = 4;
    votes[lane].result = &results[lane];
  }
  for (const Reduced& reduced : ReduceAll(votes, 2, 8, 2, 0)) {
    EXPECT_TRUE(reduced.sum.verdict.skip);
    EXPECT_FALSE(reduced.sum.trains);
    EXPECT_EQ(reduced.sum.verdict.records, 8u);
  }
}

TEST(DenseReducer, LanesThatAreFiniteAloneButNotTogetherSkipTheStepOnEveryWorker) {
  constexpr size_t kLanes = 3, kParameters = 8, kColumns = 2;
  for (const auto& [cause, spoil] : std::vector<std::pair<const char*, std::function<void(LaneResult*, size_t)>>>{
           {"the sum overflows", [](LaneResult*result, size_t) { result->gradient[3] = 3e38f; }},
           {"a square of it overflows, which Adam takes",
            [](LaneResult*result, size_t) { result->gradient[3] = 1e25f; }},
           {"the pooled moments overflow",
            [](LaneResult*result, size_t lane) { result->moments.mean[1] = lane == 0 ? -3e38f : 3e38f; }}}) {
    Random random(23);
    std::vector<LaneResult> results;
    std::vector<LaneVote> votes(kLanes);
    for (size_t lane = 0; lane < kLanes; ++lane) results.push_back(RandomResult(&random, kParameters, kColumns));
    for (size_t lane = 0; lane < kLanes; ++lane) {
      spoil(&results[lane], lane);
      votes[lane].records = 4;
      votes[lane].result = &results[lane];
    }
    for (int workers = 1; workers <= 3; ++workers) {
      for (const double clip_norm : {0.0, 1.0}) {
        for (const Reduced& reduced : ReduceAll(votes, workers, kParameters, kColumns, clip_norm)) {
          EXPECT_TRUE(reduced.sum.verdict.skip) << cause;
          EXPECT_FALSE(reduced.sum.trains) << cause;
        }
      }
    }
  }
}

TEST(DenseReducer, AStepWithoutRecordsTrainsNothing) {
  std::vector<LaneVote> votes(3);
  for (const Reduced& reduced : ReduceAll(votes, 2, 8, 2, 0)) {
    EXPECT_FALSE(reduced.sum.trains);
    EXPECT_FALSE(reduced.sum.verdict.all_at_end);
  }
  for (LaneVote& vote : votes) vote.at_end = true;
  for (const Reduced& reduced : ReduceAll(votes, 2, 8, 2, 0)) EXPECT_TRUE(reduced.sum.verdict.all_at_end);
}

}  // namespace
}  // namespace hearth
