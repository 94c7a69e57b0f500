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
#include "embedding/expiry.h"
#include "embedding/kv_store.h"
#include "embedding/lifecycle.h"
#include "embedding/sign.h"

namespace hearth {

// Occurrences count into the generation of their step (Expiry::GenerationAt), and at a step two generations count, its
// own and the one before; earlier ones are zero. So an occurrence counts for the whole span of the rule, and for less
// than twice that. Without expiry all is one generation.
//
// Every answer is given for a step's generation, from the occurrences alone: when a generation that has passed is let
// go shows in none.
class CountingFilter {
 public:
  // REQUIRES: admission and expiry as FaultsOf allows.
  CountingFilter(const Table& config, TableNumber table, uint32_t shard);
  // What the store holds of it, as of the cut of `step` and its clock; null where that is nothing. What was counted by
  // another rule of expiry counts as if all of it had been seen at `step`; the store loses the bytes of that rule, and
  // Save writes the new ones. DataLoss where they are not of such a filter at `step`.
  static absl::StatusOr<std::unique_ptr<CountingFilter>> Load(const Table& config, TableNumber table, uint32_t shard,
                                                              uint64_t step, const LogClock& saved, KvStore* store);

  // Of what was counted before.
  uint32_t Estimate(uint32_t generation, Sign sign) const;
  // REQUIRES: generations do not descend.
  void Add(uint32_t generation, Sign sign, uint32_t occurrences);

  // Its share of the model hash of a step of the generation (docs/FORMATS.md "Model hash").
  uint64_t Hash(uint32_t generation) const;
  // What changed since the last Save, for the store. What does not count any more is let go.
  void Save(uint32_t generation, const std::function<void(KvKey, absl::string_view value)>& write);
  uint64_t bytes() const;

 private:
  struct Generation {
    uint32_t number = 0;
    std::unique_ptr<CountingBloom> counts;  // made when first counted in
  };

  static bool Counts(const Generation& generation, uint32_t now) {
    return generation.counts != nullptr && uint64_t{generation.number} + 1 >= now;
  }
  // Of the generation; made in the place of the last but one, which no later step asks for.
  CountingBloom* CountsOf(uint32_t number);

  Admission admission_;
  ExpiryRule rule_;
  TableNumber table_;
  uint32_t shard_;
  std::array<Generation, 2> generations_;  // by number mod 2
};

}  // namespace hearth
