#include "embedding/memory_tier.h"

#include <cstring>

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
  if (arena_.head(slot)->Has(kRowBeyond)) beyond_.erase(slot);
  index_.Remove(slot);
  arena_.Release(slot);
}

uint32_t MemoryTier::MoveDown(uint32_t slot) {
  const uint32_t to = arena_.Take(arena_.sign(slot));
  std::memcpy(arena_.row(to), arena_.row(slot), row_bytes_);
  if (arena_.head(slot)->Has(kRowBeyond)) {
    const Beyond beyond = beyond_[slot];
    beyond_.erase(slot);
    beyond_[to] = beyond;
  }
  index_.Move(slot, to);
  arena_.Release(slot);
  return to;
}

void MemoryTier::SetMeta(uint32_t slot, const RowMeta& meta) {
  RowHead* head = arena_.head(slot);
  head->set_last_step(meta.last_step);
  head->Unset(kRowIsAdmitted);
  if (meta.flags & kRowAdmitted) head->Set(kRowIsAdmitted);
  SetCounts(slot, meta.count, meta.updates);
}

void MemoryTier::SetCounts(uint32_t slot, uint32_t count, uint32_t updates) {
  RowHead* head = arena_.head(slot);
  head->set_count(count & RowHead::kCountMax);
  head->set_updates(updates & RowHead::kCountMax);
  const Beyond beyond = {count & ~RowHead::kCountMax, updates & ~RowHead::kCountMax};
  if ((beyond.count | beyond.updates) != 0) {
    beyond_[slot] = beyond;
  } else if (head->Has(kRowBeyond)) {
    beyond_.erase(slot);
  }
  head->Unset(kRowBeyond);
  head->Set((beyond.count != 0 ? kRowCountBeyond : 0) | (beyond.updates != 0 ? kRowUpdatesBeyond : 0));
}

uint32_t MemoryTier::FarCount(uint32_t slot) const {
  return beyond_.find(slot)->second.count | arena_.head(slot)->count();
}
uint32_t MemoryTier::FarUpdates(uint32_t slot) const {
  return beyond_.find(slot)->second.updates | arena_.head(slot)->updates();
}

}  // namespace hearth
