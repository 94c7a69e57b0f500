// When a record is born, which leaves memory first, and when it is gone. docs/PROTOCOL.md §4,
// "What an apply does".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/sign.h"

namespace hearth {

// An expired record counts as absent. horizon: a step's, of the table's Expiry. Once true it stays true for all later
// steps, unless a push touches the sign.
inline bool IsExpired(uint32_t last_step, uint64_t horizon) { return last_step < horizon; }
inline bool IsExpired(const RowMeta& meta, uint64_t horizon) { return IsExpired(meta.last_step, horizon); }

inline uint32_t AddSaturating(uint32_t a, uint32_t b) {
  const uint64_t sum = uint64_t{a} + b;
  return sum > std::numeric_limits<uint32_t>::max() ? std::numeric_limits<uint32_t>::max() : static_cast<uint32_t>(sum);
}

// The lowest score leaves the memory tier. LRU: the last step. LFU: the count. LRU_LFU: the last step in spans of 1024
// steps, within a span the count (HierarchicalKV's epoch LFU): what was frequent once still leaves when it is not seen
// any more.
uint64_t ScoreOf(Table::Score score, const RowMeta& meta);

// Counts occurrences of signs in a fixed number of counters (a counting Bloom filter with conservative update). An
// estimate is never below the true count while that fits a counter; a sign never seen is estimated above 0 with
// probability at most about (1 − e^(−k·n/m))^k after n distinct signs in m counters with k hashes. Counters are one
// byte wide where count_min fits one, else four, and stop at their largest value. The result depends on the order of
// Adds: keep it fixed.
class CountingBloom {
 public:
  static constexpr uint64_t kChunkBytes = uint64_t{64} << 10;

  // REQUIRES: config.counter() == BLOOM, sizes as FaultsOf allows.
  explicit CountingBloom(const Admission& config);

  uint32_t Estimate(Sign sign) const;
  void Add(Sign sign, uint32_t occurrences);

  // The counters' bytes in chunks, for the store: only what changed is written.
  uint64_t chunks() const { return chunk_changed_.size(); }
  bool ChunkChanged(uint64_t chunk) const { return chunk_changed_[chunk]; }
  void MarkSaved() { chunk_changed_.assign(chunk_changed_.size(), false); }
  absl::string_view Chunk(uint64_t chunk) const;
  // False when the chunk does not exist or has another length: another job's filter.
  bool LoadChunk(uint64_t chunk, absl::string_view bytes);
  // Likewise, on top of what is counted. A sign's estimate is then at least the sum of the two.
  bool AddChunk(uint64_t chunk, absl::string_view bytes);

  // XXH3-64 of (what names it, the counters).
  uint64_t Hash(std::initializer_list<uint32_t> name) const;
  uint64_t bytes() const { return bytes_.size(); }
  static uint64_t BytesFor(const Admission& config) { return config.bloom_counters() * CounterBytes(config); }

 private:
  static uint32_t CounterBytes(const Admission& config) { return config.count_min() <= 255 ? 1 : 4; }
  uint64_t Position(Sign sign, uint32_t hash) const;
  uint32_t Get(uint64_t position) const { return CounterAt(bytes_.data() + position * counter_bytes_); }
  uint32_t CounterAt(const char* bytes) const;
  void RaiseTo(uint64_t position, uint32_t value);

  uint64_t counters_;
  uint32_t hashes_;
  uint32_t counter_bytes_;
  uint32_t counter_max_;
  std::vector<char> bytes_;
  std::vector<bool> chunk_changed_;
};

}  // namespace hearth
