// The model hash's share of a table's rows, kept while they change, so that a cut need not read them
// (docs/FORMATS.md "Model hash").
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "embedding/embedding_table.h"
#include "embedding/expiry.h"

namespace hearth {

// Sums of hashes and numbers of admitted rows by the step that touched them last: what has expired drops out whole. By
// time (expire_after_hours) there is one from each mark to the next, without expiry one in all. Copyable. One thread.
class RowSums {
 public:
  explicit RowSums(ExpiryRule rule, std::vector<uint64_t> marks = {}) : rule_(rule), marks_(std::move(marks)) {}

  // A record with `hash` (RecordHash) is there, or there no more.
  void Add(const RowMeta& meta, uint64_t hash) { Change(meta, hash, 1); }
  void Remove(const RowMeta& meta, uint64_t hash) { Change(meta, 0 - hash, -1); }
  // What is touched from now on is touched from `step` on (Expiry::Tick set a mark before it). REQUIRES: marks ascend.
  void Mark(uint64_t step) { marks_.push_back(step); }
  // Drops what is expired by the horizon, by time one of the marks; returns how many rows that were.
  uint64_t DropExpired(uint64_t horizon);

  uint64_t hash() const;     // mod 2^64
  uint64_t rows() const;     // admitted ones
  uint64_t records() const;  // counters of signs without a row, too

  // As a value of the store: the sums after `step`, of records of `words` weights and state.
  std::string Encode(uint64_t step, uint64_t words) const;
  // DataLoss where it is not what Encode made. They are of the rule of expiry that they were kept by, not of this
  // one's; the marks stay.
  absl::Status Decode(absl::string_view bytes, uint64_t* step, uint64_t* words);
  const ExpiryRule& rule() const { return rule_; }

 private:
  struct Sum {
    uint64_t hash = 0;
    int64_t rows = 0;
    int64_t records = 0;
  };

  void Change(const RowMeta& meta, uint64_t hash, int64_t records);
  // The first step whose records are summed with those of last_step: expired before a horizon as a whole, or not at
  // all.
  uint32_t FirstOf(uint32_t last_step) const;

  ExpiryRule rule_;
  std::vector<uint64_t> marks_;  // by time; none before what was dropped
  absl::flat_hash_map<uint32_t, Sum> by_step_;
};

}  // namespace hearth
