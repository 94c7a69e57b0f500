#include "common/job/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

constexpr char kSmallJob[] = R"(
  log { name: "days" path: "days.csv" }
  task { name: "click" category: "watch" label: "is_click" }
  slot { name: "user" table: "ids" }
  table { name: "ids" dim: 8 }
)";

Job SmallJob() { return ParseJob(kSmallJob, "small").value(); }

std::string WriteJob(const std::string& name, const std::string& text) {
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("hearth_config_test-", getpid()));
  EXPECT_TRUE(MakeDirectories(folder).ok());
  const std::string path = JoinPath(folder, name);
  EXPECT_TRUE(WriteFileAtomically(path, text).ok());
  return path;
}

TEST(ParseJob, NamesLineAndColumnOfAnUnknownField) {
  const auto job = ParseJob("seed: 3\nlog {\n  nome: \"x\"\n}\n", "bad.txtpb");
  ASSERT_FALSE(job.ok());
  EXPECT_EQ(ExitCodeOf(job.status()), kExitConfig);
  EXPECT_THAT(std::string(job.status().message()), AllOf(HasSubstr("bad.txtpb:3:"), HasSubstr("nome")));
}

TEST(LoadJob, AMissingFileIsNoInput) {
  EXPECT_EQ(ExitCodeOf(LoadJob("/nowhere/job.txtpb", {}).status()), kExitNoInput);
}

TEST(LoadJob, ARelativeDataDirIsRelativeToTheJobFile) {
  const std::string path = WriteJob("dir.txtpb", std::string("data_dir: \"logs\"") + kSmallJob);
  const auto job = LoadJob(path, {});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(std::filesystem::path(ResolvePath(*job, "days.csv")),
            std::filesystem::path(path).parent_path().lexically_normal() / "logs" / "days.csv");
  EXPECT_EQ(ResolvePath(*job, "/elsewhere/days.csv"), "/elsewhere/days.csv");
}

TEST(LoadJob, OverridesReachNestedNamedAndRepeatedFields) {
  const std::string path = WriteJob("set.txtpb", kSmallJob);
  const auto job = LoadJob(path, {"training.staleness=2", "table[ids].dim=4", "table[0].optimizer.kind=ADAM",
                                  "model.kind=MMOE", "log[0].path=a.csv,b.csv", "name=x=y", "data_dir=/d"});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->training().staleness(), 2u);
  EXPECT_EQ(job->table(0).dim(), 4u);
  EXPECT_EQ(job->table(0).optimizer().kind(), Optimizer::ADAM);
  EXPECT_EQ(job->model().kind(), Model::MMOE);
  EXPECT_THAT(job->log(0).path(), ::testing::ElementsAre("a.csv", "b.csv"));
  EXPECT_EQ(job->name(), "x=y");
  EXPECT_EQ(job->data_dir(), "/d");
}

// Libprotobuf writes to standard error where nobody collects its errors.
TEST(LoadJob, WhatIsWrongIsSaidByUsAlone) {
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("quiet-", getpid(), ".txtpb"));
  ASSERT_TRUE(WriteFileAtomically(path, "name: 'x'").ok());
  testing::internal::CaptureStderr();
  for (const char* override : {"training.epochs=many", "training.epochs=", "model.kind=NONE", "seed=-1", "slot=3"})
    EXPECT_FALSE(LoadJob(path, {override}).ok()) << override;
  ASSERT_TRUE(WriteFileAtomically(path, "name: ").ok());
  EXPECT_FALSE(LoadJob(path, {}).ok());
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST(LoadJob, EveryBadOverrideIsNamedWithItsRemedy) {
  const std::string path = WriteJob("bad_set.txtpb", kSmallJob);
  const auto job =
      LoadJob(path, {"training.stale=2", "model.kind=BEST", "table[none].dim=4", "seed=x", "model=1", "seed"});
  ASSERT_FALSE(job.ok());
  const std::string message(job.status().message());
  EXPECT_THAT(message, AllOf(HasSubstr("stale"), HasSubstr("SHARED_BOTTOM"), HasSubstr("table[none]"),
                             HasSubstr("seed=x"), HasSubstr("is a message"), HasSubstr("path=value")));
}

TEST(ValidateJob, AcceptsASmallJob) { EXPECT_THAT(FaultsOf(SmallJob()), IsEmpty()); }

TEST(ValidateJob, ReportsAllFaultsAtOnceEachWithFieldCauseAndRemedy) {
  Job job = SmallJob();
  job.mutable_training()->set_batch_size(0);
  job.mutable_slot(0)->set_table("none");
  job.mutable_task(0)->set_base_rate(1.5);
  const auto faults = FaultsOf(job);
  EXPECT_THAT(faults, SizeIs(3));
  EXPECT_THAT(faults, Contains(AllOf(HasSubstr("training.batch_size: "), HasSubstr("; give"))));
  EXPECT_THAT(faults, Contains(AllOf(HasSubstr("slot[0] \"user\".table: "), HasSubstr("ids"))));
  EXPECT_THAT(faults, Contains(HasSubstr("base_rate")));
  EXPECT_EQ(ExitCodeOf(ValidateJob(job)), kExitConfig);
}

TEST(ValidateJob, RefusesCombinationsThatCannotKeepTheirPromise) {
  Job job = SmallJob();
  job.mutable_log(0)->clear_path();
  job.mutable_log(0)->set_directory("in");
  job.mutable_log(0)->mutable_shuffle()->set_pieces(true);
  EXPECT_THAT(FaultsOf(job), Contains(HasSubstr("keeps its order")));
  job = SmallJob();
  job.mutable_training()->set_batch_size(2);
  job.mutable_training()->set_lanes(4);
  EXPECT_THAT(FaultsOf(job), Contains(HasSubstr("training.lanes")));
}

TEST(ValidateJob, RefusesSchedulesThatHaveNoEndOrNoUse) {
  const std::pair<const char*, const char*> faulty[] = {
      {"kind: COSINE", ".schedule.decay_steps: is 0; give a value from 1"},
      {"kind: POLYNOMIAL decay_steps: 9 warmup_steps: 9", ".schedule.decay_steps: is 9 with warmup_steps 9; it counts"},
      {"kind: STEP", ".schedule.step_every: is 0; give a value from 1"},
      {"decay_steps: 9", ".schedule.decay_steps: is for kinds COSINE and POLYNOMIAL alone; set such a kind"},
      {"kind: COSINE decay_steps: 9 step_every: 2", ".schedule.step_every: is for kind STEP alone; set kind: STEP"},
      {"warmup_steps: 5000000000", ".schedule.warmup_steps: is 5e+09; give a value from 0"},
      {"warmup_steps: 5 warmup_start: 2", ".schedule.warmup_start: is 2; give a value from 0 to 1"},
      {"kind: STEP step_every: 1 gamma: nan", ".schedule.gamma: is nan; give a value from 0 to 1"},
      {"end_fraction: -1", ".schedule.end_fraction: is -1; give a value from 0 to 1"},
      {"power: 0", ".schedule.power: is 0; give a value from 0.01 to 100"},
  };
  for (const auto& [schedule, fault] : faulty) {
    const std::string optimizer = absl::StrCat("optimizer { schedule { ", schedule, " } }");
    const Job part =
        ParseJob(absl::StrCat("table { ", optimizer, " } training { dense_", optimizer, " }"), "t").value();
    Job job = SmallJob();
    *job.mutable_training() = part.training();
    *job.mutable_table(0)->mutable_optimizer() = part.table(0).optimizer();
    EXPECT_THAT(FaultsOf(job), UnorderedElementsAre(AllOf(HasSubstr("table[0]"), HasSubstr(fault)),
                                                    HasSubstr(absl::StrCat("training.dense_optimizer", fault))))
        << schedule;
  }
}

TEST(ValidateJob, RefusesOfATablesOptimizerWhatItsKindKnowsNothingOf) {
  const std::pair<const char*, const char*> faulty[] = {
      {"momentum: 0.5", "momentum: is for kind MOMENTUM alone; set kind: MOMENTUM, or leave it out"},
      {"kind: SGD nesterov: true", "nesterov: is for kind MOMENTUM alone; set kind: MOMENTUM, or leave it out"},
      {"kind: ADAM accumulator_decay: 0.9",
       "accumulator_decay: is for kinds ADAGRAD and ROWWISE_ADAGRAD alone; set such a kind, or leave it out"},
      {"l1: 1", "l1: is for kind FTRL alone; set kind: FTRL"},
      {"kind: ADAMW l2: 1", "l2: is for kind FTRL alone; set kind: FTRL"},
      {"kind: MOMENTUM beta: 1", "beta: is for kind FTRL alone; set kind: FTRL"},
      {"kind: FTRL weight_decay: 0.1", "weight_decay: is not for kind FTRL; set l2, or leave it out"},
      {"kind: MOMENTUM momentum: 1", "momentum: is 1; give a value from 0"},
      {"accumulator_decay: 1.5", "accumulator_decay: is 1.5; give a value from 0 to 1"},
      {"weight_decay: -1", "weight_decay: is -1; give a value from 0 to 1000"},
      {"clip_norm: nan", "clip_norm: is nan; give a value from 0"},
      {"kind: FTRL l1: -1", "l1: is -1; give a value from 0"},
      {"kind: FTRL l2: inf", "l2: is inf; give a value from 0"},
      {"kind: FTRL beta: -0.5", "beta: is -0.5; give a value from 0"},
  };
  const auto faults_of = [](const std::string& optimizer) {
    Job job = SmallJob();
    *job.mutable_table(0)->mutable_optimizer() =
        ParseJob(absl::StrCat("table { optimizer { ", optimizer, " } }"), "t")->table(0).optimizer();
    return FaultsOf(job);
  };
  for (const auto& [optimizer, fault] : faulty) {
    EXPECT_THAT(faults_of(optimizer),
                ElementsAre(AllOf(HasSubstr("table[0]"), HasSubstr(".optimizer."), HasSubstr(fault))))
        << optimizer;
  }
  for (const char* optimizer :
       {"kind: MOMENTUM momentum: 0.5 nesterov: true weight_decay: 0.1 clip_norm: 1", "kind: ADAMW weight_decay: 0.1",
        "kind: ROWWISE_ADAGRAD accumulator_decay: 0.99", "kind: FTRL l1: 1 l2: 1 beta: 1 clip_norm: 1",
        "kind: SGD beta1: 0.5 momentum: 0.9 accumulator_decay: 1"}) {  // a default is as good as absent
    EXPECT_THAT(faults_of(optimizer), IsEmpty()) << optimizer;
  }
}

TEST(ValidateJob, RefusesGroupsDecayAndMeansThatWouldDoNothing) {
  const std::pair<const char*, const char*> faulty[] = {
      {"group { learning_rate_factor: 2 }", "group[0].match: is absent; give one of GATES"},
      {"group { match: GATES } group { match: GATES }", "group[1].match: GATES is taken; give each"},
      {"group { match: TOWERS learning_rate_factor: -1 }", "group[0].learning_rate_factor: is -1; give a value from 0"},
      {"kind: ADAMW group { match: BATCH_NORM weight_decay: 0.1 }", "group[0].weight_decay: matrices alone decay"},
      {"group { match: TOWERS weight_decay: 0.1 }", "group[0].weight_decay: is for kind ADAMW alone; set kind: ADAMW"},
      {"weight_decay: 0.1", "training.dense_optimizer.weight_decay: is for kind ADAMW alone; set kind: ADAMW"},
      {"kind: ADAMW weight_decay: -1", "training.dense_optimizer.weight_decay: is -1; give a value from 0"},
      {"ema_decay: 1", "training.dense_optimizer.ema_decay: is 1; give a value from 0"},
      {"ema_serves: true", "training.dense_optimizer.ema_serves: there is no mean of the weights; set ema_decay"},
  };
  for (const auto& [optimizer, fault] : faulty) {
    Job job = SmallJob();
    *job.mutable_training() =
        ParseJob(absl::StrCat("training { dense_optimizer { ", optimizer, " } }"), "t")->training();
    EXPECT_THAT(FaultsOf(job), ElementsAre(HasSubstr(fault))) << optimizer;
  }
  Job job = SmallJob();
  *job.mutable_training() =
      ParseJob(
          "training { dense_optimizer { kind: ADAMW weight_decay: 0.01 ema_decay: 0.999 ema_serves: true "
          "group { match: GATES } group { match: BATCH_NORM learning_rate_factor: 0.5 } } }",
          "t")
          ->training();
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_model()->set_kind(Model::MMOE);
  const auto no_norm =
      HasSubstr("group[1].match: BATCH_NORM matches nothing: model.kind MMOE has no BatchNorm without");
  EXPECT_THAT(FaultsOf(job), ElementsAre(no_norm));
  job.mutable_model()->set_home_expert(true);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_model()->set_kind(Model::SHARED_BOTTOM);
  EXPECT_THAT(FaultsOf(job),
              ElementsAre(HasSubstr("group[0].match: GATES matches nothing: model.kind SHARED_BOTTOM has no gates")));
}

TEST(ValidateJob, PublishesAtSnapshotsAlone) {
  Job job = SmallJob();
  job.mutable_snapshot()->set_every_steps(10);
  job.mutable_export_()->set_delta_every_steps(30);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_export_()->set_delta_every_steps(15);
  job.mutable_export_()->set_format("onnx,pickle");
  job.mutable_export_()->set_deltas_max(129);
  job.mutable_export_()->set_waiting_max(0);
  EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("export.delta_every_steps"),
                                               HasSubstr("multiple of snapshot.every_steps = 10")),
                                         HasSubstr("there is no \"pickle\""), HasSubstr("export.format: has no rows"),
                                         HasSubstr("export.deltas_max"), HasSubstr("export.waiting_max")));
}

TEST(ValidateJob, EvaluatesAtSnapshotsAloneAndJudgesFiguresThatThereAre) {
  Job job = SmallJob();
  job.mutable_snapshot()->set_every_steps(10);
  Split* split = job.add_split();
  split->set_name("test");
  split->mutable_log()->add_path("test.csv");
  split->set_every_steps(20);
  job.mutable_snapshot()->mutable_best()->set_split("test");
  job.mutable_training()->set_stop_after_no_gain(3);
  job.mutable_export_()->set_delta_every_steps(40);
  Requirement* require = job.mutable_export_()->add_require();
  require->set_split("test");
  require->set_task("click");
  require->set_min(0.5);
  EXPECT_THAT(FaultsOf(job), IsEmpty());

  split->set_every_steps(15);
  job.mutable_snapshot()->mutable_best()->set_task("clack");
  job.mutable_snapshot()->mutable_best()->set_metric(Quality::GAUC);
  require->set_max(0.25);
  EXPECT_THAT(
      FaultsOf(job),
      UnorderedElementsAre(
          "split[0].every_steps: is 15; give a multiple of snapshot.every_steps = 10, or 0 for none",
          "snapshot.best.task: there is no task \"clack\"; name one of the job's tasks, or leave it out for the "
          "mean over all",
          "snapshot.best.metric: is GAUC, and split \"test\" has no user; give the split its user, or choose AUC",
          "export.require[0]: min 0.5 is above max 0.25; nothing would be published",
          "export.require[0].split: \"test\" is evaluated every 15 steps, published is every 40; give it an "
          "every_steps of which export.delta_every_steps is a multiple"));

  split->set_every_steps(20);
  split->set_user("user");
  require->clear_max();
  job.mutable_snapshot()->mutable_best()->clear_task();
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_snapshot()->mutable_best()->set_metric(Quality::CALIBRATION);
  EXPECT_THAT(FaultsOf(job), ElementsAre("snapshot.best.metric: is CALIBRATION of all tasks, whose errors would cancel "
                                         "each other; name a task, or choose LOG_LOSS"));

  job = SmallJob();
  job.mutable_training()->set_stop_after_no_gain(3);
  job.mutable_export_()->add_require()->set_split("nosuch");
  EXPECT_THAT(
      FaultsOf(job),
      UnorderedElementsAre(
          "training.stop_after_no_gain: there is no figure to gain; give snapshot.best its split, or leave it out",
          "export.require[0]: the run publishes nothing; set export.delta_every_steps, or leave it out",
          "export.require[0]: has no bound; give min, max or both",
          "export.require[0].split: there is no split \"nosuch\"; name one of the job's splits"));
}

TEST(ValidateJob, RefusesNamesThatWouldLeadToOtherFolders) {
  for (const char* name : {"../x", "/etc/passwd", "a/b", "a\\b", "a\nb", ""}) {
    Job job = SmallJob();
    job.mutable_task(0)->set_name(name);
    job.mutable_log(0)->set_name(name);
    Split* split = job.add_split();
    split->set_name(name);
    *split->mutable_log() = job.log(0);
    std::string faults;
    for (const std::string& fault : FaultsOf(job)) faults += fault + "\n";
    for (const char* field : {"task[0].name", "log[0].name", "split[0].name"}) EXPECT_THAT(faults, HasSubstr(field));
  }
}

TEST(ValidateJob, WantsADelimiterOfOneCharacterForLogsAndSideTables) {
  for (const char* delimiter : {"", "ab", "\"", "\n", "\r"}) {
    Job job = SmallJob();
    job.mutable_log(0)->set_delimiter(delimiter);
    SideTable* table = job.add_side_table();
    table->set_name("s");
    table->set_path("s.csv");
    table->set_key("k");
    table->set_delimiter(delimiter);
    EXPECT_THAT(FaultsOf(job), testing::UnorderedElementsAre(HasSubstr("log[0].delimiter: is "),
                                                             HasSubstr("side_table[0].delimiter: is ")));
  }
}

TEST(ValidateJob, JsonLinesHaveNothingThatDelimitsThem) {
  Job job = SmallJob();
  job.mutable_log(0)->set_format(Log::JSON_LINES);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_log(0)->set_delimiter(",");  // as an effective job has the defaults
  job.mutable_log(0)->set_header(true);
  job.mutable_log(0)->set_multiline_records(false);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_log(0)->set_delimiter(";");
  job.mutable_log(0)->set_header(false);
  job.mutable_log(0)->set_multiline_records(true);
  const char* const what = " is for format DELIMITED alone; leave it out";
  EXPECT_THAT(FaultsOf(job), testing::ElementsAre(HasSubstr(absl::StrCat("log[0].delimiter:", what)),
                                                  HasSubstr(absl::StrCat("log[0].header:", what)),
                                                  HasSubstr(absl::StrCat("log[0].multiline_records:", what))));
}

TEST(ValidateJob, BoundsTheLengthOfEachExpression) {
  Job job = SmallJob();
  const std::string longest(kExpressionBytesMax, '1');
  job.mutable_task(0)->set_label(longest);
  job.mutable_task(0)->set_mask(longest);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  const std::string longer = longest + "1";
  job.mutable_task(0)->set_label(longer);
  job.mutable_task(0)->set_mask(longer);
  job.mutable_log(0)->set_where(longer);
  job.mutable_slot(0)->set_value(longer);
  job.add_dense()->set_name("age");
  job.mutable_dense(0)->set_value(longer);
  EXPECT_THAT(FaultsOf(job),
              UnorderedElementsAre(HasSubstr("log[0].where: is 8193 bytes long, more than 8192; shorten"),
                                   HasSubstr("task[0] \"click\".label: is 8193"), HasSubstr(".mask: is 8193"),
                                   HasSubstr("slot[0] \"user\".value: is 8193"), HasSubstr("dense[0].value: is 8193")));
}

TEST(ValidateJob, BoundsTheMemoryOfCountingFilters) {
  Job job = SmallJob();
  Admission* admission = job.mutable_table(0)->mutable_admission();
  admission->set_counter(Admission::BLOOM);
  job.mutable_training()->set_shards(64);
  admission->set_bloom_counters(uint64_t{1} << 30);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_training()->set_shards(65);
  EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("bloom_counters"), HasSubstr("training.shards"))));
  job.mutable_table(0)->set_expire_after_steps(5);
  job.mutable_training()->set_shards(32);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_training()->set_shards(33);
  EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("bloom_counters"), HasSubstr("twice"))));
}

TEST(ValidateJob, RowsExpireByOneRuleAndByTimeOnlyWhereEveryLogHasOne) {
  Job job = SmallJob();
  Table* const table = job.mutable_table(0);
  table->set_expire_after_hours(48);
  EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("log[0].time_ms: is empty"), HasSubstr("\"ids\""))));
  job.mutable_log(0)->set_time_ms("time_ms");
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  table->set_expire_after_steps(5);
  EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("expire_after_hours"), HasSubstr("expire_after_steps"))));
  table->set_expire_after_steps(0x80000000u);
  table->clear_expire_after_hours();
  EXPECT_THAT(FaultsOf(job), ElementsAre(HasSubstr("expire_after_steps")));
  table->clear_expire_after_steps();
  table->set_expire_after_hours(876001);
  EXPECT_THAT(FaultsOf(job), ElementsAre(HasSubstr("expire_after_hours")));
  table->set_expire_after_hours(876000);
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  job.mutable_log(0)->set_time_ms(std::string(8193, '1'));
  EXPECT_THAT(FaultsOf(job), ElementsAre(HasSubstr("log[0].time_ms: is 8193")));
  job.mutable_log(0)->set_time_ms("time_ms");
  Split* const split = job.add_split();
  split->set_name("test");
  *split->mutable_log() = job.log(0);
  EXPECT_THAT(FaultsOf(job), ElementsAre(HasSubstr("split[0].log.time_ms")));
}

TEST(ValidateJob, RefusesNamesThatAreNotUtf8AndTakesThoseThatAre) {
  Job job = SmallJob();
  job.mutable_table(0)->set_name("\xe5\xad\x97\xf0\x9f\x94\xa5");
  job.mutable_slot(0)->set_table(job.table(0).name());
  EXPECT_THAT(FaultsOf(job), IsEmpty());
  // A lone continuation, a sequence cut short, an overlong '/', a surrogate, beyond U+10FFFF.
  for (const char* bad : {"\x80", "a\xc3", "\xe5\xad", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff"}) {
    job = SmallJob();
    job.mutable_slot(0)->set_column(bad);
    EXPECT_THAT(FaultsOf(job), ElementsAre(AllOf(HasSubstr("slot[0].column: "), HasSubstr("UTF-8"))));
  }
  job = SmallJob();
  for (std::string* name : {job.mutable_name(), job.mutable_task(0)->mutable_name(), job.mutable_log(0)->mutable_name(),
                            job.mutable_log(0)->add_absent_column(), job.add_split()->mutable_name()}) {
    *name = "x\xff";
  }
  job.mutable_split(0)->mutable_log()->add_path("held-out.csv");
  EXPECT_THAT(FaultsOf(job), SizeIs(5));
  job = SmallJob();
  job.mutable_log(0)->set_path(0, "caf\xe9.csv");  // a file's name is bytes
  job.mutable_slot(0)->add_missing_value("\xff");  // so is what a log holds
  EXPECT_THAT(FaultsOf(job), IsEmpty());
}

TEST(ParseJob, ReadsAFieldThatIsNoMore) {
  EXPECT_TRUE(ParseJob("limits { message_bytes_max: 1073741824 }", "older").ok());
}

TEST(PrintJob, WritesDefaultsOutAndReadsBackAsTheSameJob) {
  const Job job = SmallJob();
  const std::string text = PrintJob(job);
  EXPECT_THAT(text, AllOf(HasSubstr("staleness: 0"), HasSubstr("memory_rows_max: 1000000"), HasSubstr("kind: HOME")));
  EXPECT_EQ(text.find("lanes"), std::string::npos) << "a field whose absence means something stays absent";
  const auto again = ParseJob(text, "printed");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(PrintJob(*again), text);
}

}  // namespace
}  // namespace hearth
