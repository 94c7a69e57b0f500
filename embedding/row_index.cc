#include "embedding/row_index.h"

#include <algorithm>

#include "common/base/status.h"

namespace hearth {

absl::Status RowIndex::Reserve(uint64_t rows) {
  const uint64_t needed = std::min(BucketsFor(rows), buckets_max_);
  if (needed <= buckets_count_) return absl::OkStatus();
  RowIndex grown(0);
  grown.buckets_max_ = buckets_max_;
  grown.buckets_count_ = std::min(std::max(needed, buckets_count_ * 2), buckets_max_);
  HEARTH_RETURN_IF_ERROR(grown.region_.Reserve(grown.buckets_count_ * sizeof(Bucket)));
  HEARTH_RETURN_IF_ERROR(grown.region_.Commit(grown.buckets_count_ * sizeof(Bucket)));
  // A bucket's number grows with the hash, in the old array as in the new: both are walked from front to back.
  for (uint64_t b = 0; b < buckets_count_; ++b) {
    const Bucket& bucket = buckets()[b];
    for (uint32_t i = 0; i < kCells; ++i) {
      if (bucket.signs[i] != 0) grown.Insert(bucket.signs[i], HashOf(bucket.signs[i]), bucket.slots[i]);
    }
  }
  *this = std::move(grown);
  return absl::OkStatus();
}

void RowIndex::Insert(Sign sign, uint64_t hash, uint32_t slot) {
  for (uint64_t b = HomeOf(hash);; b = Next(b)) {
    Bucket& bucket = buckets()[b];
    for (uint32_t i = 0; i < kCells; ++i) {
      if (bucket.signs[i] != 0) continue;
      bucket.signs[i] = sign;
      bucket.slots[i] = slot;
      return;
    }
    ++bucket.passed;
  }
}

void RowIndex::Remove(Sign sign) {
  for (uint64_t b = HomeOf(HashOf(sign));; b = Next(b)) {
    Bucket& bucket = buckets()[b];
    for (uint32_t i = 0; i < kCells; ++i) {
      if (bucket.signs[i] != sign) continue;
      bucket.signs[i] = 0;
      return;
    }
    HEARTH_CHECK(bucket.passed > 0, "sign ", sign, " is not in the index");
    --bucket.passed;
  }
}

}  // namespace hearth
