// A server's tables and its step clock: answers pulls, holds pushes and applies steps in the one order that
// docs/PROTOCOL.md §2 allows. Pure as to time and network: bytes in, bytes out, so it is tested without either.
//
// At a cut S the tables mark the moment, and S + 1 goes on: slices of the cut are copied after each message and in idle
// moments. A cut that comes while another is under way waits for it.
//
// Cuts are the multiples of snapshot.every_steps, the step it starts from, and whatever a push's next_cut announces:
// pushes f … S carry S, so when all pushes of j are here the first cut >= j is known as far as condition (c) can ask.
//
// The rules it keeps (each has a test that fails without it):
//  - the pull of step s is answered when exactly view(s) is applied;
//  - step j is applied once (a) every lane's push of j is here, (b) j − 1 is applied, (c) each lane's unbroken run of
//    answered pulls reaches min(j + k, first cut >= j);
//  - the reply of a pull is kept until the push of the same (lane, step) arrives and repeated byte for byte; a pull
//    repeated after its push is dropped; pushes are idempotent by (lane, step).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/env.h"
#include "common/net/mailbox.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/store_io.h"

namespace hearth {

struct ShardOptions {
  Job job;  // effective
  uint32_t lanes = 1;
  uint32_t server = 0;  // this server's index
  uint32_t servers = 1;
  uint64_t step = 0;             // the cut that the store's rows are from
  std::vector<LogClock> clocks;  // [tables] as they were there; or none
  bool read_only = false;
  uint64_t cut_rows_max = 4096;  // copied in one slice of a cut
  Env* env = Env::Real();        // for how long a cut stopped the others, which decides nothing
  // For the test that leaves out one rule at a time. All true in production.
  struct Rules {
    bool keep_replies = true;
    bool unbroken_run = true;
    bool cut_in_condition_c = true;
  } rules;
};

// One thread.
class Shard {
 public:
  // Sends a reply. Called from Handle and from whatever Handle sets free.
  using Reply = std::function<absl::Status(Address to, Bytes message)>;
  // Called once each cut S, when all that belongs to it is handed to the store's writer and nothing that is newer: what
  // the writer does next (StoreIo::Then) sees the store as of S. `report` has step, tables, hash sum and stopped_us.
  using SaveCut = std::function<absl::Status(ServerAtCut report)>;

  static absl::StatusOr<std::unique_ptr<Shard>> Open(const ShardOptions& options, StoreIo* io, Reply reply,
                                                     SaveCut save_cut);
  virtual ~Shard() = default;

  // Pull, push, prefetch and read-only pull. Takes the message: a push stays in its own bytes until its step is
  // applied. Internal on a malformed message, or one that the protocol does not allow now: the server stops (a peer has
  // a bug).
  virtual absl::Status Handle(Message message) = 0;
  // A bounded slice of what can wait: of a cut that is under way, else of upkeep. True: more to do now. A cut may wait
  // for the store's writer: call again when a write is done.
  virtual absl::StatusOr<bool> Idle() = 0;
  virtual uint64_t applied_step() const = 0;

  // The cut that a run starts with, in one go.
  virtual absl::Status Cut() = 0;
  // One a table, in the job's order. bytes_disk is the store's size, dealt by the tables' rows and widths.
  virtual void FillStats(std::vector<TableStats>* stats) const = 0;
};

}  // namespace hearth
