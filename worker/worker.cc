#include "worker/worker.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/artifact/manifest.h"
#include "common/artifact/reading.h"
#include "common/base/file.h"
#include "common/base/file_list.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"
#include "common/job/quality.h"
#include "common/net/control_message.h"
#include "common/net/wire.h"
#include "common/proto/control.pb.h"
#include "worker/dense/dense_reducer.h"
#include "worker/dense/dense_replica.h"
#include "worker/dense/dense_step.h"
#include "worker/dense/device_step.h"
#include "worker/dense/host_step.h"
#include "worker/evaluation/auc.h"
#include "worker/evaluator.h"
#include "worker/log/log_reader.h"
#include "worker/profile.h"
#include "worker/step/lane_account.h"
#include "worker/step/pipeline.h"
#include "worker/step/progress_metrics.h"

namespace hearth {
namespace {

constexpr int64_t kProgressUs = 1'000'000;
constexpr int kPullSecondsMax = 256;  // in one Progress
constexpr size_t kWindowsMax = 16;    // in one Progress
constexpr const char* kDenseFile = "dense.safetensors";

double SecondsOf(int64_t us) { return static_cast<double>(us) * 1e-6; }

// Share of the bytes of one epoch that lie behind a cursor, as far as it tells: within a file only where it is plain
// text in its own order, within a log whose pieces are shuffled not at all.
double EpochFraction(const Job& job, const std::vector<LogFile>& files, const Cursor& cursor) {
  if (cursor.end_of_epoch()) return 1;
  double total = 0;
  double behind = 0;
  const LogFile* const of_cursor = FindFile(files, cursor.file());
  const uint32_t log = of_cursor != nullptr ? of_cursor->log() : 0;
  const bool shuffled = of_cursor != nullptr && static_cast<int>(log) < job.log_size() &&
                        job.log(static_cast<int>(log)).shuffle().pieces();
  for (const LogFile& file : files) {
    if (file.taken_off()) continue;
    const double bytes = static_cast<double>(file.bytes());
    total += bytes;
    if (shuffled ? SegmentOf(file) < SegmentOf(*of_cursor) : file.number() < cursor.file()) behind += bytes;
    const bool compressed = absl::EndsWith(file.path(), ".gz") || absl::EndsWith(file.path(), ".zst");
    if (shuffled || compressed || file.number() != cursor.file() || static_cast<int>(log) >= job.log_size()) continue;
    const double piece_bytes = static_cast<double>(PieceBytes(job.log(static_cast<int>(log))));
    behind += std::min(bytes, static_cast<double>(cursor.block()) * piece_bytes);
  }
  return total > 0 ? std::min(1.0, behind / total) : 0;
}

}  // namespace

struct Worker::State {
  explicit State(const WorkerOptions& given)
      : options(given),
        env(given.env),
        mailbox(given.transport->Open(kPortControl)),
        files(given.env),
        goodbye_event(given.env->NewEvent()),
        page(given.ranks.worker(given.index)) {}
  ~State();

  absl::Status Run();

  // The control endpoint.
  absl::Status Send(Control* control);
  absl::StatusOr<Control> Receive();
  void Take(const Control& control);
  void ControlLoop();
  absl::Status WaitFor(Control::KindCase kind, Control* control);
  absl::Status WaitForGoodbye();

  // Before the first step.
  absl::Status Prepare(const StartWorker& start);
  absl::Status PrepareModel(const StartWorker& start);
  absl::Status PrepareLanes(const StartWorker& start);
  absl::Status PrepareStep();
  absl::StatusOr<std::unique_ptr<LaneReader>> OpenReader(const LaneState& lane);
  absl::Status ReportStep(uint64_t number, bool without_records);
  StepClock::Options ClockOptions(const StartWorker& start) const;

  // Steps.
  absl::Status Train();
  absl::StatusOr<CutState> Step(std::unique_ptr<StepBatch> batch);
  absl::Status CheckBudget(uint64_t step, const StepSum& sum) const;
  absl::Status CheckSkips(uint64_t step) const;
  absl::Status Diverged(uint64_t step, absl::string_view cause) const;
  void AddMetrics(const StepBatch& batch, uint64_t records);
  // Also ends the run there, where the job's evaluations gain nothing any more.
  absl::Status AtCut(uint64_t step, CutState* cut);
  absl::Status EvaluateAtCut(uint64_t step, CutState* cut);
  absl::Status Evaluate(uint64_t step, const std::vector<int>& splits, std::vector<Evaluation>* evaluations);
  void EndWindow();
  void FillProgress(Progress* progress);
  absl::Status SendProgress();

  bool is_first() const { return options.index == 0; }
  std::string LiveFolder() const { return JoinPath(options.dir, absl::StrCat("live/worker-", options.index)); }

  // Constant after construction.
  const WorkerOptions options;
  Env* const env;
  Mailbox* const mailbox;  // the calling thread's until Go, the control thread's after it

  // Shared with the control thread.
  FileList files;
  std::atomic<bool> asked_cut{false};
  std::atomic<bool> asked_stop{false};
  std::atomic<bool> quit{false};
  std::unique_ptr<RestGate> gate;    // of a job with a directory that grows; made before the control thread
  std::atomic<bool> goodbye{false};  // or the control thread failed: see control_status
  const std::unique_ptr<Event> goodbye_event;
  absl::Status control_status;  // written before `goodbye` is set, read after
  std::unique_ptr<hearth::Thread> control_thread;

  // The trainer's.
  uint32_t lanes = 1;     // of the job
  std::vector<Log> logs;  // the job's (unless only evaluating), then the splits'
  std::shared_ptr<const LogSchema> schema;
  ClientOptions clients;
  std::unique_ptr<DenseReplica> replica;
  std::unique_ptr<Evaluator> evaluator;                // none without splits
  std::vector<std::unique_ptr<LaneAccount>> accounts;  // [held lanes]
  std::vector<std::unique_ptr<LaneReader>> readers;    // [held lanes], until the pipeline takes them
  std::unique_ptr<DenseStep> dense_step;
  uint32_t skipped_in_row = 0;       // steps; the same on every worker
  std::optional<BestSnapshot> best;  // worker 0's: of the cuts so far
  std::unique_ptr<Pipeline> pipeline;
  std::unique_ptr<StepProfile> profile;  // worker 0's, where the job asks for one

  ProgressMetrics page;

  // Since the last Progress, or the start.
  uint64_t step = 0;                      // last finished
  std::vector<TaskMetric> metrics;        // [tasks]
  std::vector<ValidationWindow> windows;  // that ended
  std::vector<double> pull_seconds;
  uint32_t staleness_max_seen = 0;
  ValidationWindow window;      // the open one
  uint64_t window_records = 0;  // of all workers' in it
  int64_t start_us = 0;
  int64_t progress_us = 0;
  int64_t dense_us = 0;  // in the dense half of steps
};

Worker::Worker(const WorkerOptions& options) : state_(std::make_unique<State>(options)) {}
Worker::~Worker() = default;

Worker::State::~State() {
  files.Append({}, /*closed=*/true);  // a reader that waits for more stops waiting
  pipeline.reset();
  quit = true;
  mailbox->Deliver(Message{});  // wakes the control thread
  control_thread.reset();
}

absl::Status Worker::Run() { return state_->Run(); }

absl::Status Worker::State::Run() {
  HEARTH_RETURN_IF_ERROR(page.Serve(options.job.metrics()));
  Control hello;
  hello.mutable_hello()->set_job_hash(JobHash(options.job));
  HEARTH_RETURN_IF_ERROR(Send(&hello));
  Control message;
  HEARTH_RETURN_IF_ERROR(WaitFor(Control::kStartWorker, &message));
  if (goodbye) return absl::OkStatus();
  const StartWorker start = message.start_worker();
  HEARTH_RETURN_IF_ERROR(Prepare(start));
  Control ready;
  ready.mutable_worker_ready()->set_dense_parameters(static_cast<uint64_t>(replica->parameters()));
  HEARTH_ASSIGN_OR_RETURN(const uint64_t dense_hash, replica->Hash());
  ready.mutable_worker_ready()->set_dense_hash(dense_hash);
  ready.mutable_worker_ready()->set_device(NameOf(options.device));
  HEARTH_RETURN_IF_ERROR(Send(&ready));
  if (start.evaluate_only()) {
    HEARTH_RETURN_IF_ERROR(Evaluate(start.step(), SplitsDueAt(options.job, start.step(), /*ends=*/true), nullptr));
    return WaitFor(Control::kGoodbye, &message);
  }
  if (start.snapshot().empty()) {
    CutState first;
    first.cut = true;
    HEARTH_RETURN_IF_ERROR(AtCut(start.step(), &first));
  }
  HEARTH_RETURN_IF_ERROR(WaitFor(Control::kGo, &message));
  if (goodbye) return absl::OkStatus();
  control_thread = env->StartThread("control", [this] { ControlLoop(); });
  const StepClock::Options clock = ClockOptions(start);
  if (StepClock(clock).FinishedAt(start.step())) {
    // Resumed from the end: nothing is left to train, and the last cut's parts are committed already.
    spdlog::info("event=nothing_left_to_train step={}", start.step());
    return WaitForGoodbye();
  }
  PipelineOptions piping;
  piping.env = env;
  piping.clients = clients;
  piping.clock = clock;
  piping.read_ahead_batches_max = options.job.training().read_ahead_batches_max();
  for (const FeatureLayout::Group& group : MakeFeatureLayout(options.job).groups)
    piping.group_dims.push_back(group.dim);
  for (size_t i = 0; i < accounts.size(); ++i) {
    piping.lanes.push_back({std::move(readers[i]), accounts[i]->state().cursor()});
  }
  piping.gate = gate.get();
  piping.pulled = [this](Batch* batch) { return dense_step->Stage(batch); };
  pipeline = std::make_unique<Pipeline>(std::move(piping));
  HEARTH_RETURN_IF_ERROR(Train());
  HEARTH_RETURN_IF_ERROR(pipeline->Flush());
  return WaitForGoodbye();
}

// ---- The control endpoint

absl::Status Worker::State::Send(Control* control) {
  control->set_from_role("worker");
  control->set_from_index(static_cast<uint32_t>(options.index));
  return options.transport->Send(kPortControl, {options.ranks.scheduler(), kPortScheduler},
                                 EncodeControl(*control, step));
}

absl::StatusOr<Control> Worker::State::Receive() {
  const std::optional<Message> message = mailbox->Receive(kNever);
  if (!message.has_value() || message->payload.empty()) return Control();  // woken to quit
  HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message->payload.span()));
  std::optional<Control> control;
  if (header.kind == MessageKind::kControl) control = ParseControl(message->payload.span());
  if (!control) {
    return absl::InternalError(absl::StrCat("control message of kind ", static_cast<int>(header.kind), " from rank ",
                                            message->from.rank, " cannot be read"));
  }
  return *std::move(control);
}

// What may come at any time.
void Worker::State::Take(const Control& control) {
  switch (control.kind_case()) {
    case Control::kFilesAppended: {
      const auto& more = control.files_appended();
      files.Append({more.log_file().begin(), more.log_file().end()}, more.log_list_closed());
      return;
    }
    case Control::kAskCut:
      (control.ask_cut().stop() ? asked_stop : asked_cut) = true;
      if (gate != nullptr) gate->Open();
      return;
    case Control::kJoinStep:
      if (gate != nullptr) gate->Join(control.join_step().step());
      return;
    case Control::kGoodbye:
      goodbye = true;
      goodbye_event->Notify();
      return;
    default:
      return;
  }
}

void Worker::State::ControlLoop() {
  while (!quit && !goodbye) {
    const absl::StatusOr<Control> control = Receive();
    if (!control.ok()) {
      control_status = control.status();
      goodbye = true;
      goodbye_event->Notify();
      return;
    }
    Take(*control);
  }
}

// On the calling thread, before the control thread runs. Returns at a Goodbye too.
absl::Status Worker::State::WaitFor(Control::KindCase kind, Control* control) {
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(*control, Receive());
    Take(*control);
    if (goodbye || control->kind_case() == kind) return absl::OkStatus();
  }
}

absl::Status Worker::State::WaitForGoodbye() {
  while (!goodbye) goodbye_event->WaitUntil(kNever);
  return control_status;
}

// ---- Before the first step

absl::Status Worker::State::Prepare(const StartWorker& start) {
  start_us = env->NowUs();
  progress_us = start_us;
  step = start.step();
  lanes = start.lanes();
  files.Append({start.log_file().begin(), start.log_file().end()}, start.log_list_closed());
  metrics.resize(static_cast<size_t>(options.job.task_size()));
  for (int task = 0; task < options.job.task_size(); ++task) window.add_task();
  window.set_first_step(step + 1);
  if (start.has_best()) best = start.best();
  clients.env = env;
  clients.transport = options.transport;
  clients.map = ShardMap(options.job.training().shards(), static_cast<uint32_t>(options.ranks.servers));
  clients.ranks = options.ranks;
  clients.dtype = WireDtypeOf(options.job);
  if (!start.evaluate_only()) {
    const Job rest = WithoutReadPaths(options.job, files.files(), {start.lane().begin(), start.lane().end()});
    logs.assign(rest.log().begin(), rest.log().end());
  }
  const uint32_t first_split_log = static_cast<uint32_t>(logs.size());
  std::vector<std::string> users(logs.size());
  for (const Split& split : options.job.split()) {
    logs.push_back(split.log());
    users.push_back(split.user());
  }
  const std::vector<SideTableFile> side_tables(start.side_table().begin(), start.side_table().end());
  HEARTH_ASSIGN_OR_RETURN(schema, LogSchema::Open(options.job, logs, users, side_tables));
  HEARTH_RETURN_IF_ERROR(RemoveTree(LiveFolder()));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(LiveFolder()));
  HEARTH_RETURN_IF_ERROR(PrepareModel(start));
  if (options.job.split_size() > 0) {
    EvaluatorOptions evaluating;
    evaluating.env = env;
    evaluating.transport = options.transport;
    evaluating.clients = clients;
    evaluating.job = options.job;
    evaluating.schema = schema;
    evaluating.logs = logs;
    evaluating.first_split_log = first_split_log;
    evaluating.worker = options.index;
    evaluating.workers = options.ranks.workers;
    evaluating.dir = options.dir;
    evaluating.scratch = LiveFolder();
    HEARTH_ASSIGN_OR_RETURN(evaluator, Evaluator::Open(evaluating));
  }
  return start.evaluate_only() ? absl::OkStatus() : PrepareLanes(start);
}

absl::Status Worker::State::PrepareModel(const StartWorker& start) {
  std::vector<double> base_rates;
  for (const Task& task : options.job.task()) base_rates.push_back(task.has_base_rate() ? task.base_rate() : 0.5);
  const bool fresh = start.snapshot().empty();  // else the snapshot's weights replace the initial ones
  if (fresh && !start.evaluate_only()) {
    HEARTH_ASSIGN_OR_RETURN(base_rates, CountBaseRates(options.job, schema, files.files(), kBaseRateRecordsMax));
  }
  HEARTH_ASSIGN_OR_RETURN(replica, DenseReplica::Create(options.job, base_rates, options.device));
  if (!fresh) HEARTH_RETURN_IF_ERROR(replica->Restore(JoinPath(start.snapshot(), kDenseFile)));
  spdlog::info("event=model_built parameters={} restored={}", replica->parameters(), !fresh);
  const Profile& wanted = options.job.metrics().profile();
  if (is_first() && wanted.steps() > 0 && !start.evaluate_only()) {
    HEARTH_ASSIGN_OR_RETURN(profile, StepProfile::Create(wanted, JoinPath(options.dir, "profile/worker-0.json")));
  }
  return absl::OkStatus();
}

// Once the list of files is closed nobody waits for more.
absl::Status Worker::State::ReportStep(uint64_t number, bool without_records) {
  if (files.closed()) return absl::OkStatus();
  Control control;
  control.mutable_step_report()->set_step(number);
  control.mutable_step_report()->set_without_records(without_records);
  control.set_from_role("worker");
  control.set_from_index(static_cast<uint32_t>(options.index));
  return options.transport->Send(kPortControl, {options.ranks.scheduler(), kPortScheduler},
                                 EncodeControl(control, number));
}

absl::Status Worker::State::PrepareLanes(const StartWorker& start) {
  const uint32_t workers = static_cast<uint32_t>(options.ranks.workers);
  if (std::any_of(options.job.log().begin(), options.job.log().end(),
                  [](const Log& log) { return !log.directory().empty(); })) {
    RestGate::Report report;
    if (workers > 1) report = [this](uint64_t number, bool without) { return ReportStep(number, without); };
    gate = std::make_unique<RestGate>(env, std::move(report));
    if (asked_stop) gate->Open();
  }
  uint32_t expected = static_cast<uint32_t>(options.index);
  for (LaneState lane : start.lane()) {
    if (!lane.cursor().has_lane()) lane.mutable_cursor()->set_lane(expected);
    if (lane.cursor().lane() != expected || expected >= lanes) {
      return absl::InternalError(absl::StrCat("lease of lane ", lane.cursor().lane(), " of ", lanes, " for worker ",
                                              options.index, " of ", workers, ", expected lane ", expected));
    }
    skipped_in_row = std::max(skipped_in_row, lane.skipped_in_row());
    HEARTH_ASSIGN_OR_RETURN(auto account, LaneAccount::Open(JoinPath(options.dir, "dead-letter"), lane));
    accounts.push_back(std::move(account));
    HEARTH_ASSIGN_OR_RETURN(auto reader, OpenReader(lane));
    readers.push_back(std::move(reader));
    expected += workers;
  }
  if (accounts.empty() || expected < lanes) {
    return absl::FailedPreconditionError(absl::StrCat("worker ", options.index, " of ", workers, " holds ",
                                                      accounts.size(), " of ", lanes,
                                                      " lanes; use at most as many workers as lanes"));
  }
  return PrepareStep();
}

absl::Status Worker::State::PrepareStep() {
  const double clip_norm = options.job.training().clip_norm();
  if (options.device.gpu == kNoGpu) {
    dense_step = MakeHostStep(env, replica.get(), options.collective, lanes, clip_norm);
    return absl::OkStatus();
  }
  DeviceStepOptions step_options;
  step_options.lanes = lanes;
  step_options.clip_norm = clip_norm;
  // Sums by way of the hosts hold up what computes: all at once then.
  if (!options.device.alone) step_options.bucket_bytes_min = 0;
  HEARTH_ASSIGN_OR_RETURN(dense_step, MakeDeviceStep(env, replica.get(), options.device_collective, step_options));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<LaneReader>> Worker::State::OpenReader(const LaneState& lane) {
  LaneReaderOptions reading;
  reading.job = options.job;
  reading.logs = logs;
  reading.schema = schema;
  reading.files = &files;
  reading.lane = lane.cursor().lane();
  reading.lanes = lanes;
  reading.epochs = std::max<uint32_t>(1, options.job.training().epochs());
  reading.start = lane.cursor();
  reading.scratch = LiveFolder();
  reading.env = env;
  reading.job_rests = gate != nullptr ? &gate->rests() : nullptr;
  return LaneReader::Open(reading);
}

StepClock::Options Worker::State::ClockOptions(const StartWorker& start) const {
  const Training& training = options.job.training();
  StepClock::Options clock;
  clock.staleness = training.staleness();
  clock.every_steps = options.job.snapshot().every_steps();
  clock.steps_max = training.steps_max();
  clock.epochs = std::max<uint32_t>(1, training.epochs());
  clock.step = start.step();
  for (const auto& account : accounts) {
    clock.epoch = std::max(clock.epoch, account->state().cursor().epoch());
    clock.end.step = std::max(clock.end.step, account->state().segment_ends_at());
    clock.end.of_epoch = clock.end.of_epoch || account->state().epoch_ends_at() > 0;
  }
  // All lanes' cursors are at the end of an epoch, and nothing says that its cut is still to come.
  if (start.epoch() > clock.epoch && clock.end.step < clock.step) clock.end = {clock.step, true};
  return clock;
}

// ---- Steps

absl::Status Worker::State::Train() {
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<StepBatch> batch, pipeline->Next());
    if (batch == nullptr)
      return absl::InternalError(absl::StrCat("no step after ", step, ", and no cut ended the run"));
    if (goodbye) {
      HEARTH_RETURN_IF_ERROR(control_status);
      return absl::CancelledError(absl::StrCat("the scheduler said goodbye before step ", batch->step));
    }
    const uint64_t number = batch->step;
    if (profile != nullptr) HEARTH_RETURN_IF_ERROR(profile->Before(number));
    HEARTH_ASSIGN_OR_RETURN(CutState cut, Step(std::move(batch)));
    if (profile != nullptr) HEARTH_RETURN_IF_ERROR(profile->After(number, cut.stopping));
    step = number;
    const uint64_t window_records_max = options.job.metrics().validation_window_records();
    if (cut.cut || (window_records_max > 0 && window_records >= window_records_max)) EndWindow();
    if (cut.cut) HEARTH_RETURN_IF_ERROR(AtCut(step, &cut));
    if (cut.stopping) return profile != nullptr ? profile->After(number, /*last=*/true) : absl::OkStatus();
    if (env->NowUs() - progress_us >= kProgressUs || windows.size() >= kWindowsMax) {
      HEARTH_RETURN_IF_ERROR(SendProgress());
    }
  }
}

absl::StatusOr<CutState> Worker::State::Step(std::unique_ptr<StepBatch> batch) {
  const uint64_t number = batch->step;
  if (pull_seconds.size() < kPullSecondsMax) pull_seconds.push_back(SecondsOf(batch->pull_us));
  staleness_max_seen = std::max(staleness_max_seen, static_cast<uint32_t>(number - 1 - batch->view));

  const int64_t begin_us = env->NowUs();
  std::vector<LaneVote> votes(batch->lanes.size());
  const bool stop = asked_stop;
  const bool cut = is_first() && asked_cut.exchange(false);  // one voice, or one wish becomes as many cuts as workers
  for (size_t i = 0; i < votes.size(); ++i) {
    Batch* lane = batch->lanes[i].get();
    LaneVote& vote = votes[i];
    vote.records = static_cast<uint64_t>(lane->records);
    vote.at_end = lane->kind == Batch::Kind::kAtEnd;
    vote.last = vote.at_end && lane->cursor.end_of_epoch();
    vote.stop = stop;
    vote.cut = cut;
    vote.time_s = lane->time_s;
    const LaneState& before = accounts[i]->state();
    vote.read = before.ledger().read() + lane->delta.read();
    vote.bad = before.ledger().rejected() - before.non_finite() + lane->delta.rejected();
  }
  StepSum sum;
  HEARTH_RETURN_IF_ERROR(dense_step->Run(batch->lanes, absl::MakeSpan(votes), &sum));
  const int64_t run_us = env->NowUs() - begin_us;

  if (sum.verdict.skip)
    spdlog::warn("event=step_skipped step={} records={} cause=\"loss or gradient not finite\"", number,
                 sum.verdict.records);
  const std::vector<LogFile> listed = sum.verdict.skip ? files.files() : std::vector<LogFile>();
  for (size_t i = 0; i < votes.size(); ++i) {
    HEARTH_RETURN_IF_ERROR(accounts[i]->Enter(*batch->lanes[i], sum.verdict.skip, listed));
  }
  if (sum.verdict.records > 0) skipped_in_row = sum.trains ? 0 : skipped_in_row + 1;
  HEARTH_RETURN_IF_ERROR(CheckBudget(number, sum));
  HEARTH_RETURN_IF_ERROR(CheckSkips(number));
  if (sum.trains) AddMetrics(*batch, sum.verdict.records);
  HEARTH_ASSIGN_OR_RETURN(const CutState state, pipeline->Finish(std::move(batch), sum.verdict));
  const int64_t finished_us = env->NowUs();
  if (sum.trains) HEARTH_RETURN_IF_ERROR(dense_step->Update(number, sum));
  dense_us += run_us + env->NowUs() - finished_us;
  return state;
}

// The same sums on every worker: all of them stop at the same step, or none.
absl::Status Worker::State::CheckBudget(uint64_t number, const StepSum& sum) const {
  const Limits& limits = options.job.limits();
  if (!TooManyBadRecords(limits, sum.bad, sum.read)) return absl::OkStatus();
  // The message sends the reader to the dead letters: they must be there when the process ends.
  std::string example;
  for (const auto& account : accounts) {
    HEARTH_RETURN_IF_ERROR(account->Sync({}, false, 0));
    if (example.empty()) example = absl::StrReplaceAll(account->dead_letter(), {{"\t", ": "}});
  }
  return absl::DataLossError(absl::StrCat(
      sum.bad, " of ", sum.read, " records are bad at step ", number, ", more than limits.bad_records_max_fraction = ",
      limits.bad_records_max_fraction(), example.empty() ? "" : "; for example ", example, "; see ",
      JoinPath(options.dir, "dead-letter"), ", correct the log or raise the limit"));
}

// As the budget: all workers count the same steps.
absl::Status Worker::State::CheckSkips(uint64_t number) const {
  const uint32_t allowed = options.job.limits().skipped_steps_max();
  if (skipped_in_row <= allowed) return absl::OkStatus();
  return Diverged(number,
                  absl::StrCat("the loss or gradient of ", skipped_in_row,
                               " steps in a row was not finite, more than limits.skipped_steps_max = ", allowed));
}

absl::Status Worker::State::Diverged(uint64_t number, absl::string_view cause) const {
  for (const auto& account : accounts) HEARTH_RETURN_IF_ERROR(account->Sync({}, false, 0));
  return absl::DataLossError(absl::StrCat("diverged at step ", number, ": ", cause,
                                          "; lower training.dense_optimizer.learning_rate or a table's, set "
                                          "training.clip_norm, or mend the records listed in ",
                                          JoinPath(options.dir, "dead-letter"), ", and start anew (--fresh)"));
}

// records: of all workers.
void Worker::State::AddMetrics(const StepBatch& batch, uint64_t records) {
  const size_t tasks = metrics.size();
  window_records += records;
  for (size_t i = 0; i < batch.lanes.size(); ++i) {
    const Batch& lane = *batch.lanes[i];
    if (lane.records == 0) continue;
    const absl::Span<const float> logits = dense_step->logits(i);
    for (size_t cell = 0; cell < logits.size(); ++cell) {
      if (lane.mask[cell] == 0) continue;
      const bool positive = lane.labels[cell] != 0;
      const double loss = LogLoss(logits[cell], positive);
      AddPrediction(&metrics[cell % tasks], logits[cell], positive, loss);
      AddPrediction(window.mutable_task(static_cast<int>(cell % tasks)), logits[cell], positive, loss);
    }
  }
}

// Every worker ends its windows at the same steps: all know the records of each step.
void Worker::State::EndWindow() {
  window.set_last_step(step);
  if (window_records > 0) windows.push_back(window);
  window_records = 0;
  window.set_first_step(step + 1);
  for (TaskMetric& task : *window.mutable_task()) task.Clear();
}

absl::Status Worker::State::AtCut(uint64_t number, CutState* at) {
  const CutState& cut = *at;
  Control control;
  WorkerAtCut* at_cut = control.mutable_worker_at_cut();
  at_cut->set_step(number);
  // A snapshot that cannot train on replaces none that can, and a run that ends like this has not finished.
  HEARTH_ASSIGN_OR_RETURN(const bool finite, replica->Finite());
  if (!finite) return Diverged(number, "a dense parameter is not finite");
  if (cut.job_finished && skipped_in_row > 0) {
    return Diverged(number,
                    absl::StrCat("the loss or gradient of the job's last ", skipped_in_row, " steps was not finite"));
  }
  for (auto& account : accounts) {
    HEARTH_RETURN_IF_ERROR(account->Sync(cut.end, cut.epoch_ended, skipped_in_row));
    *at_cut->add_lane() = account->state();
  }
  if (is_first()) {
    const std::string folder = JoinPath(options.dir, absl::StrCat("snapshots/", number));
    HEARTH_RETURN_IF_ERROR(MakeDirectories(folder));
    HEARTH_ASSIGN_OR_RETURN(const uint64_t hash, replica->Save(JoinPath(folder, kDenseFile), number));
    HEARTH_ASSIGN_OR_RETURN(const std::vector<FileEntry> entries, DescribeFiles(folder, {kDenseFile}));
    at_cut->set_dense_hash(hash);
    for (const FileEntry& entry : entries) *at_cut->add_file() = entry;
  }
  // A job that steps_max ends is evaluated as at the end of an epoch: this is where its last one ends.
  at_cut->set_epoch_ended(cut.epoch_ended || cut.job_finished);
  at_cut->set_job_finished(cut.job_finished);
  at_cut->set_stopping(cut.stopping);
  step = number;
  FillProgress(at_cut->mutable_progress());
  HEARTH_RETURN_IF_ERROR(Send(&control));
  spdlog::info("event=cut step={} epoch_ended={} stopping={}", number, cut.epoch_ended, cut.stopping);
  return EvaluateAtCut(number, at);
}

// No step is applied meanwhile: every worker's pushes wait for its evaluation.
absl::Status Worker::State::EvaluateAtCut(uint64_t number, CutState* cut) {
  const bool ends = cut->epoch_ended || cut->job_finished;
  const std::vector<int> due = SplitsDueAt(options.job, number, ends);
  if (due.empty()) return absl::OkStatus();
  std::vector<Evaluation> evaluations;
  HEARTH_RETURN_IF_ERROR(Evaluate(number, due, &evaluations));
  if (is_first()) best = BestAfter(options.job, best, evaluations, number);
  // Not where the last steps were skipped: such a cut is no end to stop at. The scheduler judges the same.
  char no_gain = is_first() && skipped_in_row == 0 && EndsWithoutGain(options.job, best);
  if (options.job.training().stop_after_no_gain() > 0) {
    HEARTH_RETURN_IF_ERROR(options.collective->Broadcast(0, absl::MakeSpan(&no_gain, 1)));
  } else if (options.device.alone) {
    // Worker 0 has more to do; a wait for it is not to look to NCCL's watchdog like a link that does not move.
    HEARTH_RETURN_IF_ERROR(options.collective->Barrier());
  }
  if (no_gain == 0 || cut->job_finished) return absl::OkStatus();
  // The job ends here, and the scheduler knows it from the same figures; what steps were pulled ahead are let go.
  std::vector<int> rest;
  for (const int split : SplitsDueAt(options.job, number, /*ends=*/true)) {
    if (std::find(due.begin(), due.end(), split) == due.end()) rest.push_back(split);
  }
  HEARTH_RETURN_IF_ERROR(Evaluate(number, rest, nullptr));
  cut->job_finished = true;
  cut->stopping = true;
  return absl::OkStatus();
}

// evaluations: worker 0's, where they are wanted.
absl::Status Worker::State::Evaluate(uint64_t number, const std::vector<int>& splits,
                                     std::vector<Evaluation>* evaluations) {
  if (evaluator == nullptr || splits.empty()) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(std::vector<Evaluation> done, evaluator->Run(replica.get(), number, splits));
  for (const Evaluation& evaluation : done) {
    Control control;
    *control.mutable_evaluation() = evaluation;
    HEARTH_RETURN_IF_ERROR(Send(&control));
  }
  if (evaluations != nullptr) *evaluations = std::move(done);
  return absl::OkStatus();
}

// What Progress.task and Progress.pull_seconds hold is handed over, not kept.
void Worker::State::FillProgress(Progress* progress) {
  progress->set_step(step);
  double fraction = 0;
  const std::vector<LogFile> listed = files.files();
  const uint32_t epochs = std::max<uint32_t>(1, options.job.training().epochs());
  for (const auto& account : accounts) {
    const Cursor& cursor = account->state().cursor();
    AddLedger(account->state().ledger(), progress->mutable_ledger());
    MergeReading(account->state().reading(), progress->mutable_reading());
    fraction += (cursor.epoch() + EpochFraction(options.job, listed, cursor)) / epochs;
  }
  if (files.closed() && !accounts.empty()) progress->set_log_fraction(fraction / static_cast<double>(accounts.size()));
  for (TaskMetric& metric : metrics) {
    *progress->add_task() = metric;
    metric.Clear();
  }
  for (ValidationWindow& ended : windows) *progress->add_window() = std::move(ended);
  windows.clear();
  const Pipeline::Times waits = pipeline != nullptr ? pipeline->times() : Pipeline::Times();
  const int64_t now_us = env->NowUs();
  TimeShare* time = progress->mutable_time();
  time->set_wait_input(SecondsOf(waits.wait_input_us));
  time->set_wait_pull(SecondsOf(waits.wait_pull_us));
  const int64_t reduce_us = dense_step != nullptr ? dense_step->reduce_us() : 0;
  time->set_forward_backward(SecondsOf(dense_us - reduce_us));
  time->set_reduce(SecondsOf(reduce_us));
  time->set_push(SecondsOf(waits.push_us));
  time->set_total(SecondsOf(now_us - start_us));
  for (const double seconds : pull_seconds) progress->add_pull_seconds(seconds);
  pull_seconds.clear();
  progress->set_staleness_max_seen(staleness_max_seen);
  progress->set_peak_rss_bytes(PeakRssBytes());
  page.Show(*progress);
  page.ShowRefused(options.transport->refused());
  progress_us = now_us;
}

absl::Status Worker::State::SendProgress() {
  Control control;
  FillProgress(control.mutable_progress());
  return Send(&control);
}

}  // namespace hearth
