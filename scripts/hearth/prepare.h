// What `train`, `eval` and `submit` do before any role is started: a valid job, its inputs, and a run's folder ready
// for it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/artifact/manifest.h"
#include "common/base/file_lock.h"
#include "common/job/identity.h"
#include "common/proto/job.pb.h"

namespace hearth {

// One line for the person at the terminal.
void Say(const std::string& line);
// Says what is wrong and returns its exit code.
int Complain(const absl::Status& status);

absl::StatusOr<Job> LoadValidJob(const std::string& path, const std::vector<std::string>& overrides);

// The files that the job names, all missing ones at once.
absl::Status CheckInputs(const Job& job);
// Expressions, columns, delimiters, formats: all that headers of logs and side tables tell, all faults at once. A log
// with a directory is checked as far as no file of it is needed. REQUIRES: CheckInputs found all.
absl::Status CheckReading(const Job& job, const std::string& job_path);
// Both, for a run in `out` that may be there already and may be told to go back to the snapshot of step `from`: files
// that it has read for good need not be there any more.
absl::Status CheckInputsOfRun(const Job& job, const std::string& job_path, const std::string& out,
                              std::optional<uint64_t> from);
// As much of it as no file tells.
absl::Status CheckExpressions(const Job& job, const std::string& job_path);

// The programs that a run of the job starts are in `folder`.
absl::Status CheckPrograms(const Job& job, const std::string& folder);

// No more workers than lanes. REQUIRES: the lanes are known.
absl::Status CheckWorkers(const Job& job, int workers, bool resumed);

// In what the job is another one than the snapshot's, after it took from there what a first start decides where the
// job says nothing: lanes, pieces of logs, the momentum of a run of 0.1.
absl::StatusOr<std::vector<JobChange>> TakeFromSnapshot(const SnapshotChoice& snapshot, Job* job);
// The same; tells what will be another from here on. FailedPrecondition with all that may not be.
absl::Status ReconcileWithSnapshot(const SnapshotChoice& snapshot, Job* job);

// An open run folder, locked against other front commands until it is destroyed or the process ends.
class RunFolder {
 public:
  static absl::StatusOr<std::unique_ptr<RunFolder>> Open(const std::string& path, bool fresh);
  const std::string& path() const { return path_; }

 private:
  RunFolder(std::string path, std::unique_ptr<FileLock> lock) : path_(std::move(path)), lock_(std::move(lock)) {}
  const std::string path_;
  const std::unique_ptr<FileLock> lock_;
};

struct PrepareOptions {
  std::string job_path;
  int workers = 1;
  std::optional<uint64_t> from;  // go back to this snapshot (fork.h)
  GiveUp give_up;                // while a snapshot is verified: Cancelled, and nothing is changed
};
// The effective job, with its lanes and pieces, written to the folder's job.txtpb, and the folder ready for the roles:
// what it holds is of the same job, and something of it verifies.
absl::StatusOr<Job> PrepareRun(Job job, const PrepareOptions& options, const RunFolder& folder);

// The newest committed step in the run's folder, by its name; -1 where there is none.
int64_t NewestStep(const std::string& folder);

// What every rank of the job is to have in its environment, whoever starts it.
std::vector<std::pair<std::string, std::string>> RankEnvironment(const Job& job);

}  // namespace hearth
