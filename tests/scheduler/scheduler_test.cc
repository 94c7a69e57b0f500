// The scheduler against scripted servers and workers, over an in-process hub. The test's thread plays all of them, one
// after the other; the scheduler runs on a thread of its own.
#include "scheduler/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/artifact/bundle_chain.h"
#include "common/artifact/history.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/wire.h"
#include "common/proto/event.pb.h"
#include "tests/scheduler/scheduler_testing.h"

namespace hearth {
namespace {

using testing::HasSubstr;

constexpr int64_t kPatienceUs = 30'000'000;  // a test that waits so long has failed

class Cluster {
 public:
  Cluster(SchedulerOptions options)
      : env_(Env::Real()),
        servers_(options.servers),
        workers_(options.workers),
        hub_(env_, static_cast<int>(1 + servers_ + workers_)),
        job_(options.job),
        dir_(options.dir) {
    options.env = env_;
    options.transport = hub_.transport(0);
    options.stop_asked = [this] { return stop_.load(); };
    options.output.table = &table_;
    options.output.progress = &progress_;
    thread_ = env_->StartThread("scheduler", [this, options] {
      Scheduler scheduler(options);
      result_ = scheduler.Run();
    });
  }

  absl::StatusOr<int> Join() {
    thread_.reset();
    return result_;
  }
  void RaiseStopSignal() { stop_ = true; }
  std::string table() const { return table_.str(); }  // after Join

  int Server(uint32_t index) const { return static_cast<int>(1 + index); }
  int Worker(uint32_t index) const { return static_cast<int>(1 + servers_ + index); }

  void Send(int rank, const Control& control) {
    Header header;
    header.kind = MessageKind::kControl;
    const std::string body = control.SerializeAsString();
    ASSERT_TRUE(hub_.transport(rank)
                    ->Send(PortOf(rank), {0, kPortScheduler}, EncodeOpaque(header, {body.data(), body.size()}))
                    .ok());
  }

  // The next message to `rank`, which must be of this kind.
  Control Expect(int rank, Control::KindCase kind) {
    const auto message = hub_.transport(rank)->Open(PortOf(rank))->Receive(env_->NowUs() + kPatienceUs);
    Control control;
    if (!message.has_value()) {
      ADD_FAILURE() << "no message to rank " << rank << ", expected kind " << kind;
      return control;
    }
    const auto body = OpaqueBody(message->payload.span());
    EXPECT_TRUE(control.ParseFromArray(body.data(), static_cast<int>(body.size())));
    EXPECT_EQ(control.kind_case(), kind) << "to rank " << rank;
    return control;
  }
  bool HasMessage(int rank) { return hub_.transport(rank)->Open(PortOf(rank))->Receive(0).has_value(); }

  void Hello(int rank) {
    Control control;
    control.mutable_hello()->set_job_hash(JobHash(job_));
    Send(rank, control);
  }
  void AllHello() {
    for (int rank = 1; rank <= static_cast<int>(servers_ + workers_); ++rank) Hello(rank);
  }

  // The servers' part of a start; on a fresh one with their cut at step 0.
  StartServer StartServers() {
    StartServer first;
    for (uint32_t s = 0; s < servers_; ++s) {
      first = Expect(Server(s), Control::kStartServer).start_server();
      if (first.snapshot().empty() && !first.read_only()) ServerAtCutOf(s, 0);
      Control ready;
      ready.mutable_server_ready()->set_rows(0);
      Send(Server(s), ready);
    }
    return first;
  }
  // The workers' part, up to Go. Their StartWorker messages.
  std::vector<StartWorker> StartWorkers() {
    std::vector<StartWorker> starts;
    for (uint32_t w = 0; w < workers_; ++w) {
      starts.push_back(Expect(Worker(w), Control::kStartWorker).start_worker());
      Control ready;
      ready.mutable_worker_ready()->set_dense_parameters(77);
      Send(Worker(w), ready);
      if (starts.back().snapshot().empty()) WorkerAtCutOf(w, 0, starts.back().lanes());
    }
    return starts;
  }
  std::vector<StartWorker> StartAll() {
    AllHello();
    StartServers();
    const std::vector<StartWorker> starts = StartWorkers();
    for (uint32_t w = 0; w < workers_; ++w) Expect(Worker(w), Control::kGo);
    return starts;
  }

  void ServerAtCutOf(uint32_t server, uint64_t step) {
    const std::string folder = JoinPath(dir_, absl::StrCat("snapshots/", step));
    const std::string name = absl::StrCat("ps-", server);
    ASSERT_TRUE(MakeDirectories(JoinPath(folder, name)).ok());
    ASSERT_TRUE(
        WriteFileAtomically(JoinPath(folder, name + "/rows"), absl::StrCat("rows of ", server, " at ", step)).ok());
    Control control;
    ServerAtCut* part = control.mutable_server_at_cut();
    part->set_step(step);
    part->set_rows_hash(step * 1000 + server);
    part->add_table()->set_name("video");
    part->set_rows_verified(rows_verified);
    const auto described = DescribeFiles(folder, {name});
    ASSERT_TRUE(described.ok());
    for (const FileEntry& file : *described) *part->add_file() = file;
    Send(Server(server), control);
  }

  bool rows_verified = true;  // as all servers say it
  struct CutFlags {
    bool epoch_ended = false;
    bool job_finished = false;
    bool stopping = false;
    uint64_t rejected = 0;  // of 100 read by each lane in each step
    uint32_t epoch = 0;
    bool unsound = false;  // a ledger that does not add up
  };
  void WorkerAtCutOf(uint32_t worker, uint64_t step, uint32_t lanes, CutFlags flags) {
    Control control;
    WorkerAtCut* part = control.mutable_worker_at_cut();
    part->set_step(step);
    for (uint32_t l = worker; l < lanes; l += workers_) {
      LaneState* lane = part->add_lane();
      lane->mutable_cursor()->set_lane(l);
      lane->mutable_cursor()->set_epoch(flags.epoch);
      lane->mutable_cursor()->set_window(step);
      lane->mutable_cursor()->set_record(1);
      lane->mutable_cursor()->set_end_of_epoch(flags.epoch_ended);
      lane->mutable_ledger()->set_read(step * 100);
      lane->mutable_ledger()->set_rejected(step * flags.rejected);
      lane->mutable_ledger()->set_trained(step * (100 - flags.rejected) + (flags.unsound ? 1 : 0));
    }
    if (worker == 0) {
      const std::string folder = JoinPath(dir_, absl::StrCat("snapshots/", step));
      ASSERT_TRUE(MakeDirectories(folder).ok());
      ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "dense.safetensors"), absl::StrCat("dense at ", step)).ok());
      const auto described = DescribeFiles(folder, {"dense.safetensors"});
      ASSERT_TRUE(described.ok());
      *part->add_file() = (*described)[0];
      part->set_dense_hash(step + 5);
    }
    part->set_epoch_ended(flags.epoch_ended);
    part->set_job_finished(flags.job_finished);
    part->set_stopping(flags.stopping);
    part->mutable_progress()->set_step(step);
    if (step > 0) AddWindow(step, part->mutable_progress());
    Send(Worker(worker), control);
  }
  static void AddWindow(uint64_t step, Progress* progress) {
    ValidationWindow* window = progress->add_window();
    window->set_last_step(step);
    TaskMetric* metric = window->add_task();
    metric->set_labelled(2);
    metric->set_loss_sum(1);
    metric->set_prediction_sum(1);
    for (const uint64_t count : {0, 1}) {
      metric->add_positives(count);
      metric->add_negatives(1 - count);
    }
  }
  void WorkerAtCutOf(uint32_t worker, uint64_t step, uint32_t lanes) { WorkerAtCutOf(worker, step, lanes, CutFlags()); }
  void CutOf(uint64_t step, uint32_t lanes, CutFlags flags) {
    for (uint32_t w = 0; w < workers_; ++w) WorkerAtCutOf(w, step, lanes, flags);
    for (uint32_t s = 0; s < servers_; ++s) ServerAtCutOf(s, step);
  }
  void CutOf(uint64_t step, uint32_t lanes) { CutOf(step, lanes, CutFlags()); }

  void EvaluationOf(const std::string& split, uint64_t step, double auc) {
    Control control;
    control.mutable_evaluation()->set_split(split);
    control.mutable_evaluation()->set_step(step);
    Evaluation::Task* task = control.mutable_evaluation()->add_task();
    task->set_name("click");
    task->set_samples(10);
    task->set_auc(auc);
    Evaluation::Diagnostics::Gate* gate = control.mutable_evaluation()->mutable_diagnostics()->add_gate();
    gate->set_name("level2.task.click");
    gate->set_weight_max(0.5);
    Send(Worker(0), control);
  }

  // Everybody is told to leave with this code; the scheduler ends with it.
  void ExpectGoodbye(int exit_code) {
    for (int rank = 1; rank <= static_cast<int>(servers_ + workers_); ++rank) {
      EXPECT_EQ(Expect(rank, Control::kGoodbye).goodbye().exit_code(), exit_code);
    }
    const absl::StatusOr<int> code = Join();
    ASSERT_TRUE(code.ok()) << code.status();
    EXPECT_EQ(*code, exit_code);
  }
  void Finish(uint64_t step, uint32_t lanes) {
    CutFlags last;
    last.epoch_ended = last.job_finished = last.stopping = true;
    CutOf(step, lanes, last);
    for (const Split& split : job_.split()) EvaluationOf(split.name(), step, 0.75);
    ExpectGoodbye(0);
  }
  void Stop(uint64_t step, uint32_t lanes, uint32_t epoch = 0) {
    CutFlags last;
    last.stopping = true;
    last.epoch = epoch;
    CutOf(step, lanes, last);
    ExpectGoodbye(75);
  }

 private:
  int PortOf(int rank) const { return rank <= static_cast<int>(servers_) ? kPortServer : kPortControl; }

  Env* const env_;
  const uint32_t servers_;
  const uint32_t workers_;
  InProcessHub hub_;
  const Job job_;
  const std::string dir_;
  std::atomic<bool> stop_{false};
  std::ostringstream table_;
  std::ostringstream progress_;
  absl::StatusOr<int> result_ = absl::UnknownError("never ran");
  std::unique_ptr<Thread> thread_;  // last: joined first
};

class SchedulerTest : public testing::Test {
 protected:
  SchedulerTest() : folder_(MakeTestFolder()), dir_(JoinPath(folder_, "run")) {
    HEARTH_CHECK(MakeDirectories(dir_).ok());
    for (const char* name : {"a.csv", "b.csv"}) HEARTH_CHECK(WriteFileAtomically(JoinPath(folder_, name), name).ok());
    Job& job = options_.job;
    job.set_data_dir(folder_);
    job.add_log()->add_path("a.csv");
    job.mutable_log(0)->add_path("b.csv");
    job.add_task()->set_name("click");
    job.add_table()->set_name("video");
    job.add_split()->set_name("validation");
    job.add_split()->set_name("test");
    job.mutable_training()->set_lanes(4);
    options_.dir = dir_;
    options_.servers = 2;
    options_.workers = 2;
  }

  std::vector<std::string> Snapshots() const { return ListDirectory(JoinPath(dir_, "snapshots")).value(); }
  std::string SnapshotFolder(uint64_t step) const { return JoinPath(dir_, absl::StrCat("snapshots/", step)); }
  Manifest ManifestOf(uint64_t step) const {
    const auto manifest = ReadManifest(SnapshotFolder(step));
    EXPECT_TRUE(manifest.ok()) << manifest.status();
    return manifest.ok() ? *manifest : Manifest();
  }
  nlohmann::ordered_json RunJson() const {
    return nlohmann::ordered_json::parse(ReadFile(JoinPath(dir_, "run.json")).value());
  }
  // A run that was saved at `step`.
  void MakeSaved(uint64_t step) {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.Stop(step, 4);
  }

  const std::string folder_;
  const std::string dir_;
  SchedulerOptions options_;
};

TEST_F(SchedulerTest, CommitsASnapshotOfStepZeroBeforeAnythingIsTrained) {
  Cluster cluster(options_);
  cluster.AllHello();
  const StartServer server = cluster.StartServers();
  EXPECT_EQ(server.step(), 0u);
  EXPECT_TRUE(server.snapshot().empty());
  EXPECT_FALSE(server.read_only());
  const std::vector<StartWorker> starts = cluster.StartWorkers();
  ASSERT_EQ(starts.size(), 2u);
  for (uint32_t w = 0; w < 2; ++w) {
    EXPECT_EQ(starts[w].lanes(), 4u);
    ASSERT_EQ(starts[w].lane_size(), 2);
    EXPECT_EQ(starts[w].lane(0).cursor().lane(), w);
    EXPECT_EQ(starts[w].lane(1).cursor().lane(), w + 2);
    ASSERT_EQ(starts[w].log_file_size(), 2);
    EXPECT_EQ(starts[w].log_file(1).path(), JoinPath(folder_, "b.csv"));
    EXPECT_TRUE(starts[w].log_list_closed());
    EXPECT_TRUE(starts[w].snapshot().empty());
  }
  for (uint32_t w = 0; w < 2; ++w) cluster.Expect(cluster.Worker(w), Control::kGo);
  const Manifest manifest = ManifestOf(0);
  EXPECT_EQ(manifest.servers(), 2u);
  EXPECT_EQ(manifest.lanes(), 4u);
  EXPECT_EQ(manifest.shards(), 64u);
  EXPECT_EQ(manifest.log_file_size(), 2);
  EXPECT_EQ(manifest.file_size(), 3);
  EXPECT_EQ(manifest.dense_parameters(), 77u);
  EXPECT_EQ(manifest.rows_hash(), 1u);
  EXPECT_EQ(manifest.model_hash(), ModelHash(1, 5));
  EXPECT_TRUE(VerifyFiles(SnapshotFolder(0), manifest).ok());
  EXPECT_EQ(RunJson()["status"], "running");
  EXPECT_EQ(RunJson()["snapshots"], 1);
  cluster.Finish(7, 4);
}

TEST_F(SchedulerTest, WaitsForEveryPartAndEveryEvaluationBeforeItCommitsTheEndOfAnEpoch) {
  Cluster cluster(options_);
  cluster.StartAll();
  cluster.CutOf(5, 4);
  Cluster::CutFlags last;
  last.epoch_ended = last.job_finished = last.stopping = true;
  cluster.ServerAtCutOf(0, 10);
  cluster.ServerAtCutOf(1, 10);
  cluster.WorkerAtCutOf(1, 10, 4, last);
  cluster.EvaluationOf("test", 10, 0.625);  // worker 0 may be ahead of what others say
  cluster.WorkerAtCutOf(0, 10, 4, last);
  cluster.EvaluationOf("validation", 10, 0.75);
  cluster.ExpectGoodbye(0);
  EXPECT_EQ(ManifestOf(5).evaluation_size(), 0);
  const Manifest manifest = ManifestOf(10);
  EXPECT_TRUE(manifest.job_finished());
  ASSERT_EQ(manifest.evaluation_size(), 2);
  EXPECT_EQ(manifest.lane(3).ledger().read(), 1000u);
  const auto json = RunJson();
  EXPECT_EQ(json["status"], "finished");
  EXPECT_EQ(json["exit"]["code"], 0);
  EXPECT_EQ(json["steps"], 10);
  EXPECT_EQ(json["snapshots"], 3);
  EXPECT_EQ(json["samples"]["trained"], 4000);
  EXPECT_EQ(json["tasks"]["click"]["test"]["auc"], 0.625);
  EXPECT_THAT(cluster.table(), HasSubstr("0.6250"));
  EXPECT_THAT(cluster.table(), HasSubstr("read 4000 = trained 4000 + rejected 0 + filtered 0"));
}

TEST_F(SchedulerTest, KeepsOnlyTheNewestSnapshots) {
  options_.job.mutable_snapshot()->set_keep(2);
  Cluster cluster(options_);
  cluster.StartAll();
  for (const uint64_t step : {2, 4, 6, 8}) cluster.CutOf(step, 4);
  cluster.Finish(9, 4);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"8", "9"}));
  EXPECT_EQ(RunJson()["snapshots"], 6);
}

TEST_F(SchedulerTest, KeepsWhatAStartBeganWithAndTheOneBeforeUntilItsRowsAreVerified) {
  options_.job.mutable_training()->set_epochs(2);
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.CutOf(2, 4);
    cluster.CutOf(4, 4);
    cluster.Stop(6, 4);
  }
  options_.job.mutable_snapshot()->set_keep(1);
  Cluster cluster(options_);
  cluster.StartAll();
  FolderWatch run(dir_);
  const auto commit = [&](uint64_t step) {
    cluster.CutOf(step, 4);
    run.Until([&] { return RunJson()["steps"] == step; });
  };
  cluster.rows_verified = false;
  commit(7);
  commit(8);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"4", "6", "8"}));
  cluster.rows_verified = true;
  commit(9);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"9"}));
  cluster.Finish(10, 4);
}

TEST_F(SchedulerTest, KeepsTheBestSnapshotBesideTheNewestAndEndsAJobThatGainsNothing) {
  options_.job.mutable_snapshot()->set_keep(1);
  options_.job.mutable_snapshot()->mutable_best()->set_split("validation");
  options_.job.mutable_split(0)->set_every_steps(2);
  options_.job.mutable_training()->set_stop_after_no_gain(2);
  {
    Cluster cluster(options_);
    cluster.StartAll();
    for (const auto& [step, auc] : {std::pair(2, 0.6), std::pair(4, 0.8), std::pair(6, 0.7)}) {
      cluster.CutOf(step, 4);
      cluster.EvaluationOf("validation", step, auc);
    }
    cluster.CutOf(7, 4);  // no split is due
    FolderWatch(JoinPath(dir_, "snapshots")).Until([&] {
      return Snapshots() == std::vector<std::string>{"4", "7"} && PathExists(SnapshotFolder(7) + "/MANIFEST");
    });
    EXPECT_EQ(ManifestOf(7).best().step(), 4u);
    EXPECT_EQ(ManifestOf(7).best().without_gain(), 1u);
    Cluster::CutFlags stopping;
    stopping.stopping = true;
    cluster.CutOf(9, 4, stopping);
    cluster.ExpectGoodbye(75);
  }
  EXPECT_THAT(Snapshots(), testing::ElementsAre("4", "9"));
  EXPECT_EQ(FindBestSnapshot(dir_).value(), std::filesystem::canonical(SnapshotFolder(4)).string());
  EXPECT_EQ(HoldBestSnapshot(dir_, SnapshotCheck::kChecksums)->manifest.step(), 4u);
  {
    Cluster cluster(options_);
    EXPECT_EQ(cluster.StartAll()[0].best().step(), 4u);
    cluster.CutOf(10, 4);
    cluster.EvaluationOf("validation", 10, 0.8);
    cluster.EvaluationOf("test", 10, 0.5);  // the job ends here
    cluster.ExpectGoodbye(0);
    EXPECT_THAT(cluster.table(), HasSubstr("best: step 4, AUC of all tasks on validation 0.800000"));
  }
  EXPECT_TRUE(ManifestOf(10).job_finished());
  EXPECT_EQ(RunJson()["best"]["step"], 4);
  EXPECT_EQ(RunJson()["exit"]["reason"],
            "AUC of all tasks on validation got no better than 0.800000, of step 4, in 2 evaluations in a row "
            "(training.stop_after_no_gain = 2)");
  {
    Cluster cluster(options_);
    cluster.AllHello();
    cluster.ExpectGoodbye(0);
    EXPECT_THAT(cluster.table(), HasSubstr("in 2 evaluations in a row"));
  }
  {  // what is still to be published takes no best snapshot with it
    WriteExporter(dir_);
    options_.programs = dir_;
    options_.job.mutable_export_()->set_delta_every_steps(1);
    Cluster cluster(options_);
    cluster.AllHello();
    cluster.ExpectGoodbye(0);
    options_.job.clear_export_();
    EXPECT_TRUE(PathExists(SnapshotFolder(4) + "/MANIFEST"));
  }
  {  // a file that nobody would read
    ASSERT_TRUE(WriteFileAtomically(JoinPath(folder_, "c.csv"), "c").ok());
    options_.job.mutable_log(0)->add_path("c.csv");
    Cluster cluster(options_);
    const absl::StatusOr<int> code = cluster.Join();
    EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
    EXPECT_THAT(std::string(code.status().message()), HasSubstr("nobody would read it; raise that or set it to 0"));
    options_.job.mutable_log(0)->mutable_path()->RemoveLast();
  }
  options_.job.mutable_training()->set_stop_after_no_gain(3);
  Cluster cluster(options_);
  cluster.StartAll();
  cluster.Finish(12, 4);
  EXPECT_THAT(Snapshots(), testing::ElementsAre("12", "4"));
  EXPECT_EQ(ManifestOf(12).best().step(), 4u);
  ASSERT_TRUE(RemoveTree(SnapshotFolder(4)).ok());
  EXPECT_TRUE(absl::IsNotFound(FindBestSnapshot(dir_).status()));
  // Whose snapshot is gone is not the best any more.
  options_.job.mutable_training()->set_epochs(2);
  Cluster more(options_);
  EXPECT_FALSE(more.StartAll()[0].has_best());
  more.Finish(14, 4);
  EXPECT_EQ(ManifestOf(14).best().step(), 14u);
}

TEST_F(SchedulerTest, KeepsWhatIsReadBesideItUntilTheReaderIsDoneAndNoMoreThanAFew) {
  options_.job.mutable_snapshot()->set_keep(1);
  options_.job.mutable_training()->set_epochs(2);
  std::vector<SnapshotHold> holds;
  Cluster cluster(options_);
  cluster.StartAll();
  FolderWatch run(dir_);  // run.json is renamed into place after a commit and what it removed
  const auto commit = [&](uint64_t step) {
    cluster.CutOf(step, 4);
    run.Until([&] { return RunJson()["steps"] == step; });
  };
  const auto hold = [&](uint64_t step) { holds.push_back(SnapshotHold::Take(SnapshotFolder(step)).value()); };
  commit(2);
  hold(2);
  commit(4);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"2", "4"}));
  holds.clear();
  commit(6);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"6"}));
  static_assert(kHeldSnapshotsMax == 4);
  for (const uint64_t step : {6, 8, 10, 12, 14}) {
    hold(step);
    commit(step + 2);
  }
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"10", "12", "14", "16", "8"}));
  EXPECT_TRUE(IsRemoved(holds[0].Explain(absl::DataLossError("gone")))) << "the oldest reader is told";
  EXPECT_FALSE(IsRemoved(holds[1].Explain(absl::DataLossError("damaged"))));
  FolderWatch snapshots(JoinPath(dir_, "snapshots"));
  holds.clear();
  snapshots.Until([&] { return Snapshots() == std::vector<std::string>{"16"}; });  // without another commit
  cluster.Finish(20, 4);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"20"}));
}

TEST_F(SchedulerTest, KeepsWhatIsStillToBePublishedAndLeavesOnceItIs) {
  options_.job.mutable_snapshot()->set_keep(1);
  options_.job.mutable_export_()->set_delta_every_steps(4);
  options_.programs = options_.dir;
  WriteExporter(options_.dir);
  ASSERT_TRUE(MakeDirectories(JoinPath(options_.dir, "logs")).ok());
  const std::string hold = JoinPath(options_.dir, "hold");
  ASSERT_TRUE(WriteFileAtomically(hold, "").ok());
  Cluster cluster(options_);
  cluster.StartAll();
  for (const uint64_t step : {2, 4, 6, 8, 10}) cluster.CutOf(step, 4);
  Cluster::CutFlags last;
  last.epoch_ended = last.job_finished = last.stopping = true;
  cluster.CutOf(11, 4, last);
  for (const Split& split : options_.job.split()) cluster.EvaluationOf(split.name(), 11, 0.75);
  const std::vector<std::string> waiting = {"11", "4", "8"};
  // run.json is renamed into place after the commit and what it removed.
  FolderWatch(dir_).Until([&] { return Snapshots() == waiting && PathExists(SnapshotFolder(11) + "/MANIFEST"); });
  EXPECT_FALSE(cluster.HasMessage(cluster.Worker(0))) << "it left before its publications";
  ASSERT_TRUE(RemoveTree(hold).ok());
  cluster.ExpectGoodbye(0);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"11"}));
  const auto chain = ReadNewestChain(JoinPath(options_.dir, "export"));
  ASSERT_TRUE(chain.ok()) << chain.status();
  ASSERT_EQ(chain->size(), 3u);
  EXPECT_EQ((*chain)[0].step, 4u);
  EXPECT_EQ((*chain)[1].step, 8u);
  EXPECT_EQ((*chain)[2].step, 11u);
  EXPECT_EQ(RunJson()["export"]["published"], 3);
  EXPECT_EQ(RunJson()["export"]["failures"], 0);
}

TEST_F(SchedulerTest, SavesAndLeavesWithSeventyFiveOnASignal) {
  Cluster cluster(options_);
  cluster.StartAll();
  cluster.RaiseStopSignal();
  for (uint32_t w = 0; w < 2; ++w) EXPECT_TRUE(cluster.Expect(cluster.Worker(w), Control::kAskCut).ask_cut().stop());
  cluster.Stop(3, 4);
  EXPECT_EQ(RunJson()["status"], "saved");
  EXPECT_EQ(RunJson()["exit"]["code"], 75);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"0", "3"}));
}

TEST_F(SchedulerTest, PassesOnASignalThatCameBeforeTheWorkersWereReady) {
  Cluster cluster(options_);
  cluster.RaiseStopSignal();
  cluster.StartAll();
  for (uint32_t w = 0; w < 2; ++w) cluster.Expect(cluster.Worker(w), Control::kAskCut);
  cluster.Stop(1, 4);
}

TEST_F(SchedulerTest, ResumesFromTheNewestSnapshotOnOtherNumbersOfProcesses) {
  MakeSaved(6);
  options_.servers = 3;
  options_.workers = 1;
  options_.restarts = 1;
  Cluster cluster(options_);
  cluster.AllHello();
  const StartServer server = cluster.StartServers();
  EXPECT_EQ(server.step(), 6u);
  EXPECT_EQ(server.snapshot(), SnapshotFolder(6));
  EXPECT_EQ(server.restored_servers(), 2u);
  const StartWorker start = cluster.StartWorkers()[0];
  EXPECT_EQ(start.step(), 6u);
  EXPECT_EQ(start.snapshot(), SnapshotFolder(6));
  ASSERT_EQ(start.lane_size(), 4);
  for (uint32_t lane = 0; lane < 4; ++lane) {
    EXPECT_EQ(start.lane(lane).cursor().lane(), lane);
    EXPECT_EQ(start.lane(lane).cursor().window(), 6u);
    EXPECT_EQ(start.lane(lane).ledger().read(), 600u);
  }
  cluster.Expect(cluster.Worker(0), Control::kGo);
  EXPECT_EQ(RunJson()["status"], "running");
  cluster.Finish(9, 4);
  const auto json = RunJson();
  EXPECT_EQ(json["restarts"], 1);
  EXPECT_EQ(json["snapshots"], 3);
  EXPECT_EQ(json["ranks"]["ps"], 3);
  EXPECT_EQ(json["samples"]["read"], 3600);
}

TEST_F(SchedulerTest, KeepsTheLanesOfTheFirstStartWhereTheJobNamesNone) {
  options_.job.mutable_training()->clear_lanes();
  {
    Cluster cluster(options_);
    EXPECT_EQ(cluster.StartAll()[0].lanes(), 2u);
    cluster.Stop(1, 2);
  }
  options_.workers = 1;
  Cluster cluster(options_);
  EXPECT_EQ(cluster.StartAll()[0].lanes(), 2u);
  cluster.Finish(2, 2);
}

TEST_F(SchedulerTest, RefusesMoreWorkersThanLanes) {
  options_.workers = 5;
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("--np-worker 4"));
  EXPECT_EQ(RunJson()["status"], "failed");
  EXPECT_EQ(RunJson()["exit"]["code"], 78);
}

TEST_F(SchedulerTest, RefusesAnotherJobsFolderAndTouchesNothingInIt) {
  MakeSaved(6);
  const std::string before = ReadFile(JoinPath(dir_, "run.json")).value();
  options_.job.mutable_training()->set_batch_size(77);
  options_.job.mutable_table(0)->set_dim(8);
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("-> 77: inside a log"));
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("dim"));
  EXPECT_EQ(ReadFile(JoinPath(dir_, "run.json")).value(), before);
  EXPECT_TRUE(ReadManifest(SnapshotFolder(6)).ok());
}

TEST_F(SchedulerTest, PrintsTheTableOfAFinishedJobAgain) {
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.Finish(9, 4);
  }
  const std::string before = ReadFile(JoinPath(dir_, "run.json")).value();
  Cluster cluster(options_);
  cluster.AllHello();
  cluster.ExpectGoodbye(0);
  EXPECT_THAT(cluster.table(), HasSubstr("finished before, at step 9"));
  EXPECT_THAT(cluster.table(), HasSubstr("0.7500"));
  EXPECT_EQ(ReadFile(JoinPath(dir_, "run.json")).value(), before);
}

void SayThatTheDiskIsFull(Cluster* cluster) {
  Control failed;
  failed.mutable_failed()->set_exit_code(74);
  failed.mutable_failed()->set_reason("disk full");
  cluster->Send(cluster->Server(1), failed);
}

TEST_F(SchedulerTest, WritesItsStartsAndEndsIntoTheHistory) {
  MakeSaved(6);
  options_.job.mutable_training()->set_clip_norm(5);
  options_.restarts = 1;
  options_.workers = 1;
  {
    Cluster cluster(options_);
    cluster.StartAll();
    SayThatTheDiskIsFull(&cluster);
    ASSERT_TRUE(cluster.Join().ok());
  }
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.Finish(9, 4);
  }
  {
    Cluster cluster(options_);  // there is nothing left to do, and nothing to tell
    cluster.AllHello();
    cluster.ExpectGoodbye(0);
  }
  using Kind = HistoryEntry::Kind;
  const History history = *ReadHistory(dir_);
  std::vector<Kind> kinds;
  std::vector<uint64_t> steps;
  for (const HistoryEntry& entry : history.entries) {
    kinds.push_back(entry.kind);
    steps.push_back(entry.state.value_or(HistoryEntry::State()).step);
    EXPECT_GT(entry.time_s, 0);
  }
  ASSERT_EQ(kinds, (std::vector<Kind>{Kind::kStart, Kind::kEnd, Kind::kStart, Kind::kEnd, Kind::kStart, Kind::kEnd}));
  EXPECT_EQ(steps, (std::vector<uint64_t>{0, 6, 6, 6, 6, 9}));
  EXPECT_EQ(history.entries[0].workers, 2u);
  EXPECT_THAT(history.entries[0].changes, testing::IsEmpty());
  EXPECT_EQ(history.entries[1].status, "saved");
  EXPECT_EQ(history.entries[2].restarts, 1u);
  EXPECT_EQ(history.entries[2].state->records, 2400u);
  for (const size_t start : {2, 4})
    EXPECT_THAT(history.entries[start].changes, testing::ElementsAre("training.clip_norm: 0 -> 5"));
  EXPECT_EQ(history.entries[3].reason, "ps-1: disk full");
  EXPECT_EQ(history.entries[5].status, "finished");
  EXPECT_FALSE(history.entries[5].state->figures.empty()) << "the end's evaluation";
}

TEST_F(SchedulerTest, GoesOnWithAFinishedJobThatWasGivenMoreEpochs) {
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.Finish(9, 4);
  }
  options_.job.mutable_training()->set_epochs(2);
  Cluster cluster(options_);
  const std::vector<StartWorker> starts = cluster.StartAll();
  EXPECT_EQ(starts[0].epoch(), 1u);
  EXPECT_EQ(starts[0].step(), 9u);
  cluster.Stop(11, 4);
}

TEST_F(SchedulerTest, RefusesALastStepBeforeTheSnapshot) {
  MakeSaved(6);
  options_.job.mutable_training()->set_steps_max(5);
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("training.steps_max: is 5"));
}

TEST_F(SchedulerTest, RefusesFewerEpochsThanAreTrained) {
  options_.job.mutable_training()->set_epochs(2);
  {
    Cluster cluster(options_);
    cluster.StartAll();
    Cluster::CutFlags first;
    first.epoch_ended = true;
    cluster.CutOf(4, 4, first);
    for (const Split& split : options_.job.split()) cluster.EvaluationOf(split.name(), 4, 0.75);
    cluster.Stop(6, 4, 1);
  }
  options_.job.mutable_training()->set_epochs(1);
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("training.epochs: is 1"));
}

// The report is made before what can fail: a run.json of an earlier attempt does not speak for this one.
TEST_F(SchedulerTest, TellsRunJsonOfAPortThatIsTaken) {
  MakeSaved(6);
  const int taken = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(taken, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(taken, 1), 0);
  ASSERT_EQ(getsockname(taken, reinterpret_cast<sockaddr*>(&address), &size), 0);
  options_.job.mutable_metrics()->set_prometheus_port(ntohs(address.sin_port));
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  close(taken);
  EXPECT_FALSE(code.ok());
  EXPECT_EQ(RunJson()["status"], "failed");
  EXPECT_EQ(RunJson()["exit"]["code"], ExitCodeOf(code.status()));
  EXPECT_EQ(RunJson()["steps"], 6);
}

TEST_F(SchedulerTest, EndsAtOnceWhereTheLastStepWasMovedToTheSnapshot) {
  MakeSaved(6);
  options_.job.mutable_training()->set_steps_max(6);
  Cluster cluster(options_);
  cluster.AllHello();
  cluster.ExpectGoodbye(0);
  EXPECT_EQ(RunJson()["status"], "finished");
}

TEST_F(SchedulerTest, SetsACorruptSnapshotAsideAndRemovesOneThatWasNeverCommitted) {
  MakeSaved(6);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(SnapshotFolder(6), "ps-1/rows"), "rows of 2 at 6").ok());
  ASSERT_TRUE(MakeDirectories(JoinPath(SnapshotFolder(8), "ps-0")).ok());
  Cluster cluster(options_);
  EXPECT_EQ(cluster.StartAll()[0].step(), 0u);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"0", "6.corrupt"}));
  cluster.CutOf(6, 4);
  cluster.Finish(9, 4);
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"0", "6", "6.corrupt", "9"}));
}

TEST_F(SchedulerTest, LosesNothingWhereNoSnapshotVerifies) {
  MakeSaved(6);
  for (const uint64_t step : {0, 6}) {
    ASSERT_TRUE(WriteFileAtomically(JoinPath(SnapshotFolder(step), "dense.safetensors"), "x").ok());
  }
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitBadData);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("no snapshot verifies"));
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("dense.safetensors"));
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"0", "6"}));
}

TEST_F(SchedulerTest, RefusesToResumeOnALogFileThatChanged) {
  MakeSaved(6);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder_, "a.csv"), "other").ok());  // which the lanes are in
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(code.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("a.csv"));
  const auto json = RunJson();
  EXPECT_EQ(json["status"], "failed");
  EXPECT_EQ(json["exit"]["code"], 65);
  EXPECT_EQ(json["steps"], 6) << "what was saved is still told";
}

TEST_F(SchedulerTest, EndsWithTheCodeOfARankThatFailed) {
  Cluster cluster(options_);
  cluster.StartAll();
  SayThatTheDiskIsFull(&cluster);
  const absl::StatusOr<int> code = cluster.Join();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 74);
  const auto json = RunJson();
  EXPECT_EQ(json["status"], "failed");
  EXPECT_EQ(json["exit"].dump(), R"({"code":74,"reason":"ps-1: disk full"})");
}

// The next start reads every file; where this one has already, that would change nothing.
TEST_F(SchedulerTest, RowsThatAServerFindsDamagedAreNoEndUnlessAllWereReadBeforeTheStart) {
  MakeSaved(6);
  const auto end = [&] {
    Cluster cluster(options_);
    cluster.StartAll();
    Control control;
    control.mutable_failed()->set_exit_code(kExitBadData);
    control.mutable_failed()->set_reason("its rows are not what was written");
    cluster.Send(cluster.Server(1), control);
    return cluster.Join().value();
  };
  const std::string snapshots = JoinPath(dir_, "snapshots");
  EXPECT_EQ(end(), kExitInternal);
  EXPECT_TRUE(IsSuspect(snapshots));
  EXPECT_EQ(end(), kExitBadData);
  EXPECT_FALSE(IsSuspect(snapshots));
  EXPECT_EQ(Snapshots(), (std::vector<std::string>{"0", "6"})) << "nothing was set aside";
}

TEST_F(SchedulerTest, StopsPastTheBudgetOfBadRecordsWithoutCommitting) {
  options_.job.mutable_limits()->set_bad_records_min(100);
  options_.job.mutable_limits()->set_bad_records_max_fraction(0.1);
  Cluster cluster(options_);
  cluster.StartAll();
  Cluster::CutFlags flags;
  flags.rejected = 10;  // just within
  cluster.CutOf(4, 4, flags);
  flags.rejected = 11;
  cluster.CutOf(8, 4, flags);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitBadData);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr(JoinPath(dir_, "dead-letter")));
  EXPECT_TRUE(ReadManifest(SnapshotFolder(4)).ok());
  EXPECT_FALSE(PathExists(JoinPath(SnapshotFolder(8), "MANIFEST")));
}

TEST_F(SchedulerTest, AJobThatEndsWithoutATrainedRecordIsBadDataAndNotFinished) {
  options_.job.mutable_limits()->set_bad_records_max_fraction(1);
  options_.job.clear_split();
  Cluster cluster(options_);
  cluster.StartAll();
  Cluster::CutFlags flags;
  flags.rejected = 100;
  flags.epoch_ended = flags.job_finished = flags.stopping = true;
  cluster.CutOf(4, 4, flags);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitBadData);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("1600 records were read, of which 1600 were rejected"));
  EXPECT_FALSE(PathExists(JoinPath(SnapshotFolder(4), "MANIFEST")));
  EXPECT_EQ(RunJson()["samples"]["rejected"], 1600) << "run.json counts what was read";
}

TEST_F(SchedulerTest, RefusesALedgerThatDoesNotAddUp) {
  Cluster cluster(options_);
  cluster.StartAll();
  Cluster::CutFlags flags;
  flags.unsound = true;
  cluster.WorkerAtCutOf(0, 4, 4, flags);
  EXPECT_EQ(ExitCodeOf(cluster.Join().status()), kExitInternal);
}

TEST_F(SchedulerTest, RefusesARankThatReadAnotherJobFile) {
  Cluster cluster(options_);
  Control hello;
  hello.mutable_hello()->set_job_hash(JobHash(options_.job) + 1);
  cluster.Send(cluster.Server(0), hello);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("ps-0"));
}

TEST_F(SchedulerTest, RefusesRolesInTheWrongOrder) {
  Cluster cluster(options_);
  Control hello;
  hello.set_from_role("worker");
  hello.mutable_hello();
  cluster.Send(cluster.Server(0), hello);
  EXPECT_EQ(ExitCodeOf(cluster.Join().status()), kExitConfig);
}

TEST_F(SchedulerTest, RefusesWorkersThatStartFromDifferentModels) {
  Cluster cluster(options_);
  cluster.AllHello();
  cluster.StartServers();
  for (uint32_t w = 0; w < 2; ++w) {
    cluster.Expect(cluster.Worker(w), Control::kStartWorker);
    Control ready;
    ready.mutable_worker_ready()->set_dense_hash(w);
    cluster.Send(cluster.Worker(w), ready);
  }
  EXPECT_EQ(ExitCodeOf(cluster.Join().status()), kExitInternal);
}

TEST_F(SchedulerTest, TellsWorkersOfNewFilesInADirectoryThatGrows) {
  const std::string tail = JoinPath(folder_, "tail");
  ASSERT_TRUE(MakeDirectories(tail).ok());
  options_.job.mutable_log(0)->clear_path();
  options_.job.mutable_log(0)->set_directory("tail");
  Cluster cluster(options_);
  const std::vector<StartWorker> starts = cluster.StartAll();
  EXPECT_EQ(starts[0].log_file_size(), 0);
  EXPECT_FALSE(starts[0].log_list_closed());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(tail, "1.csv"), "x").ok());
  for (uint32_t w = 0; w < 2; ++w) {
    const FilesAppended more = cluster.Expect(cluster.Worker(w), Control::kFilesAppended).files_appended();
    ASSERT_EQ(more.log_file_size(), 1);
    EXPECT_EQ(more.log_file(0).path(), JoinPath(tail, "1.csv"));
    EXPECT_FALSE(more.log_list_closed());
  }
  cluster.CutOf(5, 4);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(tail, "_END"), "").ok());
  for (uint32_t w = 0; w < 2; ++w) {
    const FilesAppended more = cluster.Expect(cluster.Worker(w), Control::kFilesAppended).files_appended();
    EXPECT_EQ(more.log_file_size(), 0);
    EXPECT_TRUE(more.log_list_closed());
  }
  cluster.Finish(9, 4);
  EXPECT_EQ(ManifestOf(5).log_file_size(), 1);
  EXPECT_TRUE(ManifestOf(9).log_list_closed());
}

TEST_F(SchedulerTest, TellsAWorkerWithoutRecordsOfAStepThatAnotherMakes) {
  Cluster cluster(options_);
  cluster.StartAll();
  const auto report = [&](uint32_t worker, uint64_t step, bool without_records) {
    Control control;
    control.mutable_step_report()->set_step(step);
    control.mutable_step_report()->set_without_records(without_records);
    cluster.Send(cluster.Worker(worker), control);
  };
  report(0, 1, true);
  report(1, 1, false);
  EXPECT_EQ(cluster.Expect(cluster.Worker(0), Control::kJoinStep).join_step().step(), 1u);
  report(1, 3, false);  // ahead, at staleness 1
  report(0, 2, true);
  EXPECT_EQ(cluster.Expect(cluster.Worker(0), Control::kJoinStep).join_step().step(), 3u);
  report(0, 4, true);
  report(1, 4, true);  // the job rests
  cluster.RaiseStopSignal();
  for (uint32_t w = 0; w < 2; ++w) cluster.Expect(cluster.Worker(w), Control::kAskCut);
  cluster.Stop(4, 4);
}

TEST_F(SchedulerTest, GivesWorkersTheSideTablesAndRefusesToResumeOnAnotherOne) {
  SideTable* const table = options_.job.add_side_table();
  table->set_name("user");
  table->set_path("user.csv");
  options_.job.mutable_log(0)->add_join("user");
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder_, "user.csv"), "before").ok());
  {
    Cluster cluster(options_);
    const std::vector<StartWorker> starts = cluster.StartAll();
    ASSERT_EQ(starts[1].side_table_size(), 1);
    EXPECT_EQ(starts[1].side_table(0).name(), "user");
    EXPECT_EQ(starts[1].side_table(0).xxh3(), *HashFile(JoinPath(folder_, "user.csv")));
    cluster.Stop(6, 4);
  }
  ASSERT_EQ(ManifestOf(6).side_table_size(), 1);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder_, "user.csv"), "behind").ok());
  Cluster cluster(options_);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitBadData);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("side_table \"user\""));
}

TEST_F(SchedulerTest, EvaluatesASnapshotWithoutWritingOne) {
  MakeSaved(6);
  SchedulerOptions options = options_;
  options.dir = JoinPath(folder_, "evaluation");
  options.evaluate_snapshot = SnapshotFolder(6);
  options.job.mutable_training()->set_batch_size(77);  // no matter here
  options.workers = 1;
  ASSERT_TRUE(MakeDirectories(options.dir).ok());
  Cluster cluster(options);
  cluster.AllHello();
  const StartServer server = cluster.StartServers();
  EXPECT_TRUE(server.read_only());
  EXPECT_EQ(server.snapshot(), SnapshotFolder(6));
  const StartWorker start = cluster.StartWorkers()[0];
  EXPECT_TRUE(start.evaluate_only());
  EXPECT_EQ(start.step(), 6u);
  cluster.EvaluationOf("validation", 6, 0.5);
  cluster.EvaluationOf("test", 6, 0.875);
  cluster.ExpectGoodbye(0);
  EXPECT_THAT(cluster.table(), HasSubstr("0.8750"));
  EXPECT_FALSE(PathExists(JoinPath(options.dir, "snapshots")));
  EXPECT_FALSE(PathExists(JoinPath(options.dir, "history.jsonl")));
  const auto json = nlohmann::ordered_json::parse(ReadFile(JoinPath(options.dir, "run.json")).value());
  EXPECT_EQ(json["status"], "finished");
  EXPECT_EQ(json["steps"], 6);
  EXPECT_EQ(json["tasks"]["click"]["test"]["auc"], 0.875);
}

TEST_F(SchedulerTest, RefusesToEvaluateASnapshotOfAnotherModel) {
  MakeSaved(6);
  SchedulerOptions options = options_;
  options.evaluate_snapshot = SnapshotFolder(6);
  options.job.mutable_model()->set_hidden_1(3);
  Cluster cluster(options);
  const absl::StatusOr<int> code = cluster.Join();
  EXPECT_EQ(ExitCodeOf(code.status()), kExitConfig);
  EXPECT_THAT(std::string(code.status().message()), HasSubstr("model.hidden_1"));
}

TEST_F(SchedulerTest, WritesCurvesOfTrainingAndOfEachEvaluation) {
  const std::string tb = JoinPath(dir_, "tb");
  {
    Cluster cluster(options_);
    cluster.StartAll();
    EXPECT_FALSE(PathExists(tb)) << "there is nothing to draw yet";
    cluster.CutOf(5, 4);
    cluster.Finish(9, 4);
  }
  const std::vector<std::string> files = ListDirectory(tb).value();
  ASSERT_EQ(files.size(), 1u);
  const std::string events = ReadFile(JoinPath(tb, files[0])).value();
  for (const char* tag :
       {"perf/samples_per_s", "progressive/loss", "progressive/auc/click", "progressive/log_loss/click",
        "progressive/calibration/click", "learning_rate/dense", "learning_rate/table/video",
        "eval/validation/auc/click", "eval/test/auc/click", "diagnostics/weight_max/level2.task.click"}) {
    EXPECT_THAT(events, HasSubstr(tag));
  }
  options_.job.mutable_metrics()->set_tensorboard(false);
  ASSERT_TRUE(RemoveTree(tb).ok());
  options_.job.mutable_training()->set_epochs(2);
  Cluster cluster(options_);
  cluster.StartAll();
  cluster.Finish(12, 4);
  EXPECT_FALSE(PathExists(tb));
}

// TensorBoard hides what files before this one hold of START's step and later.
TEST_F(SchedulerTest, AResumeVoidsTheCurvesBeyondItsSnapshotAndDrawsNothingAtAnOlderStep) {
  const std::string tb = JoinPath(dir_, "tb");
  const auto events_of = [&](const std::string& name) {
    std::vector<TensorBoardEvent> events;
    const std::string bytes = ReadFile(JoinPath(tb, name)).value();
    for (size_t at = 0; at + 16 <= bytes.size();) {  // length 8, its checksum 4, data, its checksum 4
      uint64_t length = 0;
      std::memcpy(&length, bytes.data() + at, sizeof(length));
      EXPECT_TRUE(events.emplace_back().ParseFromString(bytes.substr(at + 12, length)));
      at += 16 + length;
    }
    return events;
  };
  const auto start_of = [](const std::vector<TensorBoardEvent>& events) {
    EXPECT_GE(events.size(), 3u);
    EXPECT_EQ(events[0].file_version(), "brain.Event:2");
    EXPECT_EQ(events[1].session_log().status(), TensorBoardEvent::SessionLog::START);
    return events[1].step();
  };
  options_.job.mutable_training()->set_epochs(2);
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.CutOf(5, 4);
    Cluster::CutFlags stopping;
    stopping.stopping = true;
    cluster.CutOf(9, 4, stopping);
    EXPECT_EQ(*cluster.Join(), kExitSaved);
  }
  const std::vector<std::string> first = ListDirectory(tb).value();
  ASSERT_EQ(first.size(), 1u);
  EXPECT_EQ(start_of(events_of(first[0])), 0);
  {
    Cluster cluster(options_);
    cluster.StartAll();
    cluster.Finish(12, 4);
  }
  std::vector<std::string> second = ListDirectory(tb).value();
  second.erase(std::remove(second.begin(), second.end(), first[0]), second.end());
  ASSERT_EQ(second.size(), 1u);
  const std::vector<TensorBoardEvent> events = events_of(second[0]);
  EXPECT_EQ(start_of(events), 10);
  for (size_t i = 2; i < events.size(); ++i) EXPECT_GE(events[i].step(), 10);
}

TEST_F(SchedulerTest, IgnoresMessagesThatComeTwice) {
  Cluster cluster(options_);
  cluster.AllHello();
  cluster.AllHello();
  cluster.StartServers();
  cluster.StartWorkers();
  for (uint32_t w = 0; w < 2; ++w) cluster.Expect(cluster.Worker(w), Control::kGo);
  cluster.CutOf(5, 4);
  cluster.CutOf(5, 4);
  cluster.Finish(9, 4);
  EXPECT_EQ(RunJson()["snapshots"], 3);
  for (int rank = 1; rank <= 4; ++rank) EXPECT_FALSE(cluster.HasMessage(rank)) << rank;
}

}  // namespace
}  // namespace hearth
