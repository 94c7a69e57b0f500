// Reads committed snapshots: DIR/snapshots/<step>/MANIFEST and what it lists. For resume, inspect, verify, eval,
// export.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/artifact/manifest.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/kv_store.h"

namespace hearth {

// That the tables of a MANIFEST's job are ones that a row can belong to: at most kTablesMax, of 1 to 4,096 dimensions.
// DataLoss.
absl::Status CheckTables(const std::string& folder, const Job& job);

// Everything that FindNewestSnapshot (common/artifact/manifest.h) checks, every RocksDB block, and that the hash of all
// rows equals the MANIFEST's. DataLoss names the file.
absl::Status VerifySnapshot(const std::string& folder);

// Visits every live row (expiry judged at the MANIFEST's step) of `table`, in (logical shard, sign) order whatever the
// number of servers was, bounded memory. Adds the table's share of the hash of all rows to *rows_hash: over all tables
// it is what CheckRowsHash takes, so that who reads a snapshot whole need not read it once more to verify it.
// visit_counter: called, in the same order, for what counts a sign that has no row yet (admission with EXACT counters).
using RowVisitor = std::function<absl::Status(Sign, const RowMeta&, absl::Span<const float> weights_and_state)>;
using CounterVisitor = std::function<absl::Status(Sign, const RowMeta&)>;
absl::Status VisitRows(const std::string& folder, const Manifest& manifest, const Job& job, TableNumber table,
                       const RowVisitor& visit, uint64_t* rows_hash, const CounterVisitor& visit_counter = {});
// DataLoss where it is not the MANIFEST's.
absl::Status CheckRowsHash(const std::string& folder, const Manifest& manifest, uint64_t rows_hash);

// The share of the rows hash that one of `servers` servers' store `folder`, of the cut, holds: summed anew from its
// records.
absl::StatusOr<uint64_t> HashServerRows(const std::string& folder, const Job& job, const ServerAtCut& cut,
                                        uint32_t server, uint32_t servers);

// A table's clock at a cut; stats: what the cut says of the tables, or nothing.
const LogClock& ClockOf(const google::protobuf::RepeatedPtrField<TableStats>& stats, int table);
// Horizons (expiry.h) of the job's tables at the cut of `step`.
std::vector<uint64_t> HorizonsOf(const Job& job, const google::protobuf::RepeatedPtrField<TableStats>& stats,
                                 uint64_t step);
// Of what a store holds: a record that is expired. Bookkeeping is none. horizon_of: 0 for a table that the job has not.
bool IsExpiredRecord(KvKey key, absl::string_view value, absl::FunctionRef<uint64_t(TableNumber)> horizon_of);

// Fills `store` with the logical shards that `owns(shard)` selects from the ps-<i> folders of a snapshot.
absl::Status RestoreShards(const std::string& folder, const Manifest& manifest,
                           const std::function<bool(uint32_t shard)>& owns, KvStore* store);

}  // namespace hearth
