#include "embedding/sign_filter.h"

#include <algorithm>
#include <utility>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr uint64_t kFirstSignsMin = uint64_t{1} << 12;
constexpr uint64_t kFirstSignsMax = uint64_t{1} << 18;
constexpr uint64_t kSignsABlock = 42;  // 512 bits of 12

// Odd, of about half their bits: each takes other bits of the hash to the top.
constexpr uint64_t kSpread[] = {0x47b6137b44974d91ull, 0x8824ad5ba2b7289dull, 0x705495c72df1424bull,
                                0x9efc49475c6bfb31ull, 0x1b873593cc9e2d51ull, 0xa2d02b6d85ebca6bull,
                                0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull};

}  // namespace

// A stream of its own beside the shard map's and the index's use of Mix64.
uint64_t SignFilter::HashOf(Sign sign) { return Mix64(sign ^ 0x510e527fade682d1ull); }

uint64_t SignFilter::BitOf(uint64_t hash, uint32_t word) { return uint64_t{1} << ((hash * kSpread[word]) >> 58); }

uint64_t SignFilter::NextBlocks(uint64_t blocks, uint64_t first, uint64_t signs) {
  const uint64_t wanted = blocks == 0 ? std::clamp(first, kFirstSignsMin, kFirstSignsMax) : blocks * kSignsABlock * 2;
  return (std::max(wanted, signs) + kSignsABlock - 1) / kSignsABlock;
}

uint64_t SignFilter::BytesFor(uint64_t signs, uint64_t first) {
  uint64_t bytes = 0, room = 0, blocks = 0;
  do {
    blocks = NextBlocks(blocks, first, 1);
    room += blocks * kSignsABlock;
    bytes += blocks * sizeof(Block);
  } while (room < signs);
  return bytes;
}

absl::Status SignFilter::Reserve(uint64_t signs) {
  if (!layers_.empty() && layers_.back().free >= signs) return absl::OkStatus();
  Layer layer;
  layer.blocks = NextBlocks(layers_.empty() ? 0 : layers_.back().blocks, first_signs_, signs);
  layer.free = layer.blocks * kSignsABlock;
  HEARTH_RETURN_IF_ERROR(layer.region.Reserve(layer.blocks * sizeof(Block)));
  HEARTH_RETURN_IF_ERROR(layer.region.Commit(layer.blocks * sizeof(Block)));  // zeros; real memory comes by use
  layers_.push_back(std::move(layer));
  return absl::OkStatus();
}

void SignFilter::Add(Sign sign) {
  if (MayContain(sign)) return;
  const uint64_t hash = HashOf(sign);
  HEARTH_CHECK(!layers_.empty() && layers_.back().free > 0);
  Block* block = layers_.back().at(hash);
  for (uint32_t word = 0; word < kWords; ++word) block->words[word] |= BitOf(hash, word);
  --layers_.back().free;
}

bool SignFilter::MayContain(Sign sign) const {
  const uint64_t hash = HashOf(sign);
  for (auto layer = layers_.rbegin(); layer != layers_.rend(); ++layer) {
    const Block* block = layer->at(hash);
    uint64_t missing = 0;
    for (uint32_t word = 0; word < kWords; ++word) missing |= ~block->words[word] & BitOf(hash, word);
    if (missing == 0) return true;
  }
  return false;
}

void SignFilter::Prefetch(Sign sign) const {
  const uint64_t hash = HashOf(sign);
  for (const Layer& layer : layers_) __builtin_prefetch(layer.at(hash));
}

uint64_t SignFilter::bytes() const {
  uint64_t bytes = 0;
  for (const Layer& layer : layers_) bytes += layer.region.committed_bytes();
  return bytes;
}

}  // namespace hearth
