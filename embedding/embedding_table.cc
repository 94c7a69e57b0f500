#include "embedding/embedding_table.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "embedding/lifecycle.h"
#include "embedding/row_arena.h"
#include "embedding/row_index.h"
#include "embedding/row_record.h"
#include "embedding/sparse_optimizer.h"

namespace hearth {
namespace {

// The memory tier's bits of RowMeta::flags. They never reach the store, a hash or a result.
constexpr uint32_t kStoredFlags = 0xff;
constexpr uint32_t kRowDirty = 1 << 8;    // the store has an older version or none
constexpr uint32_t kRowInStore = 1 << 9;  // the store has a version
constexpr int kTouchShift = 16;           // the low 16 bits of the step that last used the row
constexpr uint32_t kTouchMask = 0xffffu << kTouchShift;
constexpr uint16_t kProtectedSteps = 2;  // a row used by this step or the two before stays in memory

constexpr size_t kReadBatchMax = 16384;  // keys of one MultiGet
constexpr size_t kReadBatchBytes = size_t{16} << 20;
constexpr size_t kWriteBatchMax = 4096;  // rows of one Write
constexpr size_t kWriteBatchBytes = size_t{4} << 20;
constexpr size_t kPendingMax = size_t{1} << 20;  // rows sorted at once
constexpr size_t kWindowMax = 8192;              // signs of a push worked on together
constexpr size_t kWindowBytes = size_t{1} << 20;
constexpr uint64_t kEvictBatchMax = 4096;
constexpr uint32_t kExactEvictionSlots = 4096;  // up to so many slots eviction looks at all of them
constexpr uint32_t kScoreSamples = 1024;        // else it estimates a quantile of the scores

uint64_t WeightStream(uint64_t seed, Sign sign) { return Mix64(Mix64(seed) ^ sign); }

float WeightOf(uint64_t stream, uint32_t i, double init_uniform) {
  const double unit = static_cast<double>(Mix64(stream + i) >> 40) * 0x1.0p-24;  // [0, 1)
  return static_cast<float>(unit * 2 * init_uniform - init_uniform);
}

// Merges the lanes' sorted sign lists, a window at a time. The sum of a sign's gradients runs in lane order.
class LaneMerge {
 public:
  LaneMerge(absl::Span<const PushPart> parts, uint32_t dim) : parts_(parts), dim_(dim), next_(parts.size(), 0) {}

  // At most `max` further signs; none at the end.
  void Next(size_t max, std::vector<Sign>* signs, std::vector<uint32_t>* occurrences, std::vector<float>* gradients) {
    signs->clear();
    occurrences->clear();
    gradients->resize(max * dim_);
    Sign sign = 0;
    while (signs->size() < max && Smallest(&sign)) {
      occurrences->push_back(Sum(sign, gradients->data() + signs->size() * dim_));
      signs->push_back(sign);
    }
  }

 private:
  bool Smallest(Sign* smallest) const {
    bool any = false;
    for (size_t lane = 0; lane < parts_.size(); ++lane) {
      if (next_[lane] == parts_[lane].signs.size()) continue;
      const Sign sign = parts_[lane].signs[next_[lane]];
      if (!any || sign < *smallest) *smallest = sign;
      any = true;
    }
    return any;
  }

  uint32_t Sum(Sign sign, float* sum) {
    uint32_t occurrences = 0;
    bool first = true;
    for (size_t lane = 0; lane < parts_.size(); ++lane) {
      const size_t i = next_[lane];
      if (i == parts_[lane].signs.size() || parts_[lane].signs[i] != sign) continue;
      ++next_[lane];
      occurrences = AddSaturating(occurrences, parts_[lane].occurrences[i]);
      const float* gradient = parts_[lane].gradients.data() + i * dim_;
      if (first) {
        std::memcpy(sum, gradient, dim_ * sizeof(float));
      } else {
        for (uint32_t d = 0; d < dim_; ++d) sum[d] += gradient[d];
      }
      first = false;
    }
    return occurrences;
  }

  const absl::Span<const PushPart> parts_;
  const uint32_t dim_;
  std::vector<size_t> next_;  // [lanes]
};

// Invariant: the newest version of a record is in the memory tier, or, where that has none, in the store. So which tier
// a record is in cannot show in a result.
class TieredTable final : public EmbeddingTable {
 public:
  TieredTable(const TableOptions& options, KvStore* store)
      : config_(options.config),
        number_(options.number),
        seed_(options.seed),
        shards_(options.shards),
        memory_rows_max_(options.memory_rows_max),
        dim_(options.config.dim()),
        floats_(dim_ + StateFloatsOf(options.config.optimizer(), dim_)),
        row_bytes_(sizeof(RowMeta) + floats_ * sizeof(float)),
        stride_(RoundUp16(row_bytes_)),
        count_min_(options.config.admission().count_min()),
        bloom_(options.config.admission().counter() == Admission::BLOOM && count_min_ > 1),
        expire_after_steps_(options.config.expire_after_steps()),
        high_water_(memory_rows_max_ - memory_rows_max_ / 16),
        low_water_(memory_rows_max_ - memory_rows_max_ / 8),
        window_(BatchOf(kWindowMax, kWindowBytes, dim_ * sizeof(float))),
        read_batch_(BatchOf(kReadBatchMax, kReadBatchBytes, row_bytes_)),
        write_batch_(BatchOf(kWriteBatchMax, kWriteBatchBytes, row_bytes_)),
        optimizer_(options.config.optimizer(), dim_),
        store_(store),
        index_(memory_rows_max_),
        filters_(bloom_ ? shards_ : 0),
        random_(SeedOf(seed_, "eviction_sample")),
        scaled_(dim_) {}

  absl::Status Restore();

  absl::Status Pull(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                    float* rows) override;
  absl::Status Push(uint64_t step, uint64_t n, absl::Span<const PushPart> parts) override;
  absl::Status Prefetch(absl::Span<const Sign> signs) override;
  absl::StatusOr<bool> Maintain(uint64_t step, uint64_t rows_max) override;
  absl::StatusOr<uint64_t> Snapshot(uint64_t step) override;
  EmbeddingTableStats stats() const override;

 private:
  struct PendingWrite {
    KvKey key;
    char* row;  // in the arena or the staging buffer
    bool remove;
  };

  static size_t BatchOf(size_t rows_max, size_t bytes_max, uint64_t row_bytes) {
    return std::min<size_t>(rows_max, std::max<size_t>(1, bytes_max / row_bytes));
  }
  static uint64_t RoundUp16(uint64_t bytes) { return (bytes + 15) / 16 * 16; }
  static RowMeta* MetaOf(char* row) { return reinterpret_cast<RowMeta*>(row); }
  static float* FloatsOfRow(char* row) { return reinterpret_cast<float*>(row + sizeof(RowMeta)); }

  // The one way to many rows: for each i in order work(i, slot or kNone), with the index lines of signs some way ahead
  // and the rows of those nearer on their way into the cache. Work may insert (with room reserved) but not remove.
  template <typename Work>
  void ForEachSlot(absl::Span<const Sign> signs, uint64_t row_bytes, const Work& work);

  // Pull.
  void CopyRecord(uint64_t step, Sign sign, const RowMeta& meta, const char* weights, const uint32_t* occurrences,
                  float* out) const;
  void CopyAbsent(Sign sign, const uint32_t* occurrences, float* out) const;
  void CopyUnadmitted(Sign sign, uint32_t count, const uint32_t* occurrences, float* out) const;
  absl::Status PullMisses(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                          float* rows);

  // Push.
  absl::Status PushWindow(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                          const float* gradients);
  absl::Status PushMisses(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                          const float* gradients);
  void Apply(uint64_t step, Sign sign, char* row, uint32_t occurrences, const float* gradient);
  // What the counting filter knows of a sign without a row, as a row's beginning. False: still not admitted.
  bool CountInFilter(Sign sign, uint32_t occurrences, char* row);

  // The store.
  absl::Status ReadStore(absl::Span<const Sign> signs, absl::Span<const uint32_t> which);
  void LoadRecord(absl::string_view value, const RowMeta& meta, char* row) const;
  void AddPending(Sign sign, char* row, bool remove) { pending_.push_back({KeyOf(sign, shards_), row, remove}); }
  absl::Status WritePending();

  // Tiers.
  bool Tiered() const { return maybe_in_store_ || arena_.rows() > memory_rows_max_ / 4 * 3; }
  void Touch(RowMeta* meta) const {
    meta->flags = (meta->flags & ~kTouchMask) | static_cast<uint32_t>(now_) << kTouchShift;
  }
  bool Protected(const RowMeta& meta) const {
    return static_cast<uint16_t>(now_ - (meta.flags >> kTouchShift)) <= kProtectedSteps;
  }
  absl::Status ReserveRows(uint64_t rows);
  char* Insert(Sign sign);  // REQUIRES: a slot is free and reserved
  // Evicts until `wanted` slots are free, as far as protection allows, and reserves them. Returns how many are free.
  absl::StatusOr<uint64_t> MakeRoom(uint64_t wanted);
  absl::StatusOr<uint64_t> Evict(uint64_t wanted, uint64_t looks_max);
  void ChooseExactly(uint64_t wanted);
  void ChooseBySample(uint64_t wanted, uint64_t looks_max);
  absl::Status DropVictims();
  absl::Status SweepExpired(uint64_t looks_max);

  // Snapshot.
  absl::Status FlushMemory(uint64_t step);
  absl::Status FlushFilters();
  absl::Status SumRecords(uint64_t step, uint32_t shard, uint64_t* hash, uint64_t* rows);

  // Constant after construction.
  const Table config_;
  const TableNumber number_;
  const uint64_t seed_;
  const uint32_t shards_;
  const uint64_t memory_rows_max_;
  const uint32_t dim_;
  const uint64_t floats_;  // weights and state
  const uint64_t row_bytes_;
  const uint64_t stride_;
  const uint32_t count_min_;
  const bool bloom_;
  const uint32_t expire_after_steps_;
  const uint64_t high_water_;
  const uint64_t low_water_;
  const size_t window_;
  const size_t read_batch_;
  const size_t write_batch_;
  const SparseOptimizer optimizer_;
  KvStore* const store_;

  // The table.
  RowArena arena_;
  RowIndex index_;
  std::vector<std::unique_ptr<CountingBloom>> filters_;  // by logical shard, made when first counted in
  uint64_t applied_step_ = 0;
  float divisor_ = 1;            // n of the step being applied
  float rate_ = 0;               // its learning rate
  uint64_t now_ = 0;             // the latest step that a pull or push named; protection from eviction is judged by it
  bool maybe_in_store_ = false;  // some record may be in the store alone
  EmbeddingTableStats stats_;

  // Upkeep. None of it can change a value.
  uint64_t nothing_to_evict_at_ = std::numeric_limits<uint64_t>::max();  // `now_` when all rows were protected
  bool spilling_ = false;  // on the way from the high to the low watermark
  uint32_t evict_hand_ = 0;
  uint32_t expire_hand_ = 0;
  uint64_t expire_sweep_due_ = 0;  // applied step from which a new sweep begins
  bool expire_sweeping_ = false;
  Random random_;  // of the eviction's sample

  // Scratch, kept for its capacity.
  std::vector<uint32_t> misses_;
  std::vector<Sign> merged_signs_;
  std::vector<uint32_t> merged_occurrences_;
  std::vector<float> merged_gradients_;
  std::vector<KvKey> keys_;
  std::vector<std::string> values_;
  std::vector<bool> found_;
  std::vector<PendingWrite> pending_;
  std::vector<char> write_buffer_;
  std::vector<KvWrite> writes_;
  std::vector<char> staging_;  // rows of a push that found no place in memory
  std::vector<uint32_t> victims_;
  std::vector<float> scaled_;  // [dim]
};

template <typename Work>
void TieredTable::ForEachSlot(absl::Span<const Sign> signs, uint64_t row_bytes, const Work& work) {
  constexpr size_t kAhead = 16;  // of the row, and again of the index line: about what a core keeps in flight
  constexpr size_t kRing = 64;
  static_assert(kRing >= 2 * kAhead + 1 && (kRing & (kRing - 1)) == 0);
  constexpr uint64_t kLineBytes = 64, kLinesMax = 6;  // the hardware follows longer rows by itself
  const uint64_t lines = std::min((row_bytes + kLineBytes - 1) / kLineBytes, kLinesMax);
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
      const uint32_t slot = index_.Find(signs[j], hashes[j % kRing]);
      slots[j % kRing] = slot;
      if (slot != RowIndex::kNone) {
        const char* row = arena_.row(slot);
        for (uint64_t line = 0; line < lines; ++line) __builtin_prefetch(row + line * kLineBytes);
      }
    }
    if (i >= 2 * kAhead) work(i - 2 * kAhead, slots[(i - 2 * kAhead) % kRing]);
  }
}

// --- Pull -----------------------------------------------------------------------------------------------------------

absl::Status TieredTable::Pull(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                               float* rows) {
  const bool read_only = occurrences.empty();
  HEARTH_CHECK(read_only || occurrences.size() == signs.size());
  if (!read_only) now_ = std::max(now_, step);
  const bool touch = !read_only && Tiered();
  misses_.clear();
  ForEachSlot(signs, sizeof(RowMeta) + dim_ * sizeof(float), [&](size_t i, uint32_t slot) {
    if (slot == RowIndex::kNone) {
      misses_.push_back(static_cast<uint32_t>(i));
      return;
    }
    char* row = arena_.row(slot);
    if (touch) Touch(MetaOf(row));
    CopyRecord(step, signs[i], *MetaOf(row), row + sizeof(RowMeta), read_only ? nullptr : &occurrences[i],
               rows + i * dim_);
  });
  if (!read_only) stats_.memory_hits += signs.size() - misses_.size();
  return PullMisses(step, signs, occurrences, rows);
}

absl::Status TieredTable::PullMisses(uint64_t step, absl::Span<const Sign> signs,
                                     absl::Span<const uint32_t> occurrences, float* rows) {
  const bool read_only = occurrences.empty();
  for (size_t begin = 0; begin < misses_.size(); begin += read_batch_) {
    const auto which = absl::MakeConstSpan(misses_).subspan(begin, read_batch_);
    HEARTH_RETURN_IF_ERROR(ReadStore(signs, which));
    uint64_t room = 0;
    if (!read_only) {
      const uint64_t stored = static_cast<uint64_t>(std::count(found_.begin(), found_.end(), true));
      stats_.memory_misses += stored;
      HEARTH_ASSIGN_OR_RETURN(room, MakeRoom(stored));
    }
    for (size_t j = 0; j < which.size(); ++j) {
      const size_t i = which[j];
      const uint32_t* occurrence = read_only ? nullptr : &occurrences[i];
      if (!found_[j]) {
        CopyAbsent(signs[i], occurrence, rows + i * dim_);
        continue;
      }
      RowMeta meta;
      HEARTH_RETURN_IF_ERROR(DecodeMeta(signs[i], values_[j], floats_, &meta));
      CopyRecord(step, signs[i], meta, FloatsOf(values_[j]), occurrence, rows + i * dim_);
      if (room == 0 || IsExpired(meta, expire_after_steps_, applied_step_)) continue;
      --room;
      LoadRecord(values_[j], meta, Insert(signs[i]));
    }
  }
  return absl::OkStatus();
}

void TieredTable::CopyRecord(uint64_t step, Sign sign, const RowMeta& meta, const char* weights,
                             const uint32_t* occurrences, float* out) const {
  if (IsExpired(meta, expire_after_steps_, step)) {
    CopyUnadmitted(sign, 0, occurrences, out);
  } else if (!IsAdmitted(meta)) {
    CopyUnadmitted(sign, meta.count, occurrences, out);
  } else if (dim_ % 4 == 0) {  // a few registers instead of a call
    for (uint32_t d = 0; d < dim_; d += 4) std::memcpy(out + d, weights + d * sizeof(float), 4 * sizeof(float));
  } else {
    std::memcpy(out, weights, dim_ * sizeof(float));
  }
}

void TieredTable::CopyAbsent(Sign sign, const uint32_t* occurrences, float* out) const {
  uint32_t count = 0;
  if (bloom_) {
    const auto& filter = filters_[LogicalShardOf(sign, shards_)];
    if (filter != nullptr) count = filter->Estimate(sign);
  }
  CopyUnadmitted(sign, count, occurrences, out);
}

void TieredTable::CopyUnadmitted(Sign sign, uint32_t count, const uint32_t* occurrences, float* out) const {
  if (occurrences == nullptr || AddSaturating(count, *occurrences) < count_min_) {
    std::fill_n(out, dim_, 0.0f);
    return;
  }
  const uint64_t stream = WeightStream(seed_, sign);
  for (uint32_t d = 0; d < dim_; ++d) out[d] = WeightOf(stream, d, config_.init_uniform());
}

// --- Push -----------------------------------------------------------------------------------------------------------

absl::Status TieredTable::Push(uint64_t step, uint64_t n, absl::Span<const PushPart> parts) {
  HEARTH_CHECK(step > applied_step_ && step <= std::numeric_limits<uint32_t>::max(), "step ", step, " after ",
               applied_step_);
  const PushPart* only = nullptr;
  size_t lanes = 0;
  for (const PushPart& part : parts) {
    HEARTH_CHECK(part.occurrences.size() == part.signs.size() && part.gradients.size() == part.signs.size() * dim_);
    if (part.signs.empty()) continue;
    only = &part;
    ++lanes;
  }
  HEARTH_CHECK(n >= 1 || lanes == 0);
  now_ = std::max(now_, step);
  divisor_ = static_cast<float>(n);
  rate_ = optimizer_.RateAt(step);
  if (lanes == 1) {
    for (size_t begin = 0; begin < only->signs.size(); begin += window_) {
      HEARTH_RETURN_IF_ERROR(PushWindow(step, only->signs.subspan(begin, window_), only->occurrences.data() + begin,
                                        only->gradients.data() + begin * dim_));
    }
  } else if (lanes > 1) {
    LaneMerge merge(parts, dim_);
    for (merge.Next(window_, &merged_signs_, &merged_occurrences_, &merged_gradients_); !merged_signs_.empty();
         merge.Next(window_, &merged_signs_, &merged_occurrences_, &merged_gradients_)) {
      HEARTH_RETURN_IF_ERROR(PushWindow(step, merged_signs_, merged_occurrences_.data(), merged_gradients_.data()));
    }
  }
  applied_step_ = step;
  return absl::OkStatus();
}

absl::Status TieredTable::PushWindow(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                                     const float* gradients) {
  HEARTH_RETURN_IF_ERROR(ReserveRows(signs.size()));
  misses_.clear();
  // A sign that the store may know is looked up there, and a filter counts its signs in ascending order: both wait.
  const bool insert_at_once = !maybe_in_store_ && !bloom_;
  ForEachSlot(signs, row_bytes_, [&](size_t i, uint32_t slot) {
    if (slot != RowIndex::kNone) {
      Apply(step, signs[i], arena_.row(slot), occurrences[i], gradients + i * dim_);
    } else if (insert_at_once && arena_.free() > 0) {
      char* row = Insert(signs[i]);
      *MetaOf(row) = RowMeta();
      Apply(step, signs[i], row, occurrences[i], gradients + i * dim_);
    } else {
      misses_.push_back(static_cast<uint32_t>(i));
    }
  });
  return misses_.empty() ? absl::OkStatus() : PushMisses(step, signs, occurrences, gradients);
}

absl::Status TieredTable::PushMisses(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                                     const float* gradients) {
  HEARTH_RETURN_IF_ERROR(ReadStore(signs, misses_));
  staging_.resize(misses_.size() * stride_);
  size_t records = 0;
  for (size_t j = 0; j < misses_.size(); ++j) {
    const size_t i = misses_[j];
    char* row = staging_.data() + records * stride_;
    *MetaOf(row) = RowMeta();
    if (found_[j]) {
      RowMeta meta;
      HEARTH_RETURN_IF_ERROR(DecodeMeta(signs[i], values_[j], floats_, &meta));
      LoadRecord(values_[j], meta, row);
    } else if (bloom_ && !CountInFilter(signs[i], occurrences[i], row)) {
      stats_.gradients_dropped += occurrences[i];
      continue;
    }
    Apply(step, signs[i], row, occurrences[i], gradients + i * dim_);
    misses_[records++] = static_cast<uint32_t>(i);
  }
  // None of this step's rows is evicted for others of it: what finds no room goes to the store as it is.
  HEARTH_ASSIGN_OR_RETURN(const uint64_t room, MakeRoom(records));
  pending_.clear();
  for (size_t j = 0; j < records; ++j) {
    char* row = staging_.data() + j * stride_;
    if (j < room) {
      std::memcpy(Insert(signs[misses_[j]]), row, row_bytes_);
    } else {
      AddPending(signs[misses_[j]], row, false);
    }
  }
  if (!pending_.empty()) maybe_in_store_ = true;
  stats_.rows_spilled += pending_.size();
  return WritePending();
}

bool TieredTable::CountInFilter(Sign sign, uint32_t occurrences, char* row) {
  auto& filter = filters_[LogicalShardOf(sign, shards_)];
  if (filter == nullptr) filter = std::make_unique<CountingBloom>(config_.admission());
  MetaOf(row)->count = filter->Estimate(sign);
  filter->Add(sign, occurrences);
  return AddSaturating(MetaOf(row)->count, occurrences) >= count_min_;
}

void TieredTable::Apply(uint64_t step, Sign sign, char* row, uint32_t occurrences, const float* gradient) {
  RowMeta* meta = MetaOf(row);
  float* weights = FloatsOfRow(row);
  if (IsExpired(*meta, expire_after_steps_, step)) {  // starts anew; a fresh row's zeros may pass here too
    if (IsAdmitted(*meta)) {
      ++stats_.rows_expired;
      --stats_.rows;
    }
    *meta = RowMeta{0, 0, meta->flags & kRowInStore, 0};
  }
  meta->count = AddSaturating(meta->count, occurrences);
  meta->last_step = static_cast<uint32_t>(step);
  meta->flags |= kRowDirty;
  Touch(meta);
  if (!IsAdmitted(*meta)) {
    if (meta->count < count_min_) {
      stats_.gradients_dropped += occurrences;
      return;
    }
    meta->flags |= kRowAdmitted;
    ++stats_.rows_admitted;
    ++stats_.rows;
    const uint64_t stream = WeightStream(seed_, sign);
    for (uint32_t d = 0; d < dim_; ++d) weights[d] = WeightOf(stream, d, config_.init_uniform());
    optimizer_.InitState(weights + dim_);
  }
  for (uint32_t d = 0; d < dim_; ++d) scaled_[d] = gradient[d] / divisor_;
  if (optimizer_.Update(weights, weights + dim_, scaled_.data(), meta->updates + 1, rate_)) {
    ++meta->updates;
  } else {
    ++stats_.rows_non_finite;
  }
}

// --- Store ----------------------------------------------------------------------------------------------------------

// values_ and found_ of signs[which[j]].
absl::Status TieredTable::ReadStore(absl::Span<const Sign> signs, absl::Span<const uint32_t> which) {
  if (!maybe_in_store_) {
    found_.assign(which.size(), false);
    return absl::OkStatus();
  }
  keys_.clear();
  for (const uint32_t i : which) keys_.push_back(KeyOf(signs[i], shards_));
  return store_->MultiGet(keys_, &values_, &found_);
}

void TieredTable::LoadRecord(absl::string_view value, const RowMeta& meta, char* row) const {
  std::memcpy(row, value.data(), value.size());
  MetaOf(row)->flags = (meta.flags & kStoredFlags) | kRowInStore;
  Touch(MetaOf(row));
}

// Writes what is pending in the order of keys, and marks its rows clean.
absl::Status TieredTable::WritePending() {
  std::sort(pending_.begin(), pending_.end(), [](const auto& a, const auto& b) { return a.key < b.key; });
  for (size_t begin = 0; begin < pending_.size(); begin += write_batch_) {
    const auto batch = absl::MakeSpan(pending_).subspan(begin, write_batch_);
    write_buffer_.resize(batch.size() * row_bytes_);
    writes_.clear();
    char* value = write_buffer_.data();
    for (const PendingWrite& write : batch) {
      KvWrite out{write.key, {}, write.remove};
      if (!write.remove) {
        const uint64_t bytes = IsAdmitted(*MetaOf(write.row)) ? row_bytes_ : sizeof(RowMeta);
        std::memcpy(value, write.row, bytes);
        MetaOf(value)->flags &= kStoredFlags;
        out.value = {value, bytes};
        value += bytes;
      }
      writes_.push_back(out);
    }
    HEARTH_RETURN_IF_ERROR(store_->Write(writes_));
    for (const PendingWrite& write : batch) {
      if (write.row != nullptr) MetaOf(write.row)->flags = (MetaOf(write.row)->flags & ~kRowDirty) | kRowInStore;
    }
  }
  pending_.clear();
  return absl::OkStatus();
}

// --- Tiers ----------------------------------------------------------------------------------------------------------

absl::Status TieredTable::ReserveRows(uint64_t rows) {
  HEARTH_RETURN_IF_ERROR(arena_.Reserve(rows));
  return index_.Reserve(std::min(arena_.rows() + rows, memory_rows_max_));
}

char* TieredTable::Insert(Sign sign) {
  const uint32_t slot = arena_.Take(sign);
  index_.Insert(sign, RowIndex::HashOf(sign), slot);
  return arena_.row(slot);
}

absl::StatusOr<uint64_t> TieredTable::MakeRoom(uint64_t wanted) {
  if (arena_.free() < wanted && nothing_to_evict_at_ != now_) {
    const uint64_t batch = std::clamp<uint64_t>(memory_rows_max_ / 16, 1, kEvictBatchMax);
    HEARTH_ASSIGN_OR_RETURN(const uint64_t evicted, Evict(std::max(wanted - arena_.free(), batch), arena_.slots()));
    if (evicted == 0) nothing_to_evict_at_ = now_;
  }
  HEARTH_RETURN_IF_ERROR(ReserveRows(wanted));
  return arena_.free();
}

// Lets up to `wanted` rows of the lowest scores leave, and looks at about looks_max rows for it.
absl::StatusOr<uint64_t> TieredTable::Evict(uint64_t wanted, uint64_t looks_max) {
  victims_.clear();
  if (arena_.slots() <= kExactEvictionSlots) {
    ChooseExactly(wanted);
  } else {
    ChooseBySample(wanted, looks_max);
  }
  const uint64_t evicted = victims_.size();
  HEARTH_RETURN_IF_ERROR(DropVictims());
  return evicted;
}

void TieredTable::ChooseExactly(uint64_t wanted) {
  std::vector<std::pair<uint64_t, uint32_t>> scores;
  for (uint32_t slot = 0; slot < arena_.slots(); ++slot) {
    if (arena_.sign(slot) == 0 || Protected(*MetaOf(arena_.row(slot)))) continue;
    scores.emplace_back(ScoreOf(config_.score(), *MetaOf(arena_.row(slot))), slot);
  }
  const size_t count = std::min<size_t>(wanted, scores.size());
  std::nth_element(scores.begin(), scores.begin() + count, scores.end());
  for (size_t i = 0; i < count; ++i) victims_.push_back(scores[i].second);
}

// A hand goes round the slots and takes whose score is below a quantile, estimated from a sample: the lowest score
// leaves, give or take the sample's error, at a cost that does not grow with the table.
void TieredTable::ChooseBySample(uint64_t wanted, uint64_t looks_max) {
  std::vector<uint64_t> scores;
  for (uint32_t i = 0; i < kScoreSamples; ++i) {
    const uint32_t slot = static_cast<uint32_t>(random_.Below(arena_.slots()));
    if (arena_.sign(slot) == 0 || Protected(*MetaOf(arena_.row(slot)))) continue;
    scores.push_back(ScoreOf(config_.score(), *MetaOf(arena_.row(slot))));
  }
  if (scores.empty()) return;
  const double share =
      std::clamp(2.0 * static_cast<double>(wanted) / static_cast<double>(arena_.slots()), 1.0 / 16, 1.0);
  const size_t rank = std::min(static_cast<size_t>(share * static_cast<double>(scores.size())), scores.size() - 1);
  std::nth_element(scores.begin(), scores.begin() + rank, scores.end());
  const uint64_t score_max = scores[rank];
  const uint64_t looks = std::min<uint64_t>(looks_max, arena_.slots());
  for (uint64_t look = 0; look < looks && victims_.size() < wanted; ++look) {
    const uint32_t slot = evict_hand_ < arena_.slots() ? evict_hand_ : 0;
    evict_hand_ = slot + 1;
    if (arena_.sign(slot) == 0) continue;
    const RowMeta& meta = *MetaOf(arena_.row(slot));
    if (!Protected(meta) && ScoreOf(config_.score(), meta) <= score_max) victims_.push_back(slot);
  }
}

// The victims leave memory: what is dirty is written first, what is expired is deleted.
absl::Status TieredTable::DropVictims() {
  if (victims_.empty()) return absl::OkStatus();
  pending_.clear();
  uint64_t expired = 0;
  for (const uint32_t slot : victims_) {
    char* row = arena_.row(slot);
    const RowMeta& meta = *MetaOf(row);
    if (IsExpired(meta, expire_after_steps_, applied_step_)) {
      ++expired;
      if (IsAdmitted(meta)) {
        ++stats_.rows_expired;
        --stats_.rows;
      }
      if (meta.flags & kRowInStore) AddPending(arena_.sign(slot), nullptr, true);
    } else if (meta.flags & kRowDirty) {
      AddPending(arena_.sign(slot), row, false);
    }
  }
  HEARTH_RETURN_IF_ERROR(WritePending());
  for (const uint32_t slot : victims_) {
    index_.Remove(arena_.sign(slot));
    arena_.Release(slot);
  }
  if (expired < victims_.size()) maybe_in_store_ = true;
  stats_.rows_spilled += victims_.size() - expired;
  return absl::OkStatus();
}

absl::Status TieredTable::Prefetch(absl::Span<const Sign> signs) {
  if (!maybe_in_store_) return absl::OkStatus();
  misses_.clear();
  ForEachSlot(signs, sizeof(RowMeta), [&](size_t i, uint32_t slot) {
    if (slot == RowIndex::kNone) {
      misses_.push_back(static_cast<uint32_t>(i));
    } else {
      Touch(MetaOf(arena_.row(slot)));
    }
  });
  for (size_t begin = 0; begin < misses_.size() && nothing_to_evict_at_ != now_; begin += read_batch_) {
    const auto which = absl::MakeConstSpan(misses_).subspan(begin, read_batch_);
    HEARTH_RETURN_IF_ERROR(ReadStore(signs, which));
    HEARTH_ASSIGN_OR_RETURN(uint64_t room, MakeRoom(std::count(found_.begin(), found_.end(), true)));
    for (size_t j = 0; j < which.size() && room > 0; ++j) {
      if (!found_[j]) continue;
      RowMeta meta;
      HEARTH_RETURN_IF_ERROR(DecodeMeta(signs[which[j]], values_[j], floats_, &meta));
      if (IsExpired(meta, expire_after_steps_, applied_step_)) continue;
      --room;
      ++stats_.rows_prefetched;
      LoadRecord(values_[j], meta, Insert(signs[which[j]]));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> TieredTable::Maintain(uint64_t step, uint64_t rows_max) {
  // Only what has expired by an applied step is gone for every later pull and push.
  if (expire_after_steps_ != 0 && !expire_sweeping_ && std::min(step, applied_step_) >= expire_sweep_due_) {
    expire_sweeping_ = true;
    expire_sweep_due_ = applied_step_ + std::max<uint32_t>(1, expire_after_steps_ / 4);
  }
  if (expire_sweeping_) HEARTH_RETURN_IF_ERROR(SweepExpired(rows_max));
  if (arena_.rows() > high_water_) spilling_ = true;
  if (spilling_) {
    const uint64_t above = arena_.rows() > low_water_ ? arena_.rows() - low_water_ : 0;
    uint64_t evicted = 0;
    if (above > 0) {
      HEARTH_ASSIGN_OR_RETURN(evicted, Evict(std::min(above, rows_max), rows_max));
    }
    spilling_ = evicted > 0 && arena_.rows() > low_water_;
  }
  return spilling_ || expire_sweeping_;
}

absl::Status TieredTable::SweepExpired(uint64_t looks_max) {
  victims_.clear();
  for (uint64_t look = 0; look < looks_max && expire_hand_ < arena_.slots(); ++look, ++expire_hand_) {
    if (arena_.sign(expire_hand_) == 0) continue;
    if (IsExpired(*MetaOf(arena_.row(expire_hand_)), expire_after_steps_, applied_step_))
      victims_.push_back(expire_hand_);
  }
  if (expire_hand_ >= arena_.slots()) {
    expire_hand_ = 0;
    expire_sweeping_ = false;
  }
  return DropVictims();
}

// --- Snapshot -------------------------------------------------------------------------------------------------------

absl::StatusOr<uint64_t> TieredTable::Snapshot(uint64_t step) {
  HEARTH_CHECK(step >= applied_step_, "snapshot of step ", step, " after ", applied_step_);
  applied_step_ = step;
  HEARTH_RETURN_IF_ERROR(FlushMemory(step));
  HEARTH_RETURN_IF_ERROR(FlushFilters());
  // From here on the store holds every record's newest version.
  uint64_t hash = 0, rows = 0;
  for (uint32_t shard = 0; shard < shards_; ++shard) {
    HEARTH_RETURN_IF_ERROR(SumRecords(step, shard, &hash, &rows));
    if (bloom_ && filters_[shard] != nullptr) hash += filters_[shard]->Hash(number_, shard);
  }
  stats_.rows = rows;
  return hash;
}

absl::Status TieredTable::FlushMemory(uint64_t step) {
  victims_.clear();
  pending_.clear();
  for (uint32_t slot = 0; slot < arena_.slots(); ++slot) {
    if (arena_.sign(slot) == 0) continue;
    char* row = arena_.row(slot);
    if (IsExpired(*MetaOf(row), expire_after_steps_, step)) {
      victims_.push_back(slot);
    } else if (MetaOf(row)->flags & kRowDirty) {
      AddPending(arena_.sign(slot), row, false);
      if (pending_.size() == kPendingMax) HEARTH_RETURN_IF_ERROR(WritePending());
    }
  }
  HEARTH_RETURN_IF_ERROR(WritePending());
  return DropVictims();
}

absl::Status TieredTable::FlushFilters() {
  for (uint32_t shard = 0; shard < filters_.size(); ++shard) {
    CountingBloom* filter = filters_[shard].get();
    if (filter == nullptr) continue;
    writes_.clear();
    for (uint64_t chunk = 0; chunk < filter->chunks(); ++chunk) {
      if (filter->ChunkChanged(chunk))
        writes_.push_back({FilterChunkKey(number_, shard, chunk), filter->Chunk(chunk), false});
    }
    HEARTH_RETURN_IF_ERROR(store_->Write(writes_));
    filter->MarkSaved();
  }
  return absl::OkStatus();
}

// Adds up one logical shard as the store holds it, and deletes what has expired there.
absl::Status TieredTable::SumRecords(uint64_t step, uint32_t shard, uint64_t* hash, uint64_t* rows) {
  const KvRange range = RecordsOf(number_, shard);
  pending_.clear();
  absl::Status status;
  HEARTH_RETURN_IF_ERROR(store_->Scan(range.first, range.last, [&](KvKey key, absl::string_view value) {
    RowMeta meta;
    status = DecodeMeta(key.sign, value, floats_, &meta);
    if (!status.ok()) return false;
    if (IsExpired(meta, expire_after_steps_, step)) {
      pending_.push_back({key, nullptr, true});
      stats_.rows_expired += IsAdmitted(meta) ? 1 : 0;
      if (pending_.size() == kPendingMax) status = WritePending();
      return status.ok();
    }
    *hash += RecordHash(key.sign, value);
    *rows += IsAdmitted(meta) ? 1 : 0;
    return true;
  }));
  HEARTH_RETURN_IF_ERROR(status);
  return WritePending();
}

// Counts what the store holds, and brings rows into memory as far as the low watermark.
absl::Status TieredTable::Restore() {
  HEARTH_RETURN_IF_ERROR(arena_.Open(row_bytes_, memory_rows_max_));
  HEARTH_RETURN_IF_ERROR(index_.Reserve(0));
  absl::Status status;
  for (uint32_t shard = 0; shard < shards_ && status.ok(); ++shard) {
    const KvRange records = RecordsOf(number_, shard);
    HEARTH_RETURN_IF_ERROR(store_->Scan(records.first, records.last, [&](KvKey key, absl::string_view value) {
      RowMeta meta;
      status = DecodeMeta(key.sign, value, floats_, &meta);
      if (!status.ok()) return false;
      stats_.rows += IsAdmitted(meta) ? 1 : 0;
      if (arena_.rows() >= low_water_) {
        maybe_in_store_ = true;
        return true;
      }
      status = ReserveRows(1);
      if (status.ok()) LoadRecord(value, meta, Insert(key.sign));
      return status.ok();
    }));
    const KvRange chunks = FilterChunksOf(number_, shard);
    if (!bloom_ || !status.ok()) continue;
    HEARTH_RETURN_IF_ERROR(store_->Scan(chunks.first, chunks.last, [&](KvKey key, absl::string_view value) {
      if (filters_[shard] == nullptr) filters_[shard] = std::make_unique<CountingBloom>(config_.admission());
      if (!filters_[shard]->LoadChunk(FilterChunkOf(key), value)) {
        status = absl::DataLossError(absl::StrCat("counting filter of table \"", config_.name(), "\", logical shard ",
                                                  shard, ": chunk ", FilterChunkOf(key), " of ", value.size(),
                                                  " bytes does not fit this job's bloom_counters"));
      }
      return status.ok();
    }));
  }
  return status;
}

EmbeddingTableStats TieredTable::stats() const {
  EmbeddingTableStats stats = stats_;
  stats.rows_in_memory = arena_.rows();
  stats.bytes_memory = arena_.bytes() + index_.bytes();
  for (const auto& filter : filters_) stats.bytes_memory += filter != nullptr ? filter->bytes() : 0;
  return stats;
}

absl::Status CheckOptions(const TableOptions& options) {
  const Table& table = options.config;
  const auto refuse = [&](absl::string_view field, absl::string_view cause) {
    return absl::InvalidArgumentError(absl::StrCat("table \"", table.name(), "\": ", field, ": ", cause));
  };
  if (table.dim() < 1 || table.dim() > SparseOptimizer::kDimMax) return refuse("dim", "must be 1 to 4096");
  if (options.number < 1 || options.number > kTablesMax) return refuse("number", "must be 1 to 4095");
  if (options.shards < 1) return refuse("shards", "must be at least 1");
  if (options.memory_rows_max < 1 || options.memory_rows_max > 4'000'000'000u) {
    return refuse("memory_rows_max", "must be 1 to 4e9 on each server");
  }
  if (table.admission().counter() == Admission::BLOOM) {
    if (table.expire_after_steps() != 0) {
      return refuse("admission.counter",
                    "BLOOM cannot forget what expires; use EXACT, or leave expire_after_steps at 0");
    }
    if (table.admission().bloom_counters() < 1 || table.admission().bloom_counters() > 4'000'000'000u ||
        table.admission().bloom_hashes() < 1 || table.admission().bloom_hashes() > 16) {
      return refuse("admission", "bloom_counters must be 1 to 4e9 and bloom_hashes 1 to 16");
    }
  }
  return absl::OkStatus();
}

}  // namespace

float InitialWeight(uint64_t seed, Sign sign, uint32_t i, double init_uniform) {
  return WeightOf(WeightStream(seed, sign), i, init_uniform);
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> EmbeddingTable::Open(const TableOptions& options, KvStore* store) {
  HEARTH_RETURN_IF_ERROR(CheckOptions(options));
  auto table = std::make_unique<TieredTable>(options, store);
  HEARTH_RETURN_IF_ERROR(table->Restore());
  return table;
}

}  // namespace hearth
