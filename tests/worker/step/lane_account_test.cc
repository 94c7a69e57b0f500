#include "worker/step/lane_account.h"

#include <gtest/gtest.h>
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "tests/worker/text_files.h"

namespace {
std::mutex synced_mutex;
std::vector<std::string> synced;  // guarded by synced_mutex
}  // namespace

// This program's fsync: the system's, with a note of what it was asked for.
extern "C" int fsync(int fd) {
  char path[PATH_MAX] = {};
  if (readlink(absl::StrCat("/proc/self/fd/", fd).c_str(), path, sizeof(path) - 1) > 0) {
    std::lock_guard<std::mutex> lock(synced_mutex);
    synced.push_back(path);
  }
  return static_cast<int>(syscall(SYS_fsync, fd));
}

namespace hearth {
namespace {

Batch MakeBatch(uint64_t records, uint64_t rejected, uint64_t filtered, const std::string& dead_letters) {
  Batch batch;
  batch.lane = 2;
  batch.step = 9;
  batch.records = static_cast<int64_t>(records);
  for (uint64_t i = 0; i < records; ++i) {
    batch.file_of.push_back(1);
    batch.offset.push_back(100 * i);
  }
  batch.delta.set_read(records + rejected + filtered);
  batch.delta.set_rejected(rejected);
  batch.delta.set_filtered(filtered);
  batch.cursor.set_lane(2);
  batch.cursor.set_record(records);
  batch.dead_letters = dead_letters;
  return batch;
}

LaneState Lane2() {
  LaneState state;
  state.mutable_cursor()->set_lane(2);
  return state;
}

std::vector<LogFile> TwoFiles() {
  std::vector<LogFile> files(2);
  files[0].set_path("a.csv");
  files[1].set_path("b.csv");
  return files;
}

// Before the first dead letter and on a resume, which cuts the file back.
TEST(LaneAccount, ALinkThatSomebodyPlantedInTheDeadLettersPlaceIsRefused) {
  const std::string folder = TestFolder(), path = JoinPath(folder, "lane-2.tsv"), victim = JoinPath(folder, "victim");
  ASSERT_TRUE(MakeDirectories(folder).ok());
  ASSERT_TRUE(WriteFileAtomically(victim, "theirs").ok());
  auto account = LaneAccount::Open(folder, Lane2());
  ASSERT_TRUE(account.ok()) << account.status();
  ASSERT_EQ(symlink(victim.c_str(), path.c_str()), 0);
  const absl::Status late = (*account)->Enter(MakeBatch(3, 1, 0, "b.csv\t7\tbad\n"), false, {});
  const absl::Status early = LaneAccount::Open(folder, Lane2()).status();
  for (const absl::Status& status : {late, early}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path)) << status;
  }
  EXPECT_EQ(ReadFile(victim).value(), "theirs");
}

TEST(LaneAccount, AddsUpAndKeepsDeadLettersOfAppliedSteps) {
  const std::string folder = TestFolder();
  auto account = LaneAccount::Open(folder, Lane2());
  ASSERT_TRUE(account.ok()) << account.status();
  EXPECT_FALSE(PathExists(JoinPath(folder, "lane-2.tsv")));  // nothing to say yet
  ASSERT_TRUE((*account)->Enter(MakeBatch(3, 1, 2, "b.csv\t7\tbad\n"), false, {}).ok());
  ASSERT_TRUE((*account)->Enter(MakeBatch(2, 0, 0, ""), true, TwoFiles()).ok());
  ASSERT_TRUE((*account)->Sync({12, true}, false, 1).ok());
  const LaneState& state = (*account)->state();
  EXPECT_EQ(state.ledger().read(), 8u);
  EXPECT_EQ(state.ledger().trained(), 3u);
  EXPECT_EQ(state.ledger().rejected(), 3u);
  EXPECT_EQ(state.ledger().filtered(), 2u);
  EXPECT_EQ(state.non_finite(), 2u);
  EXPECT_EQ(state.epoch_ends_at(), 12u);
  EXPECT_EQ(state.skipped_in_row(), 1u);
  EXPECT_EQ(state.cursor().record(), 2u);
  const auto text = ReadFile(JoinPath(folder, "lane-2.tsv"));
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(*text,
            "b.csv\t7\tbad\n"
            "b.csv\t0\tloss or gradient not finite in step 9\n"
            "b.csv\t100\tloss or gradient not finite in step 9\n");
  EXPECT_EQ(state.dead_letter_bytes(), text->size());
}

TEST(LaneAccount, CountsLabelsOfTrainedRecordsAndKeepsWhatTheReaderTold) {
  auto account = LaneAccount::Open(TestFolder(), Lane2());
  ASSERT_TRUE(account.ok());
  Batch batch = MakeBatch(3, 0, 0, "");
  batch.mask = {1, 1, 1, 0, 1, 0};  // of two tasks
  batch.labels = {1, 0, 0, 0, 1, 0};
  Reading::Column* const column = batch.reading.add_column();
  column->set_name("age");
  column->set_unreadable(2);
  column->set_example("?");
  ASSERT_TRUE((*account)->Enter(batch, false, {}).ok());
  ASSERT_TRUE((*account)->Enter(batch, true, TwoFiles()).ok());  // skipped: read, not trained
  EXPECT_EQ((*account)->state().reading().ShortDebugString(),
            "column { name: \"age\" unreadable: 4 example: \"?\" } "
            "task { positives: 2 negatives: 1 masked: 0 } task { positives: 0 negatives: 1 masked: 2 }");
}

TEST(LaneAccount, AResumeCutsTheDeadLettersBackToTheSnapshot) {
  const std::string folder = TestFolder();
  LaneState saved;
  {
    auto account = LaneAccount::Open(folder, Lane2());
    ASSERT_TRUE(account.ok());
    ASSERT_TRUE((*account)->Enter(MakeBatch(1, 1, 0, "one\n"), false, {}).ok());
    ASSERT_TRUE((*account)->Sync({}, false, 0).ok());
    saved = (*account)->state();
    ASSERT_TRUE((*account)->Enter(MakeBatch(1, 1, 0, "two\n"), false, {}).ok());
  }
  auto account = LaneAccount::Open(folder, saved);
  ASSERT_TRUE(account.ok()) << account.status();
  ASSERT_TRUE((*account)->Enter(MakeBatch(1, 1, 0, "three\n"), false, {}).ok());
  ASSERT_TRUE((*account)->Sync({}, false, 0).ok());
  EXPECT_EQ(*ReadFile(JoinPath(folder, "lane-2.tsv")), "one\nthree\n");

  saved.set_dead_letter_bytes(1000);
  EXPECT_EQ(LaneAccount::Open(folder, saved).status().code(), absl::StatusCode::kDataLoss);
}

TEST(LaneAccount, ACutMakesTheFileAndItsNameDurable) {
  const std::string parent = std::filesystem::canonical(TestFolder()).string();
  const std::string folder = JoinPath(parent, "dead-letter");
  auto account = LaneAccount::Open(folder, Lane2());
  ASSERT_TRUE(account.ok());
  ASSERT_TRUE((*account)->Enter(MakeBatch(1, 1, 0, "one\n"), false, {}).ok());
  const auto synced_by_a_cut = [&] {
    {
      std::lock_guard<std::mutex> lock(synced_mutex);
      synced.clear();
    }
    EXPECT_TRUE((*account)->Sync({}, false, 0).ok());
    std::lock_guard<std::mutex> lock(synced_mutex);
    std::sort(synced.begin(), synced.end());
    return synced;
  };
  const std::string file = JoinPath(folder, "lane-2.tsv");
  EXPECT_EQ(synced_by_a_cut(), (std::vector<std::string>{parent, folder, file}));
  EXPECT_EQ(synced_by_a_cut(), (std::vector<std::string>{file})) << "its name is on the disk already";
}

TEST(LaneAccount, RefusesCountsThatDoNotAddUp) {
  auto account = LaneAccount::Open(TestFolder(), Lane2());
  ASSERT_TRUE(account.ok());
  Batch batch = MakeBatch(3, 1, 0, "");
  batch.delta.set_read(3);
  EXPECT_EQ((*account)->Enter(batch, false, {}).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace hearth
