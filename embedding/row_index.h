// Sign → slot: flat open addressing, one bucket a cache line, no tombstones.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "embedding/row_arena.h"
#include "embedding/sign.h"

namespace hearth {

// A bucket holds five signs with their slots, and how many signs went past it because it was full: a look-up goes on to
// the next bucket only while that is not 0, so removing leaves nothing behind. Look-ups are split (HashOf, Prefetch,
// Find) so that a caller can have many in flight.
class RowIndex {
 public:
  static constexpr uint32_t kNone = 0xffffffffu;

  // Never grows past what rows_max needs.
  explicit RowIndex(uint64_t rows_max) : buckets_max_(BucketsFor(rows_max)) {}

  // Independent of the shard map's Mix64(sign): a server owns some shards only, and would else fill some buckets only.
  static uint64_t HashOf(Sign sign) { return Mix64(sign ^ 0x3c6ef372fe94f82bull); }
  // Room for `rows` in all. May move everything; slots stay.
  absl::Status Reserve(uint64_t rows);
  void Prefetch(uint64_t hash) const { __builtin_prefetch(buckets() + HomeOf(hash)); }
  // The slot, or kNone.
  uint32_t Find(Sign sign, uint64_t hash) const {
    for (uint64_t b = HomeOf(hash);; b = Next(b)) {
      const Bucket& bucket = buckets()[b];
      uint32_t match = 0;
      for (uint32_t i = 0; i < kCells; ++i) match |= static_cast<uint32_t>(bucket.signs[i] == sign) << i;
      if (match != 0) return bucket.slots[__builtin_ctz(match)];
      if (bucket.passed == 0) return kNone;
    }
  }
  // REQUIRES: the sign is not there, is not 0, and a Reserve covers it.
  void Insert(Sign sign, uint64_t hash, uint32_t slot);
  // REQUIRES: the sign is there.
  void Remove(Sign sign);

  uint64_t bytes() const { return region_.committed_bytes(); }

 private:
  static constexpr uint32_t kCells = 5;
  struct alignas(64) Bucket {
    Sign signs[kCells];  // 0: free
    uint32_t slots[kCells];
    uint32_t passed;
  };
  static_assert(sizeof(Bucket) == 64);

  static uint64_t BucketsFor(uint64_t rows) { return rows * 5 / 16 + 2; }  // at most 3.2 rows in a bucket of 5
  uint64_t HomeOf(uint64_t hash) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(hash) * buckets_count_) >> 64);
  }
  uint64_t Next(uint64_t bucket) const { return bucket + 1 == buckets_count_ ? 0 : bucket + 1; }
  Bucket* buckets() const { return reinterpret_cast<Bucket*>(region_.data()); }

  uint64_t buckets_max_;
  uint64_t buckets_count_ = 0;
  Region region_;
};

}  // namespace hearth
