#include "scheduler/reading_report.h"

#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

namespace hearth {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

template <typename T>
T Parse(const std::string& text) {
  T message;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &message)) << text;
  return message;
}

std::vector<std::string> LinesOf(const std::vector<Warning>& warnings) {
  std::vector<std::string> lines;
  for (const Warning& warning : warnings) lines.push_back(warning.line);
  return lines;
}

const char* const kJob = R"(
  task { name: "click" label: "y == 'yes'" } task { name: "like" label: "like" }
  log { name: "l" path: "a.csv" path: "b.csv" } training { batch_size: 64 lanes: 2 })";

std::vector<LaneState> TwoLanes(const std::string& first, const std::string& second) {
  std::vector<LaneState> lanes = {Parse<LaneState>(first), Parse<LaneState>(second)};
  lanes[0].mutable_cursor()->set_lane(0);
  lanes[1].mutable_cursor()->set_lane(1);
  return lanes;
}

TEST(ReadingReport, NamesColumnsWithoutNumbersAndJoinsThatFindNothing) {
  EXPECT_THAT(WarningsSoFar(Reading()), IsEmpty());
  const auto lines = LinesOf(WarningsSoFar(Parse<Reading>(R"(
    column { name: "age" unreadable: 12 example: "n/a\n" }
    join { side_table: "none" matched: 0 unmatched: 100 example: "7.0" }
    join { side_table: "few" matched: 0 unmatched: 99 }
    join { side_table: "half" matched: 500 unmatched: 500 }
    join { side_table: "poor" matched: 499 unmatched: 501 example: "x" })")));
  EXPECT_THAT(lines,
              ElementsAre(HasSubstr(R"(column "age" holds no number in 12 records, for example "n/a\n")"),
                          HasSubstr(R"("none": 100 of 100 keys of the log match no row so far, for example "7.0")"),
                          HasSubstr(R"("poor": 501 of 1000 keys)")));
}

TEST(ReadingReport, NamesLabelsThatAreAlwaysTheSameAtTheEnd) {
  const Job job = Parse<Job>(kJob);
  const auto lines = LinesOf(WarningsAtEnd(
      job,
      TwoLanes("ledger { read: 5 trained: 5 } reading { task { negatives: 5 } task { positives: 1 masked: 4 } }",
               "ledger { read: 5 trained: 5 } reading { task { negatives: 5 } task { positives: 2 masked: 3 } }")));
  EXPECT_THAT(lines, ElementsAre(HasSubstr(R"(task "click": label "y == 'yes'" is never positive, on all 10)"),
                                 HasSubstr(R"(task "like": label "like" is always positive, on all 3)")));
  EXPECT_THAT(
      LinesOf(WarningsAtEnd(
          job,
          TwoLanes("ledger { read: 5 trained: 5 } reading { task { negatives: 2 positives: 3 } task { masked: 5 } }",
                   "ledger { read: 5 trained: 5 } reading { task { negatives: 5 } task { masked: 5 } }"))),
      ElementsAre(HasSubstr("is unknown on all 10 trained records")));
  EXPECT_THAT(WarningsAtEnd(job, TwoLanes("ledger { read: 50 trained: 50 } reading { task { negatives: 5 } }",
                                          "ledger { read: 5 trained: 5 }")),
              IsEmpty())
      << "resumed from a version that did not count labels";
}

TEST(ReadingReport, NamesLanesWithoutARecord) {
  EXPECT_THAT(LinesOf(WarningsAtEnd(Parse<Job>(kJob), TwoLanes("ledger { read: 9 rejected: 9 }", ""))),
              ElementsAre(HasSubstr("1 of 2 lanes had nothing to read (lane 1), so steps were smaller than")));
}

TEST(ReadingReport, NamesASplitWhoseFiguresSayNothing) {
  EXPECT_THAT(
      LinesOf(WarningsOfEvaluation(Parse<Evaluation>(R"(split: "test"
    task { name: "a" samples: 0 } task { name: "b" samples: 9 positives: 0 } task { name: "c" samples: 9 positives: 9 }
    task { name: "d" samples: 9 positives: 1 })"))),
      ElementsAre(HasSubstr("task \"a\": no record with a label"), HasSubstr("task \"b\": no positive label among 9"),
                  HasSubstr("task \"c\": no negative label among 9")));
}

TEST(ReadingReport, NamesLanesTooSmallForBatchNorm) {
  Job job = Parse<Job>(kJob);
  EXPECT_THAT(WarningsOfJob(job), IsEmpty());
  job.mutable_training()->set_lanes(32);
  EXPECT_THAT(LinesOf(WarningsOfJob(job)),
              ElementsAre(HasSubstr("a lane's batch has 2 records (batch_size 64 over 32")));
  job.mutable_model()->set_kind(Model::SHARED_BOTTOM);
  EXPECT_THAT(WarningsOfJob(job), IsEmpty()) << "a model without BatchNorm";
}

TEST(ReadingReport, AJobThatTrainedNothingIsBadDataWithItsCause) {
  const Job job = Parse<Job>(kJob);
  const absl::Status empty = CheckTrained(job, TwoLanes("", ""));
  EXPECT_EQ(empty.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(empty.message()), HasSubstr("not one record to read in a.csv, b.csv"));

  const absl::Status filtered = CheckTrained(
      job,
      TwoLanes(
          R"(ledger { read: 400 filtered: 400 } reading { column { name: "date" unreadable: 400 example: "2022-05-01" } })",
          "ledger { read: 3 rejected: 3 }"));
  EXPECT_EQ(filtered.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(filtered.message()),
              AllOf(HasSubstr("403 records were read, of which 3 were rejected, 400 filtered and 0 trained"),
                    HasSubstr(R"(column "date" holds no number in 400 records, for example "2022-05-01")")));

  EXPECT_EQ(
      CheckTrained(job, TwoLanes("ledger { read: 4 trained: 4 } reading { task { masked: 4 } task { masked: 4 } }", ""))
          .code(),
      absl::StatusCode::kDataLoss);
  EXPECT_TRUE(
      CheckTrained(
          job,
          TwoLanes("ledger { read: 4 trained: 4 } reading { task { masked: 4 } task { negatives: 1 masked: 3 } }", ""))
          .ok());
  EXPECT_TRUE(CheckTrained(job, TwoLanes("ledger { read: 4 trained: 4 }", "")).ok()) << "labels were not counted then";
}

}  // namespace
}  // namespace hearth
