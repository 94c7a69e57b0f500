// Files → batches. Delimited text (CSV, TSV; quoted fields; header or named columns; plain, gzip, zstd), joined with
// side tables, turned into signs, numbers and labels. Pieces, windows, shuffling, cursors: docs/PROTOCOL.md §1.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/base/file_list.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"
#include "worker/log/side_table.h"

namespace hearth {

// What all lanes of a process share: the job's columns, checked against its files, and side tables in memory.
// Immutable; threads may share it.
class LogSchema {
 public:
  // Checks every column that slots, tasks, filters and joins name against each log's header (or Log.column) and side
  // table: all faults at once, each with file, log, column and remedy, and what columns the file has (InvalidArgument);
  // a missing file is NotFound with its path, one of another format DataLoss. `logs`: job.log(), or the logs of splits;
  // `users`: the column of GAUC's user for each of them, "" or none at all where there is none. `side_tables`: what the
  // files of side tables must be (DataLoss); one that is not among them may be any. A log with a directory is checked
  // when its first file appears.
  static absl::StatusOr<std::shared_ptr<const LogSchema>> Open(const Job& job, const std::vector<Log>& logs,
                                                               const std::vector<std::string>& users = {},
                                                               const std::vector<SideTableFile>& side_tables = {});
  // The same faults, and those of expressions that no file has to be read for, from the headers alone: a side table's
  // rows are not read. For whoever starts the readers.
  static absl::Status Check(const Job& job, const std::vector<Log>& logs, const std::vector<std::string>& users = {});
  const AttributeTables& tables() const { return tables_; }  // those that the logs join

 private:
  explicit LogSchema(AttributeTables tables) : tables_(std::move(tables)) {}
  const AttributeTables tables_;
};

struct LaneReaderOptions {
  Job job;
  std::vector<Log> logs;  // LogFile.log indexes these
  std::shared_ptr<const LogSchema> schema;
  FileList* files = nullptr;  // outlives the reader
  uint32_t lane = 0;
  uint32_t lanes = 1;
  uint32_t batch_size = 0;  // > 0: every lane batch has so many records, whatever the job says (evaluation)
  uint32_t epochs = 1;
  bool keep_user = false;  // fill Batch::user (and user_text when predictions are written)
  bool keep_user_text = false;
  std::string user_column;
  Cursor start;         // resume: end of the last applied batch; default: the beginning
  std::string scratch;  // folder for decompressed spools where random access is needed
  Env* env = nullptr;
  // Tail: whether no step is being made because no lane has a record (RestGate). While others have records, a lane that
  // has been dry for idle_ms joins every step at once; else it says so no more often than every idle_ms. nullptr: as if
  // the job rested.
  const std::atomic<bool>* job_rests = nullptr;
};

// One lane's batches in the one order that docs/PROTOCOL.md §1 fixes. One thread. A resume from the cursor of any batch
// continues with exactly the batches that would have followed.
class LaneReader {
 public:
  static absl::StatusOr<std::unique_ptr<LaneReader>> Open(const LaneReaderOptions& options);
  virtual ~LaneReader() = default;
  // The next batch: records; the end of an epoch (once each epoch, after its last batch); or idle (tail only). After
  // the last epoch's end: nullptr. An idle batch repeats the last cursor and carries no counts. A reader started from a
  // cursor with end_of_epoch begins the next epoch at once: whoever restores a lane at its end waits for the others
  // first. Bad records are counted and dead-lettered in the batch; DataLoss where the file cannot be read on (a
  // truncated gzip, a file that is not the listed one), naming file, offset, cause and remedy.
  virtual absl::StatusOr<std::unique_ptr<Batch>> Next() = 0;
};

// The job's list of files for logs with paths: numbers, lengths, digests. NotFound names the path. Used by tests and
// `hearth eval`; in a run the scheduler makes the list (scheduler/source.h) by the same rules.
absl::StatusOr<std::vector<LogFile>> ListLogFiles(const Job& job, const std::vector<Log>& logs);

constexpr uint64_t kBaseRateRecordsMax = 65536;  // of each log, where a job starts
// Positive rates per task over the first `records_max` valid records of each log, of its first file where the log is
// cut after each file (labelled records of all logs added up), or the job's base_rate where given; 0.5 / n smoothing
// keeps it inside (0, 1). The same on every worker: it depends on files alone.
absl::StatusOr<std::vector<double>> CountBaseRates(const Job& job, const std::shared_ptr<const LogSchema>& schema,
                                                   const std::vector<LogFile>& files, uint64_t records_max);

}  // namespace hearth
