// What names a row. The only header of this room that workers may include.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"
#include "common/base/env.h"

namespace hearth {

// 64 bits: 12 bits number of the table (1-based, so no sign is 0), 52 bits of id.
using Sign = uint64_t;
using TableNumber = uint32_t;

constexpr int kIdBits = 52;
constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
constexpr uint32_t kTablesMax = 4095;

constexpr Sign MakeSign(TableNumber table, uint64_t id) { return (uint64_t{table} << kIdBits) | (id & kIdMask); }
constexpr TableNumber TableOf(Sign sign) { return static_cast<TableNumber>(sign >> kIdBits); }
constexpr uint64_t IdOf(Sign sign) { return sign & kIdMask; }

// 52 bits of XXH3-64(text, seed = salt). Two texts meet with probability n²/2^53.
uint64_t HashId(absl::string_view text, uint64_t salt);
// The salt of a slot with Hash SALTED: XXH3-64 of its SaltText (common/job/config.h).
uint64_t SaltOf(absl::string_view text);

// Fixed in number for a job; dealt to servers by ShardMap. A pure function of the sign.
inline uint32_t LogicalShardOf(Sign sign, uint32_t shards) {
  return static_cast<uint32_t>((static_cast<unsigned __int128>(Mix64(sign)) * shards) >> 64);
}

}  // namespace hearth
