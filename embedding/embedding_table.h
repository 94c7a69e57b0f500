// Sign → trained row, whatever tier it is in. The deep module of Hearth.
//
// A row is [meta | weights | optimizer state], contiguous, in the memory tier (flat open addressing over an arena,
// the meta packed with the sign: RowHead) and in the store: weights and state never come from different moments. Rules:
// docs/PROTOCOL.md §4.
//
//  - A pull changes nothing but the tier a row is in.
//  - Rows are born, counted, stamped and trained in Push, which applies one whole step.
//  - A value depends on (seed, sign, the applied steps), never on arrival, on tiers, on upkeep or on the number of
//  servers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
#include "embedding/row_weights.h"
#include "embedding/sign.h"

namespace hearth {

struct RowMeta {
  uint32_t count = 0;      // occurrences so far, saturating
  uint32_t last_step = 0;  // the last applied step that touched it
  uint32_t flags = 0;      // kRowAdmitted
  uint32_t updates = 0;    // optimizer updates so far (Adam's t)
};
static_assert(sizeof(RowMeta) == 16);
// Without it a record is a counter alone and its value ends after the meta.
constexpr uint32_t kRowAdmitted = 1;

// Floats of optimizer state behind the weights: SGD 0, ROWWISE_ADAGRAD 1, ADAGRAD and MOMENTUM dim, the others 2·dim.
uint32_t StateFloatsOf(const Optimizer& optimizer, uint32_t dim);
// Weights and state of an admitted row as who reads it gets them, the 32-bit words that a row has them in, and its
// bytes with the meta.
inline uint64_t RowFloatsOf(const Table& table) {
  return table.dim() + uint64_t{StateFloatsOf(table.optimizer(), table.dim())};
}
inline uint64_t RowWordsOf(const Table& table) {
  return WeightWordsOf(table.weights(), table.dim()) + StateFloatsOf(table.optimizer(), table.dim());
}
inline uint64_t RowBytesOf(const Table& table) { return sizeof(RowMeta) + RowWordsOf(table) * sizeof(float); }

class StoreIo;

struct TableOptions {
  Table config;                  // of the job
  TableNumber number = 1;        // position in the job + 1
  uint64_t seed = 1;             // of the job
  uint32_t shards = 1;           // logical shards of the job
  uint64_t memory_rows_max = 0;  // this server's share; at least 1
  uint64_t step = 0;             // the cut that the store's rows are from
  LogClock clock;                // as it was there, by whatever expire_after_hours; empty where the table had none
};

// One lane's part of a step. Signs strictly ascending, all of this table. gradients: sums over the lane's samples.
struct PushPart {
  absl::Span<const Sign> signs;            // [count]
  absl::Span<const uint32_t> occurrences;  // [count], each >= 1
  absl::Span<const float> gradients;       // [count, dim]
};

struct EmbeddingTableStats {
  uint64_t rows = 0;  // live admitted rows at the last cut (exact there), an upper bound between
  uint64_t rows_in_memory = 0;
  uint64_t slots_in_use = 0;  // rows in memory, and places for signs that are being read or were not found
  uint64_t rows_spilled = 0;  // leavings of the memory tier for the store, so far
  uint64_t rows_expired = 0;
  uint64_t rows_admitted = 0;
  uint64_t gradients_dropped = 0;  // occurrences of signs below the admission threshold
  uint64_t rows_non_finite = 0;    // updates refused because their result was not finite
  uint64_t memory_hits = 0;        // records that training pulls read: in the memory tier,
  uint64_t memory_misses = 0;      // or from the store. Signs without a record are in neither
  uint64_t rows_prefetched = 0;    // brought into memory by Prefetch
  uint64_t prefetch_hits = 0;      // of memory_hits: rows that Prefetch had brought in for that pull
  uint64_t bytes_memory = 0;
  uint64_t bytes_free = 0;  // of bytes_memory: places of rows that have left, buffers of writes that are done
};

// What a table of so many rows takes in memory on one server. For plans.
struct TableMemory {
  uint64_t rows_in_memory = 0;  // where a step brings few of the others
  uint64_t bytes = 0;           // stats().bytes_memory; of these
  uint64_t filter_bytes = 0;    // which signs the store has, wherever their rows are; and filters that count
  uint64_t write_bytes = 0;     // buffers of cuts
};

// What a cut knows of a table once its rows are copied.
struct TableCut {
  uint64_t step = 0;
  uint64_t hash = 0;  // sum over the live rows and the counting filters (docs/FORMATS.md "Model hash")
  uint64_t rows = 0;  // live admitted rows
  LogClock clock;     // empty where the rows do not expire by time
};

// One thread. `io` may be shared by the tables of a server (signs carry the table) and outlives them.
//
// A cut (docs/PROTOCOL.md §6): BeginCut marks the moment, ContinueCut hands the rows as they were at that moment to the
// store's writer, a slice at a time. Pulls and pushes go on in between: a row that is to change before it was handed
// over is copied first. What the table writes for other reasons waits until EndCut. So once ContinueCut has said that
// nothing is left, what the writer does next sees the store with every row as of the cut: that is the moment for a
// Checkpoint, by way of StoreIo::Then, and for EndCut.
class EmbeddingTable {
 public:
  // Takes up what the store holds of this table (restore = the store already has the rows): without a pass over them
  // where the last cut left its sums there. InvalidArgument on options that FaultsOf would refuse. Allocates at most
  // what memory_rows_max rows need, in steps as it fills, and while a cut is under way a little more.
  static absl::StatusOr<std::unique_ptr<EmbeddingTable>> Open(const TableOptions& options, StoreIo* io);
  // With reads and writes done by the caller's thread, each before its call returns.
  static absl::StatusOr<std::unique_ptr<EmbeddingTable>> Open(const TableOptions& options, KvStore* store);
  virtual ~EmbeddingTable() = default;

  // The rows of `signs` (strictly ascending) as of the last applied step, into rows [count, dim]. Expiry is judged with
  // `step`, by time with the steps applied so far. A sign without a live row: its initial value if count + occurrences
  // reaches the threshold, else zeros. Empty `occurrences`: read-only (evaluation, export): zeros without a live row,
  // and no row changes its tier.
  virtual absl::Status Pull(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                            float* rows) = 0;

  // Applies step `step`: `parts` in lane order, n = records of the step over all lanes (the divisor; n >= 1 unless no
  // part has a sign). REQUIRES: steps ascend. g = (sum of the lanes' gradients in lane order) / n, then the optimizer,
  // then last_step. Lanes without the sign are left out of its sum. BLOOM: a sign without a live row counts in its
  // logical shard's filter, signs in ascending order; a row is born with the filter's estimate as its count. A row
  // whose result would not be finite keeps weights, state and updates (a row born in this step: its initial ones) and
  // is counted in rows_non_finite; count and last_step move, because the sign was seen. On an error of the store the
  // step is applied in part: the caller stops and starts again from a snapshot.
  virtual absl::Status Push(uint64_t step, uint64_t n, absl::Span<const PushPart> parts) = 0;
  // The log's time of the step just applied, seconds since 1970. Rows that expire by time do so from the next step on.
  virtual void Tick(uint64_t step, uint32_t time_s) = 0;
  // False: a push of so many signs may find no room while a cut is under way; end the cut first.
  virtual bool HasRoomFor(uint64_t signs) const = 0;

  // Begins to bring rows into memory ahead of the pull of `step`, and keeps them until then. Waits for nothing; what
  // finds no room is left out. Never drives out a row used in the last two steps.
  virtual absl::Status Prefetch(uint64_t step, absl::Span<const Sign> signs) = 0;

  // A bounded slice of upkeep (at most about rows_max rows looked at): fill memory after a restore, spill, evict, give
  // expired space back. True when there is more to do. Never changes a value.
  virtual absl::StatusOr<bool> Maintain(uint64_t step, uint64_t rows_max) = 0;

  // REQUIRES: no cut is under way, and `step` is not before the last applied one.
  virtual absl::Status BeginCut(uint64_t step) = 0;
  // At most about rows_max rows; none while the writer is far behind (CutWaits), unless `wait`. True while there is
  // more to do.
  virtual absl::StatusOr<bool> ContinueCut(uint64_t rows_max, bool wait = false) = 0;
  virtual bool CutWaits() const = 0;
  // REQUIRES: ContinueCut said false.
  virtual TableCut EndCut() = 0;

  // A cut in one go: the store holds every row as of `step`, and the caller may call KvStore::Checkpoint. Returns the
  // cut's hash.
  absl::StatusOr<uint64_t> Snapshot(uint64_t step);

  // From now on at most so many rows in memory; not more than the options' memory_rows_max. What is too much leaves
  // with the next steps, or where a cut is under way behind it. REQUIRES: at least 1.
  virtual void SetMemoryRowsMax(uint64_t rows) = 0;
  // Looks at about rows_max rows to give memory of bytes_free back to the system. REQUIRES: no cut is under way.
  virtual absl::Status GiveBackMemory(uint64_t rows_max) = 0;
  // What a row takes in memory, about: with its sign, counters and place in the index.
  virtual uint64_t row_bytes_in_memory() const = 0;

  virtual EmbeddingTableStats stats() const = 0;
  // Of a table that holds `rows` in all, of which `changed` change from cut to cut, and whose filters count
  // `filter_shards` logical shards. REQUIRES: what Open asks.
  static TableMemory MemoryFor(const TableOptions& options, uint64_t rows, uint64_t changed, uint32_t filter_shards);

 protected:
  // Until all that was handed to the writer is written.
  virtual absl::Status WaitForWrites() = 0;
};

// What every row's share of the model hash is: XXH3-64 of (table u32, sign u64, count u32, last_step u32, flags u32,
// updates u32, weights and state floats), little-endian, in this order. Summed mod 2^64, with the counting filters'.
uint64_t RowHash(TableNumber table, Sign sign, const RowMeta& meta, absl::Span<const float> words);

// A new row's weight i: uniform in [−init, init) from Mix64(seed, sign, i). The tests' and the golden trainer's
// reference too.
float InitialWeight(uint64_t seed, Sign sign, uint32_t i, double init_uniform);

}  // namespace hearth
