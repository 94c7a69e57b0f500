// `hearth train` and `hearth eval`: check everything that can be checked before anything is started, start the roles
// under mpirun, and see the job through: restarts, signals, exit codes (docs/OPERATIONS.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace hearth {

// Where the programs are. Tests put their own there.
struct Programs {
  std::string folder;  // of hearth-scheduler, hearth-ps, hearth-worker
  std::string mpirun = "mpirun";
};
// The folder of this executable.
Programs ProgramsBesideThis();

struct TrainOptions {
  Programs programs;
  std::string job;
  std::string out;
  std::vector<std::string> overrides;  // --set path=value
  int servers = 1;
  int workers = 1;
  std::string hostfile;
  std::string live;      // folder of each server's host for its working rows; empty: in the run's
  int restarts_max = 3;  // one behind the other without a new snapshot
  bool fresh = false;
  bool again = false;             // files that the run knows may be trained once more under other names
  std::optional<uint64_t> from;   // go back to the snapshot of this step
  int64_t back_off_us = 1000000;  // before the first restart; doubles, up to 30 times as much
};

// Prints the effective job: defaults written out, lanes filled in.
absl::Status PrintEffectiveJob(const TrainOptions& options, std::string* text);
// In what the job is another one than that of the newest snapshot in options.out, one line a field, with the verdict.
// FailedPrecondition, with the same lines, where a field is refused. Changes nothing.
absl::Status PrintChanges(const TrainOptions& options, std::string* text);

// Trains `job` in the folder `out`, from its newest snapshot where it has one. Returns the exit code; what went wrong
// is told on stderr. Codes 64, 65, 66, 74 and 78 are final; after anything else that is not 0 or 75 the roles are
// started again from the newest snapshot, at most restarts_max times; a snapshot that is newer than all before begins
// the count anew. Where mpirun never got the ranks together it would refuse again: 78, with its reason.
int Train(const TrainOptions& options);

struct EvalOptions {
  Programs programs;
  std::string job;
  std::vector<std::string> overrides;
  std::string snapshot;  // a snapshot's folder, or a run's (its newest)
  bool best = false;     // of a run's snapshots not the newest, but the best
  std::vector<std::string> logs;
  std::string predictions;  // an OutputFile; empty: none
  int servers = 1;
  int workers = 1;
};
// Evaluates a snapshot on other logs through servers of its own, in a folder of its own: the run's is only read. Prints
// a table on stdout. How the logs and side tables are read is the job's affair, not the snapshot's (ModelDifferences).
int Evaluate(const EvalOptions& options);

// What `Train` runs. For tests.
struct RoleCounts {
  int servers = 1;
  int workers = 1;
};
std::vector<std::string> MpirunArguments(const Programs& programs, const RoleCounts& counts,
                                         const std::string& hostfile, const std::vector<std::string>& scheduler_flags,
                                         const std::vector<std::string>& server_flags, const std::string& folder);

// Whether a job that ended so would end so again.
bool IsFinalExit(int code);

}  // namespace hearth
