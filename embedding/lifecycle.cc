#include "embedding/lifecycle.h"

#define XXH_INLINE_ALL  // a hash state on the stack needs its definition
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr uint32_t kScoreSpanSteps = 1024;
// Streams of their own beside the shard map's and the index's use of Mix64. Stable for ever: snapshots hold the
// counters.
constexpr uint64_t kFirstSalt = 0x6a09e667f3bcc908ull;
constexpr uint64_t kStrideSalt = 0xbb67ae8584caa73bull;

}  // namespace

uint64_t ScoreOf(Table::Score score, const RowMeta& meta) {
  switch (score) {
    case Table::LRU:
      return meta.last_step;
    case Table::LFU:
      return meta.count;
    case Table::LRU_LFU:
      return uint64_t{meta.last_step / kScoreSpanSteps} << 32 | meta.count;
  }
  return 0;
}

CountingBloom::CountingBloom(const Admission& config)
    : counters_(config.bloom_counters()),
      hashes_(config.bloom_hashes()),
      counter_bytes_(CounterBytes(config)),
      counter_max_(config.count_min() <= 255 ? 255 : std::numeric_limits<uint32_t>::max()),
      bytes_(BytesFor(config)),
      chunk_changed_((bytes_.size() + kChunkBytes - 1) / kChunkBytes) {
  HEARTH_CHECK(counters_ > 0 && hashes_ > 0);
}

uint64_t CountingBloom::Position(Sign sign, uint32_t hash) const {
  const uint64_t mixed = Mix64(sign ^ kFirstSalt) + hash * (Mix64(sign ^ kStrideSalt) | 1);
  return static_cast<uint64_t>((static_cast<unsigned __int128>(mixed) * counters_) >> 64);
}

uint32_t CountingBloom::CounterAt(const char* bytes) const {
  if (counter_bytes_ == 1) return static_cast<uint8_t>(*bytes);
  uint32_t value;
  std::memcpy(&value, bytes, 4);
  return value;
}

void CountingBloom::RaiseTo(uint64_t position, uint32_t value) {
  if (Get(position) >= value) return;
  std::memcpy(bytes_.data() + position * counter_bytes_, &value, counter_bytes_);  // little-endian: the low byte first
  chunk_changed_[position * counter_bytes_ / kChunkBytes] = true;
}

uint32_t CountingBloom::Estimate(Sign sign) const {
  uint32_t estimate = counter_max_;
  for (uint32_t hash = 0; hash < hashes_; ++hash) estimate = std::min(estimate, Get(Position(sign, hash)));
  return estimate;
}

void CountingBloom::Add(Sign sign, uint32_t occurrences) {
  const uint32_t value = std::min(AddSaturating(Estimate(sign), occurrences), counter_max_);
  for (uint32_t hash = 0; hash < hashes_; ++hash) RaiseTo(Position(sign, hash), value);
}

absl::string_view CountingBloom::Chunk(uint64_t chunk) const {
  const uint64_t begin = chunk * kChunkBytes;
  return {bytes_.data() + begin, std::min<uint64_t>(kChunkBytes, bytes_.size() - begin)};
}

bool CountingBloom::LoadChunk(uint64_t chunk, absl::string_view bytes) {
  if (chunk >= chunks() || bytes.size() != Chunk(chunk).size()) return false;
  std::memcpy(bytes_.data() + chunk * kChunkBytes, bytes.data(), bytes.size());
  return true;
}

bool CountingBloom::AddChunk(uint64_t chunk, absl::string_view bytes) {
  if (chunk >= chunks() || bytes.size() != Chunk(chunk).size()) return false;
  const uint64_t begin = chunk * kChunkBytes / counter_bytes_;
  for (uint64_t i = 0; i < bytes.size() / counter_bytes_; ++i) {
    const uint32_t more = CounterAt(bytes.data() + i * counter_bytes_);
    RaiseTo(begin + i, std::min(AddSaturating(Get(begin + i), more), counter_max_));
  }
  return true;
}

uint64_t CountingBloom::Hash(std::initializer_list<uint32_t> name) const {
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, name.begin(), name.size() * sizeof(uint32_t));
  XXH3_64bits_update(&state, bytes_.data(), bytes_.size());
  return XXH3_64bits_digest(&state);
}

}  // namespace hearth
