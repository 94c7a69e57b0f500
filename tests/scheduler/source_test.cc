#include "scheduler/source.h"

#include <gtest/gtest.h>

#include <map>

#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/log_list.h"
#include "tests/scheduler/scheduler_testing.h"

namespace hearth {
namespace {

std::vector<std::string> Paths(const std::vector<LogFile>& files) {
  std::vector<std::string> paths;
  for (const LogFile& file : files) paths.push_back(file.path());
  return paths;
}

absl::StatusOr<std::unique_ptr<Source>> OpenSource(const Job& job, const std::vector<LogFile>& files, bool closed,
                                                   const std::vector<LaneState>& lanes, int64_t now_us,
                                                   const ConsumedFiles& consumed = {}) {
  Source::Listed before;
  before.files = files;
  before.closed = closed;
  before.logs = static_cast<uint32_t>(job.log_size());
  before.lanes = lanes;
  before.consumed = consumed;
  return Source::Open(job, before, now_us);
}

class SourceTest : public testing::Test {
 protected:
  SourceTest() : folder_(MakeTestFolder()) { job_.set_data_dir(folder_); }

  std::string Put(const std::string& name, const std::string& text) {
    const std::string path = JoinPath(folder_, name);
    HEARTH_CHECK(WriteFileAtomically(path, text).ok());
    return path;
  }
  Log* AddPaths(const std::vector<std::string>& names) {
    Log* log = job_.add_log();
    log->set_name(absl::StrCat("log", job_.log_size()));
    for (const std::string& name : names) log->add_path(name);
    return log;
  }
  Log* AddDirectory(const std::string& name) {
    Log* log = job_.add_log();
    log->set_name(absl::StrCat("log", job_.log_size()));
    log->set_directory(name);
    HEARTH_CHECK(MakeDirectories(JoinPath(folder_, name)).ok());
    return log;
  }

  const std::string folder_;
  Job job_;
};

TEST_F(SourceTest, ListsFilesInTheOrderOfLogsThenPaths) {
  const std::string b = Put("b.csv", "x\n");
  const std::string a = Put("a.csv", "xy\n");
  const std::string c = Put("c.csv", std::string(200'000, 'c'));
  AddPaths({"b.csv", a});
  AddPaths({"c.csv"});
  auto source = OpenSource(job_, {}, false, {}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  const std::vector<LogFile>& files = (*source)->files();
  EXPECT_EQ(Paths(files), (std::vector<std::string>{b, a, c}));
  const std::vector<uint64_t> bytes = {2, 3, 200'000};
  for (size_t i = 0; i < files.size(); ++i) {
    EXPECT_EQ(files[i].number(), i);
    EXPECT_EQ(files[i].log(), i < 2 ? 0u : 1u);
    EXPECT_EQ(files[i].bytes(), bytes[i]);
    EXPECT_EQ(files[i].digest(), *HashFileHead(files[i].path(), 65536));
  }
  EXPECT_TRUE((*source)->closed());
  EXPECT_EQ((*source)->next_poll_us(), kNever);
}

TEST_F(SourceTest, NamesAPathThatDoesNotExist) {
  AddPaths({"nowhere.csv"});
  const auto source = OpenSource(job_, {}, false, {}, 0);
  EXPECT_EQ(ExitCodeOf(source.status()), kExitNoInput);
  EXPECT_NE(source.status().message().find("nowhere.csv"), absl::string_view::npos) << source.status();
}

TEST_F(SourceTest, TakesNewFilesOfADirectoryInNameOrderAndIgnoresWhatIsNoLog) {
  AddDirectory("tail");
  auto source = *OpenSource(job_, {}, false, {}, 0);
  EXPECT_TRUE(source->files().empty());
  const std::string b = Put("tail/b.csv", "b");
  const std::string a = Put("tail/a.csv", "a");
  Put("tail/.hidden", "h");
  Put("tail/c.csv.part.tmp", "t");
  ASSERT_TRUE(MakeDirectories(JoinPath(folder_, "tail/folder")).ok());
  EXPECT_EQ(source->next_poll_us(), kSourcePollUs);
  EXPECT_EQ(Paths(*source->Poll(kSourcePollUs)), (std::vector<std::string>{a, b}));
  EXPECT_TRUE(source->Poll(2 * kSourcePollUs)->empty());
  const std::string early = Put("tail/_early.csv", "e");  // sorts before what is listed, and is trained after it
  EXPECT_EQ(Paths(*source->Poll(3 * kSourcePollUs)), (std::vector<std::string>{early}));
  EXPECT_FALSE(source->closed());
}

TEST_F(SourceTest, ClosesADirectoryAtItsEndMarkerAndGoesOnWithTheNextLog) {
  AddDirectory("tail");
  const std::string later = Put("later.csv", "l");
  AddPaths({"later.csv"});
  auto source = *OpenSource(job_, {}, false, {}, 0);
  EXPECT_TRUE(source->files().empty()) << "a log is listed once those before it are closed";
  const std::string last = Put("tail/last.csv", "x");
  Put("tail/_END", "");
  EXPECT_EQ(Paths(*source->Poll(1)), (std::vector<std::string>{last, later}));
  EXPECT_TRUE(source->closed());
}

TEST_F(SourceTest, ClosesADirectoryThatWasIdleForTooLong) {
  AddDirectory("tail")->set_idle_seconds_max(5);
  auto source = *OpenSource(job_, {}, false, {}, 1'000'000);
  ASSERT_TRUE(source->Poll(5'999'999).ok());
  EXPECT_FALSE(source->closed());
  Put("tail/a.csv", "a");
  ASSERT_TRUE(source->Poll(5'999'999).ok());
  ASSERT_TRUE(source->Poll(10'999'998).ok());
  EXPECT_FALSE(source->closed());
  ASSERT_TRUE(source->Poll(10'999'999).ok());
  EXPECT_TRUE(source->closed());
}

TEST_F(SourceTest, NamesADirectoryThatDoesNotExist) {
  job_.add_log()->set_directory("nowhere");
  const auto source = OpenSource(job_, {}, false, {}, 0);
  EXPECT_EQ(ExitCodeOf(source.status()), kExitNoInput);
  EXPECT_NE(source.status().message().find("log[0].directory"), absl::string_view::npos) << source.status();
}

TEST_F(SourceTest, GoesOnFromAListWhereverItWasCut) {
  AddPaths({"a.csv", "b.csv"});
  AddDirectory("tail");
  AddPaths({"z.csv"});
  for (const char* name : {"a.csv", "b.csv", "z.csv", "tail/1", "tail/2", "tail/_END"}) Put(name, name);
  const std::vector<LogFile> whole = (*OpenSource(job_, {}, false, {}, 0))->files();
  ASSERT_EQ(whole.size(), 5u);
  for (size_t known = 0; known <= whole.size(); ++known) {
    auto source = OpenSource(job_, {whole.begin(), whole.begin() + known}, false, {}, 0);
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ(Paths((*source)->files()), Paths(whole)) << known;
    EXPECT_TRUE((*source)->closed());
  }
}

// Lanes, as a MANIFEST has them: the number of the file that each is in; `ended`: it has all of it.
LaneState LaneIn(uint32_t file, bool ended = false) {
  LaneState lane;
  lane.mutable_cursor()->set_file(file);
  lane.mutable_cursor()->set_record(7);
  lane.mutable_cursor()->set_text_digest(1);
  if (ended) lane.mutable_cursor()->set_file_ended(true);
  return lane;
}
LaneState LaneAtEnd(uint32_t file, uint32_t epoch = 0) {
  LaneState lane;
  lane.mutable_cursor()->set_file(file);
  lane.mutable_cursor()->set_end_of_segment(true);
  lane.mutable_cursor()->set_epoch(epoch);
  lane.mutable_cursor()->set_end_of_epoch(true);
  return lane;
}

TEST_F(SourceTest, RefusesAListedFileThatChangedWhereALaneIsPastIt) {
  AddPaths({"a.csv"});
  Put("a.csv", "one");
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  LaneState old = LaneIn(0);  // a MANIFEST from before there were digests
  old.mutable_cursor()->clear_text_digest();
  for (const std::vector<LaneState>& lanes : {std::vector<LaneState>{old}, {LaneIn(0), LaneIn(0, true)}}) {
    for (const char* text : {"longer", "two"}) {
      Put("a.csv", text);
      const auto source = OpenSource(job_, listed, true, lanes, 0);
      EXPECT_EQ(ExitCodeOf(source.status()), kExitBadData);
      EXPECT_NE(source.status().message().find("a.csv"), absl::string_view::npos) << source.status();
      EXPECT_NE(source.status().message().find("put the old file back"), absl::string_view::npos) << source.status();
    }
    ASSERT_TRUE(RemoveTree(JoinPath(folder_, "a.csv")).ok());
    EXPECT_EQ(ExitCodeOf(OpenSource(job_, listed, true, lanes, 0).status()), kExitNoInput);
    Put("a.csv", "one");
    EXPECT_TRUE(OpenSource(job_, listed, true, lanes, 0).ok());
  }
}

TEST_F(SourceTest, LeavesItToReadersToCheckTheTrainedPartOfAFileThatLanesAreIn) {
  AddPaths({"a.csv", "b.csv"});
  for (const char* name : {"a.csv", "b.csv"}) Put(name, "one");
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  Put("a.csv", "mended");
  const auto source = OpenSource(job_, listed, true, {LaneIn(0), LaneState()}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE((*source)->files()[0].amended());
  EXPECT_EQ((*source)->files()[0].bytes(), 6u);
  EXPECT_FALSE((*source)->files()[1].amended());
  const auto again = OpenSource(job_, (*source)->files(), true, {LaneIn(0), LaneState()}, 0);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE((*again)->files()[0].amended()) << "once read as it is now, it is the listed one";
}

TEST_F(SourceTest, AFileThatNoLaneHasBegunMayBeAnotherOne) {
  AddPaths({"a.csv", "b.csv"});
  for (const char* name : {"a.csv", "b.csv"}) Put(name, "one");
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  Put("b.csv", "another");
  const auto source = OpenSource(job_, listed, true, {LaneIn(0), LaneIn(0, true), LaneState()}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ((*source)->files()[1].bytes(), 7u);
  EXPECT_FALSE((*source)->files()[1].amended());
}

TEST_F(SourceTest, AFileThatAllLanesHavePassedForGoodNeedNotBeThere) {
  AddDirectory("tail");
  for (const char* name : {"tail/1", "tail/2", "tail/3"}) Put(name, name);
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  ASSERT_TRUE(RemoveTree(JoinPath(folder_, "tail/1")).ok());
  for (const std::vector<LaneState>& lanes : {std::vector<LaneState>{LaneIn(0, true), LaneIn(1)}, {LaneIn(2)}}) {
    const auto source = OpenSource(job_, listed, false, lanes, 0);
    ASSERT_TRUE(source.ok()) << source.status();
    const bool left = lanes[0].cursor().file() > 0;  // no cursor names it any more
    EXPECT_EQ((*source)->files().size(), left ? 2u : 3u);
    EXPECT_EQ((*source)->consumed().files(), left ? 1u : 0u);
    EXPECT_EQ((*source)->files()[0].taken_off(), !left);
  }
  EXPECT_EQ(ExitCodeOf(OpenSource(job_, listed, false, {LaneIn(0), LaneIn(1)}, 0).status()), kExitNoInput);

  job_.mutable_training()->set_epochs(2);
  EXPECT_EQ(ExitCodeOf(OpenSource(job_, listed, false, {LaneIn(2)}, 0).status()), kExitNoInput)
      << "the next epoch reads it again";
  EXPECT_TRUE(OpenSource(job_, listed, true, {LaneAtEnd(3, 1)}, 0).ok());
}

TEST_F(SourceTest, AFileThatLeftItsDirectoryUnreadMayComeAgain) {
  AddDirectory("tail");
  for (const char* name : {"tail/1", "tail/2"}) Put(name, name);
  std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  ASSERT_TRUE(RemoveTree(JoinPath(folder_, "tail/2")).ok());
  auto source = OpenSource(job_, listed, false, {LaneIn(0)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  listed = (*source)->files();
  ASSERT_EQ(listed.size(), 2u);
  EXPECT_TRUE(listed[1].taken_off());
  Put("tail/2", "mended");
  source = OpenSource(job_, listed, false, {LaneIn(0)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  ASSERT_EQ((*source)->files().size(), 3u) << "numbers stay: pieces are dealt by them";
  EXPECT_TRUE((*source)->files()[1].taken_off());
  EXPECT_EQ((*source)->files()[2].bytes(), 6u);
}

TEST_F(SourceTest, APathMayBeTakenOffItsLogAndKeepsItsNumber) {
  Log* const log = AddPaths({"a.csv", "b.csv", "c.csv"});
  for (const char* name : {"a.csv", "b.csv", "c.csv"}) Put(name, name);
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  log->clear_path();
  for (const char* name : {"a.csv", "c.csv"}) log->add_path(name);
  const auto source = OpenSource(job_, listed, true, {LaneIn(1)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  const std::vector<LogFile> files = (*source)->files();
  ASSERT_EQ(files.size(), 3u);
  EXPECT_TRUE(files[1].taken_off());
  EXPECT_FALSE(files[2].taken_off());
  EXPECT_TRUE((*source)->closed());
  const auto again = OpenSource(job_, files, true, {LaneIn(1)}, 0);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(Paths((*again)->files()), Paths(files));

  log->mutable_shuffle()->set_pieces(true);
  EXPECT_EQ(ExitCodeOf(OpenSource(job_, listed, true, {LaneIn(0)}, 0).status()), kExitConfig)
      << "the permutation is over all pieces";
}

TEST_F(SourceTest, NewPathsAreReadBehindTheListedOnesWhileTheLogGoesOn) {
  Log* const log = AddPaths({"a.csv"});
  for (const char* name : {"a.csv", "b.csv", "0.csv"}) Put(name, name);
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  log->add_path("b.csv");
  const auto source = OpenSource(job_, listed, true, {LaneIn(0)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ((*source)->files().size(), 2u);
  EXPECT_TRUE((*source)->closed());
  EXPECT_EQ((*source)->files()[1].segment(), 0u) << "the log goes on";
  for (const LaneState& other : {LaneIn(0), LaneAtEnd(1)}) {
    const auto late = OpenSource(job_, listed, true, {other, LaneAtEnd(1)}, 0);
    ASSERT_TRUE(late.ok()) << late.status();
    EXPECT_EQ((*late)->files()[1].segment(), 1u) << "a lane has said that the log is over";
  }
  log->set_path(0, "0.csv");
  log->set_path(1, "a.csv");
  EXPECT_EQ(ExitCodeOf(OpenSource(job_, listed, true, {LaneIn(0)}, 0).status()), kExitConfig);
}

TEST_F(SourceTest, EachLogIsASegmentAndEachFileOfALogThatIsCutAfterFiles) {
  AddPaths({"a.csv", "b.csv"});
  AddPaths({"c.csv", "d.csv"})->set_cut_after(Log::FILE);
  for (const char* name : {"a.csv", "b.csv", "c.csv", "d.csv"}) Put(name, name);
  const std::vector<LogFile> files = (*OpenSource(job_, {}, false, {}, 0))->files();
  std::vector<uint32_t> segments;
  for (const LogFile& file : files) segments.push_back(file.segment());
  EXPECT_EQ(segments, (std::vector<uint32_t>{0, 0, 1, 2}));
}

TEST_F(SourceTest, ConsumedFilesLeaveTheListOnceTheJobNamesThemNoMoreAndNumbersGoOn) {
  Log* const log = AddPaths({"1.csv", "2.csv", "3.csv"});
  log->set_cut_after(Log::FILE);
  for (const char* name : {"1.csv", "2.csv", "3.csv", "4.csv"}) Put(name, absl::StrCat("of ", name));
  auto source = *OpenSource(job_, {}, false, {}, 0);
  log->clear_path();
  for (const char* name : {"3.csv", "4.csv"}) log->add_path(name);
  for (const char* name : {"1.csv", "2.csv"}) ASSERT_TRUE(RemoveTree(JoinPath(folder_, name)).ok());
  source = *OpenSource(job_, source->files(), true, {LaneAtEnd(3), LaneAtEnd(3)}, 0);
  ASSERT_EQ(source->files().size(), 2u);
  EXPECT_EQ(source->files()[0].number(), 2u);
  EXPECT_EQ(source->files()[1].number(), 3u);
  EXPECT_EQ(source->files()[1].segment(), 3u);
  EXPECT_EQ(source->consumed().files(), 2u);
  EXPECT_EQ(source->consumed().bytes(), 16u);
  const ConsumedFiles consumed = source->consumed();
  source = *OpenSource(job_, source->files(), true, {LaneAtEnd(4), LaneAtEnd(4)}, 0, consumed);
  EXPECT_EQ(source->consumed().files(), 2u) << "the job still names 3.csv";
  EXPECT_EQ(source->files().size(), 2u);
  ASSERT_TRUE(RemoveTree(JoinPath(folder_, "3.csv")).ok());
  for (int start = 0; start < 2; ++start) {
    source = *OpenSource(job_, source->files(), true, {LaneAtEnd(4), LaneAtEnd(4)}, 0, consumed);
    EXPECT_EQ(source->consumed().files(), 2u) << "though it is gone";
    EXPECT_EQ(source->files().size(), 2u);
  }
}

TEST_F(SourceTest, AFileThatAModelWasTrainedOnBeforeItWasTakenOverIsTrainedOnlyWhenAskedFor) {
  AddPaths({"1.csv", "2.csv"});
  for (const char* name : {"1.csv", "2.csv"}) Put(name, absl::StrCat("of ", name));
  Source::Listed adopted;
  adopted.logs = 1;
  adopted.lanes = {LaneState()};
  adopted.consumed.add_newest(IdentityOf((*OpenSource(job_, {}, false, {}, 0))->files()[1]));
  const absl::Status status = Source::Open(job_, adopted, 0).status();
  EXPECT_EQ(ExitCodeOf(status), kExitConfig);
  EXPECT_NE(status.message().find("log[0].path[1]"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("before it was taken over"), absl::string_view::npos) << status;
  adopted.again = true;
  const auto source = Source::Open(job_, adopted, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  // A resume does not ask again: the file is in the run's own list.
  adopted.again = false;
  adopted.files = (*source)->files();
  EXPECT_TRUE(Source::Open(job_, adopted, 0).ok());
  EXPECT_EQ((*source)->consumed().newest_size(), 1);
}

TEST_F(SourceTest, AFileThatTheRunHasHadUnderAnotherNameIsTrainedOnlyWhenAskedFor) {
  Log* const log = AddPaths({"1.csv", "2.csv"});
  for (const char* name : {"1.csv", "2.csv"}) Put(name, absl::StrCat("of ", name));
  auto source = *OpenSource(job_, {}, false, {}, 0);
  Put("copy.csv", "of 1.csv");
  log->add_path("copy.csv");
  Source::Listed before = {source->files(), true, 1, {LaneAtEnd(2)}, {}, false};
  const absl::Status status = Source::Open(job_, before, 0).status();
  EXPECT_EQ(ExitCodeOf(status), kExitConfig);
  EXPECT_NE(status.message().find("copy.csv"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("--again"), absl::string_view::npos) << status;
  before.again = true;
  EXPECT_TRUE(Source::Open(job_, before, 0).ok());
  before.again = false;
  Job two_logs = job_;
  two_logs.mutable_log(0)->mutable_path()->RemoveLast();
  *two_logs.add_log() = two_logs.log(0);
  EXPECT_TRUE(Source::Open(two_logs, before, 0).ok()) << "another log may take other records of the same file";

  log->clear_path();
  log->add_path("2.csv");
  ASSERT_TRUE(RemoveTree(JoinPath(folder_, "1.csv")).ok());
  source = *OpenSource(job_, before.files, true, before.lanes, 0);
  ASSERT_EQ(source->consumed().files(), 1u);
  log->add_path("copy.csv");
  before = {source->files(), true, 1, {LaneAtEnd(2)}, source->consumed(), false};
  EXPECT_EQ(ExitCodeOf(Source::Open(job_, before, 0).status()), kExitConfig) << "though it has left the list";
}

TEST_F(SourceTest, ADirectoryThatHadEndedGoesOnWhereAFileHasCome) {
  AddDirectory("tail")->set_idle_seconds_max(5);
  Put("tail/1", "one");
  auto source = *OpenSource(job_, {}, false, {}, 0);
  ASSERT_TRUE(source->Poll(6'000'000).ok());
  ASSERT_TRUE(source->closed());
  const std::vector<LogFile> listed = source->files();
  source = *OpenSource(job_, listed, true, {LaneAtEnd(1)}, 0);
  EXPECT_TRUE(source->closed()) << "nothing has come";
  Put("tail/2", "two");
  source = *OpenSource(job_, listed, true, {LaneAtEnd(1)}, 0);
  ASSERT_EQ(source->files().size(), 2u);
  EXPECT_EQ(source->files()[1].segment(), 1u);
  EXPECT_FALSE(source->closed());
  ASSERT_TRUE(source->Poll(6'000'000).ok());
  EXPECT_TRUE(source->closed());
}

TEST_F(SourceTest, GoesOnFromAListWithoutNamesByPosition) {
  Log* const log = AddPaths({"a.csv", "b.csv"});
  for (const char* name : {"a.csv", "b.csv"}) Put(name, name);
  std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  for (LogFile& file : listed) file.clear_name();
  auto source = OpenSource(job_, listed, true, {LaneIn(0)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ((*source)->files()[1].name(), "b.csv");
  log->mutable_path()->RemoveLast();
  source = OpenSource(job_, listed, true, {LaneIn(0)}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE((*source)->files()[1].taken_off());
}

TEST_F(SourceTest, SideTablesThatTrainingJoinsMustStayTheSame) {
  for (const char* name : {"joined", "of_split", "unused"}) {
    SideTable* const table = job_.add_side_table();
    table->set_name(name);
    table->set_path(name);
  }
  AddPaths({"a.csv"})->add_join("joined");
  job_.add_split()->mutable_log()->add_join("of_split");
  for (const char* name : {"joined", "of_split"}) Put(name, "before");
  const auto before = DescribeSideTables(job_);
  ASSERT_TRUE(before.ok()) << before.status();
  EXPECT_EQ(before->size(), 2u) << "nobody reads the third";
  const std::vector<SideTableFile> kept = JoinedInTraining(job_, *before);
  ASSERT_EQ(kept.size(), 1u);
  Put("of_split", "later");
  EXPECT_TRUE(CheckSideTables(kept, *DescribeSideTables(job_)).ok());
  for (const char* other : {"behind", "longer"}) {
    Put("joined", other);
    const absl::Status status = CheckSideTables(kept, *DescribeSideTables(job_));
    EXPECT_EQ(ExitCodeOf(status), kExitBadData);
    EXPECT_NE(status.message().find("side_table \"joined\""), absl::string_view::npos) << status;
  }
  ASSERT_TRUE(RemoveTree(JoinPath(folder_, "joined")).ok());
  EXPECT_EQ(ExitCodeOf(DescribeSideTables(job_).status()), kExitNoInput);
}

TEST_F(SourceTest, FollowsADataFolderThatMoved) {
  AddPaths({"a.csv"});
  AddDirectory("tail");
  for (const char* name : {"a.csv", "tail/1"}) Put(name, name);
  const std::vector<LogFile> listed = (*OpenSource(job_, {}, false, {}, 0))->files();
  const std::string moved = folder_ + "-moved";
  ASSERT_TRUE(RemoveTree(moved).ok());
  ASSERT_TRUE(RenamePath(folder_, moved).ok());
  job_.set_data_dir(moved);
  auto source = OpenSource(job_, listed, false, {}, 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(Paths((*source)->files()), (std::vector<std::string>{moved + "/a.csv", moved + "/tail/1"}));
}

TEST_F(SourceTest, ListsEachFileOfABusyDirectoryOnce) {
  AddDirectory("tail");
  auto source = *OpenSource(job_, {}, false, {}, 0);
  Random random(7);
  std::map<std::string, int> times;
  int64_t now_us = 0;
  for (int i = 0; i < 60; ++i) {
    if (random.Below(3) > 0) {
      const std::string name = absl::StrCat("tail/", random.Next());
      Put(name, name);
      times[JoinPath(folder_, name)] = 0;
    }
    if (random.Below(4) == 0) source = *OpenSource(job_, source->files(), false, {}, now_us);  // as a resume does
    ASSERT_TRUE(source->Poll(now_us += kSourcePollUs).ok());
  }
  for (size_t i = 0; i < source->files().size(); ++i) {
    EXPECT_EQ(source->files()[i].number(), i);
    ++times[source->files()[i].path()];
  }
  for (const auto& [path, count] : times) EXPECT_EQ(count, 1) << path;
}

}  // namespace
}  // namespace hearth
