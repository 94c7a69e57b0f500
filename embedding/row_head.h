// What a row in memory begins with: its sign, the memory tier's notes, and its RowMeta, in as many bytes as the RowMeta
// of a record has. Weights and state follow it.
#pragma once

#include <cstdint>

#include "embedding/embedding_table.h"
#include "embedding/sign.h"

namespace hearth {

// A row's state. All rows of an arena are one table's, so that the sign's 12 bits for its number are free for it. All
// but kRowIsAdmitted are the memory tier's own: they never reach the store, a hash or a result.
constexpr uint64_t RowState(int bit) { return uint64_t{1} << (kIdBits + bit); }
constexpr uint64_t kRowIsThere = RowState(0);      // the slot is in use
constexpr uint64_t kRowIsAdmitted = RowState(1);   // the record's kRowAdmitted
constexpr uint64_t kRowCountBeyond = RowState(2);  // count does not fit: the rest of it is elsewhere
constexpr uint64_t kRowDirty = RowState(3);        // newer than what the store has or is being given
constexpr uint64_t kRowDirtyEra = RowState(4);     // of a dirty row: an odd or even number of cuts were begun before
constexpr uint64_t kRowLoading = RowState(5);     // a place for what is being read; of it only the touch means anything
constexpr uint64_t kRowAbsent = RowState(6);      // a place for a sign that the store has no live record of
constexpr uint64_t kRowPrefetched = RowState(7);  // brought in ahead of its pull, which has not come yet
constexpr uint64_t kRowFlight = RowState(8);      // 3 bits: writes of it that are under way. Until they land it stays
constexpr uint64_t kRowInFlight = 7 * kRowFlight;
constexpr uint64_t kRowUpdatesBeyond = RowState(11);  // as kRowCountBeyond
static_assert(kRowUpdatesBeyond == uint64_t{1} << 63);
constexpr uint64_t kRowBeyond = kRowCountBeyond | kRowUpdatesBeyond;

// At a multiple of 4. Any bytes are one.
class __attribute__((packed, aligned(4))) RowHead {
 public:
  static constexpr uint32_t kTouchMask = 0x3ff;
  static constexpr uint32_t kCountMax = 0x7ff;  // of what is kept here; so of updates

  // A new row of `sign`, in no other state than that it is there.
  void Reset(Sign sign) {
    word_ = IdOf(sign) | kRowIsThere;
    last_step_ = use_ = 0;
  }
  void Clear() { word_ = 0; }

  bool IsOf(Sign sign) const { return (word_ & (kIdMask | kRowIsThere)) == (IdOf(sign) | kRowIsThere); }
  uint64_t id() const { return word_ & kIdMask; }

  bool Has(uint64_t states) const { return (word_ & states) != 0; }  // one of them
  uint64_t Only(uint64_t states) const { return word_ & states; }
  void Set(uint64_t states) { word_ |= states; }
  void Unset(uint64_t states) { word_ &= ~states; }
  // REQUIRES: fewer than 7 writes of it are under way, or one at least.
  void BeginFlight() { word_ += kRowFlight; }
  void EndFlight() { word_ -= kRowFlight; }

  uint32_t last_step() const { return last_step_; }
  void set_last_step(uint32_t step) { last_step_ = step; }
  // The low 10 bits of the step that last used it, or will.
  uint32_t touch() const { return use_ & kTouchMask; }
  void set_touch(uint64_t step) { use_ = (use_ & ~kTouchMask) | (static_cast<uint32_t>(step) & kTouchMask); }
  // The low 11 bits.
  uint32_t count() const { return use_ >> 10 & kCountMax; }
  uint32_t updates() const { return use_ >> 21; }
  void set_count(uint32_t count) { use_ = (use_ & ~(kCountMax << 10)) | (count & kCountMax) << 10; }
  void set_updates(uint32_t updates) { use_ = (use_ & ((1u << 21) - 1)) | updates << 21; }

 private:
  uint64_t word_;
  uint32_t last_step_;
  uint32_t use_;
};
static_assert(sizeof(RowHead) == sizeof(RowMeta));

}  // namespace hearth
