#include "scripts/hearth/show_history.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
using Kind = HistoryEntry::Kind;

constexpr int64_t kDay = 86400;

class ShowHistoryTest : public testing::Test {
 protected:
  ShowHistoryTest()
      : dir_(absl::StrCat(testing::TempDir(), "show_history_", getpid(), "_",
                          testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::remove_all(dir_);
    EXPECT_TRUE(MakeDirectories(dir_ + "/snapshots").ok());
  }
  static Evaluation EvaluationAt(uint64_t step) {
    Evaluation evaluation;
    evaluation.set_split("test");
    evaluation.set_step(step);
    evaluation.add_task()->set_name("click");
    evaluation.mutable_task(0)->set_auc(static_cast<double>(step) / 1000);
    return evaluation;
  }
  // Ten records a step, evaluated every hundred.
  static HistoryEntry Entry(Kind kind, int day, uint64_t step) {
    HistoryEntry entry;
    entry.kind = kind;
    entry.time_s = day * kDay;
    entry.state = StateOf(step, 10 * step, {EvaluationAt(step / 100 * 100)});
    return entry;
  }
  void Start(int day, uint64_t step, uint32_t restarts = 0, const std::vector<std::string>& changes = {}) {
    HistoryEntry entry = Entry(Kind::kStart, day, step);
    entry.restarts = restarts;
    entry.changes = changes;
    ASSERT_TRUE(AppendHistory(dir_, entry).ok());
  }
  void End(int day, uint64_t step, const std::string& status, int code, const std::string& reason = "") {
    HistoryEntry entry = Entry(Kind::kEnd, day, step);
    entry.status = status;
    entry.code = code;
    entry.reason = reason;
    ASSERT_TRUE(AppendHistory(dir_, entry).ok());
  }
  void Fork(int day, uint64_t newest, uint64_t back_to) {
    HistoryEntry entry = Entry(Kind::kFork, day, newest);
    entry.back_to = back_to;
    entry.number = 1;
    ASSERT_TRUE(AppendHistory(dir_, entry).ok());
  }
  void Commit(uint64_t step, const std::vector<JobEra>& eras = {}, const Adoption* adoption = nullptr) {
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_lanes(1);
    manifest.set_shards(1);
    manifest.set_servers(1);
    manifest.add_lane()->mutable_ledger()->set_trained(10 * step);
    *manifest.add_evaluation() = EvaluationAt(step / 100 * 100);
    for (const JobEra& era : eras) *manifest.add_era() = era;
    if (adoption != nullptr) *manifest.mutable_adoption() = *adoption;
    const std::string folder = absl::StrCat(dir_, "/snapshots/", step);
    ASSERT_TRUE(MakeDirectories(folder).ok());
    ASSERT_TRUE(CommitManifest(folder, manifest).ok());
  }
  nlohmann::json Show() { return nlohmann::json::parse(*ShowHistory(dir_, true)); }
  std::vector<std::string> Lines() { return absl::StrSplit(*ShowHistory(dir_, false), '\n', absl::SkipEmpty()); }

  const std::string dir_;
};

TEST_F(ShowHistoryTest, AnEraALineFromTheFirstStartToTheNewestSnapshot) {
  Start(1, 0);
  Start(2, 250, 1);  // a rank had died
  End(3, 400, "saved", 75);
  Start(4, 400, 0, {"training.clip_norm: 0 -> 5"});
  Commit(700);
  const nlohmann::json eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(2));
  EXPECT_EQ(eras[0]["from_step"], 1);
  EXPECT_EQ(eras[0]["to_step"], 400);
  EXPECT_EQ(eras[0]["begun"], kDay);
  EXPECT_EQ(eras[0]["records"], 4000);
  EXPECT_EQ(eras[0]["starts"], 2);
  EXPECT_EQ(eras[0]["restarts"], 1);
  EXPECT_EQ(eras[0]["end"]["status"], "saved");
  EXPECT_EQ(eras[0]["evaluation"][0]["step"], 400);
  EXPECT_EQ(eras[1]["from_step"], 401);
  EXPECT_EQ(eras[1]["to_step"], 700);
  EXPECT_EQ(eras[1]["records"], 3000) << "its own";
  EXPECT_EQ(eras[1]["changes"][0], "training.clip_norm: 0 -> 5");
  EXPECT_TRUE(eras[1]["end"].is_null());
  EXPECT_EQ(eras[1]["evaluation"][0]["auc"], 0.7);
  const std::vector<std::string> lines = Lines();
  ASSERT_THAT(lines, SizeIs(3)) << *ShowHistory(dir_, false);
  EXPECT_THAT(lines[1], HasSubstr("1    1-400"));
  EXPECT_THAT(lines[1], HasSubstr("1970-01-02 00:00"));
  EXPECT_THAT(lines[2], HasSubstr("test at 700: click AUC 0.7000  changed training.clip_norm: 0 -> 5"));
}

TEST_F(ShowHistoryTest, AStartThatSavedNothingBeginsItsEraAgain) {
  Start(1, 0);
  Start(2, 100, 0, {"training.clip_norm: 0 -> 5"});
  Start(3, 100, 1, {"training.clip_norm: 0 -> 5"});
  Start(4, 100, 0, {"training.clip_norm: 0 -> 6"});  // its user thought better of it
  Commit(150);
  const nlohmann::json eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(2));
  EXPECT_EQ(eras[1]["starts"], 3);
  EXPECT_EQ(eras[1]["begun"], 2 * kDay);
  EXPECT_EQ(eras[1]["changes"], nlohmann::json::array({"training.clip_norm: 0 -> 6"}));
  EXPECT_THAT(eras[1]["evaluation"], SizeIs(0)) << "none was made in it";
}

TEST_F(ShowHistoryTest, AForkIsAnEraAndTellsWhatItLeft) {
  Start(1, 0);
  Start(2, 200, 0, {"task[like].weight: 1 -> 3"});
  Fork(3, 400, 300);
  nlohmann::json eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(3)) << "it has not begun to train";
  EXPECT_EQ(eras[1]["to_step"], 400);
  EXPECT_EQ(eras[1]["set_aside_from"], 301);
  EXPECT_TRUE(eras[0]["set_aside_from"].is_null());
  Start(4, 300, 0, {"training.clip_norm: 0 -> 5"});
  Commit(350);
  eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(3));
  EXPECT_EQ(eras[2]["from_step"], 301);
  EXPECT_EQ(eras[2]["to_step"], 350);
  EXPECT_EQ(eras[2]["records"], 500);
  EXPECT_EQ(eras[2]["fork"]["back_to"], 300);
  EXPECT_EQ(eras[2]["starts"], 1);
  EXPECT_THAT(Lines()[2], HasSubstr("set aside from step 301 on"));
  EXPECT_THAT(Lines()[3], HasSubstr("back to 300 (fork 1); changed training.clip_norm: 0 -> 5"));
}

// A run of before there was a history, and one that was begun then.
TEST_F(ShowHistoryTest, WhatNoEntrySaysIsTakenFromTheManifest) {
  JobEra era;
  era.set_from_step(101);
  era.add_change("training.clip_norm: 0 -> 5");
  Commit(200, {era});
  nlohmann::json eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(2));
  EXPECT_EQ(eras[0]["to_step"], 100);
  EXPECT_TRUE(eras[0]["begun"].is_null());
  EXPECT_EQ(eras[1]["to_step"], 200);
  Start(1, 200, 0, {"training.clip_norm: 5 -> 6"});
  eras = Show()["eras"];
  ASSERT_THAT(eras, SizeIs(3));
  EXPECT_EQ(eras[1]["to_step"], 200);
  EXPECT_EQ(eras[2]["from_step"], 201);
}

TEST_F(ShowHistoryTest, ARunThatBeganWithAModelTakenOverBeginsBehindItAndSaysWhoseItWas) {
  Adoption adoption;
  adoption.set_step(700);
  adoption.set_model_hash(0xabc);
  adoption.set_first_step(700);
  Commit(700, {}, &adoption);
  EXPECT_THAT(ShowHistory(dir_, false).value(), HasSubstr("after 700"));
  Start(1, 700);
  End(1, 900, "finished", 0);
  Commit(900, {}, &adoption);
  const std::string text = ShowHistory(dir_, false).value();
  EXPECT_THAT(text, HasSubstr("701-900"));
  EXPECT_THAT(text, HasSubstr("adopted from step 700 of model 0000000000000abc; finished"));
  const auto json = nlohmann::json::parse(ShowHistory(dir_, true).value());
  EXPECT_EQ(json["adopted"]["model_hash"], "0000000000000abc");
  EXPECT_THAT(json["eras"], SizeIs(1));
  EXPECT_EQ(json["eras"][0]["from_step"], 701);
}

TEST_F(ShowHistoryTest, AReasonOfManyLinesStaysInItsLine) {
  Start(1, 0);
  End(1, 0, "failed", 65, "log.csv: bad\nmend it");
  ASSERT_THAT(Lines(), SizeIs(2));
  EXPECT_THAT(Lines()[1], HasSubstr("failed with 65: log.csv: bad mend it"));
}

TEST_F(ShowHistoryTest, AFolderThatIsNoRunsIsToldAndAnEmptyRunIsEmpty) {
  EXPECT_TRUE(absl::IsNotFound(ShowHistory(dir_ + "/none", false).status()));
  EXPECT_THAT(*ShowHistory(dir_, false), HasSubstr("has trained nothing yet"));
  EXPECT_THAT(Show()["eras"], SizeIs(0));
}

}  // namespace
}  // namespace hearth
