#include "scheduler/run_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/scheduler/scheduler_testing.h"

namespace hearth {
namespace {

using testing::HasSubstr;
using testing::Not;

class RunReportTest : public testing::Test {
 protected:
  RunReportTest() : folder_(MakeTestFolder()) {
    options_.job.set_name("watch");
    options_.job.set_seed(7);
    options_.job.add_task()->set_name("click");
    options_.job.add_task()->set_name("like");
    options_.job.mutable_training()->set_staleness(1);
    options_.dir = folder_;
    options_.servers = 2;
    options_.workers = 2;
    options_.lanes = 4;
    options_.restarts = 3;
    // At step 10: half of the warm-up, no schedule, and gamma for the first time.
    DenseOptimizer* dense = options_.job.mutable_training()->mutable_dense_optimizer();
    dense->set_learning_rate(0.5);
    dense->mutable_schedule()->set_warmup_steps(20);
    Table* video = options_.job.add_table();
    video->set_name("video");
    video->mutable_optimizer()->set_learning_rate(0.5);
    Table* author = options_.job.add_table();
    author->set_name("author");
    author->mutable_optimizer()->set_learning_rate(0.25);
    author->mutable_optimizer()->mutable_schedule()->set_kind(Schedule::STEP);
    author->mutable_optimizer()->mutable_schedule()->set_step_every(9);
    author->mutable_optimizer()->mutable_schedule()->set_gamma(0.5);
    options_.output.table = &table_;
    options_.output.progress = &progress_;
  }

  nlohmann::ordered_json RunJson() const {
    return nlohmann::ordered_json::parse(ReadFile(JoinPath(folder_, "run.json")).value());
  }

  // A job of four lanes, `trained` records each.
  static Manifest ManifestAt(uint64_t step, uint64_t trained) {
    Manifest manifest;
    manifest.set_step(step);
    for (uint32_t lane = 0; lane < 4; ++lane) {
      Ledger* ledger = manifest.add_lane()->mutable_ledger();
      ledger->set_read(trained + 3);
      ledger->set_trained(trained);
      ledger->set_rejected(1);
      ledger->set_filtered(2);
    }
    manifest.set_model_hash(0xabc);
    manifest.set_dense_parameters(1234);
    TableStats* stats = manifest.add_table();
    stats->set_name("video");
    stats->set_rows(10);
    stats->set_rows_in_memory(4);
    stats->set_rows_spilled(6);
    stats->set_rows_expired(1);
    stats->set_memory_hits(3);
    stats->set_memory_misses(1);
    stats->set_prefetch_hits(1);
    stats->set_bytes_memory(640);
    stats->set_bytes_disk(960);
    manifest.add_table()->set_name("author");
    Evaluation* evaluation = manifest.add_evaluation();
    evaluation->set_split("test");
    Evaluation::Task* click = evaluation->add_task();
    click->set_name("click");
    click->set_samples(100);
    click->set_positives(40);
    click->set_auc(0.75);
    click->set_gauc(0.625);
    click->set_gauc_users(9);
    click->set_log_loss(0.5);
    click->set_calibration(std::numeric_limits<double>::infinity());
    Evaluation::Task* like = evaluation->add_task();  // one class alone
    like->set_name("like");
    like->set_samples(100);
    like->set_log_loss(0.25);
    return manifest;
  }

  static Progress ProgressOf(uint64_t step, uint64_t trained) {
    Progress progress;
    progress.set_step(step);
    progress.mutable_ledger()->set_read(trained);
    progress.mutable_ledger()->set_trained(trained);
    return progress;
  }

  const std::string folder_;
  RunReport::Options options_;
  std::ostringstream table_;
  std::ostringstream progress_;
};

TEST_F(RunReportTest, WritesEveryFieldOfTheSchemaInItsOrder) {
  RunReport report(options_);
  report.Start({Ledger(), Ledger()}, 1'000'000);
  Progress progress = ProgressOf(10, 500);
  progress.mutable_time()->set_wait_input(1);
  progress.mutable_time()->set_wait_pull(2);
  progress.mutable_time()->set_forward_backward(5);
  progress.mutable_time()->set_reduce(1.5);
  progress.mutable_time()->set_push(0.5);
  progress.mutable_time()->set_total(10);
  progress.set_staleness_max_seen(1);
  progress.set_peak_rss_bytes(5000);
  for (int i = 1; i <= 100; ++i) progress.add_pull_seconds(i);
  report.set_device("cuda");
  ASSERT_TRUE(report.OnProgress(1, progress, 1'500'000).ok());
  ServerAtCut server;
  server.set_peak_rss_bytes(777);
  report.OnServer(server, 1);
  report.CutReached(10, 5'000'000);
  ASSERT_TRUE(report.Committed(ManifestAt(10, 500), 0).ok());
  ASSERT_TRUE(report.Write("saved", 75, "stopped").ok());

  const nlohmann::ordered_json json = RunJson();
  std::vector<std::string> keys;
  for (const auto& item : json.items()) keys.push_back(item.key());
  EXPECT_EQ(keys, (std::vector<std::string>{"schema",
                                            "job",
                                            "status",
                                            "exit",
                                            "commit",
                                            "seed",
                                            "ranks",
                                            "lanes",
                                            "staleness",
                                            "device",
                                            "steps",
                                            "learning_rate",
                                            "seconds",
                                            "samples_per_s",
                                            "restarts",
                                            "snapshots",
                                            "model_hash",
                                            "samples",
                                            "labels",
                                            "columns",
                                            "side_tables",
                                            "warnings",
                                            "time_share",
                                            "pull_seconds",
                                            "staleness_max_seen",
                                            "tables",
                                            "peak_rss_bytes",
                                            "dense_parameters",
                                            "tasks",
                                            "best",
                                            "progressive",
                                            "diagnostics"}));
  EXPECT_EQ(json["schema"], 1);
  EXPECT_EQ(json["job"], "watch");
  EXPECT_EQ(json["status"], "saved");
  EXPECT_EQ(json["exit"].dump(), R"({"code":75,"reason":"stopped"})");
  EXPECT_EQ(json["seed"], 7);
  EXPECT_EQ(json["ranks"].dump(), R"({"ps":2,"worker":2})");
  EXPECT_EQ(json["lanes"], 4);
  EXPECT_EQ(json["staleness"], 1);
  EXPECT_EQ(json["device"], "cuda");
  EXPECT_EQ(json["steps"], 10);
  EXPECT_EQ(json["learning_rate"].dump(), R"({"dense":0.25,"tables":{"video":0.5,"author":0.125}})");
  EXPECT_EQ(json["seconds"], 4.0);
  EXPECT_EQ(json["samples_per_s"], 500.0);
  EXPECT_EQ(json["restarts"], 3);
  EXPECT_EQ(json["snapshots"], 1);
  EXPECT_EQ(json["model_hash"], "0000000000000abc");
  EXPECT_EQ(json["samples"].dump(), R"({"read":2012,"trained":2000,"rejected":4,"filtered":8})");
  EXPECT_EQ(json["time_share"].dump(),
            R"({"wait_input":0.1,"wait_pull":0.2,"forward_backward":0.5,"reduce":0.15,"push":0.05})");
  EXPECT_EQ(json["pull_seconds"].dump(), R"({"p50":51.0,"p99":100.0})");
  EXPECT_EQ(json["staleness_max_seen"], 1);
  EXPECT_EQ(
      json["tables"]["video"].dump(),
      R"({"rows":10,"rows_in_memory":4,"rows_spilled":6,"rows_expired":1,"memory_hit_ratio":0.75,"cold_hit_ratio":0.5,"bytes_memory":640,"bytes_disk":960})");
  EXPECT_TRUE(json["tables"]["author"]["memory_hit_ratio"].is_null()) << "undefined is null, never 0";
  EXPECT_EQ(json["peak_rss_bytes"]["ps"].dump(), "[0,777]");
  EXPECT_EQ(json["peak_rss_bytes"]["worker"].dump(), "[0,5000]");
  EXPECT_GT(json["peak_rss_bytes"]["scheduler"][0], 0);
  EXPECT_EQ(json["dense_parameters"], 1234);
  EXPECT_EQ(
      json["tasks"]["click"]["test"].dump(),
      R"({"samples":100,"positives":40,"auc":0.75,"gauc":0.625,"gauc_users":9,"log_loss":0.5,"calibration":null})");
  EXPECT_EQ(
      json["tasks"]["like"]["test"].dump(),
      R"({"samples":100,"positives":0,"auc":null,"gauc":null,"gauc_users":0,"log_loss":0.25,"calibration":null})");
}

TEST_F(RunReportTest, LeavesUndefinedWhatIsNotKnownYet) {
  RunReport report(options_);
  ASSERT_TRUE(report.Write("running", 0, "").ok());
  const nlohmann::ordered_json json = RunJson();
  for (const char* key : {"model_hash", "samples_per_s"}) EXPECT_TRUE(json[key].is_null()) << key;
  EXPECT_TRUE(json["time_share"]["reduce"].is_null());
  EXPECT_TRUE(json["pull_seconds"]["p99"].is_null());
  EXPECT_EQ(json["tasks"].dump(), R"({"click":{},"like":{}})");
  EXPECT_EQ(json["tables"].dump(), "{}");
}

TEST_F(RunReportTest, CountsSnapshotsOverAllAttempts) {
  RunReport first(options_);
  ASSERT_TRUE(first.Committed(ManifestAt(0, 5), 0).ok());
  ASSERT_TRUE(first.Committed(ManifestAt(10, 5), 0).ok());
  EXPECT_EQ(RunJson()["snapshots"], 2);
  RunReport second(options_);
  second.Resume(ManifestAt(10, 5));
  ASSERT_TRUE(second.Committed(ManifestAt(20, 5), 0).ok());
  EXPECT_EQ(RunJson()["snapshots"], 3);
  RunReport third(options_);
  third.Resume(ManifestAt(30, 5));  // step 30 was committed, and run.json does not know it
  ASSERT_TRUE(third.Committed(ManifestAt(40, 5), 0).ok());
  EXPECT_EQ(RunJson()["snapshots"], 5);
}

TEST_F(RunReportTest, CountsOnlyThisAttemptsTrainingAsSeconds) {
  RunReport report(options_);
  report.Resume(ManifestAt(10, 1000));
  Ledger half;
  half.set_read(2000);
  half.set_trained(2000);
  report.Start({half, half}, 0);
  report.CutReached(20, 10'000'000);
  report.SetEvaluating(true, 10'000'000);
  report.SetEvaluating(false, 90'000'000);
  report.CutReached(30, 100'000'000);
  report.SetEvaluating(true, 100'000'000);
  ASSERT_TRUE(report.Committed(ManifestAt(20, 1250), 0).ok());
  EXPECT_EQ(RunJson()["seconds"], 10.0);
  EXPECT_EQ(RunJson()["samples_per_s"], 100.0);
  ASSERT_TRUE(report.Committed(ManifestAt(30, 1500), 0).ok());
  EXPECT_EQ(RunJson()["seconds"], 20.0);
  EXPECT_EQ(RunJson()["samples_per_s"], 100.0);
}

TEST_F(RunReportTest, KeepsAUniformSampleOfAnyNumberOfPulls) {
  RunReport report(options_);
  report.Start({Ledger(), Ledger()}, 0);
  for (int round = 0; round < 500; ++round) {
    Progress progress;
    for (int i = 0; i < 256; ++i) progress.add_pull_seconds((round * 256 + i) % 1000);
    ASSERT_TRUE(report.OnProgress(0, progress, 0).ok());
  }
  ASSERT_TRUE(report.Write("running", 0, "").ok());
  EXPECT_NEAR(RunJson()["pull_seconds"]["p50"].get<double>(), 500, 50);
  EXPECT_NEAR(RunJson()["pull_seconds"]["p99"].get<double>(), 990, 8);
}

TEST_F(RunReportTest, RefusesALedgerThatDoesNotAddUp) {
  RunReport report(options_);
  Manifest manifest = ManifestAt(10, 5);
  manifest.mutable_lane(2)->mutable_ledger()->set_filtered(3);
  EXPECT_TRUE(absl::IsInternal(report.Committed(manifest, 0)));
}

TEST_F(RunReportTest, PrintsPlainLinesWhereThereIsNoTerminal) {
  options_.job.mutable_metrics()->set_progress_seconds(10);
  RunReport report(options_);
  report.Start({Ledger(), Ledger()}, 0);
  for (int second = 1; second <= 35; ++second) {
    for (uint32_t worker = 0; worker < 2; ++worker) {
      Progress progress = ProgressOf(second, second * 50);
      progress.set_log_fraction(second / 100.0);
      if (second == 15) {
        ValidationWindow* const window = progress.add_window();
        window->set_last_step(second);
        for (int task = 0; task < 2; ++task) {
          TaskMetric* const metric = window->add_task();
          metric->set_labelled(worker + 1);
          metric->set_loss_sum(0.75);
          metric->add_positives(worker);
          metric->add_negatives(1);
        }
      }
      ASSERT_TRUE(report.OnProgress(worker, progress, second * 1'000'000).ok());
    }
    ASSERT_TRUE(report.Show(second * 1'000'000).ok());
  }
  const std::string text = progress_.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << text;
  EXPECT_THAT(
      text,
      HasSubstr("step 20   20%  100 samples/s  ETA 1:20  before training: loss 0.5000  AUC click 0.5000 like 0.5000"));
  EXPECT_THAT(text.substr(0, text.find('\n')), Not(HasSubstr("loss"))) << "no window has ended yet";
  EXPECT_THAT(text, Not(HasSubstr("\r")));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
}

TEST_F(RunReportTest, TellsOnceWhatCouldNotBeUsedAndCountsItInRunJsonAndTheTable) {
  RunReport report(options_);
  report.Start({Ledger(), Ledger()}, 0);
  Progress progress = ProgressOf(1, 50);
  Reading::Column* const column = progress.mutable_reading()->add_column();
  column->set_name("age");
  column->set_unreadable(2);
  column->set_example("n/a");
  for (int i = 1; i <= 3; ++i) ASSERT_TRUE(report.OnProgress(0, progress, i * 1'000'000).ok());
  EXPECT_EQ(progress_.str().find("hearth: warning: column \"age\" holds no number in 2 records, for example \"n/a\""),
            0);
  EXPECT_EQ(progress_.str().find("warning", 20), std::string::npos) << progress_.str();

  Manifest manifest = ManifestAt(10, 500);
  manifest.set_job_finished(true);
  for (LaneState& lane : *manifest.mutable_lane()) {
    *lane.mutable_reading() = progress.reading();
    Reading::Join* const join = lane.mutable_reading()->add_join();
    join->set_side_table("user");
    join->set_unmatched(10);
    join->set_without_key(1);
    join->set_example("7.0");
    for (int task = 0; task < 2; ++task) lane.mutable_reading()->add_task()->set_negatives(500);
  }
  ASSERT_TRUE(report.Committed(manifest, 0).ok());
  report.PrintTable();
  EXPECT_THAT(table_.str(), HasSubstr("column  unreadable  example\n"
                                      "age              8  \"n/a\"\n"
                                      "side table  matched  unmatched  without key  example\n"
                                      "user              0         40            4  \"7.0\"\n"));
  EXPECT_THAT(progress_.str(), HasSubstr("none of 40 keys of the log matches a row"));
  EXPECT_THAT(progress_.str(), HasSubstr("never positive, on all 2000 labelled records"));
  const auto json = RunJson();
  EXPECT_EQ(json["columns"].dump(), R"({"age":{"unreadable":8,"example":"n/a"}})");
  EXPECT_EQ(json["side_tables"]["user"].dump(), R"({"matched":0,"unmatched":40,"without_key":4,"example":"7.0"})");
  EXPECT_EQ(json["labels"]["click"].dump(), R"({"positives":0,"negatives":2000,"masked":0})");
  EXPECT_GE(json["warnings"].size(), 4u);
}

TEST_F(RunReportTest, DrawsOneLineOnATerminalAndEndsItBeforeTheTable) {
  options_.output.is_terminal = true;
  options_.output.columns = 60;
  for (const bool colour : {false, true}) {
    options_.output.colour = colour;
    progress_.str("");
    RunReport report(options_);
    report.Start({Ledger(), Ledger()}, 0);
    for (int i = 1; i <= 8; ++i) {
      ASSERT_TRUE(report.OnProgress(0, ProgressOf(i, i * 10), i * 250'000).ok());
      ASSERT_TRUE(report.Show(i * 250'000).ok());
    }
    report.PrintTable();
    const std::string text = progress_.str();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 8);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
    EXPECT_EQ(text.find("\x1b[36m") != std::string::npos, colour) << "NO_COLOR is honoured";
  }
}

TEST_F(RunReportTest, EndsWithATableOfEachTaskAndSplitAndTheLedger) {
  RunReport report(options_);
  ASSERT_TRUE(report.Committed(ManifestAt(10, 500), 0).ok());
  report.PrintTable();
  EXPECT_EQ(table_.str(),
            "task   split  samples  positives     AUC    GAUC  log loss  calibration\n"
            "click  test       100         40  0.7500  0.6250    0.5000            -\n"
            "like   test       100          0       -       -    0.2500            -\n"
            "read 2012 = trained 2000 + rejected 4 + filtered 8\n"
            "step 10  model hash 0000000000000abc  snapshots 1  restarts 3\n");
}

// Two experts of which one is dead, and a task that does not use its own.
Evaluation::Diagnostics SickExperts() {
  Evaluation::Diagnostics sick;
  sick.set_records(2048);
  for (const auto& [name, zero_rate] :
       {std::pair<const char*, double>{"level2.shared.0", 0.125}, {"level2.task.like.0", 1}}) {
    Evaluation::Diagnostics::Expert* expert = sick.add_expert();
    expert->set_name(name);
    expert->set_zero_rate(zero_rate);
    expert->set_mean(0.5);
    expert->set_deviation(1 - zero_rate);
  }
  Evaluation::Diagnostics::Gate* gate = sick.add_gate();
  gate->set_name("level2.task.like");
  gate->set_weight_max(0.75);
  gate->set_entropy_of_mean(0.5);
  gate->set_mean_entropy(0.25);
  Evaluation::Diagnostics::Shared* shared = sick.add_shared();
  shared->set_name("level2.shared.0");
  shared->set_occupancy(0.9);
  shared->set_tasks_using(1);
  for (const auto& [name, own_weight] : {std::pair<const char*, double>{"click", 0.25}, {"like", 0.0625}}) {
    Evaluation::Diagnostics::Task* task = sick.add_task();
    task->set_name(name);
    task->set_positive_rate(0.5);
    task->set_own_weight(own_weight);
    task->set_own_weight_uniform(0.25);
  }
  return sick;
}

TEST_F(RunReportTest, ShowsTheAnomaliesOfTheExperts) {
  RunReport report(options_);
  Manifest manifest = ManifestAt(10, 500);
  manifest.mutable_evaluation(0)->set_step(10);
  *manifest.mutable_evaluation(0)->mutable_diagnostics() = SickExperts();
  ASSERT_TRUE(report.Committed(manifest, 0).ok());
  const nlohmann::ordered_json json = RunJson()["diagnostics"];
  EXPECT_EQ(json["split"], "test");
  EXPECT_EQ(json["step"], 10);
  EXPECT_EQ(json["records"], 2048);
  EXPECT_EQ(json["experts"]["level2.task.like.0"].dump(), R"({"zero_rate":1.0,"mean":0.5,"deviation":0.0})");
  EXPECT_EQ(json["gates"]["level2.task.like"].dump(),
            R"({"weight_max":0.75,"entropy_of_mean":0.5,"mean_entropy":0.25,"deviation_max_ratio":null})");
  EXPECT_EQ(json["shared_experts"]["level2.shared.0"].dump(), R"({"occupancy":0.9,"tasks_using":1})");
  EXPECT_EQ(json["tasks"]["like"].dump(),
            R"({"positive_rate":0.5,"own_weight":0.0625,"own_weight_uniform":0.25,"own_gradient_ratio":null})");
  EXPECT_EQ(FormatDiagnostics(manifest.evaluation(0)),
            "anomaly       figure                 worst  of (2048 records of test, step 10)\n"
            "collapse      zero rate             1.0000  level2.task.like.0\n"
            "collapse      mean gate weight      0.7500  level2.task.like\n"
            "degradation   occupancy             0.9000  level2.shared.0 (tasks using it: 1)\n"
            "underfitting  own weight / uniform  0.2500  like\n");
  report.PrintTable();
  EXPECT_THAT(table_.str(), HasSubstr(FormatDiagnostics(manifest.evaluation(0)) + "read "));
  // A resume knows them from the snapshot.
  RunReport next(options_);
  next.Resume(manifest);
  ASSERT_TRUE(next.Write("running", 0, "").ok());
  EXPECT_EQ(RunJson()["diagnostics"], json);
}

TEST(SetTerminal, TakesTheFrontCommandsWordForTheTerminalBehindThePipe) {
  struct Case {
    const char* told;
    std::optional<size_t> own;
    const char* no_colour;
    bool is_terminal;
    size_t columns;
    bool colour;
  };
  const std::vector<Case> cases = {
      {nullptr, std::nullopt, nullptr, false, 0, false}, {"132", std::nullopt, nullptr, true, 132, true},
      {"132", std::nullopt, "1", true, 132, false},      {"132", std::nullopt, "", true, 132, true},
      {"0", std::nullopt, nullptr, true, 80, true},      {"wide", std::nullopt, nullptr, false, 0, false},
      {nullptr, 100, nullptr, true, 100, true},          {nullptr, 0, nullptr, true, 80, true}};
  for (const Case& c : cases) {
    RunOutput output;
    SetTerminal(c.told, c.own, c.no_colour, &output);
    EXPECT_EQ(output.is_terminal, c.is_terminal);
    EXPECT_EQ(output.columns, c.columns);
    EXPECT_EQ(output.colour, c.colour);
  }
}

TEST_F(RunReportTest, KnowsWhetherRunJsonAlreadySaysFinished) {
  RunReport first(options_);
  ASSERT_TRUE(first.Committed(ManifestAt(10, 5), 0).ok());
  const auto says_finished = [&] {
    RunReport next(options_);
    next.Resume(ManifestAt(10, 5));
    return next.says_finished();
  };
  EXPECT_FALSE(says_finished());
  ASSERT_TRUE(first.Write("finished", 0, "").ok());
  EXPECT_TRUE(says_finished());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder_, "run.json"), "{ torn").ok());
  EXPECT_FALSE(says_finished());
}

}  // namespace
}  // namespace hearth
