#include "embedding/row_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;
constexpr uint64_t kCommitStepBytesMax = uint64_t{8} << 20;

uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

absl::Status MemoryError(absl::string_view what, uint64_t bytes) {
  return absl::ResourceExhaustedError(absl::StrCat("memory tier: ", what, " ", bytes, " bytes: ", std::strerror(errno),
                                                   "; lower the tables' memory_rows_max or raise the process's limit"));
}

}  // namespace

Region::~Region() {
  if (data_ != nullptr) munmap(data_, reserved_bytes_);
}

Region::Region(Region&& other) noexcept { *this = std::move(other); }

Region& Region::operator=(Region&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(reserved_bytes_, other.reserved_bytes_);
  std::swap(committed_bytes_, other.committed_bytes_);
  return *this;
}

absl::Status Region::Reserve(uint64_t bytes_max) {
  const bool huge = bytes_max >= kHugePageBytes;
  const uint64_t unit = huge ? kHugePageBytes : kPageBytes;
  const uint64_t bytes = RoundUp(std::max<uint64_t>(bytes_max, 1), unit);
  // A huge page must begin at a multiple of its size; mmap promises a small page's only. What is over is given back.
  const uint64_t wanted = huge ? bytes + kHugePageBytes : bytes;
  void* address = mmap(nullptr, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return MemoryError("cannot reserve", wanted);
  char* begin = static_cast<char*>(address);
  char* aligned = reinterpret_cast<char*>(RoundUp(reinterpret_cast<uintptr_t>(begin), unit));
  if (aligned != begin) munmap(begin, aligned - begin);
  if (aligned + bytes != begin + wanted) munmap(aligned + bytes, begin + wanted - (aligned + bytes));
  data_ = aligned;
  reserved_bytes_ = bytes;
  // Advice only: without huge pages the kernel says no and everything is merely slower.
  if (huge) madvise(data_, bytes, MADV_HUGEPAGE);
  return absl::OkStatus();
}

absl::Status Region::Commit(uint64_t bytes) {
  if (bytes <= committed_bytes_) return absl::OkStatus();
  HEARTH_CHECK(bytes <= reserved_bytes_);
  const uint64_t step = std::min(std::max(committed_bytes_, kHugePageBytes), kCommitStepBytesMax);
  const uint64_t target = std::min(RoundUp(bytes, step), reserved_bytes_);
  if (mprotect(data_ + committed_bytes_, target - committed_bytes_, PROT_READ | PROT_WRITE) != 0) {
    return MemoryError("cannot take", target - committed_bytes_);
  }
  committed_bytes_ = target;
  return absl::OkStatus();
}

void Region::Trim(uint64_t bytes) {
  const uint64_t kept = RoundUp(bytes, kCommitStepBytesMax);
  if (kept + kCommitStepBytesMax > committed_bytes_) return;
  if (madvise(data_ + kept, committed_bytes_ - kept, MADV_DONTNEED) == 0) committed_bytes_ = kept;
}

absl::Status SlotSet::Reserve(uint64_t slots) {
  slots_ = std::max(slots_, slots);
  return region_.Commit(slots / 8 + sizeof(uint64_t));
}

uint32_t SlotSet::TakeFirst() {
  while (words()[hand_] == 0) ++hand_;
  const uint32_t slot = static_cast<uint32_t>(hand_ * 64 + static_cast<uint64_t>(__builtin_ctzll(words()[hand_])));
  Remove(slot);
  return slot;
}

void SlotSet::TakeFirst(uint64_t count_max, std::vector<uint32_t>* slots) {
  slots->clear();
  while (size_ > 0 && slots->size() < count_max) slots->push_back(TakeFirst());
}

absl::Status RowArena::Open(uint64_t row_bytes, uint64_t rows_max) {
  HEARTH_CHECK(rows_max >= 1 && rows_max <= 0xfffffffeull && row_bytes % alignof(RowHead) == 0);
  row_bytes_ = row_bytes;
  rows_max_ = rows_max;
  HEARTH_RETURN_IF_ERROR(released_.Open(rows_max));
  return region_.Reserve(rows_max * row_bytes_);
}

absl::Status RowArena::Reserve(uint64_t rows) {
  const uint64_t fresh = rows - std::min(rows, released_.size());
  const uint64_t slots = std::min(slots_ + fresh, rows_max_);
  if (slots <= reserved_slots_) return absl::OkStatus();
  HEARTH_RETURN_IF_ERROR(region_.Commit(slots * row_bytes_));
  HEARTH_RETURN_IF_ERROR(released_.Reserve(slots));
  reserved_slots_ = slots;
  return absl::OkStatus();
}

uint32_t RowArena::Take(Sign sign) {
  HEARTH_CHECK(released_.size() > 0 || slots_ < reserved_slots_);
  const uint32_t slot = released_.size() > 0 ? released_.TakeFirst() : slots_++;
  head(slot)->Reset(sign);
  ++rows_;
  return slot;
}

void RowArena::Release(uint32_t slot) {
  head(slot)->Clear();
  released_.Add(slot);
  --rows_;
}

void RowArena::Trim() {
  while (slots_ > 0 && !head(slots_ - 1)->Has(kRowIsThere)) released_.Remove(--slots_);
  region_.Trim(slots_ * row_bytes_);
  reserved_slots_ = std::min(reserved_slots_, region_.committed_bytes() / row_bytes_);
}

}  // namespace hearth
