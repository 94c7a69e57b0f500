// The rows of a table that are in memory: sign → slot → row, in what state each is (RowHead), and which may leave.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "common/proto/job.pb.h"
#include "embedding/embedding_table.h"
#include "embedding/lifecycle.h"
#include "embedding/row_arena.h"
#include "embedding/row_head.h"
#include "embedding/row_index.h"
#include "embedding/sign.h"

namespace hearth {

// One thread.
class MemoryTier {
 public:
  static constexpr uint32_t kNone = RowIndex::kNone;
  static constexpr uint64_t kAheadStepsMax = 128;  // that a touch may lie ahead

  // At most rows_max rows of row_bytes each, rows_full for most of the time; memory is taken as it fills.
  MemoryTier(TableNumber number, uint64_t row_bytes, uint64_t rows_full, uint64_t rows_max, uint64_t seed)
      : number_(number),
        row_bytes_(row_bytes),
        rows_max_(rows_max),
        arena_(number),
        index_(&arena_, rows_full, rows_max),
        random_(seed) {}
  MemoryTier(const MemoryTier&) = delete;
  absl::Status Open();

  uint64_t rows() const { return arena_.rows(); }
  uint64_t slots() const { return arena_.slots(); }
  uint64_t bytes() const { return arena_.bytes() + index_.bytes() + beyond_.size() * kBeyondBytes; }
  uint64_t bytes_free() const { return arena_.bytes_free(); }  // of them, in slots without a row

  RowHead* head(uint32_t slot) const { return arena_.head(slot); }
  char* body(uint32_t slot) const { return arena_.row(slot) + sizeof(RowHead); }  // at a multiple of 4
  Sign sign(uint32_t slot) const { return arena_.sign(slot); }                    // 0: nothing is there
  // The head as a record has it.
  RowMeta meta(uint32_t slot) const {
    const RowHead& head = *arena_.head(slot);
    return {CountOf(slot), head.last_step(), head.Has(kRowIsAdmitted) ? kRowAdmitted : 0, UpdatesOf(slot)};
  }
  // REQUIRES: meta.flags has no bit that is not named.
  void SetMeta(uint32_t slot, const RowMeta& meta);
  uint32_t CountOf(uint32_t slot) const {
    const RowHead& head = *arena_.head(slot);
    return head.Has(kRowCountBeyond) ? FarCount(slot) : head.count();
  }
  uint32_t UpdatesOf(uint32_t slot) const {
    const RowHead& head = *arena_.head(slot);
    return head.Has(kRowUpdatesBeyond) ? FarUpdates(slot) : head.updates();
  }
  void AddOccurrences(uint32_t slot, uint32_t occurrences) {
    RowHead* head = arena_.head(slot);
    const uint64_t count = uint64_t{head->count()} + occurrences;
    if (count <= RowHead::kCountMax) return head->set_count(static_cast<uint32_t>(count));
    SetCounts(slot, AddSaturating(CountOf(slot), occurrences), UpdatesOf(slot));
  }
  void AddUpdate(uint32_t slot) {
    RowHead* head = arena_.head(slot);
    if (head->updates() < RowHead::kCountMax) return head->set_updates(head->updates() + 1);
    SetCounts(slot, CountOf(slot), UpdatesOf(slot) + 1);
  }
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
  // A slot for it. REQUIRES: it has none, and a Reserve covers it. The head is a new one, and behind it is anything.
  uint32_t Insert(Sign sign);
  void Remove(uint32_t slot);
  // The row goes to a lower slot, which it returns. REQUIRES: rows() < slots(), and nothing else knows its slot.
  uint32_t MoveDown(uint32_t slot);
  // Gives back the memory behind the last slot that is in use.
  void Trim() { arena_.Trim(); }
  // What a row takes in all, about.
  uint64_t row_bytes() const { return row_bytes_ + RowIndex::kRowBytes; }

  // The step that rows are used by; who is to stay is judged by it.
  void SetNow(uint64_t step) { now_ = std::max(now_, step); }
  uint64_t now() const { return now_; }
  // Used by now(), or to be used by `step`.
  void Touch(RowHead* head) const { Touch(head, now_); }
  void Touch(RowHead* head, uint64_t step) const { head->set_touch(std::min(step, now_ + kAheadStepsMax)); }
  // It is in use for one step more at least: a touch would cost a write and gain a step.
  bool TouchedOfLate(const RowHead& head) const { return StepsBehind(head) < kAheadStepsMax + kInUseSteps; }
  // Not used of late. By chance, so that few rows at a time look as if they were when their touches come round.
  void TouchUnused(RowHead* head) { head->set_touch(now_ - kInUseSteps - 1 - random_.Below(kUnusedSteps)); }
  // A step from now() − 2 to now() + kAheadStepsMax uses it. Or one did 1024 steps, or a multiple, before.
  bool InUse(const RowHead& head) const { return StepsBehind(head) <= kAheadStepsMax + kInUseSteps; }
  // Up to `wanted` slots that nothing is under way for and of which fit(head) holds, the lowest scores first, about;
  // looks at about looks_max of them. Those without a record go before all others.
  template <typename Fit>
  void ChooseLeaving(Table::Score score, uint64_t wanted, uint64_t looks_max, const Fit& fit,
                     std::vector<uint32_t>* chosen);

 private:
  static constexpr uint64_t kInUseSteps = 2;
  static constexpr uint64_t kUnusedSteps = 768;
  static_assert(kUnusedSteps + kAheadStepsMax + 2 * kInUseSteps < RowHead::kTouchMask);
  static constexpr uint64_t kAheadBytesMax = 384;  // the hardware follows longer rows by itself
  static constexpr uint32_t kExactSlots = 4096;    // up to so many slots it looks at all of them
  static constexpr uint32_t kScoreSamples = 1024;  // else it estimates a quantile of the scores

  // How far its touch lies behind now() + kAheadStepsMax, in 10 bits.
  uint64_t StepsBehind(const RowHead& head) const {
    return (now_ + kAheadStepsMax - head.touch()) & RowHead::kTouchMask;
  }
  uint64_t ScoreOfRow(Table::Score score, uint32_t slot) const {
    const RowHead& head = *arena_.head(slot);
    if (head.Has(kRowAbsent)) return 0;
    return ScoreOf(score, {score == Table::LRU ? 0 : CountOf(slot), head.last_step(), 0, 0});
  }

  // What does not fit the head.
  struct Beyond {
    uint32_t count;  // without the bits that the head has
    uint32_t updates;
  };
  static constexpr uint64_t kBeyondBytes = 16;  // about, in a tree
  void SetCounts(uint32_t slot, uint32_t count, uint32_t updates);
  uint32_t FarCount(uint32_t slot) const;
  uint32_t FarUpdates(uint32_t slot) const;

  const TableNumber number_;
  const uint64_t row_bytes_;
  const uint64_t rows_max_;
  RowArena arena_;
  RowIndex index_;
  // A tree: it grows without a pause. Of the rows that are in it, few, it is asked once a cut, each 2048 occurrences
  // and updates, and by optimizers that want the number of updates at each.
  absl::btree_map<uint32_t, Beyond> beyond_;
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
      if (slot != kNone && !arena_.head(slot)->IsOf(signs[j])) slot = index_.Find(signs[j], hashes[j % kRing]);
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
    const RowHead& row = *arena_.head(slot);
    return row.Only(kRowIsThere | kRowLoading | kRowInFlight) == kRowIsThere && fit(row);
  };
  std::vector<uint64_t> scores;
  if (slots <= kExactSlots) {
    std::vector<std::pair<uint64_t, uint32_t>> all;
    for (uint32_t slot = 0; slot < slots; ++slot) {
      if (may_leave(slot)) all.emplace_back(ScoreOfRow(score, slot), slot);
    }
    const size_t count = std::min<size_t>(wanted, all.size());
    std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(count), all.end());
    for (size_t i = 0; i < count; ++i) chosen->push_back(all[i].second);
    return;
  }
  for (uint32_t i = 0; i < kScoreSamples; ++i) {
    const uint32_t slot = static_cast<uint32_t>(random_.Below(slots));
    if (may_leave(slot)) scores.push_back(ScoreOfRow(score, slot));
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
    if (slot + kAhead < slots) arena_.PrefetchHead(slot + kAhead);
    if (may_leave(slot) && ScoreOfRow(score, slot) <= score_max) chosen->push_back(slot);
  }
}

}  // namespace hearth
