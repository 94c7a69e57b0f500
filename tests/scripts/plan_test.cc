#include "scripts/hearth/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/net/wire.h"
#include "scripts/hearth/calibrate.h"
#include "scripts/hearth/plan_command.h"

namespace hearth {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

constexpr char kJob[] =
    "name: 'small' log { name: 'train' path: 'log.csv' }\n"
    "task { name: 'click' category: 'watch' label: 'click' }\n"
    "slot { name: 'user' table: 'user' hash: SALTED } slot { name: 'item' table: 'item' hash: SALTED }\n"
    "table { name: 'user' dim: 4 } table { name: 'item' dim: 7 optimizer { kind: ADAM } }\n"
    "training { batch_size: 100 lanes: 2 shards: 64 }\n";

PlanInput Input(const std::string& more = "") {
  PlanInput input;
  input.job = *ParseJob(absl::StrCat(kJob, more), "job");
  input.tables.resize(2);
  for (PlanTable& table : input.tables) {
    table.rows = 10000;
    table.signs = 80;
  }
  input.rates = BuiltInRates(input.job);
  return input;
}

double ValueOf(const std::vector<PlanFigure>& figures, const std::string& what, bool largest = false) {
  for (const PlanFigure& figure : figures) {
    if (figure.what == what) return largest ? figure.largest : figure.value;
  }
  ADD_FAILURE() << "nothing is said of " << what;
  return -1;
}

TEST(Plan, GivesTheServerWithMostLogicalShardsItsShareAndTellsTheRemedy) {
  PlanInput input = Input();
  input.servers = 50;
  Plan plan = MakePlan(input);
  EXPECT_EQ(plan.shards_largest, 2u);
  EXPECT_DOUBLE_EQ(plan.largest_over_mean, 2 / 1.28);
  ASSERT_FALSE(plan.warnings.empty());
  EXPECT_THAT(plan.warnings[0], HasSubstr("training.shards"));
  EXPECT_THAT(plan.warnings[0], HasSubstr("multiple of 50"));
  const auto& network = plan.ranks[1].network;
  EXPECT_GT(ValueOf(network, "bytes sent", true), ValueOf(network, "bytes sent"));
  input.servers = 32;
  plan = MakePlan(input);
  EXPECT_DOUBLE_EQ(plan.largest_over_mean, 1);
  EXPECT_THAT(plan.warnings, IsEmpty());
}

// The messages of one step as they are encoded, beside the plan's formula.
TEST(Plan, CountsTheBytesOfAStepAsTheMessagesHaveThem) {
  const PlanInput input = Input();
  uint64_t asks = 0, rows = 0, pushes = 0;
  std::vector<uint64_t> signs;
  for (uint64_t i = 1; i <= 40; ++i) signs.push_back(i);
  const std::vector<uint32_t> occurrences(40, 1);
  const std::vector<float> values(40 * 7);
  std::vector<Section> asking, with_rows, pushing;
  for (const uint32_t table : {1u, 2u}) {
    const uint32_t dim = input.job.table(static_cast<int>(table) - 1).dim();
    const auto of_rows = absl::MakeConstSpan(values).first(40 * dim);
    asking.push_back({table, dim, signs, occurrences, {}, 40});
    with_rows.push_back({table, dim, {}, {}, of_rows, 40});
    pushing.push_back({table, dim, signs, occurrences, of_rows, 40});
  }
  asks = EncodeMessage(Header(), asking).size();
  rows = EncodeMessage(Header(), with_rows).size();
  pushes = EncodeMessage(Header(), pushing).size();
  const Plan plan = MakePlan(input);
  const std::vector<PlanFigure>& server = plan.ranks[1].network;
  EXPECT_NEAR(ValueOf(server, "bytes received"), 2.0 * (2 * asks + pushes), 0.5);
  EXPECT_NEAR(ValueOf(server, "bytes sent"), 2.0 * (rows + sizeof(Header)), 0.5);
  EXPECT_EQ(ValueOf(server, "messages received"), 6);
  EXPECT_EQ(ValueOf(server, "messages sent"), 4);
  EXPECT_NEAR(ValueOf(plan.ranks[2].network, "bytes sent"), 2.0 * (2 * asks + pushes), 0.5);
}

TEST(Plan, SendsWhatOtherWorkersReceiveAndTheReductionIsInIt) {
  PlanInput input = Input();
  input.job.mutable_training()->set_lanes(3);
  input.servers = 4;
  input.workers = 2;
  const Plan plan = MakePlan(input);
  ASSERT_EQ(plan.ranks.size(), 4u);
  double sent = 0, received = 0;
  for (const PlanRank& rank : plan.ranks) {
    if (rank.name == "scheduler") continue;
    sent += rank.count * ValueOf(rank.network, "bytes sent");
    received += rank.count * ValueOf(rank.network, "bytes received");
  }
  EXPECT_NEAR(sent / received, 1, 1e-9);
  EXPECT_GT(ValueOf(plan.ranks[2].network, "bytes sent"), 4.0 * static_cast<double>(plan.dense_parameters));
}

TEST(Plan, TakesTheSlowestStageAndAtStalenessTheWholeWayOverTheStepsInFlight) {
  PlanInput input = Input();
  input.rates.dense_records_per_s = 1000;  // 100 ms a step
  const Plan exact = MakePlan(input);
  EXPECT_GT(exact.step_seconds, 0.1);
  EXPECT_THAT(exact.bound, HasSubstr("from pull to push"));
  input.job.mutable_training()->set_staleness(1);
  const Plan stale = MakePlan(input);
  EXPECT_NEAR(stale.step_seconds, 0.1, 1e-9);
  EXPECT_EQ(stale.bound, "dense step of a worker");
  input.rates.rows[0].pull_ns = 1e7;
  EXPECT_EQ(MakePlan(input).bound, "table work of a server");
}

TEST(Plan, KeepsInMemoryNoMoreRowsThanTheTableMayAndSaysSo) {
  PlanInput input = Input();
  input.tables[0].rows = 1e9;
  const Plan plan = MakePlan(input);
  EXPECT_LT(ValueOf(plan.ranks[1].memory, "table user"), 2.5e9);  // of which the filter of all signs is most
  ASSERT_EQ(plan.warnings.size(), 1u);
  EXPECT_THAT(plan.warnings[0], HasSubstr("0.0938 % of the rows of the fullest server fit"));
  EXPECT_GT(ValueOf(plan.stages, "rows from disk"), 0);
}

TEST(Plan, DealsABoundInBytesSoThatSmallTablesStayWhole) {
  PlanInput input = Input("store { memory_bytes_max: 100000000 }");
  input.tables[0].rows = 1e7;
  const Plan plan = MakePlan(input);
  const double user = ValueOf(plan.ranks[1].memory, "table user"), item = ValueOf(plan.ranks[1].memory, "table item");
  EXPECT_NEAR(user + item, 1e8, 1e7);
  ASSERT_EQ(plan.warnings.size(), 1u);
  EXPECT_THAT(plan.warnings[0], HasSubstr("table \"user\""));
}

TEST(Plan, AddsUpTheRanksOfTheFullestNode) {
  PlanInput input = Input();
  input.servers = input.workers = 2;
  input.nodes = 2;
  const Plan plan = MakePlan(input);
  EXPECT_EQ(ValueOf(plan.node, "servers"), 1);
  EXPECT_DOUBLE_EQ(ValueOf(plan.node, "memory, bytes"),
                   SumOf(plan.ranks[1].memory, false, true) + SumOf(plan.ranks[2].memory, false, true));
}

TEST(ParseNamedNumber, TakesANumberWithOrWithoutATable) {
  EXPECT_EQ(ParseNamedNumber("3e6")->number, 3e6);
  EXPECT_EQ(ParseNamedNumber("3e6")->name, "");
  EXPECT_EQ(ParseNamedNumber("a=b=12")->name, "a=b");
  EXPECT_EQ(ParseNamedNumber("video=12")->number, 12);
  for (const char* text : {"", "=3", "x=", "many", "x=-1", "nan", "x=1e99"}) {
    EXPECT_EQ(ParseNamedNumber(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

class PlanRunTest : public testing::Test {
 protected:
  PlanRunTest()
      : root_(absl::StrCat(testing::TempDir(), "plan_", getpid(), "_",
                           testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::remove_all(root_);
    EXPECT_TRUE(MakeDirectories(root_).ok());
    Write("job.txtpb", kJob);
    options_.job = root_ + "/job.txtpb";
  }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomically(root_ + "/" + name, text).ok());
  }
  // Each user twice in a batch of a lane, each item once.
  void WriteLog(int records) {
    std::string log = "user,item,click\n";
    for (int i = 0; i < records; ++i) absl::StrAppend(&log, "u", i / 2, ",i", i, ",", i % 2, "\n");
    Write("log.csv", log);
  }

  const std::string root_;
  PlanOptions options_;
};

TEST_F(PlanRunTest, CountsSignsInTheJobsLogWhereItIsThere) {
  WriteLog(4000);
  options_.json = true;
  const auto text = PlanRun(options_);
  ASSERT_TRUE(text.ok()) << text.status();
  const auto json = nlohmann::json::parse(*text);
  EXPECT_NEAR(json["tables"]["user"]["signs"], 50, 2);
  EXPECT_NEAR(json["tables"]["item"]["signs"], 100, 1e-9);
  EXPECT_THAT(std::string(json["tables"]["item"]["signs_from"]), HasSubstr("the job's log"));
}

TEST_F(PlanRunTest, TakesAnUpperBoundWithoutALogAndMarksIt) {
  options_.rows = {"30000", "item=7"};
  options_.signs = {"user=10"};
  const auto text = PlanRun(options_);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text,
              HasSubstr("table item: 7 rows (--rows), 100 signs a step (upper bound: batch_size times its slots"));
  EXPECT_THAT(*text, HasSubstr("10 signs a step (--signs)"));
  EXPECT_THAT(*text, HasSubstr("not calibrated"));
}

TEST_F(PlanRunTest, RefusesATableThatTheJobHasNotAndWorkersBeyondItsLanes) {
  options_.rows = {"video=7"};
  EXPECT_THAT(std::string(PlanRun(options_).status().message()), HasSubstr("it has user, item"));
  options_.rows.clear();
  options_.workers = 3;
  EXPECT_EQ(PlanRun(options_).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(PlanRunTest, TakesWhatWasMeasuredInThePlaceOfWhatIsBuiltIn) {
  Calibration calibration;
  calibration.host = "there";
  calibration.when = "then";
  calibration.rows = {{16, Optimizer::ADAM, 50, 60, 70, 80}};
  calibration.bytes_per_s = 5e9;
  calibration.latency_us = 3;
  Write("rates.json", PrintCalibration(calibration));
  Write("run.json",
        R"({"samples_per_s": 1000, "ranks": {"worker": 2}, "time_share": {"forward_backward": 0.5},
            "dense_parameters": 0, "tables": {"user": {"rows": 123}, "gone": {"rows": 1}}})");
  options_.calibration = root_ + "/rates.json";
  options_.measured = root_;
  const auto text = PlanRun(options_);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text, HasSubstr("rates of rows: measured on there, then"));
  EXPECT_THAT(*text, HasSubstr("5.00 GB/s a direction between two ranks, 3 us: measured on there, then"));
  EXPECT_THAT(*text, HasSubstr("table user: 123 rows (of the run that --measured names)"));
  EXPECT_EQ(ReadMeasuredRun(root_)->dense_records_per_s, 1000);
  Write("rates.json", "[1]");
  EXPECT_EQ(PlanRun(options_).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(PlanRunTest, MeasuresRowsOfATableInAFolderOfItsOwn) {
  const Job job = *ParseJob(kJob, "job");
  const auto rates = MeasureRows(job.table(1), 50000, root_);
  ASSERT_TRUE(rates.ok()) << rates.status();
  EXPECT_EQ(rates->dim, 7u);
  EXPECT_EQ(rates->optimizer, Optimizer::ADAM);
  EXPECT_GT(rates->pull_ns, 0);
  EXPECT_GT(rates->push_ns, 0);
  EXPECT_GT(rates->miss_ns, 0);
}

}  // namespace
}  // namespace hearth
