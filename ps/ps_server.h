// A parameter server's process, from its Hello to the scheduler's Goodbye: restores its logical shards, feeds its Shard
// with messages in the order they come, uses idle moments for upkeep, and saves its rows at each cut beside that
// (docs/ARCHITECTURE.md, "A run, message by message").
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "common/base/task_pool.h"
#include "common/net/transport.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
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
  std::string
      live_dir;  // parent of ps-<i>; empty: dir/live. Best on the file system of dir: checkpoints are hard links
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

 private:
  struct Saved {  // a file that never changes once written
    uint64_t bytes = 0;
    uint64_t xxh3 = 0;
  };
  // A cut on its way to the disk, and to the scheduler.
  struct Saving {
    ServerAtCut report;
    int64_t begin_us = 0;
    absl::Status status;
    std::atomic<bool> done = false;
  };

  absl::Status Start(const StartServer& start);
  absl::Status Serve();
  absl::Status Restore(const StartServer& start);
  absl::Status OpenStore(uint64_t step);
  absl::Status SaveCut(ServerAtCut report);
  absl::Status CopyStore(const Saving& saving);  // on the store's writer
  absl::Status Describe(Saving* saving);         // on the saver
  absl::StatusOr<std::vector<FileEntry>> DescribeCheckpoint(const std::string& snapshot);
  absl::Status TellOfCuts(bool wait);
  absl::Status SendControl(const Control& control);

  const PsServerOptions options_;
  const uint32_t index_;    // among the servers
  const std::string name_;  // ps-<index>
  const std::string live_;  // folder of the store
  Mailbox* const mailbox_;
  std::atomic<uint64_t> saved_step_ = 0;  // of the newest checkpoint: what is expired there, no snapshot needs
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<TaskPool> saver_;              // one thread, that describes checkpoints while the writer goes on
  std::unique_ptr<StoreIo> io_;                  // over store_
  std::unique_ptr<Shard> shard_;                 // over io_
  std::deque<std::unique_ptr<Saving>> savings_;  // oldest first
  std::deque<Message> early_;                    // what came while the first cut was saved
  ServerMetrics metrics_;
  std::map<std::string, Saved> saved_;  // sorted tables of the last checkpoint, by name. The saver's
};

// Tells the scheduler that this process fails with `status`. Fit for a process whose server's Run has returned.
absl::Status SendFailed(Transport* transport, const Ranks& ranks, const absl::Status& status);

}  // namespace hearth
