#include "common/artifact/snapshot_hold.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "common/artifact/manifest.h"
#include "common/artifact/numbered_folder.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;

TEST(NumberedFolder, ANumberHasOneName) {
  EXPECT_EQ(NumberOfName("0"), 0u);
  EXPECT_EQ(NumberOfName("10"), 10u);
  EXPECT_EQ(NumberOfName("18446744073709551615"), ~uint64_t{0});
  for (const char* name : {"", "0010", "+10", "-1", " 10", "10 ", "10.corrupt", "1e3", "18446744073709551616", "x"}) {
    EXPECT_FALSE(NumberOfName(name).has_value()) << name;
  }
}

class SnapshotHoldTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
    run_ = JoinPath(testing::TempDir(), absl::StrCat("snapshot_hold_test-", info->name(), "-", getpid()));
    ASSERT_TRUE(RemoveTree(run_).ok());
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(run_).ok()); }

  std::string Folder(uint64_t step) const { return JoinPath(run_, absl::StrCat("snapshots/", step)); }
  void Commit(uint64_t step) {
    ASSERT_TRUE(MakeDirectories(Folder(step)).ok());
    ASSERT_TRUE(WriteFileAtomically(JoinPath(Folder(step), "rows"), "rows").ok());
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_lanes(1);
    manifest.set_shards(1);
    manifest.set_servers(1);
    manifest.add_lane();
    const std::vector<FileEntry> files = DescribeFiles(Folder(step), {"rows"}).value();
    manifest.mutable_file()->Assign(files.begin(), files.end());
    ASSERT_TRUE(CommitManifest(Folder(step), manifest).ok());
  }

  std::string run_;
};

TEST_F(SnapshotHoldTest, AHeldSnapshotStaysUntilEveryReaderIsDone) {
  Commit(5);
  {
    const absl::StatusOr<SnapshotHold> first = SnapshotHold::Take(Folder(5));
    ASSERT_TRUE(first.ok()) << first.status();
    {
      const absl::StatusOr<SnapshotHold> second = SnapshotHold::Take(Folder(5));
      ASSERT_TRUE(second.ok()) << "readers do not shut each other out: " << second.status();
      EXPECT_FALSE(RemoveSnapshot(Folder(5), /*force=*/false).value());
    }
    EXPECT_FALSE(RemoveSnapshot(Folder(5), /*force=*/false).value());
    EXPECT_TRUE(ReadManifest(Folder(5)).ok());
    EXPECT_THAT(ListDirectory(Folder(5)).value(), ElementsAre("MANIFEST", "rows")) << "a hold leaves nothing there";
  }
  EXPECT_TRUE(RemoveSnapshot(Folder(5), /*force=*/false).value());
  EXPECT_FALSE(PathExists(Folder(5)));
  EXPECT_TRUE(RemoveSnapshot(Folder(5), /*force=*/false).value()) << "once more is fine";
}

TEST_F(SnapshotHoldTest, AKilledReaderHoldsNothing) {
  Commit(5);
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t reader = fork();
  if (reader == 0) {
    const absl::StatusOr<SnapshotHold> hold = SnapshotHold::Take(Folder(5));
    const char taken = hold.ok() ? 'y' : 'n';
    if (write(ready[1], &taken, 1) != 1) _exit(1);
    while (true) pause();
  }
  char taken = 0;
  ASSERT_EQ(read(ready[0], &taken, 1), 1);
  ASSERT_EQ(taken, 'y');
  EXPECT_FALSE(RemoveSnapshot(Folder(5), /*force=*/false).value());
  ASSERT_EQ(kill(reader, SIGKILL), 0);
  ASSERT_EQ(waitpid(reader, nullptr, 0), reader);
  EXPECT_TRUE(RemoveSnapshot(Folder(5), /*force=*/false).value());
  close(ready[0]);
  close(ready[1]);
}

TEST_F(SnapshotHoldTest, WhatGoesUnderAReaderWasRemovedAndIsNotCorrupt) {
  Commit(5);
  const absl::StatusOr<SnapshotHold> hold = SnapshotHold::Take(Folder(5));
  ASSERT_TRUE(hold.ok()) << hold.status();
  const absl::Status damaged = absl::DataLossError("a file is missing");
  EXPECT_EQ(hold->Explain(damaged), damaged) << "while it is there it is damaged";
  EXPECT_TRUE(RemoveSnapshot(Folder(5), /*force=*/true).value());
  EXPECT_TRUE(hold->Explain(absl::OkStatus()).ok()) << "what was read before is good";
  const absl::Status judged = hold->Explain(damaged);
  EXPECT_TRUE(IsRemoved(judged));
  EXPECT_EQ(ExitCodeOf(judged), kExitNoInput);
  EXPECT_THAT(std::string(judged.message()), HasSubstr("removed while it was read"));
  Commit(5);
  EXPECT_TRUE(IsRemoved(hold->Explain(damaged))) << "another one of that step is not the one that was held";
  EXPECT_TRUE(IsRemoved(SnapshotHold::Take(Folder(6)).status()));
}

TEST_F(SnapshotHoldTest, TheNewestWholeOneOfARunIsHeld) {
  EXPECT_EQ(ExitCodeOf(HoldNewestSnapshot(run_, SnapshotCheck::kChecksums).status()), kExitNoInput);
  for (const uint64_t step : {9, 10, 100}) Commit(step);
  ASSERT_TRUE(MakeDirectories(Folder(200)).ok());                                     // not committed
  ASSERT_EQ(rename(Folder(9).c_str(), JoinPath(run_, "snapshots/0300").c_str()), 0);  // no step's name
  ASSERT_TRUE(WriteFileAtomically(JoinPath(Folder(100), "rows"), "r0ws").ok());
  const absl::StatusOr<HeldSnapshot> lengths = HoldNewestSnapshot(run_, SnapshotCheck::kLengths);
  ASSERT_TRUE(lengths.ok()) << lengths.status();
  EXPECT_THAT(lengths->folder, EndsWith("/snapshots/100"));
  const absl::StatusOr<HeldSnapshot> whole = HoldNewestSnapshot(run_, SnapshotCheck::kChecksums);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_THAT(whole->folder, EndsWith("/snapshots/10"));
  EXPECT_THAT(whole->passed_over, ElementsAre(HasSubstr("/snapshots/100/rows")));
  EXPECT_FALSE(RemoveSnapshot(Folder(10), /*force=*/false).value());
  EXPECT_EQ(HoldNewestSnapshot(JoinPath(run_, "snapshots/0300"), SnapshotCheck::kChecksums)->manifest.step(), 9u)
      << "a folder that is named may be called anything";
  EXPECT_EQ(ExitCodeOf(HoldNewestSnapshot(Folder(200), SnapshotCheck::kLengths).status()), kExitBadData);
}

}  // namespace
}  // namespace hearth
