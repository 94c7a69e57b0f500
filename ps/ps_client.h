// A worker's view of all servers: split by owner, send, retry, gather. The one place that retries.
//
// Two objects, one a thread, with endpoints of their own and nothing shared: the pull thread owns a PullClient, the
// push thread a PushClient. Everything they call is idempotent by (lane, step).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/net/transport.h"
#include "common/net/wire.h"
#include "ps/shard_map.h"

namespace hearth {

// One table's share of a batch. Signs strictly ascending.
struct TableRows {
  TableNumber table = 1;
  uint32_t dim = 0;
  absl::Span<const Sign> signs;            // [count]
  absl::Span<const uint32_t> occurrences;  // [count]; empty in read-only pulls
  absl::Span<float> rows;                  // [count, dim]: filled by Pull, read (gradients) by Push
};

struct ClientOptions {
  Env* env = nullptr;
  Transport* transport = nullptr;
  ShardMap map{1, 1};
  Ranks ranks;
  Dtype dtype = Dtype::kFloat32;  // of rows that training pulls and of gradients, on the wire (WireDtypeOf)
  // A message unanswered for retry_us is sent again, and then each time after twice as long, up to retry_us_max. Nobody
  // gives up: at a cut a server may save, and other workers evaluate, for longer than any limit here; whoever dies ends
  // the job.
  int64_t retry_us = 2'000'000;
  int64_t retry_us_max = 30'000'000;
};

// One message a server even where it owns none of the signs: the step clock needs it (docs/PROTOCOL.md §2).
class PullClient {
 public:
  // `port`: kPortPull for training, kPortEvaluate on worker > 0 or kPortPull for evaluation pulls.
  PullClient(const ClientOptions& options, int port);
  ~PullClient();
  // The two halves, so that one step's pulls of all lanes are in flight together. Send in (step, lane) order; then
  // Receive with the same order and arguments. Rows land in place. Internal on a reply that does not fit: a server has
  // a bug.
  absl::Status Send(uint32_t lane, uint64_t step, uint64_t view, absl::Span<const TableRows> tables);
  absl::Status Receive(uint32_t lane, uint64_t step, absl::Span<TableRows> tables);
  // Any thread: whoever waits in Receive, or would, gets Cancelled instead. For an end at which steps that were pulled
  // ahead are let go: their views may be steps that nobody makes.
  void Stop();
  // Rows after the cut `view`, read only; any number, matched by a number of its own.
  absl::Status ReadOnly(uint64_t view, absl::Span<TableRows> tables);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

class PushClient {
 public:
  explicit PushClient(const ClientOptions& options);
  ~PushClient();
  // Hands the push to the transport and keeps a copy until each server acknowledged it. Of a skipped step only the
  // clock is sent.
  struct Terms {  // of a step, the same for all lanes
    uint64_t n = 0;
    uint64_t next_cut = 0;
    bool skip = false;
    uint32_t time_s = 0;  // 0: none
  };
  absl::Status Push(uint32_t lane, uint64_t step, const Terms& terms, absl::Span<const TableRows> tables);
  // Takes acknowledgements in, repeats what is overdue. Returns when the next call is due (a time, kNever if nothing is
  // open).
  absl::StatusOr<int64_t> Poll();
  // Waits until all are acknowledged.
  absl::Status Flush();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Hints; no reply. Any thread with a port of its own (kPortPrefetch).
absl::Status SendPrefetch(const ClientOptions& options, uint64_t step, absl::Span<const TableRows> tables);

}  // namespace hearth
