// Which signs the store may hold: what was never written there need not be looked up.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "embedding/row_arena.h"
#include "embedding/sign.h"

namespace hearth {

// Blocked Bloom filters, each twice as large as the one before, 12 bits a sign. A sign that was added is always
// contained, one that was not with a probability below 1 %. One thread.
class SignFilter {
 public:
  // About so many signs at first.
  explicit SignFilter(uint64_t signs) : first_signs_(signs) {}
  // Room for `signs` more Adds. ResourceExhausted.
  absl::Status Reserve(uint64_t signs);
  // REQUIRES: a Reserve covers it.
  void Add(Sign sign);
  bool MayContain(Sign sign) const;
  void Prefetch(Sign sign) const;
  uint64_t bytes() const;
  // bytes() of a filter for `first` signs at first that has come to hold `signs`. For plans.
  static uint64_t BytesFor(uint64_t signs, uint64_t first);

 private:
  static constexpr uint32_t kWords = 8;  // one bit of each is a sign's
  struct alignas(64) Block {
    uint64_t words[kWords];
  };
  static_assert(sizeof(Block) == 64);
  struct Layer {
    Region region;
    uint64_t blocks = 0;
    uint64_t free = 0;  // signs that it may still take
    Block* at(uint64_t hash) const {
      const uint64_t block = static_cast<uint64_t>((static_cast<unsigned __int128>(hash) * blocks) >> 64);
      return reinterpret_cast<Block*>(region.data()) + block;
    }
  };

  // Of the layer behind one of `blocks`, 0 for the first, where `signs` are to be added.
  static uint64_t NextBlocks(uint64_t blocks, uint64_t first, uint64_t signs);
  static uint64_t HashOf(Sign sign);
  static uint64_t BitOf(uint64_t hash, uint32_t word);

  uint64_t first_signs_;
  std::vector<Layer> layers_;
};

}  // namespace hearth
