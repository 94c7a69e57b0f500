// A logical shard's counting filter of a table (admission by BLOOM). It forgets in step with the rows that expire.
// docs/PROTOCOL.md §4, "Counters".
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/proto/job.pb.h"
#include "embedding/kv_store.h"
#include "embedding/lifecycle.h"
#include "embedding/sign.h"

namespace hearth {

// Occurrences count into the generation of their step, which is step / expire_after_steps. At a step two generations
// count, its own and the one before; earlier ones are zero. So an occurrence counts for expire_after_steps steps at
// least, as long as a row would live, and for less than twice as many. Without expiry all is one generation.
//
// Every answer is given for a step, from the occurrences alone: when a generation that has passed is let go shows in
// none.
class CountingFilter {
 public:
  // REQUIRES: admission and expiry as FaultsOf allows.
  CountingFilter(const Table& config, TableNumber table, uint32_t shard);
  // What the store holds of it, as of `step`; null where that is nothing. What was counted by another
  // expire_after_steps counts as if all of it had been seen at `step`; the store loses the bytes of that rule, and Save
  // writes the new ones. DataLoss where they are not of such a filter at `step`.
  static absl::StatusOr<std::unique_ptr<CountingFilter>> Load(const Table& config, TableNumber table, uint32_t shard,
                                                              uint64_t step, KvStore* store);

  // Of what was counted before.
  uint32_t Estimate(uint64_t step, Sign sign) const;
  // REQUIRES: steps do not descend.
  void Add(uint64_t step, Sign sign, uint32_t occurrences);

  // Its share of the model hash of `step` (docs/FORMATS.md "Model hash").
  uint64_t Hash(uint64_t step) const;
  // What changed since the last Save, for the store. What does not count at `step` is let go.
  void Save(uint64_t step, const std::function<void(KvKey, absl::string_view value)>& write);
  uint64_t bytes() const;

 private:
  struct Generation {
    uint32_t number = 0;
    std::unique_ptr<CountingBloom> counts;  // made when first counted in
  };

  bool Counts(const Generation& generation, uint64_t step) const;
  // Of the generation; made in the place of the last but one, which no later step asks for.
  CountingBloom* CountsOf(uint32_t number);

  Admission admission_;
  uint32_t expire_after_steps_;
  TableNumber table_;
  uint32_t shard_;
  std::array<Generation, 2> generations_;  // by number mod 2
};

}  // namespace hearth
