// A parameter server's process, from its Hello to the scheduler's Goodbye: restores its logical shards, feeds its Shard
// with messages in the order they come, uses idle moments for upkeep, and saves its rows at each cut beside that
// (docs/ARCHITECTURE.md, "A run, message by message").
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/file_lock.h"
#include "common/base/task_pool.h"
#include "common/net/transport.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
#include "embedding/rocksdb_store.h"
#include "embedding/store_io.h"
#include "ps/server_metrics.h"
#include "ps/shard.h"
#include "ps/shard_map.h"

namespace hearth {

struct PsServerOptions {
  Env* env = nullptr;
  Transport* transport = nullptr;  // of this server's rank
  Job job;                         // effective, training.lanes filled in
  Ranks ranks;
  std::string dir;  // the run's folder
  // Parent of the working stores ps-<i>; empty: dir/live. On the file system of `dir` a snapshot is a set of hard
  // links; from another one, such as a disk of the host's own, what is new since the last snapshot is copied. Where it
  // is named it is there, and ps-<i>.lock in it keeps a second server out of ps-<i>.
  std::string live_dir;
};

// One thread, and those of its store.
class PsServer {
 public:
  explicit PsServer(PsServerOptions options);
  ~PsServer();  // waits for what its threads are at
  // Returns OK after Goodbye. An error is for the caller to report (SendFailed) and to end the process with; nothing
  // that was committed is touched by it. It comes at once, whatever the threads are at, and is best reported before the
  // destructor waits for them.
  absl::Status Run();
  // After Run: nothing of this server is left in live_dir.
  absl::Status RemoveWorkingStore();

 private:
  // A cut on its way to the disk, and to the scheduler.
  struct Saving {
    ServerAtCut report;
    int64_t begin_us = 0;
    absl::Status status;
    std::atomic<bool> done = false;
  };

  void EndThreads();
  absl::Status LockWorkingStore();
  absl::Status Start(const StartServer& start);
  absl::Status Serve();
  absl::Status Restore(const StartServer& start);
  absl::StatusOr<std::set<std::string>> CloneCheckpoint(const std::string& from, const std::string& to);
  absl::Status OpenStore();
  absl::Status SaveCut(ServerAtCut report);
  void SetHorizons(const google::protobuf::RepeatedPtrField<TableStats>& stats, uint64_t step);
  std::string SavedFolder(uint64_t step) const { return JoinPath(snapshots_, absl::StrCat(step, "/", name_)); }
  absl::Status CopyStore(const ServerAtCut& cut);  // on the store's writer
  // On the saver:
  absl::Status Describe(Saving* saving);
  absl::Status BringCheckpoint(const std::string& from, const std::string& to);
  absl::Status Copy(const std::string& from, const std::string& to);
  absl::Status CheckHash(const ServerAtCut& report);
  absl::StatusOr<std::vector<FileEntry>> DescribeCheckpoint(const std::string& snapshot);
  void Remember(absl::Span<const FileEntry> files);
  absl::Status TellOfCut(bool wait);
  // Reads the files that this server started from, slowly, beside its work.
  void VerifyInBackground(const std::string& folder, std::vector<FileEntry> files);
  absl::Status SendControl(const Control& control);

  const PsServerOptions options_;
  const uint32_t index_;    // among the servers
  const std::string name_;  // ps-<index>
  const std::string snapshots_;
  const std::string live_;          // folder of the store
  const std::string cuts_;          // of checkpoints on their way to snapshots_, where those are on another file system
  std::unique_ptr<FileLock> lock_;  // on live_ and cuts_
  Mailbox* const mailbox_;
  // [tables] of the newest checkpoint: what is expired there, no snapshot needs.
  std::vector<std::atomic<uint64_t>> saved_horizons_;
  std::vector<LogClock> clocks_;  // [tables] of the snapshot that it starts from; or none
  std::unique_ptr<KvStore> store_;
  std::atomic<bool> leaving_ = false;       // the background looks at it
  std::atomic<bool> rows_verified_ = true;  // but while verifier_ is at it
  absl::Status verified_;                   // written before kVerified is delivered
  std::unique_ptr<TaskPool> verifier_;      // one thread
  std::unique_ptr<TaskPool> saver_;         // one thread, that describes checkpoints while the writer goes on
  std::unique_ptr<StoreIo> io_;             // over store_
  std::unique_ptr<Shard> shard_;            // over io_
  std::unique_ptr<Saving> saving_;          // at most one
  std::deque<Message> early_;               // what came while a cut was waited for
  ServerMetrics metrics_;
  bool links_ = false;   // a file of live_ may have a name in snapshots_, too
  RocksDbOptions disk_;  // disk_free_bytes_min and disk_sharers, of the disks of live_ and snapshots_ alike
  // The saver's: the files of rows of the last snapshot, by name. They never change. And where they are.
  std::map<std::string, FileEntry> saved_;
  std::string saved_in_;
};

// Tells the scheduler that this process fails with `status`. Fit for a process whose server's Run has returned.
absl::Status SendFailed(Transport* transport, const Ranks& ranks, const absl::Status& status);

}  // namespace hearth
