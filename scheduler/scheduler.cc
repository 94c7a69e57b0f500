#include "scheduler/scheduler.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/artifact/numbered_folder.h"
#include "common/artifact/reading.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/job/log_list.h"
#include "common/job/quality.h"
#include "common/net/control_message.h"
#include "common/net/wire.h"

namespace hearth {
namespace {

constexpr int64_t kSignalPollUs = 100'000;
constexpr int64_t kRemovalRetryUs = 1'000'000;
constexpr uint32_t kManifestSchema = 1;

absl::StatusOr<Control> DecodeControl(const Message& message) {
  HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message.payload.span()));
  if (header.kind != MessageKind::kControl) {
    return absl::InternalError(
        absl::StrCat("a message of kind ", static_cast<int>(header.kind), " came to the scheduler"));
  }
  std::optional<Control> control = ParseControl(message.payload.span());
  if (!control) return absl::InternalError("a control message does not parse");
  return *std::move(control);
}

std::vector<std::string> SplitNames(const Job& job) {
  std::vector<std::string> names;
  for (const Split& split : job.split()) names.push_back(split.name());
  return names;
}

}  // namespace

Scheduler::Scheduler(SchedulerOptions options) : options_(std::move(options)), job_hash_(JobHash(options_.job)) {
  HEARTH_CHECK(options_.transport->size() == static_cast<int>(1 + options_.servers + options_.workers));
}

Scheduler::~Scheduler() = default;

absl::StatusOr<int> Scheduler::Run() {
  mailbox_ = options_.transport->Open(kPortScheduler);
  absl::Status status = Prepare();
  if (status.ok()) status = Loop();
  if (status.ok()) return *exit_code_;
  if (report_ != nullptr) {
    report_->EndLine();
    const absl::Status written = report_->Write("failed", ExitCodeOf(status), std::string(status.message()));
    if (!written.ok()) spdlog::error("event=run_json_not_written cause={}", Quoted(written.message()));
  }
  return status;
}

// --- before any message ---

absl::Status Scheduler::Prepare() {
  if (evaluates() && options_.job.split_size() == 0) {
    return absl::InvalidArgumentError("split: the job names none, so there is nothing to evaluate; add a split");
  }
  HEARTH_RETURN_IF_ERROR(ChooseSnapshot());
  const Manifest* const manifest = restored();
  Training* const training = options_.job.mutable_training();
  if (!training->has_lanes()) training->set_lanes(manifest != nullptr ? manifest->lanes() : options_.workers);
  if (manifest != nullptr) HEARTH_RETURN_IF_ERROR(TakeJob(*manifest));
  const uint32_t lanes = evaluates() && manifest != nullptr ? manifest->lanes() : training->lanes();
  HEARTH_RETURN_IF_ERROR(OpenReport(lanes));

  std::vector<LaneState> cursors;
  std::vector<LogFile> files;
  if (manifest != nullptr) {
    cursors = LanesOf(*manifest);
    if (!evaluates()) cursors = DealtAnew(cursors, training->lanes());
    files.assign(manifest->log_file().begin(), manifest->log_file().end());
    evaluations_.assign(manifest->evaluation().begin(), manifest->evaluation().end());
    dense_parameters_ = manifest->dense_parameters();
  }
  HEARTH_ASSIGN_OR_RETURN(leases_, LeaseTable::Make(lanes, options_.workers, cursors));
  if (!evaluates()) return PrepareTraining(cursors, files);
  HEARTH_ASSIGN_OR_RETURN(side_tables_, DescribeSideTables(options_.job));
  leases_->AppendFiles(files, true);  // none of them is read
  return absl::OkStatus();
}

// The report comes before what can fail, for it tells of that.
absl::Status Scheduler::OpenReport(uint32_t lanes) {
  RunReport::Options report;
  report.job = options_.job;
  report.dir = options_.dir;
  report.servers = options_.servers;
  report.workers = options_.workers;
  report.lanes = lanes;
  report.restarts = options_.restarts;
  report.history = !evaluates();
  for (const Log& log : options_.job.log()) report.tails = report.tails || !log.directory().empty();
  report.output = options_.output;
  report_ = std::make_unique<RunReport>(report);
  const Manifest* const manifest = restored();
  if (manifest != nullptr) report_->Resume(*manifest);
  if (manifest != nullptr && !evaluates())
    HEARTH_RETURN_IF_ERROR(Annotate(CheckEndIsAhead(options_.job, *manifest), start_.folder));
  const uint64_t first_step = manifest != nullptr ? manifest->step() + 1 : 0;
  HEARTH_ASSIGN_OR_RETURN(curves_, Curves::Start(options_.env, options_.job, options_.dir, first_step));
  report_->set_curves(curves_.get());
  if (!evaluates()) report_->Warn(WarningsOfJob(options_.job));
  return absl::OkStatus();
}

// What an evaluation does without: publications, the source of files, cuts.
absl::Status Scheduler::PrepareTraining(const std::vector<LaneState>& cursors, const std::vector<LogFile>& files) {
  const Manifest* const manifest = restored();
  HEARTH_RETURN_IF_ERROR(TidySnapshots());
  if (best_at_start_.has_value()) best_step_ = best_at_start_->step();  // also where nothing is left to train
  if (options_.job.export_().delta_every_steps() > 0) {
    Publisher::Options publisher = {options_.env, options_.job, options_.dir, options_.programs};
    publisher_ = std::make_unique<Publisher>(publisher, committed_, manifest != nullptr && manifest->job_finished());
    report_->set_publication(publisher_->figures());
  }
  HEARTH_RETURN_IF_ERROR(OpenSource(cursors, files));
  if (manifest != nullptr && NothingIsLeft()) {
    finished_before_ = true;
    return absl::OkStatus();
  }
  HEARTH_ASSIGN_OR_RETURN(side_tables_, DescribeSideTables(options_.job));
  if (manifest != nullptr) HEARTH_RETURN_IF_ERROR(TakeSideTables(*manifest, AtSegmentEnd(cursors, manifest->step())));

  SnapshotCoordinator::Options coordinator;
  coordinator.servers = options_.servers;
  coordinator.workers = options_.workers;
  coordinator.lanes = leases_->lanes();
  coordinator.job = options_.job;
  if (manifest != nullptr) {
    coordinator.best = best_at_start_;
    coordinator.task_metrics.assign(manifest->task_metric().begin(), manifest->task_metric().end());
    coordinator.after_step = manifest->step();
  }
  coordinator_ = std::make_unique<SnapshotCoordinator>(coordinator);
  return absl::OkStatus();
}

// By log: how many files are listed from this number on, and the first of them.
void Scheduler::TellNewFiles(uint64_t from_step, uint32_t first_new) {
  std::map<uint32_t, std::vector<std::string>> names;
  for (const LogFile& file : source_->files()) {
    if (file.number() >= first_new) names[file.log()].push_back(file.name());
  }
  for (const auto& [log, of_log] : names) {
    AddChange(from_step, absl::StrCat("log[", log, "]: ", of_log.size(), of_log.size() == 1 ? " file" : " files",
                                      " more, from ", of_log[0], " on"));
  }
}

// Inside a segment they must be the snapshot's; at its end others are a change like that of a field.
absl::Status Scheduler::TakeSideTables(const Manifest& manifest, bool at_segment_end) {
  const std::vector<SideTableFile> now = JoinedInTraining(options_.job, side_tables_);
  for (const SideTableFile& before : manifest.side_table()) {
    const absl::Status same = CheckSideTables({before}, now);
    if (same.ok()) continue;
    if (!at_segment_end) return same;
    const auto found =
        std::find_if(now.begin(), now.end(), [&](const SideTableFile& file) { return file.name() == before.name(); });
    AddChange(manifest.step() + 1,
              absl::StrFormat("side_table \"%s\": %016x -> %016x", before.name(), before.xxh3(), found->xxh3()));
  }
  return absl::OkStatus();
}

// To the era that begins at this step.
void Scheduler::AddChange(uint64_t from_step, const std::string& change) {
  spdlog::warn("event=job_changed from_step={} change={}", from_step, Quoted(change));
  if (eras_.empty() || eras_.back().from_step() != from_step) {
    eras_.emplace_back();
    eras_.back().set_from_step(from_step);
  }
  eras_.back().add_change(change);
}

// The list of files as the snapshot has it, and what has come since: it opens an epoch again that was over.
absl::Status Scheduler::OpenSource(const std::vector<LaneState>& cursors, const std::vector<LogFile>& files) {
  const Manifest* const manifest = restored();
  Source::Listed listed;
  listed.files = files;
  listed.lanes = cursors;
  listed.again = options_.again;
  if (manifest != nullptr) {
    listed.closed = manifest->log_list_closed();
    listed.logs = logs_before_;
    listed.consumed = manifest->consumed();
  }
  HEARTH_ASSIGN_OR_RETURN(source_, Source::Open(options_.job, listed, options_.env->NowUs()));
  leases_->AppendFiles(source_->files(), source_->closed());
  if (manifest == nullptr || source_->files().empty()) return absl::OkStatus();
  const uint32_t files_end = source_->files().back().number() + 1;
  if (files_end == FilesEnd(*manifest)) return absl::OkStatus();
  leases_->Reopen(files_end);
  // Of a run that begins with a model taken over every file is new, and none is news.
  const bool begins = manifest->has_adoption() && manifest->step() == manifest->adoption().first_step();
  if (!begins) TellNewFiles(manifest->step() + 1, FilesEnd(*manifest));
  if (manifest->job_finished() && EndsWithoutGain(options_.job, best_at_start_)) {
    return absl::FailedPreconditionError(absl::StrCat(
        source_->files().back().path(), ": is new, and the job has ended: ", WhyItEnded(options_.job, *best_at_start_),
        ": nobody would read it; raise that or set it to 0"));
  }
  const uint64_t steps_max = options_.job.training().steps_max();
  if (steps_max == 0 || manifest->step() < steps_max) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(source_->files().back().path(), ": is new, and the job ended at its last step, ", steps_max,
                   ": nobody would read it; raise training.steps_max, or take the file off"));
}

std::string Scheduler::SnapshotsFolder() const { return JoinPath(options_.dir, "snapshots"); }

absl::Status Scheduler::ChooseSnapshot() {
  if (!evaluates()) {
    HEARTH_RETURN_IF_ERROR(MakeDirectories(SnapshotsFolder()));
    all_verified_ = IsSuspect(SnapshotsFolder());  // before the start, then
    HEARTH_ASSIGN_OR_RETURN(start_, FindNewestSnapshot(SnapshotsFolder()));
    return absl::OkStatus();
  }
  start_.folder = options_.evaluate_snapshot;
  HEARTH_ASSIGN_OR_RETURN(start_.manifest, ReadManifest(start_.folder));
  HEARTH_RETURN_IF_ERROR(CheckCounts(start_.manifest, start_.folder));
  return VerifyFiles(start_.folder, start_.manifest, FileCheck::kAllButRows);
}

absl::Status Scheduler::TakeJob(const Manifest& manifest) {
  const std::string path = JoinPath(start_.folder, "MANIFEST");
  HEARTH_ASSIGN_OR_RETURN(const Job before, ParseJob(manifest.job(), path));
  logs_before_ = static_cast<uint32_t>(before.log_size());
  eras_.assign(manifest.era().begin(), manifest.era().end());
  std::vector<std::string> refused, carried;
  if (evaluates()) {
    refused = ModelDifferences(before, options_.job);
  } else {
    const std::vector<JobChange> changes = ChangesOf(before, options_.job, manifest);
    refused = RefusalsOf(changes);
    for (const JobChange& change : OfKind(changes, JobChange::kCarried)) carried.push_back(change.ToString());
  }
  if (!refused.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is of another job, which differs in (snapshot, job):\n  ",
                                                      absl::StrJoin(refused, "\n  "), "\n",
                                                      evaluates() ? "set these back" : kWaysOutOfRefusal));
  }
  for (const std::string& change : carried) AddChange(manifest.step() + 1, change);
  if (!evaluates()) best_at_start_ = BestOf(manifest, before);
  return absl::OkStatus();
}

std::vector<std::string> Scheduler::ChangesOfThisStart() const {
  if (restored() == nullptr || eras_.empty() || eras_.back().from_step() != restored()->step() + 1) return {};
  return {eras_.back().change().begin(), eras_.back().change().end()};
}

// What is not a valid snapshot makes way for the steps that will be saved again. A folder without a MANIFEST was never
// committed and is removed; a committed one that no longer verifies is set aside: somebody may want to look at it.
absl::Status Scheduler::TidySnapshots() {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, NumbersIn(SnapshotsFolder()));
  std::vector<std::string> uncommitted;
  std::vector<std::string> corrupt;
  for (const uint64_t step : steps) {
    const std::string folder = JoinPath(SnapshotsFolder(), absl::StrCat(step));
    if (!PathExists(JoinPath(folder, "MANIFEST"))) {
      uncommitted.push_back(folder);
    } else if (start_.folder.empty() || step > start_.manifest.step()) {
      corrupt.push_back(folder);
    } else {
      committed_.push_back(step);
    }
  }
  if (start_.folder.empty() && !corrupt.empty()) {
    return absl::DataLossError(absl::StrCat(SnapshotsFolder(), ": no snapshot verifies:\n  ",
                                            absl::StrJoin(start_.passed_over, "\n  "),
                                            "\nput the files back, or train with --fresh into another folder"));
  }
  for (const std::string& folder : uncommitted) {
    spdlog::info("event=snapshot_removed folder={} cause=\"has no MANIFEST\"", Quoted(folder));
    HEARTH_RETURN_IF_ERROR(RemoveTree(folder));
  }
  if (!corrupt.empty()) {
    for (const std::string& line : start_.passed_over)
      spdlog::warn("event=snapshot_passed_over cause={}", Quoted(line));
  }
  for (const std::string& folder : corrupt) {
    const std::string aside = folder + ".corrupt";
    spdlog::warn("event=snapshot_set_aside folder={} as={} resumed_from={}", Quoted(folder), Quoted(aside),
                 Quoted(start_.folder));
    HEARTH_RETURN_IF_ERROR(RemoveTree(aside));
    HEARTH_RETURN_IF_ERROR(RenamePath(folder, aside));
  }
  if (restored() != nullptr && !all_verified_) {
    for (uint32_t server = 0; server < options_.servers; ++server) unverified_.insert(server);
    if (committed_.size() > 1) before_start_ = committed_[committed_.size() - 2];
  }
  return ClearSuspect(SnapshotsFolder());
}

// Nothing where another figure, or other held-out records, are judged from here on, or where its snapshot is not there
// any more: a way back may lie behind its removal.
std::optional<BestSnapshot> Scheduler::BestOf(const Manifest& manifest, const Job& before) const {
  if (!manifest.has_best() || !JudgeTheSame(before, options_.job)) return std::nullopt;
  const std::string folder = JoinPath(SnapshotsFolder(), absl::StrCat(manifest.best().step()));
  if (PathExists(JoinPath(folder, "MANIFEST"))) return BestAfter(options_.job, manifest.best(), {}, manifest.step());
  spdlog::warn("event=best_snapshot_gone folder={} then=\"the best is looked for anew\"", Quoted(folder));
  return std::nullopt;
}

// By the job as it is now: a finished one goes on where its end was moved, to more epochs or a later last step.
bool Scheduler::NothingIsLeft() const {
  const Training& training = options_.job.training();
  const uint64_t step = start_.manifest.step();
  if (training.steps_max() > 0 && step >= training.steps_max()) return true;
  if (start_.manifest.job_finished() && EndsWithoutGain(options_.job, best_at_start_)) return true;
  return leases_->AtEpochEnd(step) && leases_->epoch() >= training.epochs();
}

// --- the loop ---

absl::Status Scheduler::Loop() {
  while (!exit_code_.has_value()) {
    HEARTH_RETURN_IF_ERROR(PollOutside());
    const int64_t now_us = options_.env->NowUs();
    const std::optional<Message> message = mailbox_->Receive(NextDeadlineUs(now_us));
    if (message.has_value()) {
      HEARTH_RETURN_IF_ERROR(Handle(*message));
    }
  }
  return absl::OkStatus();
}

int64_t Scheduler::NextDeadlineUs(int64_t now_us) const {
  const int64_t source_us = source_ != nullptr ? source_->next_poll_us() : kNever;
  return std::min({now_us + kSignalPollUs, source_us, report_->next_show_us()});
}

// What does not come as a message: the signal, new files, the time to show progress.
absl::Status Scheduler::PollOutside() {
  const int64_t now_us = options_.env->NowUs();
  if (!stop_asked_ && options_.stop_asked && options_.stop_asked()) {
    stop_asked_ = true;
    spdlog::info("event=stop_asked phase={}", static_cast<int>(phase_));
  }
  const bool trains = phase_ == Phase::kRunning && !evaluates();
  if (stop_asked_ && !stop_sent_ && trains && !departure_.has_value()) {
    Control control;
    control.mutable_ask_cut()->set_stop(true);
    HEARTH_RETURN_IF_ERROR(SendToWorkers(control));
    stop_sent_ = true;
  }
  if (source_ != nullptr && now_us >= source_->next_poll_us()) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<LogFile> files, source_->Poll(now_us));
    if (!files.empty() || source_->closed()) {
      leases_->AppendFiles(files, source_->closed());
      Control control;
      for (const LogFile& file : files) {
        spdlog::info("event=file_listed number={} path={} bytes={}", file.number(), Quoted(file.path()), file.bytes());
        *control.mutable_files_appended()->add_log_file() = file;
      }
      control.mutable_files_appended()->set_log_list_closed(source_->closed());
      report_->set_files_behind(leases_->FilesBehind());
      // Before their start workers get the whole list with it.
      if (phase_ == Phase::kRunning || phase_ == Phase::kWorkersStart) HEARTH_RETURN_IF_ERROR(SendToWorkers(control));
    }
  }
  HEARTH_RETURN_IF_ERROR(PollPublisher());
  if (now_us >= removal_retry_us_) HEARTH_RETURN_IF_ERROR(RemoveOldSnapshots());
  return report_->Show(now_us);
}

absl::Status Scheduler::PollPublisher() {
  if (publisher_ == nullptr) return absl::OkStatus();
  if (publisher_->Poll()) {
    report_->set_publication(publisher_->figures());
    HEARTH_RETURN_IF_ERROR(RemoveOldSnapshots());
  }
  return MaybeLeave();
}

absl::Status Scheduler::Handle(const Message& message) {
  const int rank = message.from.rank;
  if (rank < 1 || rank >= options_.transport->size()) {
    return absl::InternalError(absl::StrCat("a message from rank ", rank, ", which is no rank of this job"));
  }
  const bool server = IsServer(rank);
  const uint32_t index = static_cast<uint32_t>(server ? rank - 1 : rank - 1 - static_cast<int>(options_.servers));
  const std::string who = absl::StrCat(server ? "ps-" : "worker-", index);
  const absl::StatusOr<Control> decoded = DecodeControl(message);
  if (!decoded.ok()) return Annotate(decoded.status(), who);
  const Control& control = *decoded;
  if (control.has_from_role() && control.from_role() != (server ? "ps" : "worker")) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rank ", rank, " is a ", control.from_role(), " where ", who,
        " was due; start one scheduler, then all servers, then all workers, with the same --ps and --worker"));
  }
  if (!IsDue(control, server)) {
    return absl::InternalError(absl::StrCat(who, ": sent control message ", static_cast<int>(control.kind_case()),
                                            " in phase ", static_cast<int>(phase_), ", where none is due"));
  }
  if (control.has_hello()) return Annotate(HandleHello(rank, control.hello()), who);
  if (control.has_failed()) {
    HandleFailed(who, control.failed());
    return absl::OkStatus();
  }
  return server ? HandleServer(index, control) : HandleWorker(index, control);
}

bool Scheduler::IsDue(const Control& control, bool from_server) const {
  switch (control.kind_case()) {
    case Control::kHello:
    case Control::kFailed:
      return true;
    case Control::kServerReady:
      return from_server;
    case Control::kServerAtCut:
      return from_server && trains();
    case Control::kWorkerReady:
    case Control::kProgress:
    case Control::kEvaluation:
      return !from_server;
    case Control::kWorkerAtCut:
    case Control::kStepReport:
      return !from_server && trains();
    default:
      return false;  // what the scheduler itself sends, or nothing
  }
}

absl::Status Scheduler::HandleServer(uint32_t server, const Control& control) {
  if (control.has_server_ready()) return HandleServerReady(server, control.server_ready());
  report_->OnServer(control.server_at_cut(), server);
  if (control.server_at_cut().rows_verified()) unverified_.erase(server);
  HEARTH_RETURN_IF_ERROR(coordinator_->AddServer(server, control.server_at_cut()));
  return CommitWholeCuts();
}

absl::Status Scheduler::HandleWorker(uint32_t worker, const Control& control) {
  if (control.has_worker_ready()) return HandleWorkerReady(worker, control.worker_ready());
  if (control.has_progress()) {
    return trains() ? HandleProgress(worker, control.progress()) : absl::OkStatus();
  }
  if (control.has_worker_at_cut()) return HandleWorkerAtCut(worker, control.worker_at_cut());
  if (control.has_evaluation()) return HandleEvaluation(control.evaluation());
  return HandleStepReport(worker, control.step_report());
}

absl::Status Scheduler::HandleHello(int rank, const Hello& hello) {
  if (!hello_.insert(rank).second) return absl::OkStatus();  // a message may come twice
  if (hello.has_job_hash() && hello.job_hash() != job_hash_) {
    return absl::FailedPreconditionError(
        "read another job.txtpb than the scheduler; is the run's folder the same on every machine?");
  }
  const bool all_here = hello_.size() == options_.servers + options_.workers;
  if (finished_before_) {
    if (!all_here) return absl::OkStatus();
    if (options_.output.table != nullptr) {
      *options_.output.table << "The job was finished before, at step " << start_.manifest.step()
                             << "; there was nothing left to do.\n";
      if (EndsWithoutGain(options_.job, best_at_start_)) {
        *options_.output.table << WhyItEnded(options_.job, *best_at_start_) << "; to go on, raise it or set it to 0.\n";
      }
    }
    return LeaveWhenPublished("finished", kExitOk, "");
  }
  if (IsServer(rank)) {
    Control control;
    StartServer* const start = control.mutable_start_server();
    start->set_step(start_.folder.empty() ? 0 : start_.manifest.step());
    start->set_snapshot(start_.folder);
    start->set_restored_servers(start_.folder.empty() ? 0 : start_.manifest.servers());
    start->set_read_only(evaluates());
    HEARTH_RETURN_IF_ERROR(SendToServer(static_cast<uint32_t>(rank - 1), control));
  }
  return all_here ? StartWorkers() : absl::OkStatus();
}

absl::Status Scheduler::HandleServerReady(uint32_t server, const ServerReady& ready) {
  if (!servers_ready_.insert(server).second) return absl::OkStatus();
  spdlog::info("event=server_ready index={} rows={}", server, ready.rows());
  return StartWorkers();
}

// Once all servers are ready and everybody is here.
absl::Status Scheduler::StartWorkers() {
  if (phase_ != Phase::kServersStart || servers_ready_.size() < options_.servers ||
      hello_.size() < options_.servers + options_.workers) {
    return absl::OkStatus();
  }
  phase_ = Phase::kWorkersStart;
  for (uint32_t worker = 0; worker < options_.workers; ++worker) {
    Control control;
    StartWorker* const start = control.mutable_start_worker();
    start->set_step(start_.folder.empty() ? 0 : start_.manifest.step());
    start->set_lanes(leases_->lanes());
    for (LaneState& lane : leases_->LeasesOf(worker)) *start->add_lane() = std::move(lane);
    for (const LogFile& file : leases_->files()) *start->add_log_file() = file;
    start->set_log_list_closed(leases_->files_closed());
    start->set_snapshot(start_.folder);
    start->set_evaluate_only(evaluates());
    start->set_epoch(leases_->epoch());
    if (best_at_start_.has_value()) *start->mutable_best() = *best_at_start_;
    for (const SideTableFile& file : side_tables_) *start->add_side_table() = file;
    HEARTH_RETURN_IF_ERROR(SendToWorker(worker, std::move(control)));
  }
  return absl::OkStatus();
}

absl::Status Scheduler::HandleWorkerReady(uint32_t worker, const WorkerReady& ready) {
  if (!workers_ready_.insert(worker).second) return absl::OkStatus();
  dense_parameters_ = ready.dense_parameters();
  report_->set_dense_parameters(dense_parameters_);
  report_->set_device(ready.device());
  if (ready.has_dense_hash()) {
    if (!dense_hash_.has_value()) dense_hash_ = ready.dense_hash();
    if (*dense_hash_ != ready.dense_hash()) {
      return absl::InternalError(
          absl::StrCat("worker-", worker, ": starts with other dense parameters than another worker"));
    }
    if (!start_.folder.empty() && ready.dense_hash() != start_.manifest.dense_hash()) {
      return absl::DataLossError(absl::StrCat("worker-", worker, ": its dense parameters are not those of ",
                                              start_.folder, " (dense_hash differs); resume from another snapshot"));
    }
  }
  return MaybeGo();
}

// Once all workers are ready and there is a snapshot to come back to.
absl::Status Scheduler::MaybeGo() {
  const bool has_snapshot = !start_.folder.empty() || !committed_.empty();
  if (phase_ != Phase::kWorkersStart || workers_ready_.size() < options_.workers || !has_snapshot)
    return absl::OkStatus();
  phase_ = Phase::kRunning;
  if (evaluates()) return absl::OkStatus();  // workers began when they were ready
  std::vector<Ledger> ledgers(options_.workers);
  for (uint32_t worker = 0; worker < options_.workers; ++worker) {
    for (const LaneState& lane : leases_->LeasesOf(worker)) AddLedger(lane.ledger(), &ledgers[worker]);
  }
  report_->Start(ledgers, options_.env->NowUs());
  report_->set_files_behind(leases_->FilesBehind());
  Control control;
  control.mutable_go();
  spdlog::info("event=go step={} lanes={} files={}", start_.manifest.step(), leases_->lanes(), leases_->files().size());
  HEARTH_RETURN_IF_ERROR(report_->Write("running", 0, ""));
  HEARTH_RETURN_IF_ERROR(report_->TellStart(ChangesOfThisStart()));
  return SendToWorkers(control);
}

absl::Status Scheduler::HandleProgress(uint32_t worker, const Progress& progress) {
  HEARTH_RETURN_IF_ERROR(coordinator_->AddMetrics(worker, {progress.task().begin(), progress.task().end()}));
  return report_->OnProgress(worker, progress, options_.env->NowUs());
}

// Workers judge the same at every step; this is the last door before a commit.
absl::Status Scheduler::CheckBadRecords() const {
  const Limits& limits = options_.job.limits();
  const uint64_t bad = leases_->BadRecords();
  const uint64_t read = leases_->TotalLedger().read();
  if (!TooManyBadRecords(limits, bad, read)) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(bad, " of ", read, " records are bad, more than limits.bad_records_max_fraction = ",
                   limits.bad_records_max_fraction(), "; each one is listed with its reason in ",
                   JoinPath(options_.dir, "dead-letter"), "; mend the log or the job, or raise the limit"));
}

absl::Status Scheduler::HandleWorkerAtCut(uint32_t worker, const WorkerAtCut& part) {
  const int64_t now_us = options_.env->NowUs();
  HEARTH_ASSIGN_OR_RETURN(const bool reached, coordinator_->AddWorker(worker, part));
  if (part.has_progress()) HEARTH_RETURN_IF_ERROR(report_->OnProgress(worker, part.progress(), now_us));
  if (reached) report_->CutReached(part.step(), now_us);
  return CommitWholeCuts();
}

absl::Status Scheduler::HandleEvaluation(const Evaluation& evaluation) {
  if (coordinator_ != nullptr) {
    HEARTH_RETURN_IF_ERROR(coordinator_->AddEvaluation(evaluation));
    return CommitWholeCuts();
  }
  const std::vector<std::string> splits = SplitNames(options_.job);
  if (std::find(splits.begin(), splits.end(), evaluation.split()) == splits.end() ||
      evaluation.step() != start_.manifest.step()) {
    return absl::InternalError(absl::StrCat("an evaluation of \"", evaluation.split(), "\" at step ", evaluation.step(),
                                            ", which was not asked for"));
  }
  evaluated_[evaluation.split()] = evaluation;
  if (evaluated_.size() < splits.size()) return absl::OkStatus();
  std::vector<Evaluation> evaluations;
  for (const std::string& split : splits) evaluations.push_back(evaluated_[split]);
  HEARTH_RETURN_IF_ERROR(report_->Evaluated(evaluations));
  return Leave("finished", kExitOk, "");
}

// Every step is made by all workers, so one that makes a step makes those before it too.
absl::Status Scheduler::HandleStepReport(uint32_t worker, const StepReport& report) {
  if (report.without_records()) {
    resting_[worker] = report.step();
  } else {
    step_with_records_ = std::max(step_with_records_, report.step());
    resting_.erase(worker);
  }
  for (auto rests = resting_.begin(); rests != resting_.end();) {
    if (rests->second > step_with_records_) {
      ++rests;
      continue;
    }
    Control control;
    control.mutable_join_step()->set_step(step_with_records_);
    HEARTH_RETURN_IF_ERROR(SendToWorker(rests->first, std::move(control)));
    rests = resting_.erase(rests);
  }
  return absl::OkStatus();
}

void Scheduler::HandleFailed(const std::string& who, const Failed& failed) {
  int code = failed.exit_code() != 0 ? failed.exit_code() : static_cast<int>(kExitInternal);
  const std::string reason = absl::StrCat(who, ": ", failed.reason());
  report_->EndLine();
  spdlog::error("event=failed role={} code={} reason={}", Quoted(who), code, Quoted(failed.reason()));
  // Rows that are not what was written are no end: the next start looks at every file, and goes back where it must. Not
  // where this one has: it would come to the same.
  if (code == kExitBadData && absl::StartsWith(who, "ps") && restored() != nullptr && !evaluates() && !all_verified_) {
    const absl::Status marked = MarkSuspect(SnapshotsFolder());
    if (marked.ok()) code = kExitInternal;
    if (!marked.ok()) spdlog::error("event=suspicion_not_written cause={}", Quoted(marked.message()));
  }
  const absl::Status written = report_->Write("failed", code, reason);
  if (!written.ok()) spdlog::error("event=run_json_not_written cause={}", Quoted(written.message()));
  exit_code_ = code;
}

absl::Status Scheduler::CommitWholeCuts() {
  while (!exit_code_.has_value()) {
    std::optional<SnapshotCoordinator::Cut> cut = coordinator_->TakeWhole();
    if (!cut.has_value()) break;
    HEARTH_RETURN_IF_ERROR(Commit(*std::move(cut)));
  }
  report_->SetEvaluating(coordinator_->evaluating(), options_.env->NowUs());
  return absl::OkStatus();
}

absl::Status Scheduler::Commit(SnapshotCoordinator::Cut cut) {
  Manifest& manifest = cut.manifest;
  HEARTH_RETURN_IF_ERROR(leases_->Advance({manifest.lane().begin(), manifest.lane().end()}));
  HEARTH_RETURN_IF_ERROR(CheckBadRecords());
  const std::vector<LaneState> lanes(manifest.lane().begin(), manifest.lane().end());
  if (const absl::Status trained = CheckTrained(options_.job, lanes); manifest.job_finished() && !trained.ok()) {
    report_->SetLanes(lanes);
    return trained;
  }
  for (const Evaluation& evaluation : manifest.evaluation()) {
    const auto same = [&](const Evaluation& known) { return known.split() == evaluation.split(); };
    evaluations_.erase(std::remove_if(evaluations_.begin(), evaluations_.end(), same), evaluations_.end());
    evaluations_.push_back(evaluation);
  }
  manifest.clear_evaluation();
  for (const Evaluation& evaluation : evaluations_) *manifest.add_evaluation() = evaluation;
  manifest.set_schema(kManifestSchema);
  manifest.set_job(PrintJob(options_.job));
  for (const JobEra& era : eras_) *manifest.add_era() = era;
  if (restored() != nullptr && restored()->has_adoption()) *manifest.mutable_adoption() = restored()->adoption();
  manifest.set_shards(options_.job.training().shards());
  for (const LogFile& file : leases_->files()) *manifest.add_log_file() = file;
  if (source_->consumed().files() > 0 || source_->consumed().newest_size() > 0)
    *manifest.mutable_consumed() = source_->consumed();
  manifest.set_log_list_closed(leases_->files_closed());
  for (SideTableFile& file : JoinedInTraining(options_.job, side_tables_)) *manifest.add_side_table() = std::move(file);
  manifest.set_dense_parameters(dense_parameters_);
  manifest.set_commit(BuildCommit());

  const int64_t begin_us = options_.env->NowUs();
  HEARTH_RETURN_IF_ERROR(CommitManifest(JoinPath(SnapshotsFolder(), absl::StrCat(manifest.step())), manifest));
  committed_.push_back(manifest.step());
  if (manifest.has_best()) best_step_ = manifest.best().step();
  if (publisher_ != nullptr) {
    publisher_->Committed(manifest.step(), manifest.job_finished());
    report_->set_publication(publisher_->figures());
  }
  spdlog::info("event=committed step={} model_hash={:016x} files={} epoch_ended={} stopping={} seconds={:.3f}",
               manifest.step(), manifest.model_hash(), manifest.file_size(), cut.epoch_ended, cut.stopping,
               static_cast<double>(options_.env->NowUs() - begin_us) * 1e-6);
  HEARTH_RETURN_IF_ERROR(RemoveOldSnapshots());
  report_->set_files_behind(leases_->FilesBehind());
  HEARTH_RETURN_IF_ERROR(report_->Committed(manifest, options_.env->NowUs()));
  if (cut.without_gain) return LeaveWhenPublished("finished", kExitOk, WhyItEnded(options_.job, manifest.best()));
  if (manifest.job_finished()) return LeaveWhenPublished("finished", kExitOk, "");
  if (cut.stopping) return LeaveWhenPublished("saved", kExitSaved, "stopped by a signal; start again to go on");
  return MaybeGo();
}

// Those beyond snapshot.keep go, but what waits for publication and what a reader holds. Of the latter the newest
// kHeldSnapshotsMax stay; an older one is taken from under its reader, who is told so (SnapshotHold::Explain).
absl::Status Scheduler::RemoveOldSnapshots() {
  const size_t keep = std::max<size_t>(1, options_.job.snapshot().keep());
  size_t held = 0;
  for (size_t i = committed_.size() > keep ? committed_.size() - keep : 0; i-- > 0;) {
    const uint64_t step = committed_[i];
    if (best_step_ == step) continue;
    // Until its rows are verified the start may have to go back, and what it began with is in all that came since.
    if (!unverified_.empty() && (step == restored()->step() || step == before_start_)) continue;
    if (publisher_ != nullptr && publisher_->Waits(step)) continue;
    const bool force = held == kHeldSnapshotsMax;
    HEARTH_ASSIGN_OR_RETURN(const bool removed, RemoveSnapshot(JoinPath(SnapshotsFolder(), absl::StrCat(step)), force));
    if (removed) {
      committed_.erase(committed_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++held;
    }
  }
  if (held > held_) spdlog::info("event=snapshots_held count={} cause=\"somebody reads them\"", held);
  held_ = held;
  removal_retry_us_ = held > 0 ? options_.env->NowUs() + kRemovalRetryUs : kNever;
  return absl::OkStatus();
}

absl::Status Scheduler::LeaveWhenPublished(const std::string& status, int exit_code, const std::string& reason) {
  departure_ = Departure{status, exit_code, reason};
  return MaybeLeave();
}

absl::Status Scheduler::MaybeLeave() {
  if (!departure_.has_value() || phase_ == Phase::kLeaving) return absl::OkStatus();
  const bool all = departure_->exit_code == kExitOk && !stop_asked_;
  if (publisher_ != nullptr && (all ? !publisher_->done() : publisher_->working())) return absl::OkStatus();
  return Leave(departure_->status, departure_->exit_code, departure_->reason);
}

absl::Status Scheduler::Leave(const std::string& status, int exit_code, const std::string& reason) {
  phase_ = Phase::kLeaving;
  const bool news =
      !finished_before_ || !report_->says_finished() || (publisher_ != nullptr && publisher_->figures().published > 0);
  if (news) HEARTH_RETURN_IF_ERROR(report_->Write(status, exit_code, reason));
  report_->PrintTable();
  spdlog::info("event=leaving status={} code={} reason={}", status, exit_code, Quoted(reason));
  Control control;
  control.mutable_goodbye()->set_exit_code(exit_code);
  control.mutable_goodbye()->set_reason(reason.empty() ? status : reason);
  for (uint32_t server = 0; server < options_.servers; ++server) HEARTH_RETURN_IF_ERROR(SendToServer(server, control));
  HEARTH_RETURN_IF_ERROR(SendToWorkers(control));
  exit_code_ = exit_code;
  return absl::OkStatus();
}

absl::Status Scheduler::SendToServer(uint32_t server, Control control) {
  return Send({static_cast<int>(1 + server), kPortServer}, std::move(control));
}

absl::Status Scheduler::SendToWorker(uint32_t worker, Control control) {
  return Send({static_cast<int>(1 + options_.servers + worker), kPortControl}, std::move(control));
}

absl::Status Scheduler::SendToWorkers(const Control& control) {
  for (uint32_t worker = 0; worker < options_.workers; ++worker) HEARTH_RETURN_IF_ERROR(SendToWorker(worker, control));
  return absl::OkStatus();
}

absl::Status Scheduler::Send(Address to, Control control) {
  control.set_from_role("scheduler");
  control.set_from_index(0);
  return options_.transport->Send(kPortScheduler, to, EncodeControl(control));
}

}  // namespace hearth
