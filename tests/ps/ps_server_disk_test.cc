// Whole servers whose disk fails at one call after the other while they train and save.
#include <gmock/gmock.h>

#include <cstring>
#include <iostream>

#include "embedding/snapshot_reader.h"
#include "tests/ps/servers.h"

namespace hearth {
namespace {

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
