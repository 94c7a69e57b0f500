// The scheduler's process: one loop over its mailbox. Says who starts from where, commits what was cut, ends the run
// (docs/ARCHITECTURE.md, "A run, message by message").
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/artifact/manifest.h"
#include "common/base/env.h"
#include "common/net/transport.h"
#include "scheduler/lease_table.h"
#include "scheduler/publisher.h"
#include "scheduler/run_report.h"
#include "scheduler/snapshot_coordinator.h"
#include "scheduler/source.h"

namespace hearth {

constexpr size_t kHeldSnapshotsMax = 4;  // stay beside snapshot.keep because readers hold them

struct SchedulerOptions {
  Env* env = nullptr;
  Transport* transport = nullptr;  // rank 0 of 1 + servers + workers
  uint32_t servers = 1;
  uint32_t workers = 1;
  Job job;          // effective; without training.lanes: the snapshot's lanes, or a lane for each worker
  std::string dir;  // the run's folder
  uint32_t restarts = 0;
  bool again = false;                // files that the run knows may be trained once more under other names
  std::string evaluate_snapshot;     // evaluate this snapshot's folder; empty: train
  std::string programs;              // folder of hearth-export and hearth-delta, for a job that publishes
  std::function<bool()> stop_asked;  // polled: save and leave (SIGUSR1)
  RunOutput output;
};

class Scheduler {
 public:
  explicit Scheduler(SchedulerOptions options);
  ~Scheduler();

  // Runs the job to its end. 0 (finished) and 75 (saved): every rank was told Goodbye. Any other code: a rank failed,
  // and an error: this one did; the caller ends all ranks with that code (MpiRuntime::Abort). run.json says so in each
  // case, unless DIR belongs to another job: then nothing in it is touched.
  absl::StatusOr<int> Run();

 private:
  enum class Phase { kServersStart, kWorkersStart, kRunning, kLeaving };

  // Before any message.
  absl::Status Prepare();
  absl::Status ChooseSnapshot();
  absl::Status OpenReport(uint32_t lanes);
  absl::Status OpenSource(const std::vector<LaneState>& cursors, const std::vector<LogFile>& files);
  absl::Status PrepareTraining(const std::vector<LaneState>& cursors, const std::vector<LogFile>& files);
  // The snapshot's job, or one that a run may change to: then from the next step on.
  absl::Status TakeJob(const Manifest& manifest);
  void AddChange(uint64_t from_step, const std::string& change);
  void TellNewFiles(uint64_t from_step, uint32_t first_new);
  absl::Status TakeSideTables(const Manifest& manifest, bool at_segment_end);
  std::vector<std::string> ChangesOfThisStart() const;
  absl::Status TidySnapshots();
  std::optional<BestSnapshot> BestOf(const Manifest& manifest, const Job& before) const;
  bool NothingIsLeft() const;
  std::string SnapshotsFolder() const;

  // The loop.
  absl::Status Loop();
  absl::Status PollOutside();
  int64_t NextDeadlineUs(int64_t now_us) const;
  absl::Status Handle(const Message& message);
  // Whether such a message may come, from a server or else from a worker, as things stand.
  bool IsDue(const Control& control, bool from_server) const;
  absl::Status HandleServer(uint32_t server, const Control& control);
  absl::Status HandleWorker(uint32_t worker, const Control& control);
  absl::Status HandleHello(int rank, const Hello& hello);
  absl::Status HandleServerReady(uint32_t server, const ServerReady& ready);
  absl::Status HandleWorkerReady(uint32_t worker, const WorkerReady& ready);
  absl::Status HandleProgress(uint32_t worker, const Progress& progress);
  absl::Status HandleWorkerAtCut(uint32_t worker, const WorkerAtCut& part);
  absl::Status HandleEvaluation(const Evaluation& evaluation);
  absl::Status HandleStepReport(uint32_t worker, const StepReport& report);
  void HandleFailed(const std::string& who, const Failed& failed);

  absl::Status StartWorkers();
  absl::Status MaybeGo();
  absl::Status CommitWholeCuts();
  absl::Status Commit(SnapshotCoordinator::Cut cut);
  absl::Status RemoveOldSnapshots();
  absl::Status CheckBadRecords() const;
  absl::Status PollPublisher();
  // Leave, once what is being published is there: all of it where the job is finished, else what is in work.
  absl::Status LeaveWhenPublished(const std::string& status, int exit_code, const std::string& reason);
  absl::Status MaybeLeave();
  // Tells everyone to leave, and what run.json and the table are to say.
  absl::Status Leave(const std::string& status, int exit_code, const std::string& reason);

  bool evaluates() const { return !options_.evaluate_snapshot.empty(); }  // one snapshot, and nothing else
  bool trains() const { return coordinator_ != nullptr && !finished_before_; }
  // What everything starts from; null: from nothing.
  const Manifest* restored() const { return start_.folder.empty() ? nullptr : &start_.manifest; }
  bool IsServer(int rank) const { return rank >= 1 && rank <= static_cast<int>(options_.servers); }
  absl::Status SendToServer(uint32_t server, Control control);
  absl::Status SendToWorker(uint32_t worker, Control control);
  absl::Status SendToWorkers(const Control& control);
  absl::Status Send(Address to, Control control);

  // Constant after Prepare.
  SchedulerOptions options_;
  const uint64_t job_hash_;                    // of the job as the other roles read it
  uint32_t logs_before_ = 0;                   // of the snapshot's job
  std::vector<JobEra> eras_;                   // of the run so far, for each MANIFEST
  SnapshotChoice start_;                       // where everything starts from; no folder: from nothing
  std::optional<BestSnapshot> best_at_start_;  // of the figure that the job judges now
  bool finished_before_ = false;               // the job was finished when this run started

  // State of the run.
  Mailbox* mailbox_ = nullptr;
  Phase phase_ = Phase::kServersStart;
  std::set<int> hello_;  // ranks that said it
  std::set<uint32_t> servers_ready_;
  std::set<uint32_t> workers_ready_;
  std::optional<LeaseTable> leases_;
  std::unique_ptr<Source> source_;
  std::vector<SideTableFile> side_tables_;
  std::unique_ptr<SnapshotCoordinator> coordinator_;
  std::unique_ptr<Curves> curves_;
  std::unique_ptr<RunReport> report_;
  std::unique_ptr<Publisher> publisher_;         // of a job that publishes
  std::vector<Evaluation> evaluations_;          // newest of each split, in the job's order
  std::map<std::string, Evaluation> evaluated_;  // of an evaluation of a snapshot
  std::vector<uint64_t> committed_;              // steps of the snapshots in DIR, ascending
  bool all_verified_ = false;                    // every file of the snapshot was read before this start
  std::set<uint32_t> unverified_;                // servers that still read the files that they started from
  std::optional<uint64_t> before_start_;         // the newest snapshot before the one of the start
  std::optional<uint64_t> best_step_;            // of the best snapshot, which stays
  size_t held_ = 0;                              // of those, beyond snapshot.keep and left because somebody reads them
  int64_t removal_retry_us_ = kNever;
  uint64_t dense_parameters_ = 0;
  std::optional<uint64_t> dense_hash_;    // at the start, of the workers that are ready
  uint64_t step_with_records_ = 0;        // the newest that some worker makes, while a directory may grow
  std::map<uint32_t, uint64_t> resting_;  // the step that a worker has no record for, and waits whether others have
  bool stop_asked_ = false;
  bool stop_sent_ = false;
  struct Departure {
    std::string status;
    int exit_code;
    std::string reason;
  };
  std::optional<Departure> departure_;  // waits for publications
  std::optional<int> exit_code_;
};

}  // namespace hearth
