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
// Sign 0 of a shard is free for the tables' own bookkeeping (counting filters), see embedding_table.h.
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

// One thread at a time. Five virtuals, two implementations (RocksDbStore, MapStore) under one conformance suite.
class KvStore {
 public:
  virtual ~KvStore() = default;
  // values->at(i) is the value of keys[i]; found->at(i) says whether there is one. Keys in any order.
  virtual absl::Status MultiGet(absl::Span<const KvKey> keys, std::vector<std::string>* values,
                                std::vector<bool>* found) = 0;
  // Applies all of a batch or, on error, an unspecified part that no Checkpoint will contain half of. ResourceExhausted
  // when the disk is full or the cap is reached: the store stays readable.
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
