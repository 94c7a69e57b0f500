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

uint64_t UnitOf(uint64_t bytes_max) { return bytes_max >= kHugePageBytes ? kHugePageBytes : kPageBytes; }
// By which a region grows that has so much.
uint64_t StepOf(uint64_t committed) { return std::min(std::max(committed, kHugePageBytes), kCommitStepBytesMax); }

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
  const uint64_t unit = UnitOf(bytes_max);
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
  const uint64_t target = std::min(RoundUp(bytes, StepOf(committed_bytes_)), reserved_bytes_);
  if (mprotect(data_ + committed_bytes_, target - committed_bytes_, PROT_READ | PROT_WRITE) != 0) {
    return MemoryError("cannot take", target - committed_bytes_);
  }
  committed_bytes_ = target;
  return absl::OkStatus();
}

uint64_t Region::BytesFor(uint64_t bytes, uint64_t bytes_max) {
  uint64_t before = 0;  // the last steps before the largest
  while (StepOf(before) < std::min(bytes, kCommitStepBytesMax)) before += StepOf(before);
  return std::min(RoundUp(bytes, StepOf(before)), RoundUp(std::max<uint64_t>(bytes_max, 1), UnitOf(bytes_max)));
}

absl::Status RowArena::Open(uint64_t row_bytes, uint64_t rows_max) {
  HEARTH_CHECK(rows_max >= 1 && rows_max <= 0xfffffffeull && row_bytes >= sizeof(uint32_t));
  stride_ = StrideOf(row_bytes);
  rows_max_ = rows_max;
  return region_.Reserve(rows_max * stride_);
}

absl::Status RowArena::Reserve(uint64_t rows) {
  const uint64_t released = slots_ - rows_;
  const uint64_t fresh = rows > released ? rows - released : 0;
  const uint64_t slots = std::min(slots_ + fresh, rows_max_);
  if (slots <= reserved_slots_) return absl::OkStatus();
  HEARTH_RETURN_IF_ERROR(region_.Commit(slots * stride_));
  reserved_slots_ = slots;
  return absl::OkStatus();
}

uint32_t RowArena::Take(Sign sign) {
  uint32_t slot = released_;
  if (slot != kNoSlot) {
    released_ = *next_released(slot);
  } else {
    HEARTH_CHECK(slots_ < reserved_slots_);
    slot = slots_++;
  }
  *reinterpret_cast<Sign*>(place(slot)) = sign;
  ++rows_;
  return slot;
}

void RowArena::Release(uint32_t slot) {
  *reinterpret_cast<Sign*>(place(slot)) = 0;
  *next_released(slot) = released_;
  released_ = slot;
  --rows_;
}

void SlotSet::TakeNext(uint64_t count_max, std::vector<uint32_t>* slots) {
  slots->clear();
  const uint64_t end = size_ == 0 ? 0 : region_.committed_bytes() / sizeof(uint64_t);
  for (; hand_ < end && slots->size() < count_max; ++hand_) {
    uint64_t* const word = words() + hand_;
    for (; *word != 0 && slots->size() < count_max; *word &= *word - 1) {
      slots->push_back(static_cast<uint32_t>(hand_ * 64 + static_cast<uint64_t>(__builtin_ctzll(*word))));
    }
    if (*word != 0) break;
  }
  size_ -= slots->size();
  if (size_ == 0) hand_ = 0;
}

}  // namespace hearth
