// The rows of a table that are in memory: sign → slot → row, in what state each is, and which may leave.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/row_arena.h"
#include "embedding/row_index.h"
#include "embedding/sign.h"

namespace hearth {

// The memory tier's bits of RowMeta::flags. They never reach the store, a hash or a result.
constexpr uint32_t kStoredFlags = 0xff;
constexpr uint32_t kRowDirty = 1 << 8;        // newer than what the store has or is being given
constexpr uint32_t kRowDirtyEra = 1 << 9;     // of a dirty row: an odd or even number of cuts were begun before
constexpr uint32_t kRowLoading = 1 << 10;     // a place for what is being read; only the touch means anything
constexpr uint32_t kRowAbsent = 1 << 11;      // a place for a sign that the store has no live record of
constexpr uint32_t kRowPrefetched = 1 << 12;  // brought in ahead of its pull, which has not come yet
constexpr int kInFlightShift = 13;            // 3 bits: writes of it that are under way. Until they land it must stay
constexpr uint32_t kRowInFlight = 7u << kInFlightShift;
constexpr int kTouchShift = 16;  // the low 16 bits of the step that last used it, or will
constexpr uint32_t kTouchMask = 0xffffu << kTouchShift;

// One thread.
class MemoryTier {
 public:
  static constexpr uint32_t kNone = RowIndex::kNone;
  static constexpr uint64_t kAheadStepsMax = 1024;  // that a touch may lie ahead

  // At most rows_max rows of row_bytes each; memory is taken as it fills.
  MemoryTier(TableNumber number, uint64_t row_bytes, uint64_t rows_max, uint64_t seed)
      : number_(number), row_bytes_(row_bytes), rows_max_(rows_max), index_(&arena_, rows_max), random_(seed) {}
  MemoryTier(const MemoryTier&) = delete;
  absl::Status Open();

  uint64_t rows() const { return arena_.rows(); }
  uint64_t slots() const { return arena_.slots(); }
  uint64_t bytes() const { return arena_.bytes() + index_.bytes(); }
  uint64_t bytes_free() const { return arena_.bytes_free(); }  // of them, in slots without a row

  char* row(uint32_t slot) const { return arena_.row(slot); }
  RowMeta* meta(uint32_t slot) const { return reinterpret_cast<RowMeta*>(arena_.row(slot)); }
  Sign sign(uint32_t slot) const { return arena_.sign(slot); }  // 0: nothing is there
  // `bytes` of the row are on their way into the cache; or its place in the index, for who will remove it.
  void PrefetchRow(uint32_t slot, uint64_t bytes) const { arena_.Prefetch(slot, std::min(bytes, kAheadBytesMax)); }
  void PrefetchPlace(uint32_t slot) const { index_.Prefetch(RowIndex::HashOf(arena_.sign(slot))); }
  uint32_t Find(Sign sign) const { return index_.Find(sign, RowIndex::HashOf(sign)); }

  // The one way to many rows: for each i in order work(i, slot or kNone), with the index lines of signs some way ahead
  // and `bytes` of the rows of those nearer on their way into the cache. Work may insert (with room reserved) but not
  // remove. Signs ascend.
  template <typename Work>
  void ForEach(absl::Span<const Sign> signs, uint64_t bytes, const Work& work) const;

  // Room for so many more. ResourceExhausted.
  absl::Status Reserve(uint64_t rows);
  // A slot for it. REQUIRES: it has none, and a Reserve covers it. The row holds anything.
  uint32_t Insert(Sign sign);
  void Remove(uint32_t slot);
  // The row goes to a lower slot, which it returns. REQUIRES: rows() < slots(), and nothing else knows its slot.
  uint32_t MoveDown(uint32_t slot);
  // Gives back the memory behind the last slot that is in use.
  void Trim() { arena_.Trim(); }
  // What a row takes in all, about.
  uint64_t row_bytes() const { return arena_.stride() + RowIndex::kRowBytes; }

  // The step that rows are used by; who is to stay is judged by it.
  void SetNow(uint64_t step) { now_ = std::max(now_, step); }
  uint64_t now() const { return now_; }
  // Used by now(), or to be used by `step`.
  void Touch(RowMeta* meta) const { Touch(meta, now_); }
  void Touch(RowMeta* meta, uint64_t step) const {
    const uint64_t at = std::min(step, now_ + kAheadStepsMax);
    meta->flags = (meta->flags & ~kTouchMask) | static_cast<uint32_t>(at) << kTouchShift;
  }
  // It is in use for one step more at least: a touch would cost a write and gain a step.
  bool TouchedOfLate(const RowMeta& meta) const { return StepsBehind(meta) < kAheadStepsMax + kInUseSteps; }
  // Not used of late.
  void TouchUnused(RowMeta* meta) const {
    meta->flags = (meta->flags & ~kTouchMask) | static_cast<uint32_t>(now_ - kInUseSteps - 1) << kTouchShift;
  }
  // A step from now() − 2 to now() + kAheadStepsMax uses it.
  bool InUse(const RowMeta& meta) const { return StepsBehind(meta) <= kAheadStepsMax + kInUseSteps; }
  // Up to `wanted` slots that nothing is under way for and of which fit(meta) holds, the lowest scores first, about;
  // looks at about looks_max of them. Those without a record go before all others.
  template <typename Fit>
  void ChooseLeaving(Table::Score score, uint64_t wanted, uint64_t looks_max, const Fit& fit,
                     std::vector<uint32_t>* chosen);

 private:
  static constexpr uint64_t kInUseSteps = 2;
  static constexpr uint64_t kAheadBytesMax = 384;  // the hardware follows longer rows by itself
  static constexpr uint32_t kExactSlots = 4096;    // up to so many slots it looks at all of them
  static constexpr uint32_t kScoreSamples = 1024;  // else it estimates a quantile of the scores

  // How far its touch lies behind now() + kAheadStepsMax, in 16 bits.
  uint64_t StepsBehind(const RowMeta& meta) const {
    return static_cast<uint16_t>(now_ + kAheadStepsMax - (meta.flags >> kTouchShift));
  }
  static uint64_t ScoreOfRow(Table::Score score, const RowMeta& meta);

  const TableNumber number_;
  const uint64_t row_bytes_;
  const uint64_t rows_max_;
  RowArena arena_;
  RowIndex index_;
  uint64_t now_ = 0;
  uint32_t hand_ = 0;  // goes round the slots
  Random random_;      // of the sample
};

template <typename Work>
void MemoryTier::ForEach(absl::Span<const Sign> signs, uint64_t bytes, const Work& work) const {
  constexpr size_t kAhead = 16;  // of the row, and again of the index line: about what a core keeps in flight
  constexpr size_t kRing = 64;
  static_assert(kRing >= 2 * kAhead + 1 && (kRing & (kRing - 1)) == 0);
  const uint64_t ahead_bytes = std::min(bytes, kAheadBytesMax);
  if (signs.empty()) return;
  HEARTH_CHECK(TableOf(signs.front()) == number_ && TableOf(signs.back()) == number_, "signs of another table than ",
               number_);
  uint64_t hashes[kRing];
  uint32_t slots[kRing];
  const size_t count = signs.size();
  for (size_t i = 0; i < count + 2 * kAhead; ++i) {
    if (i < count) {
      HEARTH_CHECK(i == 0 || signs[i - 1] < signs[i], "signs must ascend");
      hashes[i % kRing] = RowIndex::HashOf(signs[i]);
      index_.Prefetch(hashes[i % kRing]);
    }
    if (i >= kAhead && i - kAhead < count) {
      const size_t j = i - kAhead;
      const uint32_t slot = index_.Candidate(hashes[j % kRing]);
      slots[j % kRing] = slot;
      if (slot != kNone) arena_.Prefetch(slot, ahead_bytes);
    }
    if (i >= 2 * kAhead) {
      const size_t j = i - 2 * kAhead;
      uint32_t slot = slots[j % kRing];
      if (slot != kNone && arena_.sign(slot) != signs[j]) slot = index_.Find(signs[j], hashes[j % kRing]);
      work(j, slot);
    }
  }
}

// A few slots are all looked at. Of many, a hand goes round and takes whose score is below a quantile, estimated from a
// sample: the lowest scores leave, give or take the sample's error, at a cost that does not grow with the table.
template <typename Fit>
void MemoryTier::ChooseLeaving(Table::Score score, uint64_t wanted, uint64_t looks_max, const Fit& fit,
                               std::vector<uint32_t>* chosen) {
  chosen->clear();
  const uint32_t slots = arena_.slots();
  if (slots == 0 || wanted == 0) return;
  const auto may_leave = [&](uint32_t slot) {
    return arena_.sign(slot) != 0 && !(meta(slot)->flags & (kRowLoading | kRowInFlight)) && fit(*meta(slot));
  };
  std::vector<uint64_t> scores;
  if (slots <= kExactSlots) {
    std::vector<std::pair<uint64_t, uint32_t>> all;
    for (uint32_t slot = 0; slot < slots; ++slot) {
      if (may_leave(slot)) all.emplace_back(ScoreOfRow(score, *meta(slot)), slot);
    }
    const size_t count = std::min<size_t>(wanted, all.size());
    std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(count), all.end());
    for (size_t i = 0; i < count; ++i) chosen->push_back(all[i].second);
    return;
  }
  for (uint32_t i = 0; i < kScoreSamples; ++i) {
    const uint32_t slot = static_cast<uint32_t>(random_.Below(slots));
    if (may_leave(slot)) scores.push_back(ScoreOfRow(score, *meta(slot)));
  }
  if (scores.empty()) return;
  // The share of those that may leave, so many that a round of the hand finds twice what is wanted.
  const double leavable = static_cast<double>(scores.size()) / kScoreSamples * static_cast<double>(slots);
  const double share = std::clamp(2.0 * static_cast<double>(wanted) / leavable, 1.0 / 16, 1.0);
  const size_t rank = std::min(static_cast<size_t>(share * static_cast<double>(scores.size())), scores.size() - 1);
  std::nth_element(scores.begin(), scores.begin() + static_cast<ptrdiff_t>(rank), scores.end());
  const uint64_t score_max = scores[rank];
  constexpr uint32_t kAhead = 16;
  const uint64_t looks = std::min<uint64_t>(looks_max, slots);
  for (uint64_t look = 0; look < looks && chosen->size() < wanted; ++look) {
    const uint32_t slot = hand_ < slots ? hand_ : 0;
    hand_ = slot + 1;
    if (slot + kAhead < slots) arena_.PrefetchSign(slot + kAhead);
    if (may_leave(slot) && ScoreOfRow(score, *meta(slot)) <= score_max) chosen->push_back(slot);
  }
}

}  // namespace hearth
