// A record as the store holds it, and where it lies there (docs/FORMATS.md "Rows in RocksDB").
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "embedding/embedding_table.h"
#include "embedding/kv_store.h"
#include "embedding/sign.h"

namespace hearth {

struct KvRange {  // [first, last)
  KvKey first;
  KvKey last;
};

inline KvKey KeyOf(Sign sign, uint32_t shards) { return {LogicalShardOf(sign, shards), sign}; }
// A table's records in one logical shard.
inline KvRange RecordsOf(TableNumber table, uint32_t shard) {
  const KvKey last = table < kTablesMax ? KvKey{shard, MakeSign(table + 1, 0)} : KvKey{shard + 1, 0};
  return {{shard, MakeSign(table, 0)}, last};
}
// A table's counting filter in one logical shard: one key a chunk, below every sign.
struct FilterChunk {
  uint64_t number = 0;
  bool aged = false;    // of a table with expiry: of one generation
  uint32_t parity = 0;  // of that one's number. A generation takes the keys of the last but one
};
constexpr int kFilterChunkBits = 40;  // the two highest: aged, parity
static_assert(kFilterChunkBits + 12 == kIdBits);
inline KvKey FilterChunkKey(TableNumber table, uint32_t shard, const FilterChunk& chunk) {
  const uint64_t aged = chunk.aged ? 2 + chunk.parity : 0;
  return {shard, uint64_t{table} << kFilterChunkBits | aged << (kFilterChunkBits - 2) | chunk.number};
}
inline KvRange FilterChunksOf(TableNumber table, uint32_t shard) {
  return {FilterChunkKey(table, shard, {}), FilterChunkKey(table + 1, shard, {})};
}
inline FilterChunk FilterChunkOf(KvKey key) {
  const uint64_t aged = key.sign >> (kFilterChunkBits - 2) & 3;
  return {key.sign & ((uint64_t{1} << (kFilterChunkBits - 2)) - 1), aged >= 2, static_cast<uint32_t>(aged & 1)};
}

// What a server keeps of a table beside its logical shards: the sums of its rows (row_sums.h). Not moved with a shard.
inline KvKey SumsKey(TableNumber table) { return {0xffffffffu, MakeSign(table, 0)}; }

// DataLoss unless `value` is a record of RowWordsOf `words`, or a counter alone.
absl::Status DecodeMeta(Sign sign, absl::string_view value, uint64_t words, RowMeta* meta);
inline const char* WordsOf(absl::string_view value) { return value.data() + sizeof(RowMeta); }  // unaligned
// Weights and state [RowFloatsOf], of an admitted row's record.
void DecodeFloats(const Table& table, absl::string_view value, float* floats);
// Behind the meta.
void AppendFloats(const Table& table, const float* floats, std::string* value);
inline bool IsAdmitted(const RowMeta& meta) { return (meta.flags & kRowAdmitted) != 0; }

// RowHash of a record as it is stored.
uint64_t RecordHash(Sign sign, absl::string_view value);

}  // namespace hearth
