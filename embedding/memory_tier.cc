#include "embedding/memory_tier.h"

#include <cstring>

#include "embedding/lifecycle.h"

namespace hearth {

absl::Status MemoryTier::Open() {
  HEARTH_RETURN_IF_ERROR(arena_.Open(row_bytes_, rows_max_));
  return index_.Reserve(0);
}

absl::Status MemoryTier::Reserve(uint64_t rows) {
  HEARTH_RETURN_IF_ERROR(arena_.Reserve(rows));
  return index_.Reserve(std::min(arena_.rows() + rows, rows_max_));
}

uint32_t MemoryTier::Insert(Sign sign) {
  const uint32_t slot = arena_.Take(sign);
  index_.Insert(RowIndex::HashOf(sign), slot);
  return slot;
}

void MemoryTier::Remove(uint32_t slot) {
  index_.Remove(slot);
  arena_.Release(slot);
}

uint32_t MemoryTier::MoveDown(uint32_t slot) {
  const uint32_t to = arena_.Take(arena_.sign(slot));
  std::memcpy(arena_.row(to), arena_.row(slot), row_bytes_);
  index_.Move(slot, to);
  arena_.Release(slot);
  return to;
}

uint64_t MemoryTier::ScoreOfRow(Table::Score score, const RowMeta& meta) {
  return meta.flags & kRowAbsent ? 0 : ScoreOf(score, meta);
}

}  // namespace hearth
