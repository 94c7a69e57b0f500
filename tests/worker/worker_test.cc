// Whole workers against real parameter servers and a scripted scheduler: what only a run shows. That its bits are the
// golden trainer's for any number of workers and servers is in tests/golden.
#include "worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zstd.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/artifact/manifest.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/quality.h"
#include "common/net/wire.h"
#include "common/proto/control.pb.h"
#include "ps/ps_server.h"
#include "tests/worker/text_files.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kPatienceUs = 60'000'000;  // a test that waits so long has failed

// 300 records; `poisoned` has a feature so large that its products overflow.
std::string LogText(uint64_t seed, int poisoned) {
  Random random(seed);
  std::string text = "user,video,age,click,like\n";
  for (int i = 0; i < 300; ++i) {
    const uint64_t user = random.Below(20), video = random.Below(30);
    absl::StrAppend(&text, "u", user, ",v", video, ",", i == poisoned ? "3e38" : absl::StrCat(random.Below(90)), ",",
                    (user + video + random.Below(10)) % 3 == 0, ",", random.Below(5) == 0, "\n");
  }
  return text;
}

Job TestJob(const std::string& folder) {
  auto job = ParseJob(R"(
    name: "worker-test" seed: 3
    log { name: "train" path: "train.csv" piece_bytes: 1000 }
    task { name: "click" category: "watch" label: "click" }
    task { name: "like" category: "inter" label: "like" }
    slot { name: "user" table: "users" } slot { name: "video" table: "videos" }
    dense { name: "age" }
    table { name: "users" dim: 4 } table { name: "videos" dim: 8 }
    model { kind: HOME hidden_1: 8 hidden_2: 8 width_1: 8 width_2: 8 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 }
    training { batch_size: 60 lanes: 3 shards: 8 }
    snapshot { every_steps: 1000 }
    split { name: "test" user: "user" predictions: true batch_size: 16
            log { name: "test" path: "test.csv" piece_bytes: 700 } })",
                      "test");
  HEARTH_CHECK(job.ok(), "", job.status().ToString());
  job->set_data_dir(folder);
  return *job;
}

struct RunResult {
  std::vector<absl::Status> workers;
  std::map<uint64_t, std::vector<WorkerAtCut>> cuts;  // by step, by worker
  std::map<uint64_t, std::vector<Evaluation>> evaluations;
  std::vector<ValidationWindow> windows;
  Ledger ledger() const {  // at the last cut
    Ledger sum;
    for (const WorkerAtCut& part : cuts.rbegin()->second) {
      for (const LaneState& lane : part.lane()) {
        sum.set_read(sum.read() + lane.ledger().read());
        sum.set_trained(sum.trained() + lane.ledger().trained());
        sum.set_rejected(sum.rejected() + lane.ledger().rejected());
      }
    }
    return sum;
  }
};

// Plays rank 0: starts everyone, says Go, and Goodbye once the last cut and its evaluations are there or a worker
// failed.
class Script {
 public:
  Script(const Job& job, const std::string& dir, int servers, int workers)
      : job_(job), dir_(dir), ranks_{servers, workers}, hub_(env_, ranks_.size()), collectives_(env_, workers) {
    for (const char* folder : {"snapshots", "live"}) EXPECT_TRUE(MakeDirectories(JoinPath(dir, folder)).ok());
    mailbox_ = hub_.transport(0)->Open(kPortScheduler);
    result_.workers.resize(static_cast<size_t>(workers));
  }

  RunResult Run(uint64_t step = 0, const std::string& snapshot = "", bool evaluate_only = false) {
    {
      std::vector<std::unique_ptr<Thread>> threads;
      for (int i = 0; i < ranks_.servers; ++i) threads.push_back(env_->StartThread("ps", [this, i] { RunServer(i); }));
      for (int i = 0; i < ranks_.workers; ++i)
        threads.push_back(env_->StartThread("worker", [this, i] { RunWorker(i); }));
      Play(step, snapshot, evaluate_only);
      Control control;
      control.mutable_goodbye();
      SendToAll(control);
    }
    return result_;
  }

 private:
  void RunServer(int index) {
    PsServerOptions options;
    options.env = env_;
    options.transport = hub_.transport(ranks_.server(index));
    options.job = job_;
    options.ranks = ranks_;
    options.dir = dir_;
    const absl::Status status = PsServer(options).Run();
    if (status.ok()) return;
    ADD_FAILURE() << status;
    EXPECT_TRUE(SendFailed(options.transport, ranks_, status).ok());
  }

  void RunWorker(int index) {
    WorkerOptions options;
    options.env = env_;
    options.transport = hub_.transport(ranks_.worker(index));
    options.collective = collectives_.collective(index);
    options.job = job_;
    options.dir = dir_;
    options.ranks = ranks_;
    options.index = index;
    absl::Status& status = result_.workers[static_cast<size_t>(index)];
    status = Worker(options).Run();
    if (status.ok()) return;
    EXPECT_TRUE(SendFailed(options.transport, ranks_, status).ok());
  }

  // The next control message; none: a worker failed.
  std::optional<std::pair<int, Control>> Receive() {
    const std::optional<Message> message = mailbox_->Receive(env_->NowUs() + kPatienceUs);
    HEARTH_CHECK(message.has_value(), "nothing came for a minute");
    Control control;
    const absl::Span<const char> body = OpaqueBody(message->payload.span());
    HEARTH_CHECK(control.ParseFromArray(body.data(), static_cast<int>(body.size())));
    if (control.has_failed()) return std::nullopt;
    return std::make_pair(message->from.rank, std::move(control));
  }

  bool Gather(Control::KindCase kind, int count) {
    while (count > 0) {
      auto got = Receive();
      if (!got.has_value()) return false;
      if (got->second.kind_case() == kind) --count;
      Note(got->second);
    }
    return true;
  }

  void Note(const Control& control) {
    if (control.has_worker_at_cut()) {
      auto& parts = result_.cuts[control.worker_at_cut().step()];
      parts.resize(static_cast<size_t>(ranks_.workers));
      parts[control.from_index()] = control.worker_at_cut();
      stopping_ += control.worker_at_cut().stopping();
    }
    for (const Progress* progress : {&control.progress(), &control.worker_at_cut().progress()}) {
      result_.windows.insert(result_.windows.end(), progress->window().begin(), progress->window().end());
    }
    if (!control.has_evaluation()) return;
    const Evaluation& evaluation = control.evaluation();
    result_.evaluations[evaluation.step()].push_back(evaluation);
    best_ = BestAfter(job_, best_, {evaluation}, evaluation.step());
  }

  void SendToAll(const Control& control) {
    for (int i = 0; i < ranks_.servers; ++i) Send({ranks_.server(i), kPortServer}, control);
    for (int i = 0; i < ranks_.workers; ++i) Send({ranks_.worker(i), kPortControl}, control);
  }
  void Send(Address to, const Control& control) {
    Header header;
    header.kind = MessageKind::kControl;
    EXPECT_TRUE(hub_.transport(0)->Send(kPortScheduler, to, EncodeOpaque(header, control.SerializeAsString())).ok());
  }

  void Play(uint64_t step, const std::string& snapshot, bool evaluate_only) {
    if (!Gather(Control::kHello, ranks_.servers + ranks_.workers)) return;
    for (int i = 0; i < ranks_.servers; ++i) {
      Control control;
      control.mutable_start_server()->set_step(step);
      control.mutable_start_server()->set_snapshot(snapshot);
      control.mutable_start_server()->set_restored_servers(snapshot.empty() ? 0 : 1);
      control.mutable_start_server()->set_read_only(evaluate_only);
      Send({ranks_.server(i), kPortServer}, control);
    }
    if (!Gather(Control::kServerReady, ranks_.servers)) return;
    const auto files = ListLogFiles(job_, {job_.log().begin(), job_.log().end()});
    HEARTH_CHECK(files.ok(), "", files.status().ToString());
    for (int i = 0; i < ranks_.workers; ++i) {
      Control control;
      StartWorker* start = control.mutable_start_worker();
      start->set_step(step);
      start->set_snapshot(snapshot);
      start->set_evaluate_only(evaluate_only);
      start->set_lanes(job_.training().lanes());
      for (uint32_t lane = static_cast<uint32_t>(i); lane < job_.training().lanes();
           lane += static_cast<uint32_t>(ranks_.workers)) {
        start->add_lane()->mutable_cursor()->set_lane(lane);
      }
      for (const LogFile& file : *files) *start->add_log_file() = file;
      start->set_log_list_closed(true);
      Send({ranks_.worker(i), kPortControl}, control);
    }
    if (!Gather(Control::kWorkerReady, ranks_.workers)) return;
    Control go;
    go.mutable_go();
    if (!evaluate_only) {
      for (int i = 0; i < ranks_.workers; ++i) Send({ranks_.worker(i), kPortControl}, go);
      while (stopping_ < ranks_.workers && !EndsWithoutGain(job_, best_)) {
        auto got = Receive();
        if (!got.has_value()) return;
        Note(got->second);
      }
    }
    const size_t splits = static_cast<size_t>(job_.split_size());
    const auto evaluated = [&] {
      const uint64_t last = evaluate_only ? step : result_.cuts.rbegin()->first;
      return result_.evaluations[last].size() >= splits;
    };
    while (!evaluated()) {
      auto got = Receive();
      if (!got.has_value()) return;
      Note(got->second);
    }
  }

  Env* const env_ = Env::Real();
  const Job job_;
  const std::string dir_;
  const Ranks ranks_;
  InProcessHub hub_;
  LocalCollectiveHub collectives_;
  Mailbox* mailbox_;
  RunResult result_;
  std::optional<BestSnapshot> best_;
  int stopping_ = 0;
};

// A folder with both logs.
std::string DataFolder(int poisoned) {
  const std::string folder = TestFolder();
  EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "train.csv"), LogText(1, poisoned)).ok());
  EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "test.csv"), LogText(2, -1)).ok());
  return folder;
}

std::string ReadPredictions(const std::string& dir) {
  const auto bytes = ReadFile(JoinPath(dir, "predictions/test.tsv.zst"));
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  std::string text(1 << 20, '\0');
  const size_t size = ZSTD_decompress(text.data(), text.size(), bytes->data(), bytes->size());
  EXPECT_FALSE(ZSTD_isError(size));
  text.resize(size);
  return text;
}

TEST(Worker, EvaluationAndPredictionsAreTheSameForAnyNumberOfWorkers) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_training()->set_staleness(1);
  std::vector<std::string> predictions, evaluations, hashes;
  for (int workers = 1; workers <= 3; ++workers) {
    const std::string dir = JoinPath(folder, absl::StrCat("run-", workers));
    const RunResult run = Script(job, dir, 1 + workers % 2, workers).Run();
    for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
    const auto& [step, last] = *run.cuts.rbegin();
    EXPECT_TRUE(last[0].epoch_ended() && last[0].job_finished() && last[0].stopping());
    EXPECT_EQ(run.ledger().trained(), 300u);
    ASSERT_EQ(run.evaluations.at(step).size(), 1u);
    const Evaluation& evaluation = run.evaluations.at(step)[0];
    EXPECT_EQ(evaluation.task(0).samples(), 300u);
    EXPECT_TRUE(evaluation.task(0).has_auc());
    EXPECT_TRUE(evaluation.task(0).has_gauc());
    EXPECT_EQ(evaluation.diagnostics().records(), 300u);  // all workers' pieces
    EXPECT_EQ(evaluation.diagnostics().expert_size(), 2 + 2 * 2 + 2 + 2 * 2 + 2);
    EXPECT_EQ(evaluation.diagnostics().gate_size(), 3 + 2);
    EXPECT_EQ(evaluation.diagnostics().shared_size(), 2);  // of the last level, where tasks choose
    EXPECT_TRUE(evaluation.diagnostics().task(1).has_own_gradient_ratio());
    evaluations.push_back(evaluation.SerializeAsString());
    predictions.push_back(ReadPredictions(dir));
    hashes.push_back(absl::StrCat(last[0].dense_hash()));
  }
  EXPECT_EQ(evaluations, std::vector<std::string>(3, evaluations[0]));
  EXPECT_EQ(predictions, std::vector<std::string>(3, predictions[0]));
  EXPECT_EQ(hashes, std::vector<std::string>(3, hashes[0]));
  // One line a record, in the file's order.
  const std::vector<std::string> lines = absl::StrSplit(predictions[0], '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 301u);
  EXPECT_EQ(lines[0], "source\toffset\tuser\tlabel_click\tp_click\tlabel_like\tp_like");
  uint64_t before = 0;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<std::string> fields = absl::StrSplit(lines[i], '\t');
    ASSERT_EQ(fields.size(), 7u);
    const uint64_t offset = std::stoull(fields[1]);
    EXPECT_GT(offset, before);
    before = offset;
  }
}

TEST(Worker, EvaluatesASavedSnapshotToTheSameFigures) {
  const std::string folder = DataFolder(-1);
  const Job job = TestJob(folder);
  const std::string dir = JoinPath(folder, "run");
  const RunResult trained = Script(job, dir, 1, 2).Run();
  const uint64_t step = trained.cuts.rbegin()->first;
  const std::string predictions = ReadPredictions(dir);
  const std::string snapshot = JoinPath(dir, absl::StrCat("snapshots/", step));
  Manifest manifest;
  manifest.set_schema(1);
  manifest.set_step(step);
  manifest.set_job(PrintJob(job));
  manifest.set_lanes(job.training().lanes());
  manifest.set_shards(job.training().shards());
  manifest.set_servers(1);
  const auto files = DescribeFiles(snapshot, {"dense.safetensors", "ps-0"});
  ASSERT_TRUE(files.ok()) << files.status();
  for (const FileEntry& file : *files) *manifest.add_file() = file;
  ASSERT_TRUE(CommitManifest(snapshot, manifest).ok());
  const std::string again = JoinPath(folder, "again");
  const RunResult evaluated = Script(job, again, 2, 3).Run(step, snapshot, /*evaluate_only=*/true);
  for (const absl::Status& status : evaluated.workers) ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(evaluated.cuts.empty());
  EXPECT_EQ(evaluated.evaluations.at(step)[0].SerializeAsString(), trained.evaluations.at(step)[0].SerializeAsString());
  EXPECT_EQ(ReadPredictions(again), predictions);
}

TEST(Worker, AStepThatIsNotFiniteIsSkippedEverywhereAndDeadLettered) {
  const std::string folder = DataFolder(/*poisoned=*/100);
  const Job job = TestJob(folder);
  std::vector<uint64_t> hashes;
  for (const int workers : {1, 3}) {
    const std::string dir = JoinPath(folder, absl::StrCat("run-", workers));
    const RunResult run = Script(job, dir, 1, workers).Run();
    for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
    const Ledger ledger = run.ledger();
    EXPECT_EQ(ledger.read(), 300u);
    EXPECT_EQ(ledger.trained() + ledger.rejected(), 300u);
    EXPECT_GE(ledger.rejected(), 20u);  // at least the lane's own batch
    EXPECT_LE(ledger.rejected(), 60u);  // one step
    uint64_t lines = 0;
    bool named = false;
    const size_t offset = LogText(1, 100).find(",3e38,");
    for (uint32_t lane = 0; lane < job.training().lanes(); ++lane) {
      const auto text = ReadFile(JoinPath(dir, absl::StrCat("dead-letter/lane-", lane, ".tsv")));
      if (!text.ok()) continue;
      for (const absl::string_view line : absl::StrSplit(*text, '\n', absl::SkipEmpty())) {
        const std::vector<std::string> fields = absl::StrSplit(line, '\t');
        ASSERT_EQ(fields.size(), 3u);
        EXPECT_EQ(fields[0], "train.csv");
        const uint64_t at = std::stoull(fields[1]);
        named = named || (at < offset && offset < at + 12);
        ++lines;
      }
    }
    EXPECT_EQ(lines, ledger.rejected());
    EXPECT_TRUE(named);
    hashes.push_back(run.cuts.rbegin()->second[0].dense_hash());
  }
  EXPECT_EQ(hashes[0], hashes[1]);
}

// Steps that move every parameter so far that nothing is finite after the first.
Job DivergingJob(const std::string& folder) {
  Job job = TestJob(folder);
  job.mutable_training()->mutable_dense_optimizer()->set_kind(DenseOptimizer::SGD);
  job.mutable_training()->mutable_dense_optimizer()->set_learning_rate(1e30);
  return job;
}

TEST(Worker, ADivergedRunEndsAsBadDataOnEveryWorkerAtTheSameStep) {
  const std::string folder = DataFolder(-1);
  Job job = DivergingJob(folder);
  job.mutable_limits()->set_skipped_steps_max(2);
  std::set<std::string> messages;
  for (const int workers : {1, 2, 3}) {
    const std::string dir = JoinPath(folder, absl::StrCat("run-", workers));
    const RunResult run = Script(job, dir, 1, workers).Run();
    for (const absl::Status& status : run.workers) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
      messages.insert(absl::StrReplaceAll(status.message(), {{dir, "DIR"}}));
    }
    EXPECT_EQ(run.cuts.rbegin()->first, 0u) << "nothing of it is saved";
  }
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_THAT(*messages.begin(), AllOf(HasSubstr("diverged at step 4"), HasSubstr("limits.skipped_steps_max = 2"),
                                       HasSubstr("learning_rate"), HasSubstr("DIR/dead-letter")));
}

TEST(Worker, AJobDoesNotFinishOnASkippedStep) {
  const std::string folder = DataFolder(-1);
  const Job job = DivergingJob(folder);  // ends before so many steps in a row are skipped that the limit is passed
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 2).Run();
  for (const absl::Status& status : run.workers) {
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("diverged"));
  }
}

TEST(Worker, EveryLaneRemembersHowManyStepsInARowWereSkipped) {
  const std::string folder = DataFolder(/*poisoned=*/100);
  Job job = TestJob(folder);
  job.mutable_snapshot()->set_every_steps(1);
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 2).Run();
  for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
  uint32_t skipped = 0;
  for (const auto& [step, parts] : run.cuts) {
    const uint32_t in_row = parts[0].lane(0).skipped_in_row();
    skipped += in_row;
    for (const WorkerAtCut& part : parts) {
      for (const LaneState& lane : part.lane()) EXPECT_EQ(lane.skipped_in_row(), in_row) << "step " << step;
    }
  }
  EXPECT_EQ(skipped, 1u);
}

TEST(Worker, TooManyBadRecordsStopEveryWorkerAtTheSameStep) {
  const std::string folder = DataFolder(-1);
  std::string text = LogText(1, -1);
  for (int i = 0; i < 40; ++i) text += "too,few\n";
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "train.csv"), text).ok());
  Job job = TestJob(folder);
  job.mutable_limits()->set_bad_records_min(10);
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 3).Run();
  // All say the same; the example is each worker's own.
  const auto counts_of = [](const absl::Status& status) {
    const std::string text(status.message());
    return text.substr(0, text.find(';'));
  };
  for (const absl::Status& status : run.workers) {
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_EQ(counts_of(status), counts_of(run.workers[0]));
    EXPECT_NE(std::string(status.message()).find("dead-letter"), std::string::npos);
  }
  uint64_t letters = 0;
  for (uint32_t lane = 0; lane < job.training().lanes(); ++lane) {
    const auto text = ReadFile(JoinPath(folder, absl::StrCat("run/dead-letter/lane-", lane, ".tsv")));
    if (text.ok()) letters += static_cast<uint64_t>(std::count(text->begin(), text->end(), '\n'));
  }
  EXPECT_EQ(absl::StrCat(letters, " of "), std::string(run.workers[0].message().substr(0, 6)));
}

TEST(Worker, StepsMaxFinishesTheJobWithAnEvaluation) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_training()->set_steps_max(3);
  const RunResult run = Script(job, JoinPath(folder, "run"), 2, 2).Run();
  for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(run.cuts.rbegin()->first, 3u);
  EXPECT_TRUE(run.cuts.rbegin()->second[1].job_finished());
  EXPECT_EQ(run.evaluations.at(3).size(), 1u);
}

TEST(Worker, EvaluatesASplitAtItsStepsToTheFiguresOfTheSavedSnapshotAndTrainsTheSameBits) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_snapshot()->set_every_steps(1);
  job.mutable_training()->set_staleness(2);
  const RunResult plain = Script(job, JoinPath(folder, "plain"), 2, 2).Run();
  job.mutable_split(0)->set_every_steps(2);
  std::map<uint64_t, std::string> figures;
  for (const int workers : {1, 3}) {
    const RunResult run = Script(job, JoinPath(folder, absl::StrCat("run-", workers)), 3 - workers / 2, workers).Run();
    for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
    const uint64_t last = run.cuts.rbegin()->first;
    EXPECT_EQ(run.cuts.rbegin()->second[0].dense_hash(), plain.cuts.rbegin()->second[0].dense_hash());
    ASSERT_GE(last, 4u);
    for (uint64_t step = 1; step <= last; ++step) {
      const auto found = run.evaluations.find(step);
      EXPECT_EQ(found != run.evaluations.end() && !found->second.empty(), step % 2 == 0 || step == last) << step;
      if (found == run.evaluations.end() || found->second.empty()) continue;
      const std::string text = found->second[0].SerializeAsString();
      if (workers == 1) figures[step] = text;
      EXPECT_EQ(figures[step], text) << "step " << step;
    }
  }
  EXPECT_NE(figures[2], figures[4]);
}

TEST(Worker, AJobThatGainsNothingEndsOnEveryWorkerAtTheSameCut) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_snapshot()->set_every_steps(1);
  job.mutable_training()->set_staleness(2);
  job.mutable_training()->set_epochs(50);
  job.mutable_training()->mutable_dense_optimizer()->set_learning_rate(0);
  for (Table& table : *job.mutable_table()) table.mutable_optimizer()->set_learning_rate(0);
  job.mutable_split(0)->set_every_steps(1);
  job.mutable_snapshot()->mutable_best()->set_split(job.split(0).name());
  job.mutable_snapshot()->mutable_best()->set_metric(Quality::LOG_LOSS);
  job.mutable_training()->set_stop_after_no_gain(1000000);
  EXPECT_TRUE(FaultsOf(job).empty()) << absl::StrJoin(FaultsOf(job), "; ");
  const RunResult long_run = Script(job, JoinPath(folder, "long"), 1, 2).Run();
  EXPECT_GT(long_run.cuts.size(), 50u);
  job.mutable_training()->set_stop_after_no_gain(3);
  for (const int workers : {1, 3}) {
    const RunResult run = Script(job, JoinPath(folder, absl::StrCat("run-", workers)), 2, workers).Run();
    for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
    // BatchNorm's running statistics move in any case, so some step is best; three cuts behind it the job ends.
    std::optional<BestSnapshot> best;
    for (const auto& [step, evaluations] : run.evaluations) {
      EXPECT_FALSE(EndsWithoutGain(job, best)) << "went on to step " << step;
      best = BestAfter(job, best, evaluations, step);
    }
    EXPECT_TRUE(EndsWithoutGain(job, best));
    EXPECT_EQ(run.cuts.rbegin()->first, best->step() + 3);
    EXPECT_EQ(run.cuts.size(), best->step() + 4) << "every cut from 0 on";
  }
}

TEST(Worker, WindowsOfProgressiveValidationHoldEveryRecordOnceWhoeverTrainsIt) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_metrics()->set_validation_window_records(100);
  std::map<uint64_t, ValidationWindow> of_one;
  for (const int workers : {1, 3}) {
    const RunResult run = Script(job, JoinPath(folder, absl::StrCat("run-", workers)), 1, workers).Run();
    std::map<uint64_t, ValidationWindow> windows;
    uint64_t labelled = 0;
    for (const ValidationWindow& part : run.windows) {
      ValidationWindow& sum = windows[part.last_step()];
      sum.set_first_step(part.first_step());
      sum.set_last_step(part.last_step());
      for (int task = 0; task < part.task_size(); ++task) {
        if (sum.task_size() == task) sum.add_task();
        sum.mutable_task(task)->set_labelled(sum.task(task).labelled() + part.task(task).labelled());
      }
      labelled += part.task(0).labelled();
    }
    EXPECT_EQ(labelled, 300u);
    uint64_t next = 1;
    for (const auto& [last_step, window] : windows) {
      EXPECT_EQ(window.first_step(), next);
      next = last_step + 1;
    }
    EXPECT_EQ(windows.begin()->second.last_step(), 2u) << "the first step with 100 records behind it";
    if (workers == 1) of_one = windows;
    ASSERT_EQ(windows.size(), of_one.size());
    for (const auto& [last_step, window] : windows)
      EXPECT_EQ(window.SerializeAsString(), of_one[last_step].SerializeAsString()) << last_step;
  }
}

TEST(Worker, CountsASplitsBadRecordsAndStopsWhereTheyAreTooMany) {
  const std::string folder = DataFolder(-1);
  std::string text = LogText(2, -1);
  for (int i = 0; i < 40; ++i) text += "too,few\n";
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "test.csv"), text).ok());
  Job job = TestJob(folder);  // 40 are fewer than limits.bad_records_min
  for (const int workers : {1, 3}) {
    const RunResult run = Script(job, JoinPath(folder, absl::StrCat("run-", workers)), 1, workers).Run();
    for (const absl::Status& status : run.workers) ASSERT_TRUE(status.ok()) << status;
    const Evaluation& evaluation = run.evaluations.rbegin()->second[0];
    EXPECT_EQ(evaluation.read(), 340u);
    EXPECT_EQ(evaluation.rejected(), 40u);
  }
  job.mutable_limits()->set_bad_records_min(10);
  for (const int workers : {1, 3}) {
    const RunResult run = Script(job, JoinPath(folder, absl::StrCat("strict-", workers)), 1, workers).Run();
    EXPECT_EQ(run.workers[0].code(), absl::StatusCode::kDataLoss) << run.workers[0];
    EXPECT_THAT(std::string(run.workers[0].message()),
                AllOf(HasSubstr("split test: 40 of 340 records are bad"), HasSubstr("limits.bad_records_max_fraction"),
                      HasSubstr("test.csv\t"), HasSubstr("has 2 fields instead of 5")));
  }
}

TEST(Worker, RefusesASplitOfMoreRecordsThanItsBound) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_split(0)->set_records_max(300);
  for (const absl::Status& status : Script(job, JoinPath(folder, "enough"), 1, 2).Run().workers) {
    EXPECT_TRUE(status.ok()) << status;
  }
  job.mutable_split(0)->set_records_max(299);
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 2).Run();
  EXPECT_EQ(run.workers[0].code(), absl::StatusCode::kInvalidArgument) << run.workers[0];
  EXPECT_THAT(std::string(run.workers[0].message()), HasSubstr("split test: more than records_max = 299 records"));
}

TEST(Worker, NamesTheColumnOfASplitsUserBeforeAnythingIsTrained) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_split(0)->set_user("visitor");
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 1).Run();
  EXPECT_EQ(run.workers[0].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(run.workers[0].message()), AllOf(HasSubstr("log \"test\""), HasSubstr("visitor")));
  EXPECT_TRUE(run.cuts.empty());
}

TEST(Worker, NamesAColumnThatTheLogDoesNotHave) {
  const std::string folder = DataFolder(-1);
  Job job = TestJob(folder);
  job.mutable_slot(0)->set_column("viewer");
  const RunResult run = Script(job, JoinPath(folder, "run"), 1, 1).Run();
  EXPECT_EQ(run.workers[0].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(run.workers[0].message()).find("viewer"), std::string::npos);
}

}  // namespace
}  // namespace hearth
