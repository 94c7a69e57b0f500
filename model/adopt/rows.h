// The rows' half of an adoption: from the old snapshot's stores into a new one, by the plan.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "common/artifact/snapshot_hold.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
#include "embedding/sign.h"
#include "model/adopt/plan.h"

namespace hearth {

struct AdoptedTable {
  uint64_t rows = 0;      // carried; of a table that is dropped: that it had
  uint64_t counters = 0;  // of signs without a row, carried
  uint64_t counters_left = 0;
  uint64_t expired = 0;  // rows that the new job's rule of expiry ends at the first step
  LogClock clock;        // that rows expire by from there on; empty where that is not by time
};
struct AdoptedRows {
  uint64_t rows_hash = 0;            // of the new stores, as servers sum it
  std::vector<AdoptedTable> tables;  // as AdoptionPlan::table_lines
};
using WantedRows = absl::flat_hash_map<Sign, std::vector<float>>;

// Streams every row of `before`, whose job is `old_job`, in order, into `store`, which is empty: its sign renumbered to
// the new table, put where the new job's shards have it, its optimizer's state as the plan says. Memory is bounded.
// `restart`: the first snapshot is of step 0, and so is every row; else it is of the old one's step. Of the old signs
// that are keys of *wanted, fills in the weights; signs without a row are left empty. DataLoss where the rows are not
// those of the MANIFEST; what `store` says where the disk is full.
absl::StatusOr<AdoptedRows> TakeOverRows(const HeldSnapshot& before, const Job& old_job, const Job& now,
                                         const AdoptionPlan& plan, bool restart, KvStore* store, WantedRows* wanted);

}  // namespace hearth
