// `hearth submit`: a job for Slurm. It prepares the run's folder as `hearth train` does, writes DIR/hearth.sbatch (the
// script of scripts/slurm with its parameters filled in) and hands it to sbatch. BatchBegin and BatchEnd are what that
// script asks before and after each start: whether an ended start is the end, or goes back into the queue.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace hearth {

// scripts/slurm/hearth.sbatch.
extern const char kSbatchTemplate[];

struct SubmitOptions {
  std::string programs;  // folder of the programs, the same on all nodes
  std::string job;
  std::string out;
  std::vector<std::string> overrides;  // --set path=value
  int servers = 1;
  int workers = 1;
  int nodes = 1;
  std::string live;                 // folder of each server's node for its working rows; empty: in the run's
  std::string time;                 // as Slurm writes it: minutes, h:m:s, d-h …
  std::string partition;            // empty: the cluster's default
  int signal_lead_s = 90;           // SIGUSR1 so long before the time limit
  int cpus_per_task = 0;            // 0: training.threads
  int requeues_max = 10;            // one behind the other without a new snapshot
  std::optional<uint64_t> from;     // go back to the snapshot of this step, now
  std::vector<std::string> sbatch;  // more options for sbatch, e.g. "--account=ranking"
  bool print = false;               // print the script; write and submit nothing
};

// Returns the exit code; what went wrong is told on stderr. 78 where there is no sbatch, or sbatch refuses.
int Submit(const SubmitOptions& options);

// The script for a run in `folder` whose ranks get `cpus_per_task` and `environment`.
absl::StatusOr<std::string> BatchScript(const SubmitOptions& options, const std::string& folder, int cpus_per_task,
                                        const std::vector<std::pair<std::string, std::string>>& environment);

// Before a start of Slurm's job `slurm_job` in the run's folder: remembers the newest snapshot in DIR/requeues, ends a
// fork that was cut short (fork.h), and marks run.json as running, so that an outcome found there later is this
// start's.
absl::Status BatchBegin(const std::string& folder, const std::string& slurm_job);

struct BatchOutcome {
  int code = 0;           // srun's
  bool asked = false;     // SIGUSR1 was sent: the time limit was near; or the limit came
  bool stopped = false;   // SIGTERM was sent: somebody cancelled the job
  bool requeued = false;  // SIGTERM was sent: Slurm itself puts the job back
  int requeues_max = 10;  // how often this job may be put back after a dead rank, or without having saved
};
struct BatchNext {
  bool requeue = false;
  int code = 0;  // of the batch script
  std::string reason;
};
// After a start: what is to happen, and run.json says it. What the scheduler wrote there stands above srun's code,
// which is that of the rank that was killed hardest. A saved run goes back as long as each start brings a new snapshot;
// what else goes back counts against requeues_max.
absl::StatusOr<BatchNext> BatchEnd(const std::string& folder, const std::string& slurm_job,
                                   const BatchOutcome& outcome);

}  // namespace hearth
