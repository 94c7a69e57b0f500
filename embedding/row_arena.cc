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
constexpr uint64_t kCommitStepBytesMax = uint64_t{64} << 20;

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

absl::Status RowArena::Open(uint64_t row_bytes, uint64_t rows_max) {
  HEARTH_CHECK(rows_max >= 1 && rows_max <= 0xfffffffeull);
  stride_ = RoundUp(row_bytes, 16);
  rows_max_ = rows_max;
  HEARTH_RETURN_IF_ERROR(rows_region_.Reserve(rows_max * stride_));
  return signs_region_.Reserve(rows_max * sizeof(Sign));
}

absl::Status RowArena::Reserve(uint64_t rows) {
  const uint64_t fresh = rows > released_.size() ? rows - released_.size() : 0;
  const uint64_t slots = std::min(slots_ + fresh, rows_max_);
  if (slots <= reserved_slots_) return absl::OkStatus();
  HEARTH_RETURN_IF_ERROR(rows_region_.Commit(slots * stride_));
  HEARTH_RETURN_IF_ERROR(signs_region_.Commit(slots * sizeof(Sign)));
  reserved_slots_ = slots;
  return absl::OkStatus();
}

uint32_t RowArena::Take(Sign sign) {
  uint32_t slot;
  if (!released_.empty()) {
    slot = released_.back();
    released_.pop_back();
  } else {
    HEARTH_CHECK(slots_ < reserved_slots_);
    slot = slots_++;
  }
  signs()[slot] = sign;
  ++rows_;
  return slot;
}

void RowArena::Release(uint32_t slot) {
  signs()[slot] = 0;
  released_.push_back(slot);
  --rows_;
}

uint64_t RowArena::bytes() const {
  return rows_region_.committed_bytes() + signs_region_.committed_bytes() + released_.capacity() * sizeof(uint32_t);
}

}  // namespace hearth
