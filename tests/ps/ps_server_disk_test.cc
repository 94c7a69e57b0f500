// Whole servers whose disk fails at one call after the other while they train and save.
#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <iostream>

#include "absl/strings/match.h"
#include "common/base/file_lock.h"
#include "common/net/control_message.h"
#include "embedding/snapshot_reader.h"
#include "tests/common/leaping_env.h"
#include "tests/ps/servers.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kFirstCut = 6;  // the disk is sound until then
constexpr int kServers = 2;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kRunsMax = 6;
#else
constexpr uint64_t kRunsMax = 24;
#endif

struct Outcome {
  uint64_t calls = 0;
  bool finished = false;
};

// Servers that go on from a snapshot, fail, and others that go on from what is left.
Outcome RunWith(const Plan& plan, const Reference& reference, const DiskFault& fault) {
  SCOPED_TRACE(
      absl::StrCat("call ", fault.at, fault.once ? " alone: " : " and all after it: ", std::strerror(fault.error)));
  const std::string dir = NewFolder("failing");
  const std::string snapshots = JoinPath(dir, "snapshots");
  Job job = plan.job();
  // RocksDB flushes with a fourth as many; all stores of a process share them.
  job.mutable_store()->set_compaction_threads(4 * kRunsAtOnce);
  FailingDisk disk(dir);
  Outcome outcome;
  uint64_t committed = 0;
  std::string first;
  {
    Servers servers(job, dir, kServers, &disk);
    servers.Start(0, "");
    for (int i = 0; i < 2 * kServers; ++i) servers.Next();  // cut 0, ready
    first = servers.Train(plan, reference, 0, kFirstCut).value();
  }
  {
    Servers servers(job, dir, kServers, &disk);
    disk.Arm(fault);
    servers.Start(kFirstCut, first);
    const absl::Status ready = servers.WaitUntilReady();
    const auto trained =
        ready.ok() ? servers.Train(plan, reference, kFirstCut, plan.steps) : absl::StatusOr<std::string>(ready);
    outcome.calls = disk.calls();
    outcome.finished = trained.ok();
    committed = servers.committed();
    const std::string failed = disk.first_failed();
    servers.Stop();
    disk.Arm(DiskFault());
    SCOPED_TRACE(failed);
    for (const absl::Status& status : servers.statuses()) {
      if (status.ok()) continue;
      EXPECT_EQ(ExitCodeOf(status), kExitIo) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr(dir));
      EXPECT_THAT(std::string(status.message()), HasSubstr(std::strerror(fault.error)));
    }
    if (!trained.ok()) {
      EXPECT_NE(failed, "");
      EXPECT_THAT(std::string(trained.status().message()), HasSubstr(dir));
      EXPECT_THAT(std::string(trained.status().message()), HasSubstr(std::strerror(fault.error)));
    }
  }
  // The newest snapshot that a start would find is one that was committed, and whole; the run goes on from it.
  const auto choice = FindNewestSnapshot(snapshots);
  if (!choice.ok()) {
    ADD_FAILURE() << choice.status();
    return outcome;
  }
  const uint64_t step = choice->manifest.step();
  EXPECT_GE(step, std::max(kFirstCut, committed));  // a commit whose last sync failed may be there
  EXPECT_EQ(choice->manifest.rows_hash(), reference.Hash(step));
  EXPECT_TRUE(VerifySnapshot(choice->folder).ok()) << VerifySnapshot(choice->folder);
  if (!outcome.finished) {
    Servers servers(job, dir, kServers);
    servers.Start(step, choice->folder);
    EXPECT_TRUE(servers.WaitUntilReady().ok());
    if (step < plan.steps) {
      const auto last = servers.Train(plan, reference, step, plan.steps);
      EXPECT_TRUE(last.ok() && ReadManifest(*last)->rows_hash() == reference.Hash(plan.steps)) << last.status();
    }
  }
  EXPECT_TRUE(RemoveTree(dir).ok());
  return outcome;
}

TEST_F(PsServerTest, AFailureIsReportedWhileTheDiskHangs) {
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("hanging");
  FailingDisk disk(dir);
  Servers servers(plan.job(), dir, 1, &disk);
  servers.Start(0, "");
  for (int i = 0; i < 2; ++i) servers.Next();  // cut 0, ready
  ASSERT_TRUE(servers.Train(plan, reference, 0, kFirstCut).ok());
  disk.Hold();
  absl::Status trained;
  auto trainer = Env::Real()->StartThread(
      "train", [&] { trained = servers.Train(plan, reference, kFirstCut, plan.steps).status(); });
  disk.WaitForHeldCall();  // the next cut can not be saved
  servers.Start(0, "");    // not to a running server
  trainer.reset();         // once it has heard of the failure
  EXPECT_THAT(std::string(trained.message()), HasSubstr("to a running server"));
  disk.Release();
  servers.Stop();
  EXPECT_EQ(servers.statuses()[0].code(), absl::StatusCode::kInternal) << servers.statuses()[0];
  EXPECT_FALSE(PathExists(JoinPath(dir, "snapshots/12/MANIFEST")));
}

// Memory as a disk of the host's own.
class AServersOwnDisk : public PsServerTest {
 protected:
  static constexpr uint64_t kFreeBytesMin = uint64_t{64} << 20;

  void SetUp() override {
    const std::string live = absl::StrCat("/dev/shm/hearth_ps_server_disk_test_", getpid());
    if (!MakeDirectories(live).ok() || CanLinkFiles(live, testing::TempDir())) {
      GTEST_SKIP() << "/dev/shm is no file system of its own here";
    }
    live_ = live;
  }
  void TearDown() override {
    if (!live_.empty()) {
      EXPECT_TRUE(RemoveTree(live_).ok());
    }
  }

  // A run to kFirstCut.
  std::string Begin(const std::string& live) const {
    Servers servers(plan_.job(), dir_, 1, nullptr, live);
    servers.Start(0, "");
    for (int i = 0; i < 2; ++i) servers.Next();  // cut 0, ready
    return servers.Train(plan_, reference_, 0, kFirstCut).value();
  }
  // It goes on to its end: OK, or what the server said.
  absl::Status GoOn(const std::string& live, const std::string& snapshot) const {
    Servers servers(plan_.job(), dir_, 1, nullptr, live);
    servers.Start(kFirstCut, snapshot);
    absl::Status status = servers.WaitUntilReady();
    if (status.ok()) status = servers.Train(plan_, reference_, kFirstCut, plan_.steps).status();
    servers.Stop();
    EXPECT_EQ(ExitCodeOf(servers.statuses()[0]), status.ok() ? kExitOk : kExitIo) << servers.statuses()[0];
    return status;
  }

  const Plan plan_ = MakeServerPlan();
  const Reference reference_{plan_};
  const std::string dir_ = NewFolder("own_disk");
  std::string live_;
};

TEST_F(AServersOwnDisk, HasOneCutOnItsWayToASlowDiskAndTheNextOneWaits) {
  const Plan plan = MakeServerPlan(/*steps=*/36);
  const Reference reference(plan);
  ASSERT_EQ(plan.every_steps, 6u);
  const std::string log = JoinPath(dir_, "log");
  ASSERT_TRUE(StartLogging("ps-0", log).ok());
  FailingDisk disk(JoinPath(dir_, "snapshots"));
  Servers servers(plan.job(), dir_, 1, nullptr, live_);
  servers.Start(0, "");
  for (int i = 0; i < 2; ++i) servers.Next();  // cut 0, ready
  disk.Hold();
  std::atomic<bool> trained{false};
  auto trainer = Env::Real()->StartThread("train", [&] {
    EXPECT_TRUE(servers.Train(plan, reference, 0, plan.steps, /*commit=*/false).ok());
    trained = true;
  });
  disk.WaitForHeldCall();  // cut 6 is being copied; steps go on, to cut 18 at most
  const auto pause = Env::Real()->NewEvent();
  const std::string waits = "event=cut_waits step=12 for=6";
  while (!trained && !absl::StrContains(ReadFile(log).value(), waits)) {
    FlushLogging();
    pause->WaitUntil(Env::Real()->NowUs() + 1000);
  }
  EXPECT_FALSE(trained) << "nothing was saved, and all steps were made";
  EXPECT_THAT(ListDirectory(JoinPath(live_, "ps-0-cuts")).value(), ElementsAre("6"));
  disk.Release();
  for (const uint64_t step : {6, 12, 18, 24, 30, 36}) {
    const auto snapshot = servers.Commit(step);
    ASSERT_TRUE(snapshot.ok()) << snapshot.status();
    EXPECT_EQ(ReadManifest(*snapshot)->rows_hash(), reference.Hash(step));
    EXPECT_TRUE(VerifySnapshot(*snapshot).ok()) << VerifySnapshot(*snapshot);
  }
  trainer.reset();
  servers.Stop();
  FlushLogging();
  ASSERT_TRUE(StartLogging("", "").ok());
  EXPECT_TRUE(servers.statuses()[0].ok()) << servers.statuses()[0];
}

TEST_F(AServersOwnDisk, IsBoundedAndTheOneOfItsSnapshotsIs) {
  const std::string snapshot = Begin(live_);
  for (const std::string& folder : {live_, JoinPath(dir_, "snapshots")}) {
    SCOPED_TRACE(folder);
    FailingDisk disk(folder);
    disk.SetFreeBytes(kFreeBytesMin);
    const absl::Status status = GoOn(live_, snapshot);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr(JoinPath(folder, "")), HasSubstr("snapshot.disk_free_bytes_min"),
                      HasSubstr("share of one of 1 writers")));
    EXPECT_TRUE(VerifySnapshot(snapshot).ok()) << "what was committed stays";
    EXPECT_EQ(FindNewestSnapshot(JoinPath(dir_, "snapshots"))->folder, snapshot);
  }
  const absl::Status status = GoOn(live_, snapshot);
  EXPECT_TRUE(status.ok()) << "there is room again: " << status;
}

// A snapshot is names of the store's files, so it takes no room but theirs.
TEST_F(AServersOwnDisk, ThatIsTheOneOfItsSnapshotsIsCountedOnce) {
  const std::string live = NewFolder("one_disk");
  const std::string snapshot = Begin(live);
  FailingDisk disk(JoinPath(dir_, "snapshots"));
  disk.SetFreeBytes(kFreeBytesMin);
  const absl::Status status = GoOn(live, snapshot);
  EXPECT_TRUE(status.ok()) << status;
  FailingDisk full(live);
  full.SetFreeBytes(0);
  Servers servers(plan_.job(), dir_, 1, nullptr, live);
  servers.Start(kFirstCut, snapshot, /*read_only=*/true);
  EXPECT_TRUE(servers.WaitUntilReady().ok()) << "who writes no row needs no room";
}

TEST_F(AServersOwnDisk, ThatHasTwoMountPointsIsSharedByTheStoreAndItsCopies) {
  const std::string live = NewFolder("one_disk");
  const std::string snapshot = Begin(live);
  FailingDisk disk(JoinPath(dir_, "snapshots"));
  disk.SetFreeBytes(kFreeBytesMin);
  disk.Arm({1, true, EXDEV});  // the first call there is to make a link
  const absl::Status status = GoOn(live, snapshot);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(JoinPath(dir_, "snapshots/")), HasSubstr("share of one of 2 writers")));
}

TEST_F(PsServerTest, AWorkingStoreThatAnotherProcessHasIsRefusedAndFreeOnceThatIsGone) {
  const Plan plan = MakeServerPlan();
  const std::string dir = NewFolder("locked"), live = NewFolder("locked_live"), path = JoinPath(live, "ps-0.lock");
  ASSERT_TRUE(MakeDirectories(JoinPath(live, "ps-0")).ok());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(live, "ps-0/CURRENT"), "theirs").ok());
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t other = fork();
  if (other == 0) {
    const auto lock = FileLock::Take(Env::Real(), path, 0);
    if (write(ready[1], lock.ok() ? "y" : "n", 1) != 1) _exit(1);
    while (true) pause();
  }
  char taken = 0;
  ASSERT_EQ(read(ready[0], &taken, 1), 1);
  ASSERT_EQ(taken, 'y');
  {
    LeapingEnv env;
    InProcessHub hub(Env::Real(), 3);
    Control goodbye;
    goodbye.mutable_goodbye()->set_exit_code(0);
    ASSERT_TRUE(hub.transport(0)->Send(kPortScheduler, {1, kPortServer}, EncodeControl(goodbye)).ok());
    PsServerOptions options;
    options.env = &env;
    options.transport = hub.transport(1);
    options.job = plan.job();
    options.dir = dir;
    options.live_dir = live;
    const absl::Status status = PsServer(std::move(options)).Run();
    EXPECT_EQ(ExitCodeOf(status), kExitConfig) << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr(JoinPath(live, "ps-0")), HasSubstr(absl::StrCat("process ", other, " on ")),
                      HasSubstr("another --live")));
  }
  EXPECT_EQ(ReadFile(JoinPath(live, "ps-0/CURRENT")).value(), "theirs") << "nothing there was touched";
  ASSERT_EQ(kill(other, SIGKILL), 0);
  ASSERT_EQ(waitpid(other, nullptr, 0), other);
  Servers servers(plan.job(), dir, 1, nullptr, live);
  servers.Start(0, "");
  EXPECT_TRUE(servers.Commit(0).ok());
  EXPECT_FALSE(FileLock::Take(Env::Real(), path, 0).ok()) << "held as long as it works there";
  servers.Next();  // ready
  close(ready[0]);
  close(ready[1]);
}

class AServersFailingDisk : public PsServerTest, public testing::WithParamInterface<DiskFault> {};

TEST_P(AServersFailingDisk, IsTheErrorThatTheSchedulerHearsAndTheRunGoesOnFromTheLastCommittedCut) {
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const Outcome sound = RunWith(plan, reference, DiskFault());
  ASSERT_TRUE(sound.finished);
  ASSERT_GT(sound.calls, 50u);
  const std::vector<Outcome> outcomes = RunWithFaults(
      GetParam(), sound.calls, kRunsMax, [&](const DiskFault& fault) { return RunWith(plan, reference, fault); });
  std::cout << sound.calls << " calls; of " << outcomes.size() << " runs "
            << std::count_if(outcomes.begin(), outcomes.end(), [](const Outcome& outcome) { return outcome.finished; })
            << " went on\n";
}

INSTANTIATE_TEST_SUITE_P(All, AServersFailingDisk, testing::ValuesIn(kDiskFaults),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace hearth
