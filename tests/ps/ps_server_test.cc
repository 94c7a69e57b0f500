// Whole servers over RocksDB, the scheduler and the workers played by the test.
#include "ps/ps_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/wire.h"
#include "embedding/rocksdb_store.h"
#include "embedding/snapshot_reader.h"
#include "ps/ps_client.h"
#include "tests/common/loopback.h"
#include "tests/ps/plan.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string NewFolder(const std::string& name) {
  static std::atomic<int> next{0};
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("ps_server_", name, "_", getpid(), "_", ++next));
  HEARTH_CHECK(RemoveTree(folder).ok() && MakeDirectories(folder).ok());
  return folder;
}

// P servers on threads, from Hello to Goodbye.
class Servers {
 public:
  Servers(const Job& job, const std::string& dir, int servers, const std::string& live = "")
      : job_(job), dir_(dir), hub_(Env::Real(), 2 + servers) {
    ranks_.servers = servers;
    statuses_.resize(servers);
    for (int i = 0; i < servers; ++i) {
      threads_.push_back(Env::Real()->StartThread("ps", [this, i, live] {
        PsServerOptions options;
        options.env = Env::Real();
        options.transport = hub_.transport(ranks_.server(i));
        options.job = job_;
        options.ranks = ranks_;
        options.dir = dir_;
        options.live_dir = live;
        PsServer server(std::move(options));
        statuses_[i] = server.Run();
        if (!statuses_[i].ok()) HEARTH_CHECK(SendFailed(hub_.transport(ranks_.server(i)), ranks_, statuses_[i]).ok());
      }));
    }
    for (int i = 0; i < servers; ++i) {
      const Control hello = Next();
      EXPECT_TRUE(hello.has_hello()) << hello.DebugString();
      EXPECT_EQ(hello.from_role(), "ps");
      EXPECT_EQ(hello.hello().job_hash(), JobHash(job_));
    }
  }
  ~Servers() { Stop(); }

  Control Next() {
    auto message = hub_.transport(0)->Open(kPortScheduler)->Receive(kNever);
    const absl::Span<const char> body = OpaqueBody(message->payload.span());
    Control control;
    HEARTH_CHECK(control.ParseFromArray(body.data(), static_cast<int>(body.size())));
    return control;
  }
  void Tell(const Control& control) {
    Header header;
    header.kind = MessageKind::kControl;
    const std::string body = control.SerializeAsString();
    for (int i = 0; i < ranks_.servers; ++i) {
      const Bytes message = EncodeOpaque(header, {body.data(), body.size()});
      HEARTH_CHECK(hub_.transport(0)->Send(kPortScheduler, {ranks_.server(i), kPortServer}, message.Clone()).ok());
    }
  }
  void Start(uint64_t step, const std::string& snapshot, bool read_only = false) {
    Control control;
    control.mutable_start_server()->set_step(step);
    control.mutable_start_server()->set_snapshot(snapshot);
    control.mutable_start_server()->set_read_only(read_only);
    Tell(control);
  }
  // Every server's answer, of one kind.
  std::vector<Control> Gather(bool (Control::*has)() const) {
    std::vector<Control> all;
    while (static_cast<int>(all.size()) < ranks_.servers) {
      all.push_back(Next());
      EXPECT_TRUE((all.back().*has)()) << all.back().DebugString();
    }
    return all;
  }
  // The parts of cut `step` as a committed snapshot.
  std::string Commit(uint64_t step) {
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_job(PrintJob(job_));
    manifest.set_lanes(job_.training().lanes());
    manifest.set_shards(job_.training().shards());
    manifest.set_servers(static_cast<uint32_t>(ranks_.servers));
    uint64_t hash = 0;
    for (const Control& control : Gather(&Control::has_server_at_cut)) {
      EXPECT_EQ(control.server_at_cut().step(), step);
      EXPECT_EQ(control.server_at_cut().table_size(), job_.table_size());
      EXPECT_GT(control.server_at_cut().peak_rss_bytes(), 0u);
      for (const FileEntry& file : control.server_at_cut().file()) *manifest.add_file() = file;
      hash += control.server_at_cut().rows_hash();
    }
    manifest.set_rows_hash(hash);
    const std::string folder = JoinPath(JoinPath(dir_, "snapshots"), absl::StrCat(step));
    HEARTH_CHECK(CommitManifest(folder, manifest).ok());
    return folder;
  }
  void Stop() {
    if (threads_.empty()) return;
    Control control;
    control.mutable_goodbye()->set_exit_code(0);
    Tell(control);
    threads_.clear();  // joins
  }

  // One worker with all lanes, from the cut `from` to the cut `to`; commits every cut on the way.
  std::string Train(const Plan& plan, const Reference& reference, uint64_t from, uint64_t to) {
    PullClient pulls(Client(), kPortPull);
    PushClient pushes(Client());
    std::map<std::pair<uint64_t, uint32_t>, LaneBatch> in_flight;
    std::string folder;
    uint64_t sent = from;
    for (uint64_t step = from + 1; step <= to; ++step) {
      for (; sent < std::min(to, step + plan.staleness); ++sent) {
        for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
          LaneBatch& batch = in_flight[{sent + 1, lane}];
          batch = plan.MakeBatch(lane, sent + 1);
          HEARTH_CHECK(pulls.Send(lane, sent + 1, plan.View(sent + 1), RowsOf(&batch)).ok());
        }
      }
      for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        LaneBatch& batch = in_flight[{step, lane}];
        std::vector<TableRows> tables = RowsOf(&batch);
        const absl::Status received = pulls.Receive(lane, step, absl::MakeSpan(tables));
        HEARTH_CHECK(received.ok(), "pull: ", received.ToString());
        const LaneBatch expected = reference.Pull(lane, step);
        for (uint32_t t = 0; t < kTables; ++t) {
          EXPECT_TRUE(SameBits(batch[t].rows, expected[t].rows))
              << "lane " << lane << ", step " << step << ", table " << t + 1;
        }
        plan.Train(lane, step, &batch);
      }
      for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        LaneBatch& batch = in_flight[{step, lane}];
        HEARTH_CHECK(
            pushes.Push(lane, step, plan.Records(step), plan.NextCut(step), plan.Skip(step), RowsOf(&batch)).ok());
        in_flight.erase({step, lane});
      }
      if (plan.IsCut(step)) folder = Commit(step);
    }
    HEARTH_CHECK(pushes.Flush().ok());
    return folder;
  }
  ClientOptions Client() {
    ClientOptions options;
    options.env = Env::Real();
    options.transport = hub_.transport(ranks_.worker(0));
    options.map = ShardMap(job_.training().shards(), static_cast<uint32_t>(ranks_.servers));
    options.ranks = ranks_;
    return options;
  }
  static std::vector<TableRows> RowsOf(LaneBatch* batch) {
    std::vector<TableRows> tables;
    for (uint32_t t = 0; t < kTables; ++t) {
      TableBatch& table = (*batch)[t];
      tables.push_back({t + 1, kDims[t], table.signs, table.occurrences, absl::MakeSpan(table.rows)});
    }
    return tables;
  }
  const std::vector<absl::Status>& statuses() const { return statuses_; }

 private:
  const Job job_;
  const std::string dir_;
  Ranks ranks_;
  InProcessHub hub_;
  std::vector<absl::Status> statuses_;
  std::vector<std::unique_ptr<Thread>> threads_;
};

// Libraries that a sanitizer does not see into make their statics on first use: here, before there are threads.
class PsServerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    spdlog::info("event=first_use");
    const std::string folder = NewFolder("first_use");
    auto store = OpenRocksDbStore(JoinPath(folder, "live"), RocksDbOptions());
    HEARTH_CHECK(store.ok() && (*store)->Checkpoint(JoinPath(folder, "saved")).ok());
  }
};

Plan MakePlan() {
  Plan plan = Plan::Make(5, 2, 1, 18);
  plan.every_steps = 6;
  plan.asks = {plan.steps - plan.staleness};
  plan.ids = 60;
  plan.signs_max = 25;
  return plan;
}

TEST_F(PsServerTest, AFreshStartSavesStepZeroBeforeItIsReady) {
  const Plan plan = MakePlan();
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
  const Plan plan = MakePlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("resumed");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, before, live);
    servers.Start(0, "");
    for (int i = 0; i < 2 * before; ++i) servers.Next();  // cut 0, ready
    snapshot = servers.Train(plan, reference, 0, 6);
  }
  ASSERT_TRUE(VerifySnapshot(snapshot).ok()) << VerifySnapshot(snapshot);
  EXPECT_EQ(ReadManifest(snapshot)->rows_hash(), reference.Hash(6));
  Servers servers(plan.job(), dir, after, live);
  servers.Start(6, snapshot);
  uint64_t rows = 0;
  for (const Control& control : servers.Gather(&Control::has_server_ready)) rows += control.server_ready().rows();
  EXPECT_GT(rows, 0u);
  const std::string last = servers.Train(plan, reference, 6, plan.steps);
  EXPECT_EQ(ReadManifest(last)->rows_hash(), reference.Hash(plan.steps));
  ASSERT_TRUE(VerifySnapshot(last).ok()) << VerifySnapshot(last);  // checksums, of files read once and for all, too
  ASSERT_TRUE(VerifySnapshot(snapshot).ok()) << VerifySnapshot(snapshot);  // what was committed stays as it was
}

TEST_F(PsServerTest, ResumesOnAnyNumberOfServersWithTheHashOfTheRunNeverStopped) {
  RunResumed(2, 3);
  RunResumed(3, 1);
  RunResumed(2, 2);
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
  const Plan plan = MakePlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("apart");
  {
    Servers servers(plan.job(), dir, 1, live);
    servers.Start(0, "");
    for (int i = 0; i < 2; ++i) servers.Next();
    servers.Train(plan, reference, 0, 12);
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
  const Plan plan = MakePlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("damaged");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 1);
    servers.Start(0, "");
    for (int i = 0; i < 2; ++i) servers.Next();
    snapshot = servers.Train(plan, reference, 0, 12);
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
  const Plan plan = MakePlan();
  const Reference reference(plan);
  const std::string dir = NewFolder("evaluated");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 2);
    servers.Start(0, "");
    for (int i = 0; i < 4; ++i) servers.Next();
    snapshot = servers.Train(plan, reference, 0, 12);
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
  const Plan plan = MakePlan();
  const std::string dir = NewFolder("refused");
  std::string snapshot;
  {
    Servers servers(plan.job(), dir, 1);
    servers.Start(0, "");
    snapshot = servers.Commit(0);
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
  Job job = MakePlan().job();
  job.mutable_snapshot()->set_disk_free_bytes_min(uint64_t{1} << 60);
  const absl::Status status = FailureOf(job, NewFolder("full"), 0, "");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("snapshot.disk_free_bytes_min"));
}

TEST_F(PsServerTest, ServesItsFiguresOnThePortOfItsRank) {
  const Plan plan = MakePlan();
  Job job = plan.job();
  uint16_t port;
  { port = TakenPort().port(); }
  job.mutable_metrics()->set_prometheus_port(port - 1u);  // the scheduler's; rank 1 is the first server
  Servers servers(job, NewFolder("figures"), 1);
  servers.Start(0, "");
  servers.Next();  // cut 0
  servers.Next();  // ready
  servers.Train(plan, Reference(plan), 0, 6);
  const std::string page = HttpGet(port, "/metrics");
  const std::string pushes = "hearth_requests_total{rank=\"1\",role=\"ps\",kind=\"push\"} ";
  EXPECT_THAT(page, AllOf(HasSubstr(pushes), Not(HasSubstr(pushes + "0"))));
  EXPECT_THAT(page, HasSubstr("hearth_memory_rows{"));
  servers.Stop();
  EXPECT_TRUE(servers.statuses()[0].ok()) << servers.statuses()[0];
}

TEST_F(PsServerTest, APortInUseIsOneClearError) {
  const TakenPort taken;
  InProcessHub hub(Env::Real(), 3);
  PsServerOptions options;
  options.env = Env::Real();
  options.transport = hub.transport(1);
  options.job = MakePlan().job();
  options.job.mutable_metrics()->set_prometheus_port(taken.port() - 1u);
  options.dir = NewFolder("port");
  const absl::Status status = PsServer(std::move(options)).Run();
  EXPECT_EQ(ExitCodeOf(status), kExitIo) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("port ", taken.port())));
}

TEST_F(PsServerTest, AMessageBeforeTheStartAndAStrayControlMessageAreInternal) {
  const Job job = MakePlan().job();
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
