#include "embedding/embedding_table.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "embedding/counting_filter.h"
#include "embedding/expiry.h"
#include "embedding/lane_merge.h"
#include "embedding/lifecycle.h"
#include "embedding/memory_tier.h"
#include "embedding/row_record.h"
#include "embedding/row_sums.h"
#include "embedding/sign_filter.h"
#include "embedding/sparse_optimizer.h"
#include "embedding/store_io.h"

namespace hearth {
namespace {

constexpr size_t kReadBatchMax = 2048;  // keys of one read; a pull's fewer, so that its reads run side by side
constexpr size_t kPullBatchMin = 256;
constexpr size_t kReadBatchBytes = size_t{16} << 20;
constexpr uint64_t kWriteBytesMax = uint64_t{64} << 20;  // rows of one write: one sorted file
constexpr size_t kWriteRowsMax = size_t{1} << 20;
constexpr size_t kWritesAheadMax = 4;  // of a cut; each holds kWriteBytesMax until it is written
constexpr uint64_t kCutSliceRows = 65536;
constexpr uint64_t kSpillSliceRowsMax = 16384;  // chosen and copied at once
constexpr size_t kWindowMax = 8192;             // signs of a push worked on together
constexpr size_t kWindowBytes = size_t{1} << 20;
constexpr uint64_t kSlackRowsMin = 65536;  // beyond memory_rows_max, for what a cut holds up
constexpr uint64_t kSlackRowsMax = uint64_t{1} << 20;

// Rows begin to leave above it; where the steps give places to so many signs.
uint64_t HighWaterFor(uint64_t memory_rows_max, uint64_t placed_a_step) {
  return memory_rows_max - std::min(memory_rows_max / 3, std::max(memory_rows_max / 16, 2 * placed_a_step));
}

uint64_t CapacityFor(uint64_t memory_rows_max) {
  return std::min<uint64_t>(memory_rows_max + std::clamp(memory_rows_max / 4, kSlackRowsMin, kSlackRowsMax),
                            4'200'000'000u);
}

uint64_t WeightStream(uint64_t seed, Sign sign) { return Mix64(Mix64(seed) ^ sign); }

float WeightOf(uint64_t stream, uint32_t i, double init_uniform) {
  const double unit = static_cast<double>(Mix64(stream + i) >> 40) * 0x1.0p-24;  // [0, 1)
  return static_cast<float>(unit * 2 * init_uniform - init_uniform);
}

// Where what a read finds is wanted.
struct Fetch : StoreRead {
  struct Place {
    uint32_t slot;   // kNone: nowhere but in its pull
    uint32_t index;  // of its sign in the pull
  };
  std::vector<Place> places;  // beside keys
  bool prefetch = false;
  bool landed = false;
};

struct Spill : StoreWrite {
  bool leave = false;   // its rows leave memory once they are written
  bool forced = false;  // even if they are still in use

  void Clear() {
    StoreWrite::Clear();
    leave = forced = false;
  }
};

// Invariant: the newest version of a record is in the memory tier, or, where that has none, in the store. So which tier
// a record is in cannot show in a result. What is on its way between the two stays in memory until it is there: a row
// that is being written stays until that write has landed, and a sign that is being read has a place that says so.
//
// sums_ covers each record whose newest version is not a dirty row; a row leaves them when it becomes dirty and comes
// back when it is handed to the writer.
class TieredTable final : public EmbeddingTable {
 public:
  TieredTable(const TableOptions& options, std::unique_ptr<StoreIo> own_io, StoreIo* io)
      : config_(options.config),
        number_(options.number),
        seed_(options.seed),
        shards_(options.shards),
        memory_rows_most_(options.memory_rows_max),
        capacity_max_(CapacityFor(options.memory_rows_max)),
        dim_(options.config.dim()),
        weights_(options.config, options.seed),
        words_(RowWordsOf(options.config)),
        row_bytes_(RowBytesOf(options.config)),
        count_min_(options.config.admission().count_min()),
        bloom_(options.config.admission().counter() == Admission::BLOOM && count_min_ > 1),
        window_(BatchOf(kWindowMax, kWindowBytes, dim_ * sizeof(float))),
        read_batch_(BatchOf(kReadBatchMax, kReadBatchBytes, row_bytes_)),
        optimizer_(options.config.optimizer(), dim_),
        own_io_(std::move(own_io)),
        io_(io),
        tier_(number_, row_bytes_, options.memory_rows_max, capacity_max_, SeedOf(seed_, "eviction_sample")),
        expiry_(ExpiryRule::Of(options.config), options.clock),
        sums_(expiry_.rule(), expiry_.Marks()),
        filters_(bloom_ ? shards_ : 0),
        stored_(options.memory_rows_max),
        cut_sums_(expiry_.rule()),
        memory_rows_max_(options.memory_rows_max),
        capacity_(capacity_max_),
        scaled_(dim_),
        unpacked_(dim_),
        record_(row_bytes_, '\0') {}
  // Threads hold what is under way.
  ~TieredTable() override {
    for (const auto& fetch : reads_) io_->WaitFor(fetch->done);
    for (const auto& spill : writes_) io_->WaitFor(spill->done);
  }

  absl::Status Restore(uint64_t saved_step, const LogClock& clock);

  absl::Status Pull(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                    float* rows) override;
  absl::Status Push(uint64_t step, uint64_t n, absl::Span<const PushPart> parts) override;
  void Tick(uint64_t step, uint32_t time_s) override {
    if (expiry_.Tick(step, time_s)) sums_.Mark(step + 1);
  }
  bool HasRoomFor(uint64_t signs) const override { return !cutting_ || tier_.rows() + signs + window_ <= capacity_; }
  absl::Status Prefetch(uint64_t step, absl::Span<const Sign> signs) override;
  absl::StatusOr<bool> Maintain(uint64_t step, uint64_t rows_max) override;
  absl::Status BeginCut(uint64_t step) override;
  absl::StatusOr<bool> ContinueCut(uint64_t rows_max, bool wait) override;
  bool CutWaits() const override { return writes_.size() >= kWritesAheadMax; }
  TableCut EndCut() override;
  void SetMemoryRowsMax(uint64_t rows) override {
    HEARTH_CHECK(rows >= 1);
    // While a cut is under way rows cannot leave, and what there is room for stays.
    memory_rows_max_ = std::min(rows, cutting_ ? std::min(capacity_, memory_rows_most_) : memory_rows_most_);
    if (!cutting_) capacity_ = CapacityFor(memory_rows_max_);
  }
  absl::Status GiveBackMemory(uint64_t rows_max) override;
  uint64_t row_bytes_in_memory() const override { return tier_.row_bytes(); }
  EmbeddingTableStats stats() const override;

 protected:
  absl::Status WaitForWrites() override;

 private:
  static size_t BatchOf(size_t rows_max, size_t bytes_max, uint64_t row_bytes) {
    return std::min<size_t>(rows_max, std::max<size_t>(1, bytes_max / row_bytes));
  }
  static bool IsFull(const Spill& spill) {
    return spill.bytes.size() >= kWriteBytesMax || spill.items.size() >= kWriteRowsMax;
  }
  static bool IsGone(const RowHead& head, uint64_t horizon) { return IsExpired(head.last_step(), horizon); }

  // Pull.
  void CopyRecord(uint64_t step, Sign sign, const RowMeta& meta, const char* weights, const uint32_t* occurrences,
                  float* out) const;
  void CopyWeights(const char* weights, float* out) const;
  void InitWeights(Sign sign, float* out) const;
  void CopyAbsent(uint64_t step, Sign sign, const uint32_t* occurrences, float* out) const;
  void CopyUnadmitted(Sign sign, uint32_t count, const uint32_t* occurrences, float* out) const;
  absl::Status PullMisses(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                          float* rows);

  // Push.
  absl::Status PushWindow(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                          const float* gradients);
  absl::Status PushMisses(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                          const float* gradients);
  void BeforeChange(uint32_t slot);
  // seen: the count that an expired row starts anew with.
  void Apply(uint64_t step, uint32_t slot, uint32_t occurrences, const float* gradient, uint32_t seen = 0);
  // What the counting filter knows of a sign without a live row, as its count. False: still not admitted.
  bool CountInFilter(uint64_t step, Sign sign, uint32_t occurrences, uint32_t* count);

  // Places and reads.
  void SetRecord(uint32_t slot, const RowMeta& meta, absl::string_view record) {  // as it is stored
    tier_.SetMeta(slot, meta);
    std::memcpy(tier_.body(slot), WordsOf(record), record.size() - sizeof(RowMeta));
  }
  uint32_t NewPlace(Sign sign, uint64_t state);
  void Want(Sign sign, uint32_t slot, size_t index) {
    wanted_.push_back({KeyOf(sign, shards_), {slot, static_cast<uint32_t>(index)}});
  }
  // The store may have a record of it that memory has not.
  bool MayBeStored(Sign sign) const { return maybe_in_store_ && (!stored_whole_ || stored_.MayContain(sign)); }
  // Of misses_, those that may be stored come in the order they had, the rest is given to `absent`.
  template <typename Absent>
  void TakeOutAbsent(absl::Span<const Sign> signs, const Absent& absent);
  // Hands what is wanted to the readers, in reads of at most `batch` keys.
  void ReadWanted(size_t batch, bool prefetch);
  // All of reads_ from number `first` on, and those that the signs of misses_ are on their way by.
  void WaitForReads(uint64_t first, absl::Span<const Sign> signs);
  absl::Status Land();  // what is done, of reads and of writes
  absl::Status LandReads();
  absl::Status LandRead(Fetch* fetch);
  absl::Status LandWrites();
  absl::Status LandOldestWrite() {  // waits for it
    io_->WaitFor(writes_.front()->done);
    return LandWrites();
  }

  // Writes. The record as it is stored, in record_.
  absl::string_view RecordOf(uint32_t slot);
  const RowMeta& record_meta() const { return *reinterpret_cast<const RowMeta*>(record_.data()); }
  uint64_t HandOver(Spill* spill, uint32_t slot);  // its hash
  // What handing over slots[i] and those behind it will touch comes into the cache: rows, then what their signs lead
  // to.
  void AheadOfHandOver(const std::vector<uint32_t>& slots, size_t i) const {
    constexpr size_t kAhead = 16;
    if (i + 2 * kAhead < slots.size()) tier_.PrefetchRow(slots[i + 2 * kAhead], row_bytes_);
    if (i + kAhead < slots.size()) stored_.Prefetch(tier_.sign(slots[i + kAhead]));
  }
  std::unique_ptr<Spill> NewSpill();
  void SubmitSpill();

  // Tiers.
  uint64_t Free() const { return memory_rows_max_ - std::min(memory_rows_max_, tier_.rows()); }
  // Rows begin to leave above the high watermark, down to the low one: what some steps will need stays free, for a
  // write that gives room takes about as long as a step.
  uint64_t HighWater() const { return HighWaterFor(memory_rows_max_, placed_a_step_); }
  uint64_t LowWater() const {
    return memory_rows_max_ - std::min(memory_rows_max_ / 2, std::max(memory_rows_max_ / 8, 3 * placed_a_step_));
  }
  // Rows leave, or will before long: it matters which are in use.
  bool Tiered() const { return maybe_in_store_ || tier_.rows() + memory_rows_max_ / 32 > HighWater(); }
  void Remove(uint32_t slot);
  // Room for `wanted` rows more, as far as it can be had without waiting, and reserved.
  absl::StatusOr<uint64_t> MakeRoom(uint64_t wanted);
  // Lets up to `wanted` rows leave, or begin to. Returns how many.
  absl::StatusOr<uint64_t> Evict(uint64_t wanted, uint64_t looks_max, bool forced);
  static uint64_t LooksFor(uint64_t wanted) { return std::max<uint64_t>(65536, 32 * wanted); }
  absl::Status KeepWithinBounds();
  absl::Status SpillDown(uint64_t rows_max, bool bounded_looks);
  void SweepExpired(uint64_t looks_max);
  void CountExpired(const RowHead& head) {  // of a row that the sums do not have; those they drop are counted there
    if (!head.Has(kRowIsAdmitted)) return;
    ++stats_.rows_expired;
    --stats_.rows;
  }
  void RemoveExpired(uint32_t slot) {
    if (tier_.head(slot)->Has(kRowDirty)) CountExpired(*tier_.head(slot));
    Remove(slot);
  }
  absl::Status FillFromStore(uint64_t rows_max);

  // Cut.
  void CopyForCut(uint32_t slot, bool changing);
  void SubmitCutChunk();
  bool OfCut(const RowHead& head) const { return cutting_ && head.Has(kRowDirty) && head.Only(kRowDirtyEra) != era_; }

  absl::Status ScanRecords(uint64_t kept_horizon);

  // Constant after construction.
  const Table config_;
  const TableNumber number_;
  const uint64_t seed_;
  const uint32_t shards_;
  const uint64_t memory_rows_most_;  // of memory_rows_max_
  const uint64_t capacity_max_;
  const uint32_t dim_;
  const RowWeights weights_;
  const uint64_t words_;  // weights and state
  const uint64_t row_bytes_;
  const uint32_t count_min_;
  const bool bloom_;
  const size_t window_;
  const size_t read_batch_;
  const SparseOptimizer optimizer_;
  const std::unique_ptr<StoreIo> own_io_;
  StoreIo* const io_;

  // The table.
  MemoryTier tier_;
  Expiry expiry_;
  RowSums sums_;
  std::vector<std::unique_ptr<CountingFilter>> filters_;  // by logical shard, made when first counted in
  uint64_t applied_step_ = 0;
  float divisor_ = 1;            // n of the step being applied
  float rate_ = 0;               // its learning rate
  bool maybe_in_store_ = false;  // some record may be in the store alone
  SignFilter stored_;            // signs that the store has a record of, all of them where it is whole
  bool stored_whole_ = true;
  uint64_t places_ = 0;  // slots without a record: loading or absent
  EmbeddingTableStats stats_;

  // Under way, oldest first.
  std::deque<std::unique_ptr<Fetch>> reads_;
  uint64_t first_read_ = 0;  // number of reads_.front()
  std::deque<std::unique_ptr<Spill>> writes_;
  std::unique_ptr<Spill> spill_;               // being filled
  std::vector<std::unique_ptr<Spill>> spare_;  // written; their memory is kept
  uint64_t leaving_ = 0;                       // rows whose write is under way or being filled, and that leave with it

  // The cut.
  bool cutting_ = false;
  uint64_t era_ = 0;   // kRowDirtyEra of rows that become dirty now
  SlotSet dirty_;      // became dirty since the last cut; some may be clean or another's again
  SlotSet cut_slots_;  // those of the cut, as far as it has not come to them
  bool cut_copied_ = false;
  uint64_t cut_step_ = 0;     // of the cut, or the last one
  uint64_t cut_horizon_ = 0;  // that it was judged with
  LogClock cut_clock_;
  RowSums cut_sums_;
  uint64_t cut_filters_hash_ = 0;
  std::unique_ptr<Spill> cut_chunk_;

  // Upkeep. None of it can change a value.
  uint64_t memory_rows_max_;
  uint64_t capacity_;           // rows in memory at any moment
  bool spilling_ = false;       // on the way from the high to the low watermark
  uint64_t placed_ = 0;         // signs that were given a place, since the last push
  uint64_t placed_a_step_ = 0;  // about so many, of late, where rows are in the store
  uint32_t expire_hand_ = 0;
  uint64_t expire_sweep_due_ = 1;  // horizon from which a new sweep begins
  bool expire_sweeping_ = false;
  bool filling_ = false;  // memory, from the store
  uint32_t fill_shard_ = 0;
  uint64_t fill_sign_ = 0;
  bool left_memory_ = false;  // some record of the store is not in memory, for want of room

  // Scratch, kept for its capacity.
  std::vector<uint32_t> misses_;
  std::vector<Sign> merged_signs_;
  std::vector<uint32_t> merged_occurrences_;
  std::vector<float> merged_gradients_;
  std::vector<std::pair<KvKey, Fetch::Place>> wanted_;
  std::vector<uint32_t> chosen_;
  std::vector<float> scaled_;    // [dim]
  std::vector<float> unpacked_;  // [dim], weights of 16 bits
  std::string record_;
};

// --- Pull -----------------------------------------------------------------------------------------------------------

absl::Status TieredTable::Pull(uint64_t step, absl::Span<const Sign> signs, absl::Span<const uint32_t> occurrences,
                               float* rows) {
  const bool read_only = occurrences.empty();
  HEARTH_CHECK(read_only || occurrences.size() == signs.size());
  HEARTH_RETURN_IF_ERROR(Land());
  if (!read_only) tier_.SetNow(step);
  const bool touch = !read_only && Tiered();
  const uint64_t horizon = expiry_.HorizonAt(step);
  const uint32_t dim = dim_;  // as a local it stays in a register across the writes
  uint64_t hits = 0;
  misses_.clear();
  tier_.ForEach(signs, sizeof(RowHead) + dim_ * sizeof(float), [&](size_t i, uint32_t slot) {
    if (slot == MemoryTier::kNone || tier_.head(slot)->Has(kRowLoading)) {
      misses_.push_back(static_cast<uint32_t>(i));
      return;
    }
    RowHead* head = tier_.head(slot);
    const uint32_t* occurrence = read_only ? nullptr : &occurrences[i];
    if (touch) {
      if (!tier_.TouchedOfLate(*head)) tier_.Touch(head);
      if (head->Has(kRowPrefetched)) {
        head->Unset(kRowPrefetched);
        ++stats_.prefetch_hits;
      }
    }
    if (head->Has(kRowAbsent)) {
      CopyAbsent(step, signs[i], occurrence, rows + i * dim);
      return;
    }
    ++hits;
    if (head->Has(kRowIsAdmitted) && !IsGone(*head, horizon)) {  // most are
      CopyWeights(tier_.body(slot), rows + i * dim);
    } else {
      CopyRecord(step, signs[i], tier_.meta(slot), tier_.body(slot), occurrence, rows + i * dim);
    }
  });
  if (!read_only) stats_.memory_hits += hits;
  return misses_.empty() ? absl::OkStatus() : PullMisses(step, signs, occurrences, rows);
}

absl::Status TieredTable::PullMisses(uint64_t step, absl::Span<const Sign> signs,
                                     absl::Span<const uint32_t> occurrences, float* rows) {
  const bool read_only = occurrences.empty();
  const auto occurrence = [&](size_t i) { return read_only ? nullptr : &occurrences[i]; };
  TakeOutAbsent(signs, [&](size_t i) { CopyAbsent(step, signs[i], occurrence(i), rows + i * dim_); });
  if (misses_.empty()) return absl::OkStatus();
  uint64_t room = 0;
  if (!read_only) {
    HEARTH_ASSIGN_OR_RETURN(room, MakeRoom(misses_.size()));
  }
  size_t kept = 0;  // of misses_: those that other reads bring
  for (const uint32_t i : misses_) {
    // What is loading has its newest version in the store, so that a read-only pull need not wait for it.
    uint32_t slot = read_only ? MemoryTier::kNone : tier_.Find(signs[i]);
    if (slot != MemoryTier::kNone) {
      misses_[kept++] = i;
      continue;
    }
    if (room > 0) {
      slot = NewPlace(signs[i], kRowLoading);
      --room;
    }
    Want(signs[i], slot, i);
  }
  misses_.resize(kept);
  const uint64_t first = first_read_ + reads_.size();
  ReadWanted(std::clamp<size_t>(wanted_.size() / 4, kPullBatchMin, read_batch_), false);
  WaitForReads(first, signs);
  for (uint64_t number = first; number < first_read_ + reads_.size(); ++number) {
    const Fetch& fetch = *reads_[number - first_read_];
    HEARTH_RETURN_IF_ERROR(fetch.status);
    for (size_t j = 0; j < fetch.places.size(); ++j) {
      const size_t i = fetch.places[j].index;
      if (!fetch.values.found(j)) {
        CopyAbsent(step, signs[i], occurrence(i), rows + i * dim_);
        continue;
      }
      RowMeta meta;
      HEARTH_RETURN_IF_ERROR(DecodeMeta(signs[i], fetch.values[j], words_, &meta));
      CopyRecord(step, signs[i], meta, WordsOf(fetch.values[j]), occurrence(i), rows + i * dim_);
      if (!read_only) ++stats_.memory_misses;
    }
  }
  HEARTH_RETURN_IF_ERROR(LandReads());
  for (const uint32_t i : misses_) {
    const uint32_t slot = tier_.Find(signs[i]);
    RowHead* head = tier_.head(slot);
    tier_.Touch(head);
    head->Unset(kRowPrefetched);  // it came too late
    if (head->Has(kRowAbsent)) {
      CopyAbsent(step, signs[i], occurrence(i), rows + i * dim_);
    } else {
      CopyRecord(step, signs[i], tier_.meta(slot), tier_.body(slot), occurrence(i), rows + i * dim_);
      ++stats_.memory_misses;
    }
  }
  return absl::OkStatus();
}

void TieredTable::CopyRecord(uint64_t step, Sign sign, const RowMeta& meta, const char* weights,
                             const uint32_t* occurrences, float* out) const {
  if (IsExpired(meta, expiry_.HorizonAt(step))) {
    CopyAbsent(step, sign, occurrences, out);
  } else if (!IsAdmitted(meta)) {
    CopyUnadmitted(sign, meta.count, occurrences, out);
  } else {
    CopyWeights(weights, out);
  }
}

void TieredTable::CopyWeights(const char* weights, float* out) const {
  const uint32_t dim = dim_;
  if (weights_.packed()) {
    weights_.Decode(weights, out);
  } else if (dim % 4 == 0) {  // a few registers instead of a call
    for (uint32_t d = 0; d < dim; d += 4) std::memcpy(out + d, weights + d * sizeof(float), 4 * sizeof(float));
  } else {
    std::memcpy(out, weights, dim * sizeof(float));
  }
}

void TieredTable::CopyAbsent(uint64_t step, Sign sign, const uint32_t* occurrences, float* out) const {
  uint32_t count = 0;
  if (bloom_) {
    const auto& filter = filters_[LogicalShardOf(sign, shards_)];
    if (filter != nullptr) count = filter->Estimate(expiry_.GenerationAt(step), sign);
  }
  CopyUnadmitted(sign, count, occurrences, out);
}

void TieredTable::CopyUnadmitted(Sign sign, uint32_t count, const uint32_t* occurrences, float* out) const {
  if (occurrences == nullptr || AddSaturating(count, *occurrences) < count_min_) {
    std::fill_n(out, dim_, 0.0f);
    return;
  }
  InitWeights(sign, out);
}

void TieredTable::InitWeights(Sign sign, float* out) const {
  const uint64_t stream = WeightStream(seed_, sign);
  for (uint32_t d = 0; d < dim_; ++d) out[d] = WeightOf(stream, d, config_.init_uniform());
  weights_.Round(out);
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
  HEARTH_RETURN_IF_ERROR(Land());
  tier_.SetNow(step);
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
  placed_a_step_ = maybe_in_store_ ? std::max(placed_, placed_a_step_ - placed_a_step_ / 8) : 0;
  placed_ = 0;
  return KeepWithinBounds();
}

absl::Status TieredTable::PushWindow(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                                     const float* gradients) {
  if (tier_.rows() + signs.size() > capacity_) HEARTH_RETURN_IF_ERROR(KeepWithinBounds());
  if (tier_.rows() + signs.size() > capacity_) {
    return absl::ResourceExhaustedError(absl::StrCat("table \"", config_.name(),
                                                     "\": no room for a step's rows beside ", tier_.rows(),
                                                     " in memory; raise memory_rows_max"));
  }
  HEARTH_RETURN_IF_ERROR(tier_.Reserve(signs.size()));
  HEARTH_RETURN_IF_ERROR(dirty_.Reserve(tier_.slots() + signs.size()));
  if (cutting_) HEARTH_RETURN_IF_ERROR(stored_.Reserve(signs.size()));
  misses_.clear();
  // A sign that the store may know is looked up there, and a filter counts its signs in ascending order: both wait.
  const bool insert_at_once = !maybe_in_store_ && !bloom_;
  tier_.ForEach(signs, row_bytes_, [&](size_t i, uint32_t slot) {
    if (slot == MemoryTier::kNone) {
      if (!insert_at_once) {
        misses_.push_back(static_cast<uint32_t>(i));
        return;
      }
      slot = NewPlace(signs[i], kRowAbsent);
    } else if (tier_.head(slot)->Has(bloom_ ? kRowLoading | kRowAbsent : kRowLoading) ||
               (bloom_ && IsGone(*tier_.head(slot), expiry_.HorizonAt(step)))) {
      misses_.push_back(static_cast<uint32_t>(i));
      return;
    }
    Apply(step, slot, occurrences[i], gradients + i * dim_);
  });
  return misses_.empty() ? absl::OkStatus() : PushMisses(step, signs, occurrences, gradients);
}

absl::Status TieredTable::PushMisses(uint64_t step, absl::Span<const Sign> signs, const uint32_t* occurrences,
                                     const float* gradients) {
  if (maybe_in_store_) {
    const uint64_t first = first_read_ + reads_.size();
    if (stored_whole_) {
      for (const uint32_t i : misses_) stored_.Prefetch(signs[i]);
    }
    for (const uint32_t i : misses_) {
      if (tier_.Find(signs[i]) != MemoryTier::kNone || !MayBeStored(signs[i])) continue;
      Want(signs[i], NewPlace(signs[i], kRowLoading), i);
    }
    ReadWanted(std::clamp<size_t>(wanted_.size() / 4, kPullBatchMin, read_batch_), false);
    WaitForReads(first, signs);
    HEARTH_RETURN_IF_ERROR(LandReads());
  }
  for (const uint32_t i : misses_) {
    uint32_t slot = tier_.Find(signs[i]);
    const bool record = slot != MemoryTier::kNone && !tier_.head(slot)->Has(kRowAbsent);
    const bool live = record && !IsGone(*tier_.head(slot), expiry_.HorizonAt(step));
    uint32_t count = 0;
    if (!live && bloom_ && !CountInFilter(step, signs[i], occurrences[i], &count)) {
      stats_.gradients_dropped += occurrences[i];
      continue;
    }
    if (slot == MemoryTier::kNone) slot = NewPlace(signs[i], kRowAbsent);
    if (!record) tier_.SetMeta(slot, RowMeta{count, 0, 0, 0});
    Apply(step, slot, occurrences[i], gradients + i * dim_, count);
  }
  return absl::OkStatus();
}

bool TieredTable::CountInFilter(uint64_t step, Sign sign, uint32_t occurrences, uint32_t* count) {
  const uint32_t shard = LogicalShardOf(sign, shards_);
  auto& filter = filters_[shard];
  if (filter == nullptr) filter = std::make_unique<CountingFilter>(config_, number_, shard);
  *count = filter->Estimate(expiry_.GenerationAt(step), sign);
  filter->Add(expiry_.GenerationAt(step), sign, occurrences);
  return AddSaturating(*count, occurrences) >= count_min_;
}

// Makes the row dirty: what it is now leaves the sums, and goes to a cut that has not seen it yet.
void TieredTable::BeforeChange(uint32_t slot) {
  RowHead* head = tier_.head(slot);
  if (head->Has(kRowAbsent)) {
    head->Unset(kRowAbsent);
    --places_;
  } else if (head->Has(kRowDirty)) {
    CopyForCut(slot, true);
  } else if (!IsGone(*head, cut_horizon_)) {  // else the sums have dropped it
    const uint64_t hash = RecordHash(tier_.sign(slot), RecordOf(slot));
    sums_.Remove(record_meta(), hash);
  }
  head->Unset(kRowDirtyEra);
  head->Set(kRowDirty | era_);
  dirty_.Add(slot);
}

void TieredTable::Apply(uint64_t step, uint32_t slot, uint32_t occurrences, const float* gradient, uint32_t seen) {
  RowHead* head = tier_.head(slot);
  char* const body = tier_.body(slot);
  float* const weights = weights_.packed() ? unpacked_.data() : reinterpret_cast<float*>(body);
  float* const state = reinterpret_cast<float*>(body) + weights_.words();
  if (!head->Has(kRowDirty) || OfCut(*head)) BeforeChange(slot);
  if (IsGone(*head, expiry_.HorizonAt(step))) {             // starts anew; a fresh row may pass here too
    if (!IsGone(*head, cut_horizon_)) CountExpired(*head);  // else it was counted there
    tier_.SetMeta(slot, RowMeta{seen, 0, 0, 0});
  }
  tier_.AddOccurrences(slot, occurrences);
  head->set_last_step(static_cast<uint32_t>(step));
  tier_.Touch(head);
  if (!head->Has(kRowIsAdmitted)) {
    if (tier_.CountOf(slot) < count_min_) {
      stats_.gradients_dropped += occurrences;
      return;
    }
    head->Set(kRowIsAdmitted);
    ++stats_.rows_admitted;
    ++stats_.rows;
    InitWeights(tier_.sign(slot), weights);
    if (weights_.packed()) weights_.Encode(weights, body);
    optimizer_.InitState(state);
  } else if (weights_.packed()) {
    weights_.Decode(body, weights);
  }
  for (uint32_t d = 0; d < dim_; ++d) scaled_[d] = gradient[d] / divisor_;
  const uint32_t t = optimizer_.uses_updates() ? tier_.UpdatesOf(slot) + 1 : 1;
  if (optimizer_.Update(weights, state, scaled_.data(), t, rate_)) {
    tier_.AddUpdate(slot);
    if (weights_.packed()) weights_.EncodeByChance(tier_.sign(slot), step, weights, body);
  } else {
    ++stats_.rows_non_finite;
  }
}

// --- Places and reads -----------------------------------------------------------------------------------------------

uint32_t TieredTable::NewPlace(Sign sign, uint64_t state) {
  const uint32_t slot = tier_.Insert(sign);
  RowHead* head = tier_.head(slot);
  head->Set(state);
  tier_.Touch(head);
  ++places_;
  ++placed_;
  return slot;
}

void TieredTable::ReadWanted(size_t batch, bool prefetch) {
  std::sort(wanted_.begin(), wanted_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (size_t begin = 0; begin < wanted_.size(); begin += batch) {
    auto fetch = std::make_unique<Fetch>();
    fetch->prefetch = prefetch;
    const uint32_t number = static_cast<uint32_t>(first_read_ + reads_.size());
    for (size_t i = begin; i < std::min(begin + batch, wanted_.size()); ++i) {
      const auto& [key, place] = wanted_[i];
      fetch->keys.push_back(key);
      fetch->places.push_back(place);
      if (place.slot != MemoryTier::kNone) tier_.head(place.slot)->set_last_step(number);
    }
    reads_.push_back(std::move(fetch));
    io_->Read(reads_.back().get(), !prefetch);
  }
  wanted_.clear();
}

void TieredTable::WaitForReads(uint64_t first, absl::Span<const Sign> signs) {
  // Numbers are kept in 32 bits; no more reads than that are ever under way.
  const auto wait = [&](uint32_t number) {
    const uint32_t at = number - static_cast<uint32_t>(first_read_);
    if (at < reads_.size()) io_->WaitFor(reads_[at]->done);
  };
  for (uint64_t number = first; number < first_read_ + reads_.size(); ++number) wait(static_cast<uint32_t>(number));
  for (const uint32_t i : misses_) {
    const uint32_t slot = tier_.Find(signs[i]);
    if (slot == MemoryTier::kNone) continue;
    const RowHead& head = *tier_.head(slot);
    if (head.Has(kRowLoading)) wait(head.last_step());
  }
}

template <typename Absent>
void TieredTable::TakeOutAbsent(absl::Span<const Sign> signs, const Absent& absent) {
  constexpr size_t kAhead = 16;
  size_t kept = 0;
  for (size_t j = 0; j < misses_.size(); ++j) {
    if (j + kAhead < misses_.size() && stored_whole_) stored_.Prefetch(signs[misses_[j + kAhead]]);
    if (MayBeStored(signs[misses_[j]])) {
      misses_[kept++] = misses_[j];
    } else {
      absent(misses_[j]);
    }
  }
  misses_.resize(kept);
}

absl::Status TieredTable::Land() {
  if (!reads_.empty()) HEARTH_RETURN_IF_ERROR(LandReads());
  return writes_.empty() ? absl::OkStatus() : LandWrites();
}

absl::Status TieredTable::LandReads() {
  for (const auto& fetch : reads_) {
    if (fetch->landed || !fetch->done.load(std::memory_order_acquire)) continue;
    HEARTH_RETURN_IF_ERROR(LandRead(fetch.get()));
    fetch->landed = true;
  }
  while (!reads_.empty() && reads_.front()->landed) {
    reads_.pop_front();
    ++first_read_;
  }
  return absl::OkStatus();
}

absl::Status TieredTable::LandRead(Fetch* fetch) {
  HEARTH_RETURN_IF_ERROR(fetch->status);
  for (size_t i = 0; i < fetch->places.size(); ++i) {
    const uint32_t slot = fetch->places[i].slot;
    if (slot == MemoryTier::kNone) continue;
    RowHead* head = tier_.head(slot);
    RowMeta stored;
    if (fetch->values.found(i)) {
      HEARTH_RETURN_IF_ERROR(DecodeMeta(tier_.sign(slot), fetch->values[i], words_, &stored));
    }
    head->Unset(kRowLoading);
    if (!fetch->values.found(i) || IsExpired(stored, expiry_.HorizonAt(applied_step_))) {
      head->Set(kRowAbsent);
      head->set_last_step(0);
      continue;
    }
    SetRecord(slot, stored, fetch->values[i]);
    if (fetch->prefetch) head->Set(kRowPrefetched);
    --places_;
    if (fetch->prefetch) ++stats_.rows_prefetched;
  }
  return absl::OkStatus();
}

absl::Status TieredTable::Prefetch(uint64_t step, absl::Span<const Sign> signs) {
  HEARTH_RETURN_IF_ERROR(Land());
  if (!maybe_in_store_) return absl::OkStatus();
  misses_.clear();
  tier_.ForEach(signs, sizeof(RowMeta), [&](size_t i, uint32_t slot) {
    if (slot == MemoryTier::kNone) {
      misses_.push_back(static_cast<uint32_t>(i));
    } else {
      tier_.Touch(tier_.head(slot), step);
    }
  });
  TakeOutAbsent(signs, [](size_t) {});
  HEARTH_ASSIGN_OR_RETURN(const uint64_t room, MakeRoom(misses_.size()));
  if (misses_.size() > room) misses_.resize(room);
  for (const uint32_t i : misses_) {
    const uint32_t slot = NewPlace(signs[i], kRowLoading);
    tier_.Touch(tier_.head(slot), step);
    Want(signs[i], slot, i);
  }
  ReadWanted(read_batch_, true);
  return LandReads();
}

// --- Writes ---------------------------------------------------------------------------------------------------------

absl::string_view TieredTable::RecordOf(uint32_t slot) {
  const RowMeta meta = tier_.meta(slot);
  std::memcpy(record_.data(), &meta, sizeof(meta));
  if (!IsAdmitted(meta)) return {record_.data(), sizeof(meta)};
  std::memcpy(record_.data() + sizeof(meta), tier_.body(slot), words_ * sizeof(float));
  return record_;
}

// The newest version of a dirty row goes to the writer: it is clean, and stays until it has landed.
uint64_t TieredTable::HandOver(Spill* spill, uint32_t slot) {
  RowHead* head = tier_.head(slot);
  const Sign sign = tier_.sign(slot);
  const absl::string_view record = RecordOf(slot);
  const uint64_t hash = RecordHash(sign, record);
  sums_.Add(record_meta(), hash);
  spill->Add(KeyOf(sign, shards_), slot, record);
  stored_.Add(sign);
  head->Unset(kRowDirty | kRowDirtyEra);
  head->BeginFlight();
  return hash;
}

std::unique_ptr<Spill> TieredTable::NewSpill() {
  if (spare_.empty()) return std::make_unique<Spill>();
  std::unique_ptr<Spill> spill = std::move(spare_.back());
  spare_.pop_back();
  return spill;
}

void TieredTable::SubmitSpill() {
  if (spill_ == nullptr) return;
  writes_.push_back(std::move(spill_));
  io_->Write(writes_.back().get());
}

absl::Status TieredTable::LandWrites() {
  while (!writes_.empty() && writes_.front()->done.load(std::memory_order_acquire)) {
    const Spill& spill = *writes_.front();
    HEARTH_RETURN_IF_ERROR(spill.status);
    constexpr size_t kAhead = 16;
    for (size_t i = 0; i < spill.items.size(); ++i) {
      const auto ahead = [&](size_t at) {
        return at < spill.items.size() && spill.items[at].slot != MemoryTier::kNone ? &spill.items[at] : nullptr;
      };
      if (const auto* item = ahead(i + 2 * kAhead)) tier_.PrefetchRow(item->slot, sizeof(RowMeta));
      if (const auto* item = ahead(i + kAhead)) tier_.PrefetchPlace(item->slot);
      const StoreWrite::Item& item = spill.items[i];
      if (item.slot == MemoryTier::kNone) continue;
      RowHead* head = tier_.head(item.slot);
      head->EndFlight();
      if (!spill.leave) continue;
      --leaving_;
      if (head->Has(kRowDirty | kRowInFlight)) continue;  // it changed meanwhile
      if (!spill.forced && tier_.InUse(*head)) continue;
      Remove(item.slot);
      ++stats_.rows_spilled;
      left_memory_ = maybe_in_store_ = true;
    }
    if (spare_.size() < kWritesAheadMax) {
      spare_.push_back(std::move(writes_.front()));
      spare_.back()->Clear();
    }
    writes_.pop_front();
  }
  return absl::OkStatus();
}

absl::Status TieredTable::WaitForWrites() {
  SubmitSpill();
  while (!writes_.empty()) HEARTH_RETURN_IF_ERROR(LandOldestWrite());
  return absl::OkStatus();
}

// --- Tiers ----------------------------------------------------------------------------------------------------------

void TieredTable::Remove(uint32_t slot) {
  if (tier_.head(slot)->Has(kRowAbsent)) --places_;
  tier_.Remove(slot);
}

absl::StatusOr<uint64_t> TieredTable::MakeRoom(uint64_t wanted) {
  if (Free() < wanted) {
    // What is leaving gives room before long; handing over more would not give it sooner.
    const uint64_t missing = wanted - Free() - std::min(wanted - Free(), leaving_);
    HEARTH_RETURN_IF_ERROR(Evict(missing, LooksFor(missing), false).status());
    if (own_io_ != nullptr) {  // what is written is written at once
      SubmitSpill();
      HEARTH_RETURN_IF_ERROR(LandWrites());
    }
  }
  const uint64_t room = std::min(wanted, Free());
  HEARTH_RETURN_IF_ERROR(tier_.Reserve(room));
  return room;
}

absl::StatusOr<uint64_t> TieredTable::Evict(uint64_t wanted, uint64_t looks_max, bool forced) {
  if (wanted == 0) return 0;
  HEARTH_RETURN_IF_ERROR(stored_.Reserve(wanted));
  // While a cut is under way nothing but the cut is written; and nothing more while the writer is far behind.
  const bool clean_only = cutting_ || (writes_.size() >= kWritesAheadMax && !forced);
  tier_.ChooseLeaving(
      config_.score(), wanted, looks_max,
      [&](const RowHead& head) { return (forced || !tier_.InUse(head)) && !(clean_only && head.Has(kRowDirty)); },
      &chosen_);
  for (size_t i = 0; i < chosen_.size(); ++i) {
    AheadOfHandOver(chosen_, i);
    const uint32_t slot = chosen_[i];
    const RowHead& head = *tier_.head(slot);
    if (head.Has(kRowAbsent)) {
      Remove(slot);
    } else if (IsGone(head, expiry_.HorizonAt(applied_step_))) {
      RemoveExpired(slot);
    } else {
      maybe_in_store_ = true;
      if (head.Has(kRowDirty)) {
        if (spill_ == nullptr) spill_ = NewSpill();
        spill_->leave = true;
        spill_->forced |= forced;
        HandOver(spill_.get(), slot);
        ++leaving_;
        if (IsFull(*spill_)) SubmitSpill();
      } else {
        Remove(slot);
        ++stats_.rows_spilled;
        left_memory_ = true;
      }
    }
  }
  return chosen_.size();
}

// After a step: some rows begin to leave where memory is nearly full. What is beyond memory_rows_max leaves even where
// it is still in use, and half way to the capacity it is waited for.
absl::Status TieredTable::KeepWithinBounds() {
  HEARTH_RETURN_IF_ERROR(SpillDown(std::max(kSpillSliceRowsMax, 2 * placed_a_step_), false));
  if (tier_.rows() > HighWater()) SubmitSpill();
  HEARTH_RETURN_IF_ERROR(LandWrites());
  while (tier_.rows() - leaving_ > memory_rows_max_) {
    const uint64_t above = tier_.rows() - leaving_ - memory_rows_max_;
    HEARTH_ASSIGN_OR_RETURN(const uint64_t evicted, Evict(above, LooksFor(above), true));
    SubmitSpill();
    HEARTH_RETURN_IF_ERROR(LandWrites());
    if (evicted == 0) break;
  }
  // While a cut is under way waiting gives no room: HasRoomFor is asked then.
  if (cutting_ || tier_.rows() <= memory_rows_max_ + (capacity_ - memory_rows_max_) / 2) return absl::OkStatus();
  return WaitForWrites();
}

// From the high to the low watermark, at most rows_max of the way.
absl::Status TieredTable::SpillDown(uint64_t rows_max, bool bounded_looks) {
  if (tier_.rows() - leaving_ > HighWater()) spilling_ = true;
  if (!spilling_) return absl::OkStatus();
  const uint64_t staying = tier_.rows() - leaving_;
  const uint64_t wanted = staying > LowWater() ? std::min(staying - LowWater(), rows_max) : 0;
  HEARTH_ASSIGN_OR_RETURN(const uint64_t evicted, Evict(wanted, bounded_looks ? rows_max : LooksFor(wanted), false));
  spilling_ = evicted > 0 && tier_.rows() - leaving_ > LowWater();
  if (!spilling_) SubmitSpill();
  return LandWrites();
}

// Rows of the last slots go to free ones before them. What is under way knows its slot and is waited for.
absl::Status TieredTable::GiveBackMemory(uint64_t rows_max) {
  HEARTH_CHECK(!cutting_);
  spare_.clear();
  HEARTH_RETURN_IF_ERROR(dirty_.Reserve(tier_.slots()));
  tier_.Trim();
  for (uint64_t look = 0; look < rows_max && tier_.rows() < tier_.slots(); ++look) {
    const uint32_t slot = static_cast<uint32_t>(tier_.slots() - 1);
    if (tier_.head(slot)->Has(kRowLoading | kRowInFlight)) break;
    const bool dirty = dirty_.Has(slot);
    const uint32_t to = tier_.MoveDown(slot);
    if (dirty) dirty_.Add(to);
    dirty_.Remove(slot);
    tier_.Trim();
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> TieredTable::Maintain(uint64_t step, uint64_t rows_max) {
  HEARTH_RETURN_IF_ERROR(Land());
  // Only what has expired by an applied step is gone for every later pull and push.
  if (!expire_sweeping_ && expiry_.HorizonAt(std::min(step, applied_step_)) >= expire_sweep_due_) {
    expire_sweeping_ = true;
    expire_sweep_due_ = expiry_.QuarterAfter(applied_step_);
  }
  if (expire_sweeping_) SweepExpired(rows_max);
  if (filling_) HEARTH_RETURN_IF_ERROR(FillFromStore(rows_max));
  HEARTH_RETURN_IF_ERROR(SpillDown(rows_max, true));
  return spilling_ || expire_sweeping_ || filling_;
}

void TieredTable::SweepExpired(uint64_t looks_max) {
  for (uint64_t look = 0; look < looks_max && expire_hand_ < tier_.slots(); ++look, ++expire_hand_) {
    const RowHead& head = *tier_.head(expire_hand_);
    if (head.Only(kRowIsThere | kRowLoading | kRowAbsent | kRowInFlight) != kRowIsThere || OfCut(head)) continue;
    if (IsGone(head, expiry_.HorizonAt(applied_step_))) RemoveExpired(expire_hand_);
  }
  if (expire_hand_ >= tier_.slots()) {
    expire_hand_ = 0;
    expire_sweeping_ = false;
  }
}

// Goes through the store of a table that was restored: notes which signs it has, and brings rows into memory as far as
// they fit, and until the first has to leave.
absl::Status TieredTable::FillFromStore(uint64_t rows_max) {
  uint64_t looks = 0;
  absl::Status status = stored_.Reserve(rows_max);
  HEARTH_RETURN_IF_ERROR(status);
  while (fill_shard_ < shards_ && looks < rows_max) {
    const KvRange records = RecordsOf(number_, fill_shard_);
    bool whole = true;
    const KvKey first = std::max(records.first, KvKey{fill_shard_, fill_sign_});
    HEARTH_RETURN_IF_ERROR(io_->store()->Scan(first, records.last, [&](KvKey key, absl::string_view value) {
      if (looks == rows_max) {
        fill_sign_ = key.sign;
        whole = false;
        return false;
      }
      ++looks;
      stored_.Add(key.sign);
      if (tier_.Find(key.sign) != MemoryTier::kNone) return true;  // what is there is as new, or newer
      if (left_memory_ || tier_.rows() >= LowWater()) {
        left_memory_ = true;
        return true;
      }
      RowMeta meta;
      status = DecodeMeta(key.sign, value, words_, &meta);
      if (status.ok() && IsExpired(meta, expiry_.HorizonAt(applied_step_))) return true;
      if (status.ok()) status = tier_.Reserve(1);
      if (!status.ok()) return false;
      const uint32_t slot = tier_.Insert(key.sign);
      SetRecord(slot, meta, value);
      tier_.TouchUnused(tier_.head(slot));
      return true;
    }));
    HEARTH_RETURN_IF_ERROR(status);
    if (!whole) break;
    ++looks;  // a logical shard that is another server's costs a look, too
    ++fill_shard_;
    fill_sign_ = 0;
  }
  filling_ = fill_shard_ < shards_;
  if (filling_) return absl::OkStatus();
  stored_whole_ = true;
  // What is on its way out is in memory still, and will not be.
  if (!left_memory_ && leaving_ == 0 && reads_.empty()) maybe_in_store_ = false;
  return absl::OkStatus();
}

// --- Cut ------------------------------------------------------------------------------------------------------------

absl::Status TieredTable::BeginCut(uint64_t step) {
  HEARTH_CHECK(!cutting_ && step >= applied_step_, "cut of step ", step, " after ", applied_step_);
  HEARTH_RETURN_IF_ERROR(Land());
  SubmitSpill();
  applied_step_ = cut_step_ = step;
  cut_horizon_ = expiry_.HorizonAt(step);
  cut_clock_ = expiry_.clock();
  const uint64_t expired = sums_.DropExpired(cut_horizon_);
  stats_.rows_expired += expired;
  stats_.rows -= std::min(stats_.rows, expired);
  cut_sums_ = sums_;
  cut_filters_hash_ = 0;
  cut_chunk_ = NewSpill();
  for (const auto& filter : filters_) {
    if (filter == nullptr) continue;
    cut_filters_hash_ += filter->Hash(expiry_.GenerationAt(step));
    filter->Save(expiry_.GenerationAt(step),
                 [this](KvKey key, absl::string_view value) { cut_chunk_->Add(key, MemoryTier::kNone, value); });
    if (cut_chunk_->bytes.size() < kWriteBytesMax) continue;
    SubmitCutChunk();
    while (CutWaits()) HEARTH_RETURN_IF_ERROR(LandOldestWrite());
  }
  std::swap(cut_slots_, dirty_);
  cut_chunk_->bytes.reserve(std::min(kWriteBytesMax, cut_slots_.size() * row_bytes_) + window_ * row_bytes_);
  era_ ^= kRowDirtyEra;
  cutting_ = true;
  cut_copied_ = false;
  return absl::OkStatus();
}

absl::StatusOr<bool> TieredTable::ContinueCut(uint64_t rows_max, bool wait) {
  HEARTH_CHECK(cutting_, "no cut is under way");
  HEARTH_RETURN_IF_ERROR(Land());
  if (cut_copied_) return false;
  while (CutWaits()) {
    if (!wait) return true;
    HEARTH_RETURN_IF_ERROR(LandOldestWrite());
  }
  cut_slots_.TakeFirst(rows_max, &chosen_);
  HEARTH_RETURN_IF_ERROR(stored_.Reserve(chosen_.size()));
  for (size_t i = 0; i < chosen_.size(); ++i) {
    AheadOfHandOver(chosen_, i);
    const uint32_t slot = chosen_[i];
    if (tier_.head(slot)->Has(kRowIsThere) && OfCut(*tier_.head(slot))) CopyForCut(slot, false);
  }
  if (cut_slots_.size() > 0) return true;
  cut_chunk_->Add(SumsKey(number_), MemoryTier::kNone, cut_sums_.Encode(cut_step_, words_));
  SubmitCutChunk();
  cut_copied_ = true;
  HEARTH_RETURN_IF_ERROR(LandWrites());
  return false;
}

// A row that is dirty since before the cut goes to it as it was then: it has not changed since. `changing`: it is about
// to, so it stays dirty.
void TieredTable::CopyForCut(uint32_t slot, bool changing) {
  RowHead* head = tier_.head(slot);
  const Sign sign = tier_.sign(slot);
  if (IsGone(*head, cut_horizon_)) {  // nothing needs to be written for that
    CountExpired(*head);
    if (!changing) head->Unset(kRowDirty | kRowDirtyEra);
    return;
  }
  if (changing) {
    const absl::string_view record = RecordOf(slot);
    cut_sums_.Add(record_meta(), RecordHash(sign, record));
    cut_chunk_->Add(KeyOf(sign, shards_), MemoryTier::kNone, record);
    stored_.Add(sign);
  } else {
    const uint64_t hash = HandOver(cut_chunk_.get(), slot);
    cut_sums_.Add(record_meta(), hash);
  }
  if (IsFull(*cut_chunk_)) SubmitCutChunk();
}

void TieredTable::SubmitCutChunk() {
  writes_.push_back(std::move(cut_chunk_));
  cut_chunk_ = NewSpill();
  io_->Write(writes_.back().get());
}

TableCut TieredTable::EndCut() {
  HEARTH_CHECK(cutting_ && cut_copied_, "the cut is not copied");
  cutting_ = false;
  cut_chunk_.reset();
  capacity_ = CapacityFor(memory_rows_max_);
  return {cut_step_, cut_sums_.hash() + cut_filters_hash_, cut_sums_.rows(), cut_clock_};
}

// --- Restore --------------------------------------------------------------------------------------------------------

absl::Status TieredTable::Restore(uint64_t saved_step, const LogClock& clock) {
  HEARTH_RETURN_IF_ERROR(Expiry::Check(clock));
  HEARTH_RETURN_IF_ERROR(tier_.Open());
  for (SlotSet* set : {&dirty_, &cut_slots_}) HEARTH_RETURN_IF_ERROR(set->Open(capacity_max_));
  KvValues values;
  HEARTH_RETURN_IF_ERROR(io_->store()->MultiGet({SumsKey(number_)}, &values));
  for (uint32_t shard = 0; shard < filters_.size(); ++shard) {
    HEARTH_ASSIGN_OR_RETURN(filters_[shard],
                            CountingFilter::Load(config_, number_, shard, saved_step, clock, io_->store()));
  }
  if (!values.found(0)) return ScanRecords(0);
  RowSums kept(expiry_.rule(), expiry_.Marks());
  uint64_t step = 0, words = 0;
  HEARTH_RETURN_IF_ERROR(kept.Decode(values[0], &step, &words));
  if (words != words_) {
    return absl::DataLossError(absl::StrCat("its rows have ", words, " words of weights and state, this job's have ",
                                            words_, "; the store is another job's"));
  }
  // Another rule of expiry may not bring rows back that the old one let go.
  if (kept.rule() != expiry_.rule()) return ScanRecords(Expiry(kept.rule(), clock).HorizonAt(step));
  sums_ = kept;
  cut_step_ = applied_step_ = step;
  cut_horizon_ = expiry_.HorizonAt(step);
  tier_.SetNow(step);
  stats_.rows = sums_.rows();
  maybe_in_store_ = filling_ = sums_.records() > 0;
  stored_whole_ = !filling_;
  return absl::OkStatus();
}

// Sums over what the store holds, for one that no cut of this server left: of an earlier version, dealt to other
// servers, or of another rule of expiry, by which some is deleted first.
absl::Status TieredTable::ScanRecords(uint64_t kept_horizon) {
  absl::Status status;
  std::vector<KvWrite> removes;
  for (uint32_t shard = 0; shard < shards_ && status.ok(); ++shard) {
    const KvRange records = RecordsOf(number_, shard);
    HEARTH_RETURN_IF_ERROR(io_->store()->Scan(records.first, records.last, [&](KvKey key, absl::string_view value) {
      RowMeta meta;
      status = DecodeMeta(key.sign, value, words_, &meta);
      if (!status.ok()) return false;
      if (IsExpired(meta, kept_horizon)) {
        removes.push_back({key, {}, true});
        return true;
      }
      sums_.Add(meta, RecordHash(key.sign, value));
      return true;
    }));
    if (status.ok()) status = io_->store()->Write(removes);
    removes.clear();
  }
  stats_.rows = sums_.rows();
  maybe_in_store_ = filling_ = sums_.records() > 0;
  stored_whole_ = !filling_;
  return status;
}

EmbeddingTableStats TieredTable::stats() const {
  EmbeddingTableStats stats = stats_;
  stats.rows_in_memory = tier_.rows() - places_;
  stats.slots_in_use = tier_.rows();
  stats.bytes_memory = tier_.bytes() + dirty_.bytes() + cut_slots_.bytes() + stored_.bytes();
  for (const auto& filter : filters_) stats.bytes_memory += filter != nullptr ? filter->bytes() : 0;
  const auto bytes_of = [](const std::unique_ptr<Spill>& spill) -> uint64_t {
    if (spill == nullptr) return 0;
    return spill->bytes.capacity() + spill->items.capacity() * sizeof(StoreWrite::Item);
  };
  stats.bytes_free = tier_.bytes_free();
  for (const auto& spill : spare_) stats.bytes_free += bytes_of(spill);
  stats.bytes_memory += stats.bytes_free - tier_.bytes_free() + bytes_of(spill_) + bytes_of(cut_chunk_);
  for (const auto& spill : writes_) stats.bytes_memory += bytes_of(spill);
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

TableMemory EmbeddingTable::MemoryFor(const TableOptions& options, uint64_t rows, uint64_t changed,
                                      uint32_t filter_shards) {
  const uint32_t dim = options.config.dim();
  const uint64_t row_bytes = RowBytesOf(options.config);
  const Admission& admission = options.config.admission();
  TableMemory memory;
  memory.rows_in_memory = std::min(rows, HighWaterFor(options.memory_rows_max, 0));
  memory.filter_bytes = SignFilter::BytesFor(rows, options.memory_rows_max);
  if (admission.counter() == Admission::BLOOM && admission.count_min() > 1) {
    const uint64_t generations = Expiry(ExpiryRule::Of(options.config)).generations();
    memory.filter_bytes += filter_shards * generations * CountingBloom::BytesFor(admission);
  }
  // A cut's writes: those under way and the one that is filled, whose memory is kept. The first has a window more, and
  // at least twice what the cut before any step had.
  const uint64_t window_bytes = std::clamp<uint64_t>(kWindowBytes / (dim * sizeof(float)), 1, kWindowMax) * row_bytes;
  const uint64_t chunk_rows = std::min<uint64_t>(kWriteBytesMax / row_bytes + 1, kWriteRowsMax);
  const uint64_t full = std::min<uint64_t>(changed / chunk_rows, kWritesAheadMax + 1);
  const uint64_t rest = full > kWritesAheadMax ? 0 : changed % chunk_rows;
  const auto items_bytes = [](uint64_t rows) {  // as a vector grows
    uint64_t items = 1;
    while (items < rows) items *= 2;
    return items * sizeof(StoreWrite::Item);
  };
  memory.write_bytes = std::max((full * chunk_rows + rest) * row_bytes, window_bytes) + window_bytes +
                       full * items_bytes(chunk_rows) + items_bytes(rest);
  memory.bytes =
      RowArena::BytesFor(memory.rows_in_memory, row_bytes) +
      RowIndex::BytesFor(memory.rows_in_memory, options.memory_rows_max, CapacityFor(options.memory_rows_max)) +
      2 * SlotSet::BytesFor(memory.rows_in_memory) + memory.filter_bytes + memory.write_bytes;
  return memory;
}

absl::StatusOr<uint64_t> EmbeddingTable::Snapshot(uint64_t step) {
  HEARTH_RETURN_IF_ERROR(BeginCut(step));
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(const bool more, ContinueCut(kCutSliceRows, /*wait=*/true));
    if (!more) break;
  }
  HEARTH_RETURN_IF_ERROR(WaitForWrites());
  return EndCut().hash;
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> EmbeddingTable::Open(const TableOptions& options, StoreIo* io) {
  HEARTH_RETURN_IF_ERROR(CheckOptions(options));
  auto table = std::make_unique<TieredTable>(options, nullptr, io);
  HEARTH_RETURN_IF_ERROR(table->Restore(options.step, options.clock));
  return table;
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> EmbeddingTable::Open(const TableOptions& options, KvStore* store) {
  HEARTH_RETURN_IF_ERROR(CheckOptions(options));
  auto io = std::make_unique<StoreIo>(Env::Real(), store, 0);
  StoreIo* const borrowed = io.get();
  auto table = std::make_unique<TieredTable>(options, std::move(io), borrowed);
  HEARTH_RETURN_IF_ERROR(table->Restore(options.step, options.clock));
  return table;
}

}  // namespace hearth
