// The model hash's share of a table's rows, kept while they change, so that a cut need not read them
// (docs/FORMATS.md "Model hash").
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "embedding/embedding_table.h"

namespace hearth {

// Sums of hashes and numbers of admitted rows by the step that touched them last: what has expired drops out whole.
// Without expiry there is one sum. Copyable. One thread.
class RowSums {
 public:
  explicit RowSums(uint32_t expire_after_steps) : expire_after_steps_(expire_after_steps) {}

  // A record with `hash` (RecordHash) is there, or there no more.
  void Add(const RowMeta& meta, uint64_t hash) { Change(meta, hash, 1); }
  void Remove(const RowMeta& meta, uint64_t hash) { Change(meta, 0 - hash, -1); }
  // Drops what is expired at `step`; returns how many rows that were.
  uint64_t DropExpired(uint64_t step);

  uint64_t hash() const;     // mod 2^64
  uint64_t rows() const;     // admitted ones
  uint64_t records() const;  // counters of signs without a row, too

  // As a value of the store: the sums after `step`, of records of `words` weights and state.
  std::string Encode(uint64_t step, uint64_t words) const;
  // DataLoss where it is not what Encode made. They are of the rule of expiry that they were kept by, not of this
  // one's.
  absl::Status Decode(absl::string_view bytes, uint64_t* step, uint64_t* words);
  uint32_t expire_after_steps() const { return expire_after_steps_; }

 private:
  struct Sum {
    uint64_t hash = 0;
    int64_t rows = 0;
    int64_t records = 0;
  };

  void Change(const RowMeta& meta, uint64_t hash, int64_t records);

  uint32_t expire_after_steps_;
  absl::flat_hash_map<uint32_t, Sum> by_step_;
};

}  // namespace hearth
