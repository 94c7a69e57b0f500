#include "embedding/row_index.h"

#include <algorithm>
#include <cstring>

#include "common/base/status.h"

namespace hearth {

absl::Status RowIndex::Reserve(uint64_t rows) {
  const uint64_t needed = std::min(BucketsFor(rows), buckets_max_);
  if (needed <= buckets_count_) return absl::OkStatus();
  while (growing()) Advance();
  if (region_.data() == nullptr) HEARTH_RETURN_IF_ERROR(region_.Reserve((buckets_max_ + kTail) * sizeof(Bucket)));
  const uint64_t count = Grown(needed, buckets_max_);
  HEARTH_RETURN_IF_ERROR(region_.Commit((count + kTail) * sizeof(Bucket)));
  const bool wrapped = buckets_count_ != 0 && buckets()[End() - 1].passed != 0;
  frontier_ = End();
  old_buckets_ = buckets_count_;
  buckets_count_ = count;
  if (wrapped) Rebuild({});
  return absl::OkStatus();
}

uint64_t RowIndex::BytesFor(uint64_t rows, uint64_t rows_full, uint64_t rows_max) {
  const uint64_t buckets_max = BucketsMaxFor(rows_full, rows_max);
  return (Grown(std::min(BucketsFor(rows), buckets_max), buckets_max) + kTail) * sizeof(Bucket);
}

uint64_t RowIndex::bytes() const {
  if (!growing()) return End() * sizeof(Bucket);
  const uint64_t old_end = std::min(old_buckets_ + kTail, End());
  const uint64_t moved_from = frontier_ * buckets_count_ / old_buckets_;  // nothing new below it
  return (old_end + End() - std::clamp(moved_from, old_end, End())) * sizeof(Bucket);
}

void RowIndex::Insert(uint64_t hash, uint32_t slot) {
  // Each second time: entries come into buckets that have not moved, too, but so few that these do not overflow.
  advances_ = !advances_;
  if (growing() && advances_) Advance();
  while (growing()) {
    const uint64_t old = Scale(hash, old_buckets_);
    const bool moved = old >= frontier_;
    if (Place(moved ? Scale(hash, buckets_count_) : old, moved ? End() : frontier_, TagOf(hash), slot)) return;
    if (moved) return Rebuild({slot});
    Advance();  // until there is room, or its bucket has moved
  }
  const uint64_t home = Scale(hash, buckets_count_);
  for (uint64_t at = home;; at = 0) {
    if (Place(at, End(), TagOf(hash), slot)) return;
    // Past the end: the first buckets take it.
    for (uint64_t b = at; b < End(); ++b) buckets()[b].passed += buckets()[b].passed < kPassedMax;
  }
}

bool RowIndex::Place(uint64_t home, uint64_t end, uint8_t tag, uint32_t slot) {
  for (uint64_t b = home; b < end; ++b) {
    const uint32_t free = MatchesOf(buckets()[b], 0);
    if (free == 0) continue;
    const uint32_t cell = static_cast<uint32_t>(__builtin_ctz(free));
    buckets()[b].tags[cell] = tag;
    buckets()[b].slots[cell] = slot;
    for (uint64_t full = home; full < b; ++full) {
      buckets()[full].passed += buckets()[full].passed < kPassedMax;
    }
    return true;
  }
  return false;
}

template <typename At, typename Past>
void RowIndex::Visit(uint32_t slot, const At& at, const Past& past) {
  const uint64_t hash = HashOf(arena_->sign(slot));
  for (uint64_t b = HomeOf(hash);; b = Next(b)) {
    Bucket& bucket = buckets()[b];
    for (uint32_t match = MatchesOf(bucket, TagOf(hash)); match != 0; match &= match - 1) {
      const uint32_t cell = static_cast<uint32_t>(__builtin_ctz(match));
      if (bucket.slots[cell] == slot) return at(&bucket, cell);
    }
    HEARTH_CHECK(bucket.passed > 0, "slot ", slot, " is not in the index");
    past(&bucket);
  }
}

void RowIndex::Remove(uint32_t slot) {
  Visit(
      slot, [](Bucket* bucket, uint32_t cell) { bucket->tags[cell] = 0; },
      [](Bucket* bucket) { bucket->passed -= bucket->passed < kPassedMax; });
}

void RowIndex::Move(uint32_t from, uint32_t to) {
  Visit(
      from, [&](Bucket* bucket, uint32_t cell) { bucket->slots[cell] = to; }, [](Bucket*) {});
}

void RowIndex::TakeOut(uint64_t bucket, std::vector<uint32_t>* slots) {
  Bucket& from = buckets()[bucket];
  for (uint32_t i = 0; i < kCells; ++i) {
    if (from.tags[i] != 0) slots->push_back(from.slots[i]);
  }
  std::memset(static_cast<void*>(&from), 0, sizeof(from));
}

// A run: nothing goes from the bucket before it into it, so each entry in it has its home in it, and its new home is
// not before that. What is emptied takes the new ones.
void RowIndex::Advance() {
  constexpr uint64_t kAhead = 2;  // buckets whose rows' signs will be asked for
  moving_.clear();
  do {
    --frontier_;
    if (frontier_ >= kAhead) {
      const Bucket& soon = buckets()[frontier_ - kAhead];
      for (uint32_t i = 0; i < kCells; ++i) {
        if (soon.tags[i] != 0) arena_->PrefetchHead(soon.slots[i]);
      }
    }
    TakeOut(frontier_, &moving_);
  } while (frontier_ > 0 && buckets()[frontier_ - 1].passed != 0);
  for (size_t i = 0; i < moving_.size(); ++i) {
    const uint64_t hash = HashOf(arena_->sign(moving_[i]));
    if (Place(Scale(hash, buckets_count_), End(), TagOf(hash), moving_[i])) continue;
    return Rebuild({moving_.begin() + static_cast<ptrdiff_t>(i), moving_.end()});
  }
  if (frontier_ == 0) old_buckets_ = 0;
}

void RowIndex::Rebuild(std::vector<uint32_t> apart) {
  for (uint64_t b = 0; b < End(); ++b) TakeOut(b, &apart);
  old_buckets_ = frontier_ = 0;
  for (const uint32_t slot : apart) Insert(HashOf(arena_->sign(slot)), slot);
}

}  // namespace hearth
