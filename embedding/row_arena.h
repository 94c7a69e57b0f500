// Rows of one size in one range of addresses: slot → row is a product, and a row never moves.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "embedding/sign.h"

namespace hearth {

// A reserved range of addresses whose memory is taken from its start on, as it is needed, in huge pages where it is
// large.
class Region {
 public:
  Region() = default;
  ~Region();
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;

  // Once. Reserves addresses, not memory. ResourceExhausted when the process may not have so many.
  absl::Status Reserve(uint64_t bytes_max);
  // The first `bytes` are zeros or what was written since. REQUIRES: bytes <= bytes_max.
  absl::Status Commit(uint64_t bytes);
  char* data() const { return data_; }
  uint64_t committed_bytes() const { return committed_bytes_; }
  // What is committed once Commits that grow a little each time have come to `bytes`. For plans.
  static uint64_t BytesFor(uint64_t bytes, uint64_t bytes_max);

 private:
  char* data_ = nullptr;
  uint64_t reserved_bytes_ = 0;
  uint64_t committed_bytes_ = 0;
};

// A row has its sign in front of it, so that one look at a cache line tells whose it is.
class RowArena {
 public:
  // Rows of row_bytes, each at a multiple of 8. REQUIRES: rows_max <= 2^32 − 2, row_bytes >= 4.
  absl::Status Open(uint64_t row_bytes, uint64_t rows_max);

  // Memory for `rows` more rows, as far as rows_max goes. Take draws on it.
  absl::Status Reserve(uint64_t rows);
  // Slots that Take may still give (rows_max − rows).
  uint64_t free() const { return rows_max_ - rows_; }
  uint64_t rows() const { return rows_; }
  // A free slot. REQUIRES: free() > 0 and a Reserve that covers it. The row holds anything.
  uint32_t Take(Sign sign);
  void Release(uint32_t slot);

  char* row(uint32_t slot) const { return place(slot) + sizeof(Sign); }
  // All slots ever taken are below slots(); sign(slot) is 0 where none is in use.
  uint32_t slots() const { return slots_; }
  Sign sign(uint32_t slot) const { return *reinterpret_cast<const Sign*>(place(slot)); }
  void PrefetchSign(uint32_t slot) const { __builtin_prefetch(place(slot)); }
  // With `bytes` of the row behind it.
  void Prefetch(uint32_t slot, uint64_t bytes) const {
    const char* const begin = place(slot);
    const uint64_t lines = (reinterpret_cast<uintptr_t>(begin) % kLineBytes + sizeof(Sign) + bytes - 1) / kLineBytes;
    for (uint64_t line = 0; line <= lines; ++line) __builtin_prefetch(begin + line * kLineBytes);
  }
  uint64_t bytes() const { return region_.committed_bytes(); }
  // bytes() of an arena for rows_max rows that holds `rows`. For plans.
  static uint64_t BytesFor(uint64_t rows, uint64_t row_bytes, uint64_t rows_max) {
    return Region::BytesFor(rows * StrideOf(row_bytes), rows_max * StrideOf(row_bytes));
  }

 private:
  static constexpr uint64_t kLineBytes = 64;
  static constexpr uint32_t kNoSlot = 0xffffffffu;

  static uint64_t StrideOf(uint64_t row_bytes) {
    return (sizeof(Sign) + row_bytes + sizeof(Sign) - 1) / sizeof(Sign) * sizeof(Sign);
  }
  char* place(uint32_t slot) const { return region_.data() + slot * stride_; }
  uint32_t* next_released(uint32_t slot) const { return reinterpret_cast<uint32_t*>(row(slot)); }

  uint64_t stride_ = 0;
  uint64_t rows_max_ = 0;
  uint64_t rows_ = 0;
  uint32_t slots_ = 0;
  uint64_t reserved_slots_ = 0;
  uint32_t released_ = kNoSlot;  // the last one; each names the one before it, in its row
  Region region_;
};

// Slots of an arena, a bit each, in memory that is taken as they come.
class SlotSet {
 public:
  absl::Status Open(uint64_t rows_max) { return region_.Reserve(BitBytes(rows_max)); }
  // Slots below this may be added.
  absl::Status Reserve(uint64_t slots) { return region_.Commit(BitBytes(slots)); }
  uint64_t size() const { return size_; }
  void Add(uint32_t slot) {
    uint64_t* const word = words() + slot / 64;
    const uint64_t bit = uint64_t{1} << slot % 64;
    size_ += (*word & bit) == 0;
    *word |= bit;
  }
  // Up to count_max of them, ascending, into `slots`. Each once, round after round: it goes on where it stopped.
  void TakeNext(uint64_t count_max, std::vector<uint32_t>* slots);
  uint64_t bytes() const { return region_.committed_bytes(); }
  static uint64_t BytesFor(uint64_t slots, uint64_t rows_max) {  // as RowArena's
    return Region::BytesFor(BitBytes(slots), BitBytes(rows_max));
  }

 private:
  static uint64_t BitBytes(uint64_t slots) { return slots / 8 + sizeof(uint64_t); }
  uint64_t* words() const { return reinterpret_cast<uint64_t*>(region_.data()); }

  uint64_t size_ = 0;
  uint64_t hand_ = 0;  // no slot is in the words before it
  Region region_;
};

}  // namespace hearth
