// The promise of docs/ARCHITECTURE.md, bit for bit: the real system, on any number of servers and workers and at any
// staleness, ends with the model of one loop over a std::map.
#include <gtest/gtest.h>
#include <unistd.h>

#include <map>
#include <set>
#include <string>
#include <tuple>

#include "common/base/file.h"
#include "common/job/config.h"
#include "scripts/hearth/generate.h"
#include "tests/golden/golden_trainer.h"
#include "tests/golden/in_process_run.h"

namespace hearth {
namespace {

constexpr uint32_t kLanes = 4;

std::string Folder(const std::string& name) {
  const std::string folder = JoinPath(testing::TempDir(), "hearth_golden_" + std::to_string(getpid()) + "_" + name);
  EXPECT_TRUE(RemoveTree(folder).ok());
  EXPECT_TRUE(MakeDirectories(folder).ok());
  return folder;
}

// A small generated log, and a job on it that meets every rule: admission above one, expiry, rows that do not fit, two
// tables of different widths and optimizers, a shuffled log, lanes of unequal length, two epochs.
const Job& SmallJob() {
  static const Job* const job = [] {
    const std::string folder = Folder("log");
    GeneratorSpec spec;
    spec.set_records(1500);
    spec.set_test_records(300);
    spec.set_part_records(700);
    spec.mutable_user()->set_count(400);
    spec.mutable_video()->set_count(300);
    spec.mutable_author()->set_count(50);
    spec.mutable_tag()->set_count(20);
    for (const char* name : {"click", "long_view", "like"}) {
      GeneratorTask* task = spec.add_task();
      task->set_name(name);
      task->set_category(std::string(name) == "like" ? "inter" : "watch");
      task->set_positive_rate(0.3);
    }
    std::string report;
    const absl::Status status = GenerateLog(spec, folder, &report);
    EXPECT_TRUE(status.ok()) << status;
    auto loaded = LoadJob(JoinPath(folder, "job.txtpb"), {});
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    Job* made = new Job(*loaded);
    Training* training = made->mutable_training();
    training->set_lanes(kLanes);
    training->set_batch_size(90);  // lanes of 23, 23, 22, 22 records
    training->set_epochs(2);
    training->set_shards(8);
    training->clear_clip_norm();
    made->mutable_snapshot()->set_every_steps(7);
    made->mutable_snapshot()->set_verify_hash(true);
    Log* log = made->mutable_log(0);
    log->set_piece_bytes(4000);
    log->mutable_shuffle()->set_pieces(true);
    log->mutable_shuffle()->set_window_records_max(150);
    Model* model = made->mutable_model();
    for (auto set : {&Model::set_hidden_1, &Model::set_hidden_2, &Model::set_width_1, &Model::set_width_2})
      (model->*set)(8);
    model->set_gate_rank_1(4);
    model->set_gate_rank_2(4);
    model->set_tower_hidden(8);
    for (int i = 0; i < made->table_size(); ++i) {
      Table* table = made->mutable_table(i);
      table->set_dim(i % 2 == 0 ? 4 : 8);
      table->set_memory_rows_max(60);
      table->mutable_optimizer()->set_kind(i % 2 == 0 ? Optimizer::ADAM : Optimizer::ROWWISE_ADAGRAD);
      table->mutable_admission()->set_count_min(2);
      if (i % 2 == 1) table->mutable_admission()->set_counter(Admission::BLOOM);
      table->mutable_admission()->set_bloom_counters(100);  // few: signs do collide
      table->set_expire_after_steps(11);
    }
    const auto faults = FaultsOf(*made);
    EXPECT_TRUE(faults.empty()) << faults.front();
    return made;
  }();
  return *job;
}

Job WithStaleness(uint32_t staleness) {
  Job job = SmallJob();
  job.mutable_training()->set_staleness(staleness);
  return job;
}

const GoldenResult& Golden(uint32_t staleness) {
  static std::map<uint32_t, GoldenResult> results;
  if (!results.count(staleness)) {
    const auto result = TrainGolden(WithStaleness(staleness), Folder("golden"));
    EXPECT_TRUE(result.ok()) << result.status();
    results[staleness] = result.value();
  }
  return results[staleness];
}

// The MANIFEST at the end of a run of the real system, which has to end well.
Manifest EndOf(const Job& job, const std::string& name, int servers, int workers) {
  InProcessRun run;
  run.job = job;
  run.dir = Folder(name);
  run.servers = servers;
  run.workers = workers;
  int exit_code = -1;
  const auto manifest = RunInProcess(run, &exit_code);
  EXPECT_TRUE(manifest.ok()) << manifest.status();
  EXPECT_EQ(exit_code, 0);
  return manifest.ok() ? *manifest : Manifest();
}

// (staleness, servers, workers)
class GoldenRun : public testing::TestWithParam<std::tuple<uint32_t, int, int>> {};

TEST_P(GoldenRun, EqualsTheRealSystemBitForBit) {
  const auto [staleness, servers, workers] = GetParam();
  const GoldenResult& golden = Golden(staleness);
  const Manifest manifest = EndOf(WithStaleness(staleness), "run", servers, workers);
  EXPECT_EQ(manifest.step(), golden.steps);
  EXPECT_EQ(manifest.dense_hash(), golden.dense_hash);
  EXPECT_EQ(manifest.rows_hash(), golden.rows_hash);
  EXPECT_EQ(manifest.model_hash(), golden.model_hash);
  uint64_t trained = 0, read = 0;
  for (const LaneState& lane : manifest.lane()) {
    trained += lane.ledger().trained();
    read += lane.ledger().read();
  }
  EXPECT_EQ(trained, golden.trained);
  EXPECT_EQ(read, golden.read);
  EXPECT_EQ(read, 2 * 1500u);
}

INSTANTIATE_TEST_SUITE_P(AnyShape, GoldenRun,
                         testing::Values(std::make_tuple(0, 1, 1), std::make_tuple(0, 3, 2), std::make_tuple(0, 2, 4),
                                         std::make_tuple(1, 1, 1), std::make_tuple(1, 2, 2), std::make_tuple(1, 3, 3),
                                         std::make_tuple(3, 1, 4), std::make_tuple(3, 2, 1), std::make_tuple(3, 3, 2)));

TEST(GoldenRun, TwoRowsInMemoryAndACutAtEveryStepGiveTheSameModel) {
  Job job = WithStaleness(0);
  job.mutable_snapshot()->set_every_steps(1);  // at staleness 0 a cut changes no view
  for (Table& table : *job.mutable_table()) table.set_memory_rows_max(2);
  const Manifest manifest = EndOf(job, "two_rows", 2, 2);
  EXPECT_EQ(manifest.step(), Golden(0).steps);
  EXPECT_EQ(manifest.model_hash(), Golden(0).model_hash);
}

TEST(GoldenRun, ValuesOfSixteenBitsOnTheWireGiveOneModelOnAnyNumberOfProcesses) {
  Job job = WithStaleness(1);
  job.mutable_training()->set_wire(Wire::FLOAT16);
  const GoldenResult golden = *TrainGolden(job, Folder("golden"));
  EXPECT_NE(golden.model_hash, Golden(1).model_hash);
  for (const auto& [servers, workers] : {std::make_pair(1, 2), std::make_pair(3, 4)}) {
    EXPECT_EQ(EndOf(job, absl::StrCat("wire_", servers), servers, workers).model_hash(), golden.model_hash);
  }
}

TEST(GoldenRun, RowsOfSixteenBitsGiveOneModelOnAnyNumberOfProcessesInMemoryAndInTheStore) {
  std::set<uint64_t> models = {Golden(1).model_hash};
  for (const Table::Weights weights : {Table::FLOAT16, Table::BFLOAT16}) {
    Job job = WithStaleness(1);
    for (Table& table : *job.mutable_table()) table.set_weights(weights);
    const GoldenResult golden = *TrainGolden(job, Folder("golden"));
    EXPECT_TRUE(models.insert(golden.model_hash).second);
    const std::string name = absl::StrCat("weights_", Table::Weights_Name(weights));
    EXPECT_EQ(EndOf(job, name + "_1", 1, 2).model_hash(), golden.model_hash);
    for (Table& table : *job.mutable_table()) table.set_memory_rows_max(2);
    EXPECT_EQ(EndOf(job, name + "_3", 3, 1).model_hash(), golden.model_hash);
  }
}

TEST(GoldenRun, StalenessIsPartOfTheModel) {
  EXPECT_NE(Golden(0).model_hash, Golden(1).model_hash);
  EXPECT_NE(Golden(1).model_hash, Golden(3).model_hash);
}

uint64_t HashOfAResumedRun(const Job& job, const std::string& dir) {
  // Step 7's cut is planned; the runs below end at it or at a cut asked for, and go on from there on other numbers.
  InProcessRun run;
  run.job = job;
  run.dir = dir;
  run.servers = 2;
  run.workers = 4;
  run.stop_after_polls = 20;
  int exit_code = -1;
  auto manifest = RunInProcess(run, &exit_code);
  EXPECT_EQ(exit_code, 75) << "it was asked to stop early, and nothing would be resumed";
  for (int attempt = 0; exit_code == 75 && attempt < 50; ++attempt) {
    run.servers = 1 + attempt % 3;
    run.workers = 1 + (attempt + 2) % 4;
    run.stop_after_polls = attempt < 3 ? 40 : 0;
    manifest = RunInProcess(run, &exit_code);
  }
  EXPECT_EQ(exit_code, 0);
  EXPECT_TRUE(manifest.ok()) << manifest.status();
  return manifest.ok() ? manifest->model_hash() : 0;
}

TEST(GoldenRun, SavedAndResumedOnOtherNumbersEqualsTheRunThatNeverStopped) {
  EXPECT_EQ(HashOfAResumedRun(WithStaleness(0), Folder("resumed")), Golden(0).model_hash);
}

// The same with every table's rows expiring by the log's time, not by steps.
Job ByTime(uint32_t staleness) {
  Job job = WithStaleness(staleness);
  job.mutable_log(0)->set_time_ms("time_ms");
  for (Table& table : *job.mutable_table()) {
    table.clear_expire_after_steps();
    table.set_expire_after_hours(1 + table.dim() / 8);
  }
  EXPECT_TRUE(FaultsOf(job).empty());
  return job;
}

TEST(GoldenRun, RowsThatExpireByTheLogsTimeGiveOneModelOnAnyNumberOfProcesses) {
  for (const uint32_t staleness : {0u, 2u}) {
    const auto golden = TrainGolden(ByTime(staleness), Folder("golden"));
    ASSERT_TRUE(golden.ok()) << golden.status();
    for (const auto& [servers, workers] : {std::make_pair(1, 1), std::make_pair(3, 2), std::make_pair(2, 4)}) {
      const Manifest manifest =
          EndOf(ByTime(staleness), absl::StrCat("by_time_", staleness, servers), servers, workers);
      EXPECT_EQ(manifest.model_hash(), golden->model_hash) << staleness << " " << servers;
      for (const TableStats& table : manifest.table()) {
        EXPECT_GT(table.clock().horizon(), 0u) << table.name() << ": nothing expired, and the test shows nothing";
      }
    }
    // At staleness above 0 a stop that is asked for is a cut more, and changes views.
    if (staleness == 0) {
      EXPECT_EQ(HashOfAResumedRun(ByTime(0), Folder("resumed")), golden->model_hash);
    }
  }
}

// Rates of both halves, decay and the mean of the weights hang on the step alone, wherever a run was cut. Tables have
// optimizers here that the other jobs do not have.
TEST(GoldenRun, SchedulesDecayGroupsAndMeansAreTheSameInAResumedRun) {
  Job job = WithStaleness(0);
  const Job optimizers =
      ParseJob(
          "table { optimizer { kind: FTRL l1: 0.001 schedule { kind: INVERSE_SQRT warmup_steps: 5 } } } "
          "table { optimizer { kind: MOMENTUM learning_rate: 0.5 clip_norm: 0.01 weight_decay: 0.01 } } "
          "training { dense_optimizer { kind: ADAMW weight_decay: 0.1 ema_decay: 0.9 "
          "schedule { kind: COSINE warmup_steps: 8 decay_steps: 40 end_fraction: 0.1 } "
          "group { match: TOWERS learning_rate_factor: 2 } } }",
          "test")
          .value();
  *job.mutable_training()->mutable_dense_optimizer() = optimizers.training().dense_optimizer();
  for (int i = 0; i < job.table_size(); ++i) {
    *job.mutable_table(i)->mutable_optimizer() = optimizers.table(i % 2).optimizer();
  }
  ASSERT_TRUE(FaultsOf(job).empty());
  const auto golden = TrainGolden(job, Folder("golden"));
  ASSERT_TRUE(golden.ok()) << golden.status();
  EXPECT_NE(golden->dense_hash, Golden(0).dense_hash);
  EXPECT_NE(golden->rows_hash, Golden(0).rows_hash);
  EXPECT_EQ(HashOfAResumedRun(job, Folder("resumed")), golden->model_hash);
}

}  // namespace
}  // namespace hearth
