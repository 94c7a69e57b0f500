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

 private:
  char* data_ = nullptr;
  uint64_t reserved_bytes_ = 0;
  uint64_t committed_bytes_ = 0;
};

class RowArena {
 public:
  // Rows of row_bytes, each at a multiple of 16. REQUIRES: rows_max <= 2^32 − 2.
  absl::Status Open(uint64_t row_bytes, uint64_t rows_max);

  // Memory for `rows` more rows, as far as rows_max goes. Take draws on it.
  absl::Status Reserve(uint64_t rows);
  // Slots that Take may still give (rows_max − rows).
  uint64_t free() const { return rows_max_ - rows_; }
  uint64_t rows() const { return rows_; }
  // A free slot. REQUIRES: free() > 0 and a Reserve that covers it. The row holds anything.
  uint32_t Take(Sign sign);
  void Release(uint32_t slot);

  char* row(uint32_t slot) const { return rows_region_.data() + slot * stride_; }
  // All slots ever taken are below slots(); sign(slot) is 0 where none is in use.
  uint32_t slots() const { return slots_; }
  Sign sign(uint32_t slot) const { return signs()[slot]; }
  uint64_t bytes() const;

 private:
  Sign* signs() const { return reinterpret_cast<Sign*>(signs_region_.data()); }

  uint64_t stride_ = 0;
  uint64_t rows_max_ = 0;
  uint64_t rows_ = 0;
  uint32_t slots_ = 0;
  uint64_t reserved_slots_ = 0;
  std::vector<uint32_t> released_;
  Region rows_region_;
  Region signs_region_;
};

}  // namespace hearth
