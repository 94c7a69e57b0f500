#include "common/artifact/history.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using Kind = HistoryEntry::Kind;

class HistoryTest : public testing::Test {
 protected:
  HistoryTest()
      : dir_(absl::StrCat(testing::TempDir(), "history_", getpid(), "_",
                          testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::remove_all(dir_);
    EXPECT_TRUE(MakeDirectories(dir_).ok());
  }
  static HistoryEntry Entry(Kind kind, int64_t time_s, uint64_t number = 0) {
    HistoryEntry entry;
    entry.kind = kind;
    entry.time_s = time_s;
    entry.number = number;
    return entry;
  }
  void Append(const HistoryEntry& entry) { ASSERT_TRUE(AppendHistory(dir_, entry).ok()); }
  std::string Path() const { return dir_ + "/history.jsonl"; }
  std::vector<int64_t> Times() const {
    std::vector<int64_t> times;
    const History history = *ReadHistory(dir_);
    for (const HistoryEntry& entry : history.entries) times.push_back(entry.time_s);
    return times;
  }

  const std::string dir_;
};

TEST_F(HistoryTest, ReadsBackWhatWasAppendedInItsOrder) {
  EXPECT_TRUE(ReadHistory(dir_)->entries.empty());
  HistoryEntry start = Entry(Kind::kStart, 1700000000);
  Evaluation evaluation;
  evaluation.set_split("test");
  evaluation.set_step(300);
  evaluation.add_task()->set_name("click");
  evaluation.mutable_task(0)->set_auc(0.75);
  start.state = StateOf(400, 51200, {evaluation});
  start.state->published_step = 400;
  start.state->published_base = 200;
  start.state->published_seq = 2;
  start.servers = 2;
  start.workers = 4;
  start.restarts = 1;
  start.changes = {"training.clip_norm: 0 -> 5", "name: \"a\\b\" -> \"c\""};
  Append(start);
  HistoryEntry end = Entry(Kind::kEnd, 0);
  end.status = "failed";
  end.code = 65;
  end.reason = "caf\xe9.csv: \"bad\"";
  Append(end);
  const History history = *ReadHistory(dir_);
  ASSERT_EQ(history.entries.size(), 2u);
  EXPECT_EQ(history.unreadable, 0u);
  const HistoryEntry& read = history.entries[0];
  EXPECT_EQ(read.kind, Kind::kStart);
  EXPECT_EQ(read.time_s, 1700000000);
  EXPECT_EQ(read.state->step, 400u);
  EXPECT_EQ(read.state->records, 51200u);
  ASSERT_EQ(read.state->figures.size(), 1u);
  EXPECT_EQ(read.state->figures[0].step, 300u);
  EXPECT_EQ(read.state->figures[0].auc, 0.75);
  EXPECT_FALSE(read.state->figures[0].log_loss.has_value());
  EXPECT_EQ(read.state->published_base, 200u);
  EXPECT_EQ(read.changes, start.changes);
  EXPECT_EQ(read.workers, 4u);
  EXPECT_GT(history.entries[1].time_s, 0) << "the clock's";
  EXPECT_FALSE(history.entries[1].state.has_value());
  EXPECT_EQ(history.entries[1].reason, "caf\uFFFD.csv: \"bad\"");
}

TEST_F(HistoryTest, ALineThatAKillToreHidesNoOther) {
  Append(Entry(Kind::kStart, 1));
  ASSERT_TRUE(WriteFileAtomically(Path(), *ReadFile(Path()) + "{\"event\": \"end\", \"ti").ok());
  EXPECT_THAT(Times(), ElementsAre(1));
  Append(Entry(Kind::kStart, 2));
  EXPECT_THAT(Times(), ElementsAre(1, 2));
  EXPECT_EQ(ReadHistory(dir_)->unreadable, 1u);
}

TEST_F(HistoryTest, WhateverALineHoldsReadingEndsWell) {
  const std::string lines[] = {"",
                               "[]",
                               "7",
                               "{}",
                               "{\"event\":7}",
                               "{\"event\":\"danced\"}",
                               std::string(100000, '['),
                               "{\"event\":\"start\",\"time\":-1,\"step\":\"x\",\"evaluation\":[1,{}],\"changes\":{},"
                               "\"published\":3,\"ps\":1e300}"};
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  ASSERT_TRUE(WriteFileAtomically(Path(), text).ok());
  const History history = *ReadHistory(dir_);
  EXPECT_EQ(history.unreadable, 6u);
  EXPECT_EQ(history.entries.size(), 1u);
}

TEST_F(HistoryTest, AForkIsUnfinishedUntilItsOwnEnd) {
  EXPECT_EQ(ReadHistory(dir_)->unfinished_fork(), nullptr);
  Append(Entry(Kind::kFork, 1, 1));
  EXPECT_EQ(ReadHistory(dir_)->unfinished_fork()->number, 1u);
  Append(Entry(Kind::kForked, 2, 1));
  EXPECT_EQ(ReadHistory(dir_)->unfinished_fork(), nullptr);
  Append(Entry(Kind::kFork, 3, 2));
  const History history = *ReadHistory(dir_);
  EXPECT_EQ(history.unfinished_fork()->number, 2u);
  EXPECT_EQ(history.newest_fork()->time_s, 3);
}

TEST_F(HistoryTest, ItStaysBoundedAndKeepsItsNewestFork) {
  Append(Entry(Kind::kFork, 1, 1));
  Append(Entry(Kind::kForked, 2, 1));
  HistoryEntry end = Entry(Kind::kEnd, 3);
  end.reason = std::string(100000, 'x');
  Append(end);
  ASSERT_LT(FileBytes(Path()).value(), 2000u) << "texts are cut";
  // As many as fill it, by one write.
  const std::string text = *ReadFile(Path());
  const std::string line = text.substr(text.find("{\"event\":\"end\""));
  std::string full = text;
  uint64_t lines = 3;
  for (; full.size() + line.size() <= kHistoryBytesMax; ++lines) full += line;
  ASSERT_TRUE(WriteFileAtomically(Path(), full).ok());
  end.time_s = 4;
  Append(end);  // one too many
  EXPECT_LT(FileBytes(Path()).value(), kHistoryBytesMax * 3 / 4);
  const History history = *ReadHistory(dir_);
  EXPECT_EQ(history.entries.size() + history.left_out, lines + 1);
  EXPECT_EQ(history.entries.back().time_s, 4);
  ASSERT_NE(history.newest_fork(), nullptr);
  EXPECT_EQ(history.newest_fork()->number, 1u);
  EXPECT_EQ(history.unfinished_fork(), nullptr);
}

TEST_F(HistoryTest, ALinkThatSomebodyPlantedInItsPlaceIsRefused) {
  ASSERT_TRUE(WriteFileAtomically(dir_ + "/victim", "theirs").ok());
  std::filesystem::create_symlink(dir_ + "/victim", Path());
  EXPECT_TRUE(absl::IsFailedPrecondition(AppendHistory(dir_, Entry(Kind::kStart, 1))));
  EXPECT_EQ(*ReadFile(dir_ + "/victim"), "theirs");
}

}  // namespace
}  // namespace hearth
