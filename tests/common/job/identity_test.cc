#include "common/job/identity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/job/config.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kSmallJob[] = R"(
  log { name: "days" path: "days.csv" }
  task { name: "click" category: "watch" label: "is_click" }
  slot { name: "user" table: "ids" }
  dense { name: "age" }
  table { name: "ids" dim: 8 }
  side_table { name: "users" path: "users.csv" key: "user" }
  training { lanes: 2 }
)";

Job SmallJob() { return ParseJob(kSmallJob, "small").value(); }

// A snapshot of two lanes inside an epoch.
Manifest Inside() {
  Manifest snapshot;
  snapshot.set_step(40);
  for (uint32_t lane = 0; lane < 2; ++lane) snapshot.add_lane()->mutable_cursor()->set_lane(lane);
  return snapshot;
}

Manifest AtTheEnd() {
  Manifest snapshot = Inside();
  for (LaneState& lane : *snapshot.mutable_lane()) {
    lane.mutable_cursor()->set_end_of_epoch(true);
    lane.set_epoch_ends_at(40);
  }
  return snapshot;
}

Job With(const std::string& text) {
  Job job = SmallJob();
  const Job part = ParseJob(text, "part").value();
  // Elements of lists are merged, not appended.
  const auto first = [](const auto& from, auto* to) {
    if (from.empty()) return;
    if (to->empty()) {
      *to = from;
    } else {
      to->at(0).MergeFrom(from.at(0));
      for (int i = 1; i < from.size(); ++i) *to->Add() = from.at(i);
    }
  };
  Job rest = part;
  rest.clear_log();
  rest.clear_task();
  rest.clear_slot();
  rest.clear_dense();
  rest.clear_table();
  rest.clear_side_table();
  job.MergeFrom(rest);
  first(part.log(), job.mutable_log());
  first(part.task(), job.mutable_task());
  first(part.slot(), job.mutable_slot());
  first(part.dense(), job.mutable_dense());
  first(part.table(), job.mutable_table());
  first(part.side_table(), job.mutable_side_table());
  return job;
}

// The table of docs/OPERATIONS.md, "Changing a job", as far as one field each.
TEST(ChangesOf, EveryKindOfChangeIsCarriedFreeJudgedByTheListOfFilesOrRefused) {
  struct Case {
    const char* change;
    JobChange::Kind inside, at_end;
    const char* field;
  };
  constexpr JobChange::Kind kFree = JobChange::kFree, kCarried = JobChange::kCarried, kRefused = JobChange::kRefused;
  const Case cases[] = {
      {"training { dense_optimizer { learning_rate: 0.5 } }", kCarried, kCarried, "training.dense_optimizer.learning"},
      {"training { dense_optimizer { beta2: 0.99 } }", kCarried, kCarried, "training.dense_optimizer.beta2"},
      {"training { dense_optimizer { kind: SGD } }", kRefused, kRefused, "training.dense_optimizer.kind: ADAM -> SGD"},
      {"training { dense_optimizer { kind: ADAMW } }", kCarried, kCarried, "optimizer.kind: ADAM -> ADAMW"},
      {"training { dense_optimizer { weight_decay: 0.1 } }", kCarried, kCarried, "weight_decay: 0 -> 0.1"},
      {"training { dense_optimizer { schedule { warmup_steps: 5 } } }", kCarried, kCarried, "schedule.warmup_steps"},
      {"training { dense_optimizer { group { match: GATES } } }", kCarried, kCarried, "dense_optimizer.group[0]."},
      {"training { dense_optimizer { ema_decay: 0.9 } }", kCarried, kCarried, "dense_optimizer.ema_decay: 0 -> 0.9"},
      {"training { dense_optimizer { ema_serves: true } }", kFree, kFree, "dense_optimizer.ema_serves"},
      {"table { optimizer { schedule { kind: COSINE } } }", kCarried, kCarried, "table[0].optimizer.schedule.kind"},
      {"training { clip_norm: 1 }", kCarried, kCarried, "training.clip_norm: 0 -> 1"},
      {"training { staleness: 2 }", kCarried, kCarried, "training.staleness: 0 -> 2"},
      {"training { batch_size: 64 }", kRefused, kCarried, "training.batch_size: 1024 -> 64"},
      {"training { threads: 2 }", kCarried, kCarried, "training.threads: 1 -> 2"},
      {"training { precision: BF16 }", kCarried, kCarried, "training.precision"},
      {"training { wire: FLOAT16 }", kCarried, kCarried, "training.wire"},
      {"training { lanes: 4 }", kRefused, kCarried, "training.lanes: 2 -> 4"},
      {"training { shards: 4 }", kRefused, kRefused, "training.shards"},
      {"training { epochs: 4 }", kFree, kFree, "training.epochs: 1 -> 4"},
      {"training { idle_ms: 4 }", kFree, kFree, "training.idle_ms"},
      {"table { optimizer { learning_rate: 0.5 } }", kCarried, kCarried, "table[0].optimizer.learning_rate: 0.05 ->"},
      {"table { optimizer { accumulator_decay: 0.9 } }", kCarried, kCarried, "optimizer.accumulator_decay: 1 -> 0.9"},
      {"table { optimizer { weight_decay: 0.1 } }", kCarried, kCarried, "table[0].optimizer.weight_decay: 0 -> 0.1"},
      {"table { optimizer { clip_norm: 2 } }", kCarried, kCarried, "table[0].optimizer.clip_norm: 0 -> 2"},
      {"table { optimizer { momentum: 0.5 } }", kCarried, kCarried, "table[0].optimizer.momentum: 0.9 -> 0.5"},
      {"table { optimizer { l1: 0.5 } }", kCarried, kCarried, "table[0].optimizer.l1: 0 -> 0.5"},
      {"table { optimizer { kind: SGD } }", kRefused, kRefused, "table[0].optimizer.kind: ADAGRAD -> SGD"},
      {"table { optimizer { kind: FTRL } }", kRefused, kRefused, "table[0].optimizer.kind: ADAGRAD -> FTRL"},
      {"table { expire_after_steps: 9 }", kCarried, kCarried, "table[0].expire_after_steps: 0 -> 9"},
      {"table { expire_after_hours: 9 }", kCarried, kCarried, "table[0].expire_after_hours: 0 -> 9"},
      {"log { time_ms: 'ts' }", kRefused, kCarried, "log[0].time_ms"},
      {"table { init_uniform: 0.5 }", kCarried, kCarried, "table[0].init_uniform"},
      {"table { memory_rows_max: 9 }", kFree, kFree, "table[0].memory_rows_max"},
      {"table { dim: 16 }", kRefused, kRefused, "table[0].dim: 8 -> 16"},
      {"table { admission { count_min: 3 } }", kRefused, kRefused, "table[0].admission.count_min"},
      {"task { weight: 2 }", kCarried, kCarried, "task[0].weight: 1 -> 2"},
      {"task { label: 'x' }", kRefused, kRefused, "task[0].label"},
      {"slot { pooling: MEAN }", kRefused, kRefused, "slot[0].pooling"},
      {"slot { salt: 'person' }", kRefused, kRefused, "slot[0].salt: (absent) -> \"person\""},
      {"slot { was: 'person' }", kFree, kFree, "slot[0].was"},
      {"dense { was: 'years' }", kFree, kFree, "dense[0].was"},
      {"task { was: 'hit' }", kFree, kFree, "task[0].was"},
      {"table { was: 'rows' }", kFree, kFree, "table[0].was"},
      {"dense { mean: 2 }", kRefused, kRefused, "dense[0].mean"},
      {"model { hidden_1: 2 }", kRefused, kRefused, "model.hidden_1: 64 -> 2"},
      {"model { batch_norm_momentum: 0.1 }", kCarried, kCarried, "model.batch_norm_momentum: 0 -> 0.1"},
      {"log { where: 'x' }", kRefused, kRefused, "log[0].where"},
      {"log { batch_size: 7 }", kRefused, kCarried, "log[0].batch_size"},
      {"log { path: 'tomorrow.csv' }", JobChange::kFiles, JobChange::kFiles, "log[0].path[1]: (absent) -> \"tomorrow"},
      {"side_table { key: 'k' }", kRefused, kRefused, "side_table[0].key"},
      {"seed: 9", kRefused, kRefused, "seed: 1 -> 9"},
      {"name: 'other'", kFree, kFree, "name"},
      {"snapshot { every_steps: 7 }", kFree, kFree, "snapshot.every_steps: 1000 -> 7"},
      {"limits { bad_records_min: 7 }", kFree, kFree, "limits.bad_records_min"},
      {"limits { record_bytes_max: 200 }", kRefused, kRefused, "limits.record_bytes_max: 1048576 -> 200"},
      {"export { delta_every_steps: 7 }", kFree, kFree, "export.delta_every_steps"},
      {"split { name: 'test' }", kFree, kFree, "split[0]."},
  };
  for (const Case& c : cases) {
    const Job now = With(c.change);
    for (const bool at_end : {false, true}) {
      const std::vector<JobChange> changes = ChangesOf(SmallJob(), now, at_end ? AtTheEnd() : Inside());
      ASSERT_FALSE(changes.empty()) << c.change;
      for (const JobChange& change : changes) {
        EXPECT_EQ(change.kind, at_end ? c.at_end : c.inside) << c.change << ": " << change.ToString();
        EXPECT_THAT(change.ToString(), HasSubstr(c.field)) << c.change;
        EXPECT_EQ(change.why.empty(), change.kind != JobChange::kRefused) << change.ToString();
      }
    }
  }
}

TEST(ChangesOf, CutsDecideViewsWhereThereAreSeveral) {
  const Job before = With("training { staleness: 1 }");
  Job now = before;
  now.mutable_snapshot()->set_every_steps(7);
  now.mutable_training()->set_steps_max(70);
  for (const JobChange& change : ChangesOf(before, now, Inside())) {
    EXPECT_EQ(change.kind, JobChange::kCarried) << change.ToString();
  }
}

TEST(ChangesOf, StalenessStaysWhileAnEpochIsAboutToEnd) {
  Manifest snapshot = AtTheEnd();
  for (LaneState& lane : *snapshot.mutable_lane()) lane.set_epoch_ends_at(42);
  const Job before = With("training { staleness: 2 }");
  const std::vector<JobChange> changes = ChangesOf(before, SmallJob(), snapshot);
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_EQ(changes[0].kind, JobChange::kRefused);
  EXPECT_THAT(changes[0].why, HasSubstr("about to end"));
}

TEST(ChangesOf, WhatAVersionBeforeDidNotKnowHasItsDefault) {
  Job written = WithDefaults(SmallJob());
  written.mutable_model()->clear_batch_norm_window_records();
  written.mutable_table(0)->mutable_optimizer()->clear_schedule();
  written.mutable_table(0)->mutable_optimizer()->clear_momentum();
  written.mutable_table(0)->mutable_optimizer()->clear_accumulator_decay();
  written.mutable_training()->mutable_dense_optimizer()->clear_schedule();
  written.mutable_training()->mutable_dense_optimizer()->clear_ema_decay();
  EXPECT_THAT(ChangesOf(written, SmallJob(), Inside()), IsEmpty());
}

TEST(ChangesOf, AdamAndAdamWMayTakeOneAnothersPlaceAndSgdNeithers) {
  const auto with = [](DenseOptimizer::Kind kind) {
    Job job = SmallJob();
    job.mutable_training()->mutable_dense_optimizer()->set_kind(kind);
    return job;
  };
  for (const auto from : {DenseOptimizer::ADAM, DenseOptimizer::ADAMW, DenseOptimizer::SGD}) {
    for (const auto to : {DenseOptimizer::ADAM, DenseOptimizer::ADAMW, DenseOptimizer::SGD}) {
      const std::vector<JobChange> changes = ChangesOf(with(from), with(to), Inside());
      ASSERT_EQ(changes.size(), from == to ? 0u : 1u);
      if (from == to) continue;
      const bool sgd = from == DenseOptimizer::SGD || to == DenseOptimizer::SGD;
      EXPECT_EQ(changes[0].kind, sgd ? JobChange::kRefused : JobChange::kCarried) << changes[0].ToString();
    }
  }
}

TEST(ChangesOf, ASaltThatIsTheSlotsNameIsNoChange) {
  EXPECT_THAT(ChangesOf(SmallJob(), With("slot { salt: 'user' }"), Inside()), IsEmpty());
}

TEST(ChangesOf, ARunThatBeginsWithAModelTakenOverHasReadNothingYet) {
  Manifest adopted = Inside();
  adopted.mutable_adoption()->set_first_step(40);
  const std::vector<JobChange> changes = ChangesOf(SmallJob(), With("training { batch_size: 64 }"), adopted);
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_EQ(changes[0].kind, JobChange::kCarried);
  adopted.set_step(41);
  EXPECT_EQ(ChangesOf(SmallJob(), With("training { batch_size: 64 }"), adopted)[0].kind, JobChange::kRefused);
}

TEST(JobHash, CoversWhatDecidesTheModelAndNothingElse) {
  const Job job = SmallJob();
  Job other = job;
  other.mutable_snapshot()->set_every_steps(7);
  other.mutable_training()->set_epochs(9);
  other.mutable_training()->set_device(Training::CPU);
  other.set_data_dir("/moved");
  other.mutable_export_()->set_delta_every_steps(5);
  other.mutable_training()->mutable_dense_optimizer()->set_ema_serves(true);
  other.mutable_slot(0)->set_salt("user");
  other.mutable_slot(0)->set_was("person");
  EXPECT_EQ(JobHash(other), JobHash(job));
  EXPECT_EQ(JobHash(ParseJob(PrintJob(job), "printed").value()), JobHash(job));
  other.mutable_training()->set_batch_size(99);
  EXPECT_NE(JobHash(other), JobHash(job));
}

TEST(ModelDifferences, LeavesOutHowFilesAreReadAndHowATrainingWouldGoOn) {
  const Job job = SmallJob();
  Job other = job;
  other.mutable_log(0)->set_delimiter("\t");
  other.mutable_log(0)->set_where("x > 1");
  other.mutable_task(0)->set_label("other");
  other.mutable_task(0)->set_mask("other > 0");
  other.add_side_table()->set_name("s");
  other.mutable_training()->set_batch_size(7);
  other.mutable_task(0)->set_weight(3);
  other.mutable_table(0)->mutable_optimizer()->set_learning_rate(1);
  other.mutable_table(0)->mutable_optimizer()->mutable_schedule()->set_kind(Schedule::INVERSE_SQRT);
  DenseOptimizer* dense = other.mutable_training()->mutable_dense_optimizer();
  dense->set_kind(DenseOptimizer::ADAMW);
  dense->mutable_schedule()->set_warmup_steps(7);
  dense->add_group()->set_match(DenseOptimizer::Group::GATES);
  dense->set_ema_decay(0.9);
  other.mutable_model()->set_batch_norm_momentum(0.1);
  other.mutable_model()->set_batch_norm_window_records(7);
  EXPECT_THAT(ModelDifferences(job, other), IsEmpty());
  other.mutable_table(0)->set_dim(job.table(0).dim() + 1);
  other.mutable_task(0)->set_name("renamed");
  other.mutable_slot(0)->set_hash(Slot::HASHED);
  EXPECT_THAT(
      ModelDifferences(job, other),
      testing::UnorderedElementsAre(HasSubstr("table[0].dim"), HasSubstr("task[0].name"), HasSubstr("slot[0].hash")));
}

}  // namespace
}  // namespace hearth
