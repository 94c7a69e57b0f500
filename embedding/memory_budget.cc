#include "embedding/memory_budget.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

constexpr double kKept = 63.0 / 64;  // of what was read a deal, kept at the next: it follows some dozens of steps
constexpr double kWeightMax = 4;     // of one table against the mean, and of the mean against one
constexpr uint64_t kRowsMost = 4'000'000'000;
constexpr double kDealt = 31.0 / 32;      // of the bound: until the next deal some more may come
constexpr double kFull = 63.0 / 64;       // from here on memory of rows that have left is given back,
constexpr double kHolesMax = 1.0 / 32;    // of a table where it is more than this share,
constexpr uint64_t kGiveBackRows = 8192;  // at so many rows a deal

}  // namespace

MemoryBudget::MemoryBudget(uint64_t bytes_max, std::vector<EmbeddingTable*> tables) : bytes_max_(bytes_max) {
  for (EmbeddingTable* table : tables) shares_.push_back({table, 0, 0});
}

uint64_t MemoryBudget::RowsWithin(uint64_t bytes_max, uint64_t row_bytes) {
  return std::clamp<uint64_t>(bytes_max / row_bytes, 1, kRowsMost);
}

absl::Status MemoryBudget::Deal(bool may_give_back) {
  std::vector<EmbeddingTableStats> stats;
  double used = 0, cold = 0;
  for (Share& share : shares_) {
    stats.push_back(share.table->stats());
    const uint64_t misses = stats.back().memory_misses + stats.back().rows_prefetched;
    share.cold_bytes =
        kKept * share.cold_bytes + static_cast<double>((misses - share.misses) * share.table->row_bytes_in_memory());
    share.misses = misses;
    cold += share.cold_bytes;
    used += static_cast<double>(stats.back().bytes_memory);
  }
  const double bytes_max = kDealt * static_cast<double>(bytes_max_);
  // Where all else (filters, buffers) takes up the bound, tables still work.
  const double bytes_least = bytes_max / (8 * static_cast<double>(shares_.size()));
  const double cold_mean = cold / static_cast<double>(shares_.size());
  for (size_t i = 0; i < shares_.size(); ++i) {
    const double row_bytes = static_cast<double>(shares_[i].table->row_bytes_in_memory());
    // Its rows, the places of those that have left, and what nobody has; where there is too much, less by its part.
    const double own_bytes = static_cast<double>(stats[i].slots_in_use) * row_bytes;
    double bytes = own_bytes + static_cast<double>(stats[i].bytes_free);
    const double weight = cold_mean > 0 ? std::clamp(shares_[i].cold_bytes / cold_mean, 1 / kWeightMax, kWeightMax) : 1;
    bytes += used <= bytes_max ? weight * (bytes_max - used) : bytes * std::max(-1.0, (bytes_max - used) / used);
    bytes = std::max(bytes, bytes_least);
    shares_[i].table->SetMemoryRowsMax(static_cast<uint64_t>(std::max(1.0, bytes / row_bytes)));
    if (may_give_back && used > kFull * bytes_max && static_cast<double>(stats[i].bytes_free) > kHolesMax * own_bytes) {
      HEARTH_RETURN_IF_ERROR(shares_[i].table->GiveBackMemory(kGiveBackRows));
    }
  }
  return absl::OkStatus();
}

}  // namespace hearth
