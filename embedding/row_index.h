// Sign → slot: flat open addressing, one bucket a cache line, no tombstones, no pause as it grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "embedding/row_arena.h"
#include "embedding/sign.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#else
#include <cstring>
#endif

namespace hearth {

// A bucket holds twelve slots with 8 bits of their signs' hashes, and how many entries went past it because it was
// full: a look-up goes on to the next bucket only while that is not 0, so removing leaves nothing behind. Whether a
// slot is the sign's the row itself says (RowArena), which whoever looks a row up reads anyway. Look-ups are split
// (HashOf, Prefetch, Candidate, Find) so that a caller can have many in flight.
//
// A bucket's number grows with the hash, for any number of buckets. So the array grows in its place: its memory is
// continued, and from the last bucket down entries move to where they belong among twice as many buckets, some with
// every other Insert. Entries whose old bucket is below frontier_ have not moved yet. A move reads the entry's row, so
// there are to be few; and the numbers of buckets are the most's halves and their halves, so that a full table has no
// room to spare.
class RowIndex {
 public:
  static constexpr uint32_t kNone = 0xffffffffu;

  // Never grows past what rows_full need, which are about as many as there will be; more, up to rows_max, make it
  // slower. The arena outlives it.
  RowIndex(const RowArena* arena, uint64_t rows_full, uint64_t rows_max)
      : arena_(arena), buckets_max_(BucketsMaxFor(rows_full, rows_max)) {}

  // Independent of the shard map's Mix64(sign): a server owns some shards only, and would else fill some buckets only.
  static uint64_t HashOf(Sign sign) { return Mix64(sign ^ 0x3c6ef372fe94f82bull); }
  // Room for `rows` in all. Slots stay. May begin to grow, and ends what growing is under way where Insert could not.
  absl::Status Reserve(uint64_t rows);
  void Prefetch(uint64_t hash) const { __builtin_prefetch(buckets() + HomeOf(hash)); }
  // kNone: the sign is not there. Else the slot that Find will look at first.
  uint32_t Candidate(uint64_t hash) const {
    for (uint64_t b = HomeOf(hash);; b = Next(b)) {
      const uint32_t match = MatchesOf(buckets()[b], TagOf(hash));
      if (match != 0) return buckets()[b].slots[__builtin_ctz(match)];
      if (buckets()[b].passed == 0) return kNone;
    }
  }
  // The slot, or kNone.
  uint32_t Find(Sign sign, uint64_t hash) const {
    for (uint64_t b = HomeOf(hash);; b = Next(b)) {
      const Bucket& bucket = buckets()[b];
      for (uint32_t match = MatchesOf(bucket, TagOf(hash)); match != 0; match &= match - 1) {
        const uint32_t slot = bucket.slots[__builtin_ctz(match)];
        if (arena_->head(slot)->IsOf(sign)) return slot;
      }
      if (bucket.passed == 0) return kNone;
    }
  }
  // `slot` is in the arena with its sign. REQUIRES: the sign is not there, and a Reserve covers it.
  void Insert(uint64_t hash, uint32_t slot);
  // REQUIRES: it is there, and still in the arena.
  void Remove(uint32_t slot);
  // The sign is at another slot now; both are in the arena with it. REQUIRES: `from` is there.
  void Move(uint32_t from, uint32_t to);

  // Memory that it has written to, or will before long.
  uint64_t bytes() const;
  // bytes() of one that has grown to `rows`. For plans.
  static uint64_t BytesFor(uint64_t rows, uint64_t rows_full, uint64_t rows_max);
  // Of a row, where it is about as full as it gets.
  static constexpr uint64_t kRowBytes = 7;
  bool growing() const { return old_buckets_ != 0; }

 private:
  static constexpr uint32_t kCells = 12;
  static constexpr uint64_t kTail = 16;           // buckets behind the last home, for what goes past it
  static constexpr uint16_t kPassedMax = 0xffff;  // so many, or more: it stays
  struct alignas(64) Bucket {
    uint8_t tags[kCells];  // 0: free
    uint32_t slots[kCells];
    uint16_t passed;
  };
  static_assert(sizeof(Bucket) == 64);

  static uint64_t BucketsFor(uint64_t rows) { return rows * 5 / 48 + 2; }  // at most 9.6 rows in a bucket of 12
  static uint64_t BucketsMaxFor(uint64_t rows_full, uint64_t rows_max) {
    return std::max(BucketsFor(rows_full), rows_max / 11 + 2);  // 11 of 12 in the worst case
  }
  static uint64_t Grown(uint64_t needed, uint64_t buckets_max) {
    uint64_t buckets = buckets_max;
    while ((buckets + 1) / 2 >= needed) buckets = (buckets + 1) / 2;
    return buckets;
  }
  static uint8_t TagOf(uint64_t hash) { return static_cast<uint8_t>(hash % 255 + 1); }
  static uint64_t Scale(uint64_t hash, uint64_t buckets) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(hash) * buckets) >> 64);
  }
  static uint32_t MatchesOf(const Bucket& bucket, uint8_t tag) {  // a bit a cell
#if defined(__SSE2__)
    const __m128i tags =
        _mm_load_si128(reinterpret_cast<const __m128i*>(bucket.tags));  // and the first slot behind them
    const __m128i equal = _mm_cmpeq_epi8(tags, _mm_set1_epi8(static_cast<char>(tag)));
    return static_cast<uint32_t>(_mm_movemask_epi8(equal)) & ((1u << kCells) - 1);
#else
    uint32_t matches = 0;
    for (uint32_t i = 0; i < kCells; ++i) matches |= static_cast<uint32_t>(bucket.tags[i] == tag) << i;
    return matches;
#endif
  }

  uint64_t HomeOf(uint64_t hash) const {
    if (old_buckets_ != 0) {
      const uint64_t old = Scale(hash, old_buckets_);
      if (old < frontier_) return old;
    }
    return Scale(hash, buckets_count_);
  }
  uint64_t End() const { return buckets_count_ == 0 ? 0 : buckets_count_ + kTail; }
  uint64_t Next(uint64_t bucket) const { return bucket + 1 == End() ? 0 : bucket + 1; }
  Bucket* buckets() const { return reinterpret_cast<Bucket*>(region_.data()); }

  // Calls at(bucket, cell) for the one that holds the slot, past(bucket) for those before it.
  template <typename At, typename Past>
  void Visit(uint32_t slot, const At& at, const Past& past);
  // False, and nothing is changed: between home and `end` there is no room.
  bool Place(uint64_t home, uint64_t end, uint8_t tag, uint32_t slot);
  // The last run of buckets below frontier_ that nothing goes into from before moves to its place.
  void Advance();
  // All at once, of `apart` too, which is in no bucket. The one way where entries go past the end to the first bucket.
  void Rebuild(std::vector<uint32_t> apart);
  void TakeOut(uint64_t bucket, std::vector<uint32_t>* slots);

  const RowArena* arena_;
  uint64_t buckets_max_;
  uint64_t buckets_count_ = 0;
  uint64_t old_buckets_ = 0;  // 0: it is not growing
  uint64_t frontier_ = 0;
  bool advances_ = false;  // with the next Insert, if it is growing
  Region region_;
  std::vector<uint32_t> moving_;  // scratch
};

}  // namespace hearth
