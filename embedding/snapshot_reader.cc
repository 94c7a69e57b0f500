#include "embedding/snapshot_reader.h"

#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/counting_filter.h"
#include "embedding/expiry.h"
#include "embedding/kv_store.h"
#include "embedding/lifecycle.h"
#include "embedding/rocksdb_store.h"
#include "embedding/row_record.h"
#include "embedding/sparse_optimizer.h"

namespace hearth {
namespace {

constexpr size_t kRestoreBatchBytes = size_t{64} << 20;  // one sorted file

std::string ServerFolder(const std::string& folder, uint32_t server) {
  return JoinPath(folder, absl::StrCat("ps-", server));
}

absl::Status CheckManifest(const std::string& folder, const Manifest& manifest) {
  // Every server has files in it, so their number is known before anything is allocated by it.
  const uint32_t servers_max = static_cast<uint32_t>(manifest.file_size());
  if (manifest.servers() >= 1 && manifest.servers() <= servers_max && manifest.shards() >= 1) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(folder, ": MANIFEST names ", manifest.servers(), " servers and ",
                                          manifest.shards(), " logical shards; use another snapshot"));
}

// Visits each live record, counters too, of one table in one logical shard, as it is stored.
using RecordVisitor = std::function<absl::Status(Sign, const RowMeta&, absl::string_view value)>;
absl::Status VisitRecords(KvStore* store, uint64_t horizon, const Table& config, TableNumber table, uint32_t shard,
                          const RecordVisitor& visit) {
  const uint64_t words = RowWordsOf(config);
  const KvRange range = RecordsOf(table, shard);
  absl::Status status;
  HEARTH_RETURN_IF_ERROR(store->Scan(range.first, range.last, [&](KvKey key, absl::string_view value) {
    RowMeta meta;
    status = DecodeMeta(key.sign, value, words, &meta);
    if (status.ok() && !IsExpired(meta, horizon)) status = visit(key.sign, meta, value);
    return status.ok();
  }));
  return status;
}

// A logical shard's counting filter's share of the rows hash.
absl::Status AddFilter(KvStore* store, uint64_t step, const LogClock& clock, const Table& config, TableNumber table,
                       uint32_t shard, uint64_t* hash) {
  if (config.admission().counter() != Admission::BLOOM) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(const auto filter, CountingFilter::Load(config, table, shard, step, clock, store));
  if (filter != nullptr) *hash += filter->Hash(Expiry(ExpiryRule::Of(config), clock).GenerationAt(step));
  return absl::OkStatus();
}

}  // namespace

const LogClock& ClockOf(const google::protobuf::RepeatedPtrField<TableStats>& stats, int table) {
  return table < stats.size() ? stats.Get(table).clock() : LogClock::default_instance();
}

absl::Status CheckTables(const std::string& folder, const Job& job) {
  const auto lost = [&](const std::string& fault) {
    return absl::DataLossError(
        absl::StrCat(JoinPath(folder, "MANIFEST"), ": its job has ", fault, "; use another snapshot"));
  };
  if (job.table_size() > static_cast<int>(kTablesMax)) return lost(absl::StrCat(job.table_size(), " tables"));
  for (const Table& table : job.table()) {
    if (table.dim() >= 1 && table.dim() <= SparseOptimizer::kDimMax) continue;
    return lost(absl::StrCat("a table \"", table.name(), "\" of dim ", table.dim()));
  }
  return absl::OkStatus();
}

absl::Status VerifySnapshot(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(folder));
  HEARTH_RETURN_IF_ERROR(CheckManifest(folder, manifest));
  HEARTH_RETURN_IF_ERROR(VerifyFiles(folder, manifest));
  for (uint32_t server = 0; server < manifest.servers(); ++server) {
    HEARTH_RETURN_IF_ERROR(VerifyRocksDbStore(ServerFolder(folder, server)));
  }
  HEARTH_ASSIGN_OR_RETURN(const Job job, ParseJob(manifest.job(), JoinPath(folder, "MANIFEST")));
  HEARTH_RETURN_IF_ERROR(CheckTables(folder, job));
  const auto pass = [](Sign, const RowMeta&, absl::Span<const float>) { return absl::OkStatus(); };
  uint64_t rows_hash = 0;
  for (int t = 0; t < job.table_size(); ++t) {
    HEARTH_RETURN_IF_ERROR(VisitRows(folder, manifest, job, static_cast<TableNumber>(t) + 1, pass, &rows_hash));
  }
  return CheckRowsHash(folder, manifest, rows_hash);
}

absl::Status CheckRowsHash(const std::string& folder, const Manifest& manifest, uint64_t rows_hash) {
  if (rows_hash == manifest.rows_hash()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(folder, ": the rows hash to ", absl::Hex(rows_hash, absl::kZeroPad16),
                                          ", MANIFEST says ", absl::Hex(manifest.rows_hash(), absl::kZeroPad16),
                                          "; use an older snapshot"));
}

absl::Status VisitRows(const std::string& folder, const Manifest& manifest, const Job& job, TableNumber table,
                       const RowVisitor& visit, uint64_t* rows_hash, const CounterVisitor& visit_counter) {
  HEARTH_RETURN_IF_ERROR(CheckManifest(folder, manifest));
  HEARTH_RETURN_IF_ERROR(CheckTables(folder, job));
  HEARTH_CHECK(table >= 1 && table <= static_cast<TableNumber>(job.table_size()));
  const Table& config = job.table(static_cast<int>(table) - 1);
  std::vector<std::unique_ptr<KvStore>> stores(manifest.servers());
  for (uint32_t server = 0; server < manifest.servers(); ++server) {
    HEARTH_ASSIGN_OR_RETURN(stores[server], OpenRocksDbStoreReadOnly(ServerFolder(folder, server)));
  }
  const LogClock& clock = ClockOf(manifest.table(), static_cast<int>(table) - 1);
  const uint64_t horizon = HorizonOf(config, clock, manifest.step());
  std::vector<float> floats(RowFloatsOf(config));
  for (uint32_t shard = 0; shard < manifest.shards(); ++shard) {
    const uint32_t server = shard % manifest.servers();
    const absl::Status status = VisitRecords(stores[server].get(), horizon, config, table, shard,
                                             [&](Sign sign, const RowMeta& meta, absl::string_view value) {
                                               *rows_hash += RecordHash(sign, value);
                                               if (!IsAdmitted(meta))
                                                 return visit_counter ? visit_counter(sign, meta) : absl::OkStatus();
                                               DecodeFloats(config, value, floats.data());
                                               return visit(sign, meta, floats);
                                             });
    if (!status.ok()) return Annotate(status, ServerFolder(folder, server));
  }
  for (uint32_t shard = 0; shard < manifest.shards(); ++shard) {
    const uint32_t server = shard % manifest.servers();
    const absl::Status status =
        AddFilter(stores[server].get(), manifest.step(), clock, config, table, shard, rows_hash);
    if (!status.ok()) return Annotate(status, ServerFolder(folder, server));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> HashServerRows(const std::string& folder, const Job& job, const ServerAtCut& cut,
                                        uint32_t server, uint32_t servers) {
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<KvStore> store, OpenRocksDbStoreReadOnly(folder));
  uint64_t hash = 0;
  const auto add = [&](Sign sign, const RowMeta&, absl::string_view value) {
    hash += RecordHash(sign, value);
    return absl::OkStatus();
  };
  for (int t = 0; t < job.table_size(); ++t) {
    const TableNumber table = static_cast<TableNumber>(t) + 1;
    const LogClock& clock = ClockOf(cut.table(), t);
    const uint64_t horizon = HorizonOf(job.table(t), clock, cut.step());
    for (uint32_t shard = server; shard < job.training().shards(); shard += servers) {
      HEARTH_RETURN_IF_ERROR(VisitRecords(store.get(), horizon, job.table(t), table, shard, add));
      HEARTH_RETURN_IF_ERROR(AddFilter(store.get(), cut.step(), clock, job.table(t), table, shard, &hash));
    }
  }
  return hash;
}

std::vector<uint64_t> HorizonsOf(const Job& job, const google::protobuf::RepeatedPtrField<TableStats>& stats,
                                 uint64_t step) {
  std::vector<uint64_t> horizons;
  for (int t = 0; t < job.table_size(); ++t) horizons.push_back(HorizonOf(job.table(t), ClockOf(stats, t), step));
  return horizons;
}

bool IsExpiredRecord(KvKey key, absl::string_view value, absl::FunctionRef<uint64_t(TableNumber)> horizon_of) {
  const TableNumber table = TableOf(key.sign);
  RowMeta meta;
  if (table < 1 || key == SumsKey(table)) return false;
  if (value.size() < sizeof(meta)) return false;
  std::memcpy(&meta, value.data(), sizeof(meta));
  return IsExpired(meta, horizon_of(table));
}

absl::Status RestoreShards(const std::string& folder, const Manifest& manifest,
                           const std::function<bool(uint32_t shard)>& owns, KvStore* store) {
  HEARTH_RETURN_IF_ERROR(CheckManifest(folder, manifest));
  HEARTH_ASSIGN_OR_RETURN(const Job job, ParseJob(manifest.job(), JoinPath(folder, "MANIFEST")));
  const std::vector<uint64_t> horizons = HorizonsOf(job, manifest.table(), manifest.step());
  const auto horizon_of = [&](TableNumber table) { return table <= horizons.size() ? horizons[table - 1] : 0; };
  for (uint32_t server = 0; server < manifest.servers(); ++server) {
    std::unique_ptr<KvStore> saved;  // opened only where something of it is wanted
    std::string values;
    std::vector<std::pair<KvKey, size_t>> batch;  // key and length of its value
    absl::Status status;
    const auto write = [&] {
      std::vector<KvWrite> writes;
      size_t begin = 0;
      for (const auto& [key, bytes] : batch) {
        writes.push_back({key, absl::string_view(values).substr(begin, bytes), false});
        begin += bytes;
      }
      status = store->Write(writes);
      values.clear();
      batch.clear();
      return status.ok();
    };
    for (uint32_t shard = server; shard < manifest.shards(); shard += manifest.servers()) {
      if (!owns(shard)) continue;
      if (saved == nullptr) {
        HEARTH_ASSIGN_OR_RETURN(saved, OpenRocksDbStoreReadOnly(ServerFolder(folder, server)));
      }
      HEARTH_RETURN_IF_ERROR(saved->Scan(KvKey{shard, 0}, KvKey{shard + 1, 0}, [&](KvKey key, absl::string_view value) {
        // What is expired there may still be stored. Who takes it over may have another rule.
        if (IsExpiredRecord(key, value, horizon_of)) return true;
        values.append(value.data(), value.size());
        batch.emplace_back(key, value.size());
        return values.size() < kRestoreBatchBytes || write();
      }));
      HEARTH_RETURN_IF_ERROR(status);
    }
    if (!write()) return status;
  }
  return absl::OkStatus();
}

}  // namespace hearth
