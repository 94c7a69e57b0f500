#include "ps/ps_server.h"

#include <gmock/gmock.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "embedding/snapshot_reader.h"
#include "tests/common/loopback.h"
#include "tests/ps/servers.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kServersMost = 3;
#else
constexpr int kServersMost = 8;
#endif

TEST_F(PsServerTest, AFreshStartSavesStepZeroBeforeItIsReady) {
  const Plan plan = MakeServerPlan();
  const std::string dir = NewFolder("fresh");
  Servers servers(plan.job(), dir, 2);
  servers.Start(0, "");
  int at_cut = 0, ready = 0;
  while (ready < 2) {
    const Control control = servers.Next();
    if (control.has_server_at_cut()) {
      EXPECT_EQ(control.server_at_cut().step(), 0u);
      EXPECT_EQ(control.server_at_cut().rows_hash(), 0u);
      for (const FileEntry& file : control.server_at_cut().file()) {
        EXPECT_TRUE(PathExists(JoinPath(JoinPath(dir, "snapshots/0"), file.path()))) << file.path();
      }
      ++at_cut;
    } else {
      ASSERT_TRUE(control.has_server_ready()) << control.DebugString();
      ++ready;
      EXPECT_GE(at_cut, ready);
    }
  }
  servers.Stop();
  for (const absl::Status& status : servers.statuses()) EXPECT_TRUE(status.ok()) << status;
}

// A run to the cut at 6 on `before` servers, and from there to the end on `after`.
void RunResumed(int before, int after, const std::string& live = "") {
  SCOPED_TRACE(absl::StrCat(before, " servers, then ", after));
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("resumed");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, before, nullptr, live);
    servers.Start(0, "");
    for (int i = 0; i < 2 * before; ++i) servers.Next();  // cut 0, ready
    snapshot = servers.Train(plan, reference, 0, 6).value();
  }
  ASSERT_TRUE(VerifySnapshot(snapshot).ok()) << VerifySnapshot(snapshot);
  EXPECT_EQ(ReadManifest(snapshot)->rows_hash(), reference.Hash(6));
  Servers servers(plan.job(), dir, after, nullptr, live);
  servers.Start(6, snapshot);
  uint64_t rows = 0;
  for (const Control& control : servers.Gather(&Control::has_server_ready)) rows += control.server_ready().rows();
  EXPECT_GT(rows, 0u);
  const std::string last = servers.Train(plan, reference, 6, plan.steps).value();
  EXPECT_EQ(ReadManifest(last)->rows_hash(), reference.Hash(plan.steps));
  ASSERT_TRUE(VerifySnapshot(last).ok()) << VerifySnapshot(last);  // checksums, of files read once and for all, too
  ASSERT_TRUE(VerifySnapshot(snapshot).ok()) << VerifySnapshot(snapshot);  // what was committed stays as it was
}

TEST_F(PsServerTest, ResumesOnAnyNumberOfServersWithTheHashOfTheRunNeverStopped) {
  RunResumed(2, 3);
  RunResumed(3, 1);
  RunResumed(2, 2);
}

TEST_F(PsServerTest, ASnapshotOfAnyNumberOfServersIsTheSameOnAnyOther) {
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  LaneBatch all(kTables);
  for (uint32_t t = 0; t < kTables; ++t) {
    for (uint64_t id = 1; id <= plan.ids; ++id) all[t].signs.push_back(MakeSign(t + 1, id));
    all[t].rows.resize(plan.ids * kDims[t]);
  }
  LaneBatch expected = all;
  reference.Evaluate(6, &expected);
  Job jobs[2] = {plan.job(), plan.job()};  // all rows in memory, and next to none
  for (int i = 0; i < 2; ++i) {
    for (Table& table : *jobs[i].mutable_table()) table.set_memory_rows_max(i == 0 ? 1000 : 2);
  }
  for (int before = 1; before <= kServersMost; ++before) {
    const std::string dir = NewFolder("dealt");
    const FailingDisk disk(dir);  // that does not fail, and waits for no sync
    std::string snapshot;
    {
      Servers servers(jobs[before % 2], dir, before);
      servers.Start(0, "");
      for (int i = 0; i < 2 * before; ++i) servers.Next();  // cut 0, ready
      snapshot = servers.Train(plan, reference, 0, 6).value();
    }
    ASSERT_EQ(ReadManifest(snapshot)->rows_hash(), reference.Hash(6));
    for (int after = 1; after <= kServersMost; ++after) {
      SCOPED_TRACE(absl::StrCat(before, " servers, then ", after));
      Servers servers(jobs[after / 2 % 2], JoinPath(dir, absl::StrCat("on-", after)), after);
      servers.Start(6, snapshot);
      uint64_t rows = 0;
      for (const Control& control : servers.Gather(&Control::has_server_ready)) rows += control.server_ready().rows();
      EXPECT_EQ(rows, reference.RowsAt(6));
      LaneBatch restored = all;
      std::vector<TableRows> tables = Servers::RowsOf(&restored);
      ASSERT_TRUE(PullClient(servers.Client(), kPortPull).ReadOnly(6, absl::MakeSpan(tables)).ok());
      for (uint32_t t = 0; t < kTables; ++t) EXPECT_TRUE(SameBits(restored[t].rows, expected[t].rows)) << t;
      const std::string next = servers.Train(plan, reference, 6, 12).value();
      EXPECT_EQ(ReadManifest(next)->rows_hash(), reference.Hash(12));
    }
    EXPECT_TRUE(RemoveTree(dir).ok());
  }
}

// Memory as a host's own disk: no file there has a name in the run's folder.
TEST_F(PsServerTest, WorksOnAnotherFileSystemAndCopiesToItsSnapshotsWhatIsNew) {
  const std::string live = absl::StrCat("/dev/shm/hearth_ps_server_test_", getpid());
  if (!MakeDirectories(live).ok() || CanLinkFiles(live, testing::TempDir())) {
    GTEST_SKIP() << "/dev/shm is no file system of its own here";
  }
  RunResumed(2, 2, live);
  RunResumed(2, 3, live);
  const std::vector<std::string> working = ListDirectory(live).value();
  for (const std::string& name : working) {
    if (!absl::EndsWith(name, "-cuts")) continue;
    EXPECT_EQ(ListDirectory(JoinPath(live, name)).value().size(), 0u) << name << ": a cut that stayed on its way";
  }
  // What a snapshot has in common with the one before it is the same file.
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("apart");
  {
    Servers servers(plan.job(), dir, 1, nullptr, live);
    servers.Start(0, "");
    for (int i = 0; i < 2; ++i) servers.Next();
    ASSERT_TRUE(servers.Train(plan, reference, 0, 12).ok());
  }
  int shared = 0;
  const std::string last = JoinPath(dir, "snapshots/12/ps-0");
  const std::vector<std::string> files = ListDirectory(last).value();
  for (const std::string& name : files) {
    if (HoldsRows(name) && std::filesystem::hard_link_count(JoinPath(last, name)) > 1) ++shared;
  }
  EXPECT_GT(shared, 0);
  ASSERT_TRUE(RemoveTree(live).ok());
}

TEST_F(PsServerTest, RowsThatAreNotWhatWasWrittenAreMetBesideTheWork) {
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("damaged");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 1);
    servers.Start(0, "");
    for (int i = 0; i < 2; ++i) servers.Next();
    snapshot = servers.Train(plan, reference, 0, 12).value();
  }
  std::string victim;
  const std::vector<std::string> names = ListDirectory(JoinPath(snapshot, "ps-0")).value();
  for (const std::string& name : names) {
    if (HoldsRows(name)) victim = JoinPath(JoinPath(snapshot, "ps-0"), name);
  }
  ASSERT_FALSE(victim.empty());
  std::string bytes = ReadFile(victim).value();
  bytes[20] ^= 1;
  ASSERT_TRUE(WriteFileAtomically(victim, bytes).ok());
  Servers servers(plan.job(), dir, 1);
  servers.Start(12, snapshot);
  Control control = servers.Next();
  if (control.has_server_ready()) control = servers.Next();
  ASSERT_TRUE(control.has_failed()) << control.DebugString();
  EXPECT_EQ(control.failed().exit_code(), kExitBadData) << control.DebugString();
  servers.Stop();
}

TEST_F(PsServerTest, EvaluatesASnapshotReadOnly) {
  const Plan plan = MakeServerPlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("evaluated");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 2);
    servers.Start(0, "");
    for (int i = 0; i < 4; ++i) servers.Next();
    snapshot = servers.Train(plan, reference, 0, 12).value();
  }
  Servers servers(plan.job(), NewFolder("evaluating"), 3);
  servers.Start(12, snapshot, /*read_only=*/true);
  servers.Gather(&Control::has_server_ready);
  PullClient client(servers.Client(), kPortPull);
  for (uint64_t step = 1; step <= 10; ++step) {
    LaneBatch batch = plan.MakeBatch(0, step);
    LaneBatch expected = batch;
    std::vector<TableRows> tables = Servers::RowsOf(&batch);
    ASSERT_TRUE(client.ReadOnly(12, absl::MakeSpan(tables)).ok());
    reference.Evaluate(12, &expected);
    for (uint32_t t = 0; t < kTables; ++t) EXPECT_TRUE(SameBits(batch[t].rows, expected[t].rows));
  }
}

// Starts one server that must fail, and returns how; checks that the scheduler hears of it.
absl::Status FailureOf(const Job& job, const std::string& dir, uint64_t step, const std::string& snapshot) {
  Servers servers(job, dir, 1);
  servers.Start(step, snapshot);
  const Control control = servers.Next();
  EXPECT_TRUE(control.has_failed()) << control.DebugString();
  servers.Stop();
  EXPECT_EQ(control.failed().exit_code(), ExitCodeOf(servers.statuses()[0]));
  EXPECT_EQ(control.failed().reason(), std::string(servers.statuses()[0].message()));
  return servers.statuses()[0];
}

TEST_F(PsServerTest, ASnapshotThatDoesNotFitIsRefusedAndTheSchedulerHearsWhy) {
  const Plan plan = MakeServerPlan();
  const std::string dir = NewFolder("refused");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 1);
    servers.Start(0, "");
    snapshot = servers.Commit(0).value();
    servers.Next();  // ready
  }
  Job other = plan.job();
  other.mutable_training()->set_shards(8);
  absl::Status status = FailureOf(other, dir, 0, snapshot);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("training.shards 16"));
  EXPECT_EQ(FailureOf(plan.job(), dir, 7, snapshot).code(), absl::StatusCode::kDataLoss);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(snapshot, "MANIFEST"), "step: 0\n").ok());
  EXPECT_EQ(FailureOf(plan.job(), dir, 0, snapshot).code(), absl::StatusCode::kDataLoss);
}

TEST_F(PsServerTest, ADiskThatIsTooFullForACutIsOneClearError) {
  Job job = MakeServerPlan().job();
  job.mutable_snapshot()->set_disk_free_bytes_min(uint64_t{1} << 60);
  const absl::Status status = FailureOf(job, NewFolder("full"), 0, "");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("snapshot.disk_free_bytes_min"));
}

TEST_F(PsServerTest, ServesItsFiguresOnThePortOfItsRank) {
  const Plan plan = MakeServerPlan();
  Job job = plan.job();
  uint16_t port;
  { port = TakenPort().port(); }
  job.mutable_metrics()->set_prometheus_port(port - 1u);  // the scheduler's; rank 1 is the first server
  Servers servers(job, NewFolder("figures"), 1);
  servers.Start(0, "");
  servers.Next();  // cut 0
  servers.Next();  // ready
  ASSERT_TRUE(servers.Train(plan, Reference(plan), 0, 6).ok());
  const std::string page = HttpGet(port, "/metrics");
  const std::string pushes = "hearth_requests_total{rank=\"1\",role=\"ps\",kind=\"push\"} ";
  EXPECT_THAT(page, AllOf(HasSubstr(pushes), Not(HasSubstr(pushes + "0"))));
  EXPECT_THAT(page, HasSubstr("hearth_memory_rows{"));
  servers.Stop();
  EXPECT_TRUE(servers.statuses()[0].ok()) << servers.statuses()[0];
}

TEST_F(PsServerTest, TheLogSaysOfEachCutForHowLongItStoppedTheOthers) {
  const Plan plan = MakeServerPlan();
  const std::string dir = NewFolder("logged"), log = JoinPath(dir, "log");
  ASSERT_TRUE(StartLogging("ps-0", log).ok());
  uint64_t stopped_us = 0;
  {
    Servers servers(plan.job(), dir, 1);
    servers.Start(0, "");
    stopped_us = servers.Next().server_at_cut().stopped_us();
    servers.Next();  // ready
    ASSERT_TRUE(servers.Train(plan, Reference(plan), 0, 12).ok());
  }
  FlushLogging();
  ASSERT_TRUE(StartLogging("", "").ok());
  const std::string lines = ReadFile(log).value();
  for (const int step : {0, 6, 12}) {
    EXPECT_THAT(lines, ContainsRegex(absl::StrCat("event=cut step=", step, " .*stopped_ms=[0-9]+\\.[0-9] "))) << step;
  }
  EXPECT_THAT(lines, HasSubstr(absl::StrFormat("stopped_ms=%.1f ", static_cast<double>(stopped_us) * 1e-3)));
}

TEST_F(PsServerTest, APortInUseIsOneClearError) {
  const TakenPort taken;
  InProcessHub hub(Env::Real(), 3);
  PsServerOptions options;
  options.env = Env::Real();
  options.transport = hub.transport(1);
  options.job = MakeServerPlan().job();
  options.job.mutable_metrics()->set_prometheus_port(taken.port() - 1u);
  options.dir = NewFolder("port");
  const absl::Status status = PsServer(std::move(options)).Run();
  EXPECT_EQ(ExitCodeOf(status), kExitIo) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("port ", taken.port())));
}

TEST_F(PsServerTest, AMessageBeforeTheStartAndAStrayControlMessageAreInternal) {
  const Job job = MakeServerPlan().job();
  {
    Servers servers(job, NewFolder("early"), 1);
    PullClient client(servers.Client(), kPortPull);
    ASSERT_TRUE(client.Send(0, 1, 0, {}).ok());
    EXPECT_TRUE(servers.Next().has_failed());
    servers.Stop();
    EXPECT_EQ(servers.statuses()[0].code(), absl::StatusCode::kInternal) << servers.statuses()[0];
  }
  Servers servers(job, NewFolder("stray"), 1);
  servers.Start(0, "");
  servers.Next();
  servers.Next();
  servers.Start(0, "");
  EXPECT_TRUE(servers.Next().has_failed());
  servers.Stop();
  EXPECT_EQ(servers.statuses()[0].code(), absl::StatusCode::kInternal) << servers.statuses()[0];
}

}  // namespace
}  // namespace hearth
