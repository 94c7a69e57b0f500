#include "scheduler/snapshot_coordinator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "common/artifact/manifest.h"
#include "common/base/env.h"

namespace hearth {
namespace {

SnapshotCoordinator::Options SmallOptions() {
  SnapshotCoordinator::Options options;
  options.servers = 2;
  options.workers = 2;
  options.lanes = 3;
  for (const char* name : {"validation", "test"}) options.job.add_split()->set_name(name);
  return options;
}

ServerAtCut ServerPart(uint64_t step, uint32_t server) {
  ServerAtCut part;
  part.set_step(step);
  part.set_rows_hash(~uint64_t{0} - 10 + 7 * server);
  part.add_file()->set_path(absl::StrCat("ps-", server, "/CURRENT"));
  TableStats* table = part.add_table();
  table->set_name("video");
  table->set_rows(10 + server);
  table->set_memory_hits(100);
  return part;
}

WorkerAtCut WorkerPart(uint64_t step, uint32_t worker, const SnapshotCoordinator::Options& options) {
  WorkerAtCut part;
  part.set_step(step);
  for (uint32_t lane = worker; lane < options.lanes; lane += options.workers) {
    LaneState* state = part.add_lane();
    state->mutable_cursor()->set_lane(lane);
    state->mutable_ledger()->set_read(step * 10 + lane);
    state->mutable_ledger()->set_trained(step * 10 + lane);
  }
  if (worker == 0) {
    part.set_dense_hash(99);
    part.add_file()->set_path("dense.safetensors");
  }
  return part;
}

Evaluation Evaluated(uint64_t step, const std::string& split) {
  Evaluation evaluation;
  evaluation.set_step(step);
  evaluation.set_split(split);
  return evaluation;
}

TaskMetric Metric(uint64_t positives, uint64_t negatives) {
  TaskMetric metric;
  metric.set_labelled(positives + negatives);
  metric.set_loss_sum(0.5);
  metric.add_positives(positives);
  metric.add_negatives(negatives);
  return metric;
}

TEST(SnapshotCoordinator, MakesOneManifestOfAllParts) {
  const auto options = SmallOptions();
  SnapshotCoordinator coordinator(options);
  ASSERT_TRUE(coordinator.AddServer(1, ServerPart(8, 1)).ok());
  EXPECT_EQ(coordinator.AddWorker(1, WorkerPart(8, 1, options)).value(), false);
  EXPECT_EQ(coordinator.AddWorker(0, WorkerPart(8, 0, options)).value(), true);
  EXPECT_FALSE(coordinator.TakeWhole().has_value());
  ASSERT_TRUE(coordinator.AddServer(0, ServerPart(8, 0)).ok());
  const auto cut = coordinator.TakeWhole();
  ASSERT_TRUE(cut.has_value());
  const Manifest& manifest = cut->manifest;
  EXPECT_EQ(manifest.step(), 8u);
  EXPECT_EQ(manifest.lanes(), 3u);
  EXPECT_EQ(manifest.servers(), 2u);
  ASSERT_EQ(manifest.lane_size(), 3);
  for (int lane = 0; lane < 3; ++lane) EXPECT_EQ(manifest.lane(lane).ledger().read(), 80u + lane);
  ASSERT_EQ(manifest.file_size(), 3);
  EXPECT_EQ(manifest.file(0).path(), "dense.safetensors");
  EXPECT_EQ(manifest.file(1).path(), "ps-0/CURRENT");
  EXPECT_EQ(manifest.file(2).path(), "ps-1/CURRENT");
  ASSERT_EQ(manifest.table_size(), 1);
  EXPECT_EQ(manifest.table(0).name(), "video");
  EXPECT_EQ(manifest.table(0).rows(), 21u);
  EXPECT_EQ(manifest.table(0).memory_hits(), 200u);
  const uint64_t rows_hash = 2 * (~uint64_t{0} - 10) + 7;  // mod 2^64
  EXPECT_EQ(manifest.rows_hash(), rows_hash);
  EXPECT_EQ(manifest.model_hash(), ModelHash(rows_hash, 99));
  EXPECT_FALSE(cut->stopping);
  EXPECT_FALSE(coordinator.TakeWhole().has_value());
}

TEST(SnapshotCoordinator, WaitsForEachSplitWhereTheCutEndsAnEpoch) {
  const auto options = SmallOptions();
  SnapshotCoordinator coordinator(options);
  for (uint32_t i = 0; i < 2; ++i) {
    WorkerAtCut part = WorkerPart(8, i, options);
    part.set_epoch_ended(true);
    part.set_job_finished(true);
    part.set_stopping(true);
    ASSERT_TRUE(coordinator.AddWorker(i, part).ok());
    ASSERT_TRUE(coordinator.AddServer(i, ServerPart(8, i)).ok());
  }
  EXPECT_TRUE(coordinator.evaluating());
  ASSERT_TRUE(coordinator.AddEvaluation(Evaluated(8, "test")).ok());
  EXPECT_FALSE(coordinator.TakeWhole().has_value());
  EXPECT_TRUE(absl::IsInternal(coordinator.AddEvaluation(Evaluated(8, "nosuch"))));
  ASSERT_TRUE(coordinator.AddEvaluation(Evaluated(8, "validation")).ok());
  EXPECT_FALSE(coordinator.evaluating());
  const auto cut = coordinator.TakeWhole();
  ASSERT_TRUE(cut.has_value());
  EXPECT_TRUE(cut->epoch_ended && cut->stopping && cut->manifest.job_finished());
  ASSERT_EQ(cut->manifest.evaluation_size(), 2);
  EXPECT_EQ(cut->manifest.evaluation(0).split(), "validation");  // in the job's order
}

TEST(SnapshotCoordinator, WaitsForTheSplitsThatAreDueAtTheCutsStepAlone) {
  auto options = SmallOptions();
  options.job.mutable_split(0)->set_every_steps(4);
  SnapshotCoordinator coordinator(options);
  for (const uint64_t step : {6, 8}) {
    for (uint32_t i = 0; i < 2; ++i) {
      ASSERT_TRUE(coordinator.AddWorker(i, WorkerPart(step, i, options)).ok());
      ASSERT_TRUE(coordinator.AddServer(i, ServerPart(step, i)).ok());
    }
  }
  EXPECT_EQ(coordinator.TakeWhole()->manifest.evaluation_size(), 0);
  EXPECT_FALSE(coordinator.TakeWhole().has_value());
  EXPECT_TRUE(coordinator.evaluating());
  ASSERT_TRUE(coordinator.AddEvaluation(Evaluated(8, "validation")).ok());
  const auto cut = coordinator.TakeWhole();
  ASSERT_TRUE(cut.has_value());
  EXPECT_EQ(cut->manifest.evaluation_size(), 1);
  EXPECT_FALSE(cut->manifest.has_best());
}

TEST(SnapshotCoordinator, EndsAJobWithoutGainOnceEverySplitIsEvaluated) {
  auto options = SmallOptions();
  options.job.mutable_split(0)->set_every_steps(4);
  options.job.mutable_snapshot()->mutable_best()->set_split("validation");
  options.job.mutable_training()->set_stop_after_no_gain(1);
  const auto evaluated = [](uint64_t step, double auc) {
    Evaluation evaluation = Evaluated(step, "validation");
    evaluation.add_task()->set_auc(auc);
    return evaluation;
  };
  SnapshotCoordinator coordinator(options);
  for (const uint64_t step : {4, 8, 10, 12}) {
    for (uint32_t i = 0; i < 2; ++i) {
      WorkerAtCut part = WorkerPart(step, i, options);
      // At 10 the last step was skipped: no end to stop at.
      for (LaneState& lane : *part.mutable_lane()) lane.set_skipped_in_row(step == 10 ? 1 : 0);
      part.set_epoch_ended(step == 10);
      if (step == 10) {
        ASSERT_TRUE(coordinator.AddEvaluation(Evaluated(step, "test")).ok());
      }
      ASSERT_TRUE(coordinator.AddWorker(i, part).ok());
      ASSERT_TRUE(coordinator.AddServer(i, ServerPart(step, i)).ok());
    }
    ASSERT_TRUE(coordinator.AddEvaluation(evaluated(step, step == 8 ? 0.8 : 0.7)).ok());
    if (step == 12) break;
    const auto cut = coordinator.TakeWhole();
    ASSERT_TRUE(cut.has_value());
    EXPECT_EQ(cut->manifest.best().step(), std::min<uint64_t>(step, 8));
    EXPECT_FALSE(cut->without_gain || cut->manifest.job_finished());
  }
  EXPECT_FALSE(coordinator.TakeWhole().has_value()) << "the job ends here, and a split is missing";
  ASSERT_TRUE(coordinator.AddEvaluation(Evaluated(12, "test")).ok());
  const auto end = coordinator.TakeWhole();
  ASSERT_TRUE(end.has_value());
  EXPECT_TRUE(end->without_gain && end->manifest.job_finished());
  EXPECT_EQ(end->manifest.best().step(), 8u);
  EXPECT_EQ(end->manifest.best().without_gain(), 2u);
  EXPECT_EQ(end->manifest.evaluation_size(), 2);
}

// Each role sends its cuts in their order; how the roles' messages mingle is anybody's guess.
TEST(SnapshotCoordinator, GivesCutsInTheOrderOfTheirStepsHoweverRolesAreAheadOfEachOther) {
  const auto options = SmallOptions();
  const std::vector<uint64_t> steps = {0, 5, 10, 12};
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SnapshotCoordinator coordinator(options);
    std::vector<std::vector<std::function<void()>>> roles(4);
    Random random(seed);
    for (const uint64_t step : steps) {
      for (uint32_t i = 0; i < 2; ++i) {
        const auto server = [&coordinator, step, i] {
          ASSERT_TRUE(coordinator.AddServer(i, ServerPart(step, i)).ok());
        };
        const auto worker = [&, step, i] { ASSERT_TRUE(coordinator.AddWorker(i, WorkerPart(step, i, options)).ok()); };
        for (uint64_t times = 1 + random.Below(2); times > 0; --times) {  // some come twice
          roles[i].push_back(server);
          roles[2 + i].push_back(worker);
        }
      }
    }
    std::vector<uint64_t> taken;
    std::vector<size_t> sent(roles.size(), 0);
    while (true) {
      std::vector<size_t> left;
      for (size_t role = 0; role < roles.size(); ++role) {
        if (sent[role] < roles[role].size()) left.push_back(role);
      }
      if (left.empty()) break;
      const size_t role = left[random.Below(left.size())];
      roles[role][sent[role]++]();
      while (const auto cut = coordinator.TakeWhole()) taken.push_back(cut->manifest.step());
    }
    EXPECT_EQ(taken, steps) << "seed " << seed;
    EXPECT_EQ(coordinator.in_flight(), 0u) << "seed " << seed;
  }
}

TEST(SnapshotCoordinator, IgnoresPartsOfStepsThatAreDone) {
  auto options = SmallOptions();
  options.after_step = 8;
  SnapshotCoordinator coordinator(options);
  for (uint32_t i = 0; i < 2; ++i) {
    ASSERT_TRUE(coordinator.AddServer(i, ServerPart(8, i)).ok());
    EXPECT_EQ(coordinator.AddWorker(i, WorkerPart(8, i, options)).value(), false);
  }
  EXPECT_FALSE(coordinator.TakeWhole().has_value());
  EXPECT_EQ(coordinator.in_flight(), 0u);
}

TEST(SnapshotCoordinator, RefusesPartsThatContradictEachOther) {
  const auto options = SmallOptions();
  SnapshotCoordinator coordinator(options);
  WorkerAtCut foreign_lane = WorkerPart(8, 1, options);
  foreign_lane.mutable_lane(0)->mutable_cursor()->set_lane(0);
  EXPECT_TRUE(absl::IsInternal(coordinator.AddWorker(1, foreign_lane).status()));
  WorkerAtCut lane_missing = WorkerPart(8, 0, options);
  lane_missing.mutable_lane()->RemoveLast();
  EXPECT_TRUE(absl::IsInternal(coordinator.AddWorker(0, lane_missing).status()));
  WorkerAtCut unsound = WorkerPart(8, 1, options);
  unsound.mutable_lane(0)->mutable_ledger()->set_filtered(1);
  EXPECT_TRUE(absl::IsInternal(coordinator.AddWorker(1, unsound).status()));
  WorkerAtCut without_hash = WorkerPart(8, 0, options);
  without_hash.clear_dense_hash();
  EXPECT_TRUE(absl::IsInternal(coordinator.AddWorker(0, without_hash).status()));
  ASSERT_TRUE(coordinator.AddWorker(0, WorkerPart(8, 0, options)).ok());
  WorkerAtCut stopping = WorkerPart(8, 1, options);
  stopping.set_stopping(true);
  EXPECT_TRUE(absl::IsInternal(coordinator.AddWorker(1, stopping).status()));
}

TEST(SnapshotCoordinator, KeepsTrainingMetricsAsTheyWereAtTheCut) {
  auto options = SmallOptions();
  options.task_metrics = {Metric(100, 1000)};  // of earlier attempts
  SnapshotCoordinator coordinator(options);
  ASSERT_TRUE(coordinator.AddMetrics(0, {Metric(1, 10)}).ok());
  ASSERT_TRUE(coordinator.AddMetrics(1, {Metric(2, 20)}).ok());
  WorkerAtCut first = WorkerPart(8, 0, options);
  *first.mutable_progress()->add_task() = Metric(3, 30);
  ASSERT_TRUE(coordinator.AddWorker(0, first).ok());
  ASSERT_TRUE(coordinator.AddWorker(0, first).ok());              // comes twice, counts once
  ASSERT_TRUE(coordinator.AddMetrics(0, {Metric(50, 50)}).ok());  // after the cut
  ASSERT_TRUE(coordinator.AddWorker(1, WorkerPart(8, 1, options)).ok());
  for (uint32_t i = 0; i < 2; ++i) ASSERT_TRUE(coordinator.AddServer(i, ServerPart(8, i)).ok());
  const auto cut = coordinator.TakeWhole();
  ASSERT_TRUE(cut.has_value());
  ASSERT_EQ(cut->manifest.task_metric_size(), 1);
  EXPECT_EQ(cut->manifest.task_metric(0).positives(0), 106u);
  EXPECT_EQ(cut->manifest.task_metric(0).negatives(0), 1060u);
  EXPECT_EQ(cut->manifest.task_metric(0).labelled(), 1166u);
  EXPECT_TRUE(absl::IsInternal(coordinator.AddMetrics(0, {Metric(1, 1), Metric(1, 1)})));
}

}  // namespace
}  // namespace hearth
