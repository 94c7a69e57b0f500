// Seam 2: holds opaque values by (logical shard, sign), durably from Checkpoint to Checkpoint, with a point-in-time
// copy. Between checkpoints nothing is promised across a crash: the snapshot is the unit of durability.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "embedding/sign.h"

namespace hearth {

// Ordered by (shard, sign). Stored as 4 bytes shard then 8 bytes sign, both big-endian, so a shard moves as a range.
// Signs below 2^52 are free for the tables' own bookkeeping, see row_record.h.
struct KvKey {
  uint32_t shard = 0;
  uint64_t sign = 0;
  bool operator<(const KvKey& o) const { return shard != o.shard ? shard < o.shard : sign < o.sign; }
  bool operator==(const KvKey& o) const { return shard == o.shard && sign == o.sign; }
};

struct KvWrite {
  KvKey key;
  absl::string_view value;  // ignored when `remove`
  bool remove = false;
};

// What MultiGet found, in one piece of memory.
class KvValues {
 public:
  void Reset(size_t count) {
    bytes_.clear();
    places_.assign(count, Place());
  }
  // Once for each i at most. What `operator[]` gave before is no longer valid.
  void Set(size_t i, absl::string_view value) {
    places_[i] = {bytes_.size(), value.size(), true};
    bytes_.append(value.data(), value.size());
  }
  size_t size() const { return places_.size(); }
  bool found(size_t i) const { return places_[i].found; }
  absl::string_view operator[](size_t i) const { return {bytes_.data() + places_[i].begin, places_[i].bytes}; }

 private:
  struct Place {
    size_t begin = 0;
    size_t bytes = 0;
    bool found = false;
  };
  std::string bytes_;
  std::vector<Place> places_;
};

// Any number of threads may read (MultiGet, Scan, DiskBytes) while one does the rest. Five virtuals, two
// implementations (RocksDbStore, MapStore) under one conformance suite.
class KvStore {
 public:
  virtual ~KvStore() = default;
  // values[i] is the value of keys[i], as of some moment of the call. Fastest with keys that ascend.
  virtual absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) = 0;
  // Applies all of a batch or, on error, an unspecified part that no Checkpoint will contain half of. ResourceExhausted
  // when the disk is full or the cap is reached: the store stays readable. Fastest with many keys that ascend.
  virtual absl::Status Write(absl::Span<const KvWrite> writes) = 0;
  // Visits keys in [first, last) in order as of now; `visit` returns false to stop. Writing meanwhile is allowed and
  // not seen.
  virtual absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) = 0;
  // A point-in-time copy of everything written so far in the new folder `path`, by hard links where the file system
  // allows.
  virtual absl::Status Checkpoint(const std::string& path) = 0;
  virtual uint64_t DiskBytes() = 0;
};

}  // namespace hearth
