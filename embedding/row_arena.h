// Rows of one size in one range of addresses: slot → row is a product, and a row moves only when it is told to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "embedding/row_head.h"
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
  // What lies behind the first `bytes` goes back to the system, as far as that is worth a call; it is zeros when it is
  // committed again.
  void Trim(uint64_t bytes);
  char* data() const { return data_; }
  uint64_t committed_bytes() const { return committed_bytes_; }

 private:
  char* data_ = nullptr;
  uint64_t reserved_bytes_ = 0;
  uint64_t committed_bytes_ = 0;
};

// Slots of an arena, a bit each, in memory that is taken as they come.
class SlotSet {
 public:
  absl::Status Open(uint64_t slots_max) { return region_.Reserve(slots_max / 8 + sizeof(uint64_t)); }
  // Slots below this may be added.
  absl::Status Reserve(uint64_t slots);
  uint64_t size() const { return size_; }
  bool Has(uint32_t slot) const { return (words()[slot / 64] >> slot % 64 & 1) != 0; }
  void Add(uint32_t slot) {
    size_ += !Has(slot);
    words()[slot / 64] |= uint64_t{1} << slot % 64;
    hand_ = std::min<uint64_t>(hand_, slot / 64);
  }
  void Remove(uint32_t slot) {
    size_ -= Has(slot);
    words()[slot / 64] &= ~(uint64_t{1} << slot % 64);
  }
  // The lowest. REQUIRES: size() > 0.
  uint32_t TakeFirst();
  // Up to count_max of the lowest, ascending.
  void TakeFirst(uint64_t count_max, std::vector<uint32_t>* slots);
  uint64_t bytes() const { return BytesFor(slots_); }
  static uint64_t BytesFor(uint64_t slots) { return slots / 8; }

 private:
  uint64_t* words() const { return reinterpret_cast<uint64_t*>(region_.data()); }

  uint64_t slots_ = 0;  // so many may be added
  uint64_t size_ = 0;
  uint64_t hand_ = 0;  // no slot is in the words before it
  Region region_;
};

// Rows of one table. A row begins with its RowHead, so that one look at a cache line tells whose it is.
class RowArena {
 public:
  explicit RowArena(TableNumber number) : number_(number) {}
  // Rows of row_bytes with the head, each at a multiple of 4. REQUIRES: rows_max <= 2^32 − 2, row_bytes of 4.
  absl::Status Open(uint64_t row_bytes, uint64_t rows_max);

  // Memory for `rows` more rows, as far as rows_max goes. Take draws on it.
  absl::Status Reserve(uint64_t rows);
  // Slots that Take may still give (rows_max − rows).
  uint64_t free() const { return rows_max_ - rows_; }
  uint64_t rows() const { return rows_; }
  // The lowest free slot. REQUIRES: free() > 0 and a Reserve that covers it. Behind the head the row holds anything.
  uint32_t Take(Sign sign);
  void Release(uint32_t slot);
  // Gives back the memory behind the last slot in use, where it is much.
  void Trim();

  char* row(uint32_t slot) const { return region_.data() + slot * row_bytes_; }
  RowHead* head(uint32_t slot) const { return reinterpret_cast<RowHead*>(row(slot)); }
  // All slots ever taken are below slots(); sign(slot) is 0 where none is in use.
  uint32_t slots() const { return slots_; }
  Sign sign(uint32_t slot) const { return head(slot)->Has(kRowIsThere) ? MakeSign(number_, head(slot)->id()) : 0; }
  void PrefetchHead(uint32_t slot) const { __builtin_prefetch(row(slot)); }
  // Its first `bytes`. As many prefetches for each row, so that no branch waits for where the row lies.
  void Prefetch(uint32_t slot, uint64_t bytes) const {
    const char* const begin = row(slot);
    for (uint64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(begin + at);
    __builtin_prefetch(begin + bytes - 1);
  }
  // Of all slots, and of those that are free.
  uint64_t bytes() const { return slots_ * row_bytes_ + released_.bytes(); }
  // bytes() of one that has had so many rows. For plans.
  static uint64_t BytesFor(uint64_t slots, uint64_t row_bytes) { return slots * row_bytes + SlotSet::BytesFor(slots); }
  uint64_t bytes_committed() const { return region_.committed_bytes(); }
  uint64_t bytes_free() const { return released_.size() * row_bytes_; }

 private:
  static constexpr uint64_t kLineBytes = 64;

  const TableNumber number_;
  uint64_t row_bytes_ = 0;
  uint64_t rows_max_ = 0;
  uint64_t rows_ = 0;
  uint32_t slots_ = 0;
  uint64_t reserved_slots_ = 0;
  SlotSet released_;  // below slots_
  Region region_;
};

}  // namespace hearth
