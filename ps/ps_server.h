// A parameter server's process, from its Hello to the scheduler's Goodbye: restores its logical shards, feeds its Shard
// with messages in the order they come, uses idle moments for upkeep, and saves its rows at each cut
// (docs/ARCHITECTURE.md, "A run, message by message").
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "common/net/transport.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
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

// One thread.
class PsServer {
 public:
  explicit PsServer(PsServerOptions options);
  ~PsServer();
  // Returns OK after Goodbye. An error is for the caller to report (SendFailed) and to end the process with; nothing
  // that was committed is touched by it.
  absl::Status Run();

 private:
  struct Saved {  // a file that never changes once written
    uint64_t bytes = 0;
    uint64_t xxh3 = 0;
  };

  absl::Status Start(const StartServer& start);
  absl::Status Serve();
  absl::Status Restore(const StartServer& start);
  absl::Status SaveCut(uint64_t step);
  absl::StatusOr<std::vector<FileEntry>> DescribeCheckpoint(const std::string& snapshot);
  absl::Status SendControl(const Control& control);

  const PsServerOptions options_;
  const uint32_t index_;    // among the servers
  const std::string name_;  // ps-<index>
  const std::string live_;  // folder of the store
  Mailbox* const mailbox_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<Shard> shard_;  // over store_
  ServerMetrics metrics_;
  std::map<std::string, Saved> saved_;  // sorted tables of the last checkpoint, by name
};

// Tells the scheduler that this process fails with `status`. Fit for a process whose server has already returned.
absl::Status SendFailed(Transport* transport, const Ranks& ranks, const absl::Status& status);

}  // namespace hearth
