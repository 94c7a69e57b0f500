// Where the job's log files come from: files in the order that the job gives, and directories that grow. Makes the
// append-only list of files (docs/PROTOCOL.md §1): number, path, length, digest of the first 64 KiB. No more is read.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

constexpr int64_t kSourcePollUs = 200'000;
constexpr uint64_t kDigestBytes = 64 * 1024;
constexpr size_t kLogFilesMax = size_t{1} << 20;  // at a time; what is consumed and gone leaves the list

// One thread. Time is given, never asked for.
//
// Logs are listed one after the other: a log's files enter the list once the logs before it are closed. A log with
// paths is closed at once. A log with a directory is closed by its end marker, or after `idle_seconds_max` without a
// new file; its files enter in the order of their names, as far as they are there at the same poll. Hidden names, names
// that end in ".tmp", folders and the end marker are no log files. A file must enter its directory whole, by rename.
class Source {
 public:
  // The list and the lanes as a MANIFEST knows them; all empty on a first start.
  struct Listed {
    std::vector<LogFile> files;
    bool closed = false;
    uint32_t logs = 0;  // of the job that the list was made for
    std::vector<LaneState> lanes;
    ConsumedFiles consumed;
    bool again = false;  // a file that the run knows may be trained once more under another name
  };
  // Paths are resolved anew, so that a job whose data_dir moved goes on. What is still to be read must be there with
  // its length and digest: NotFound or DataLoss otherwise, with file and remedy. What is amended since is told in the
  // log:
  //  - a file that no lane has begun may be another one, or be gone from its directory;
  //  - a file that lanes are in may be another one behind their cursors: readers check the rest (Cursor.text_digest);
  //  - a file that all lanes have passed for good need not be there, and leaves the list once nobody names it;
  //  - a path may be taken off its log at any time, and new ones named behind the listed ones: FailedPrecondition
  //    where they stand before them, or are known files under another name. A directory that had ended goes on where
  //    new files lie in it. New files begin a segment where lanes are at the end of the last one, or it is shuffled.
  // A shuffled segment that is begun is one whole: nothing of it may change. Ends with a first Poll.
  static absl::StatusOr<std::unique_ptr<Source>> Open(const Job& job, const Listed& before, int64_t now_us);

  // Looks for new files, appends them to the list and returns them. Nothing when closed. NotFound for a path, or a
  // directory, that does not exist.
  absl::StatusOr<std::vector<LogFile>> Poll(int64_t now_us);

  const std::vector<LogFile>& files() const { return files_; }
  bool closed() const { return closed_; }
  const ConsumedFiles& consumed() const { return consumed_; }  // left the list before its first entry
  // When Poll is worth calling again; kNever once closed.
  int64_t next_poll_us() const { return next_poll_us_; }

 private:
  struct OfLog {
    std::set<std::string> seen;  // names of its directory that are in the list
    int paths = 0;               // listed so many of log.path
    bool closed_before = false;  // had ended when the MANIFEST was written
  };

  Source(const Job& job, const Listed& before)
      : job_(job),
        again_(before.again),
        known_files_(before.files.size()),
        consumed_(before.consumed),
        logs_(static_cast<size_t>(job.log_size())) {}
  absl::Status Restore(const Listed& was);
  void ForgetConsumed(const Listed& was);
  absl::Status CheckNew(int path) const;
  absl::Status PollDirectory(const Log& log, int64_t now_us);
  absl::StatusOr<std::vector<std::string>> NewNames(const std::string& folder, const Log& log, bool* ended) const;
  absl::Status Append(const std::string& path, const std::string& name, uint32_t log);

  const Job job_;
  const bool again_;
  size_t known_files_;  // the first ones of files_: not new
  ConsumedFiles consumed_;
  std::vector<OfLog> logs_;  // [logs]
  std::vector<LogFile> files_;
  bool last_is_whole_ = false;  // nothing can be added to the last listed segment
  uint32_t log_ = 0;            // the log whose files are being listed
  int64_t newest_us_ = -1;      // when that log last gave a file, or when it became its turn; -1: not yet its turn
  int64_t next_poll_us_ = 0;
  bool closed_ = false;
};

// Side tables that training logs or splits join, as they are now: every worker must read the same. NotFound names one
// that is missing.
absl::StatusOr<std::vector<SideTableFile>> DescribeSideTables(const Job& job);
// Those of `files` that training logs join.
std::vector<SideTableFile> JoinedInTraining(const Job& job, const std::vector<SideTableFile>& files);
// DataLoss where a side table that training joins is another one than `before`: it decides which records are valid, and
// so what a cursor means.
absl::Status CheckSideTables(const std::vector<SideTableFile>& before, const std::vector<SideTableFile>& now);

}  // namespace hearth
