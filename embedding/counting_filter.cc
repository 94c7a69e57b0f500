#include "embedding/counting_filter.h"

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "embedding/row_record.h"

namespace hearth {
namespace {

// Before the counters of a chunk, where there is expiry. It tells a chunk that a past generation has left behind, or
// that another rule counted.
struct Label {
  uint32_t generation = 0;
  uint32_t rule = 0;  // ExpiryRule::code
};
static_assert(sizeof(Label) == 8);

// Takes it off the value. False: no chunk has such a label.
bool TakeLabel(const FilterChunk& chunk, absl::string_view* value, Label* label) {
  if (!chunk.aged) return true;
  if (value->size() < sizeof(Label)) return false;
  std::memcpy(label, value->data(), sizeof(Label));
  value->remove_prefix(sizeof(Label));
  return label->rule != 0 && label->generation % 2 == chunk.parity;
}

}  // namespace

CountingFilter::CountingFilter(const Table& config, TableNumber table, uint32_t shard)
    : admission_(config.admission()), rule_(ExpiryRule::Of(config)), table_(table), shard_(shard) {}

absl::StatusOr<std::unique_ptr<CountingFilter>> CountingFilter::Load(const Table& config, TableNumber table,
                                                                     uint32_t shard, uint64_t step,
                                                                     const LogClock& saved, KvStore* store) {
  const Expiry expiry(ExpiryRule::Of(config), saved);
  std::unique_ptr<CountingFilter> filter;
  std::vector<KvWrite> removes;
  bool fits = true;
  const KvRange chunks = FilterChunksOf(table, shard);
  HEARTH_RETURN_IF_ERROR(store->Scan(chunks.first, chunks.last, [&](KvKey key, absl::string_view value) {
    const FilterChunk chunk = FilterChunkOf(key);
    Label label;
    fits = TakeLabel(chunk, &value, &label);
    if (!fits) return false;
    const ExpiryRule rule = ExpiryRule::OfCode(label.rule);
    const uint32_t now = Expiry(rule, saved).GenerationAt(step);
    fits = label.generation <= now;  // one of up to `step`
    if (!fits) return false;
    const bool of_another_rule = rule != expiry.rule();
    if (of_another_rule) removes.push_back({key, {}, true});
    if (uint64_t{label.generation} + 1 < now) return true;
    if (filter == nullptr) filter = std::make_unique<CountingFilter>(config, table, shard);
    fits = of_another_rule ? filter->CountsOf(expiry.GenerationAt(step))->AddChunk(chunk.number, value)
                           : filter->CountsOf(label.generation)->LoadChunk(chunk.number, value);
    return fits;
  }));
  if (!fits) {
    return absl::DataLossError(absl::StrCat("counting filter of table \"", config.name(), "\", logical shard ", shard,
                                            ": does not fit the job's bloom_counters, or step ", step));
  }
  if (!removes.empty()) HEARTH_RETURN_IF_ERROR(store->Write(removes));
  return filter;
}

CountingBloom* CountingFilter::CountsOf(uint32_t number) {
  Generation& generation = generations_[number % 2];
  if (generation.counts == nullptr || generation.number != number) {
    HEARTH_CHECK(generation.counts == nullptr || generation.number < number, "generation ", number, " after ",
                 generation.number);
    generation = {number, std::make_unique<CountingBloom>(admission_)};
  }
  return generation.counts.get();
}

uint32_t CountingFilter::Estimate(uint32_t generation, Sign sign) const {
  uint32_t sum = 0;
  for (const Generation& one : generations_) {
    if (Counts(one, generation)) sum = AddSaturating(sum, one.counts->Estimate(sign));
  }
  return sum;
}

void CountingFilter::Add(uint32_t generation, Sign sign, uint32_t occurrences) {
  CountsOf(generation)->Add(sign, occurrences);
}

uint64_t CountingFilter::Hash(uint32_t generation) const {
  uint64_t sum = 0;
  for (const Generation& one : generations_) {
    if (!Counts(one, generation)) continue;
    sum += rule_.never() ? one.counts->Hash({table_, shard_}) : one.counts->Hash({table_, shard_, one.number});
  }
  return sum;
}

void CountingFilter::Save(uint32_t generation, const std::function<void(KvKey, absl::string_view value)>& write) {
  std::string value;
  for (Generation& one : generations_) {
    if (!Counts(one, generation)) one.counts.reset();
    if (one.counts == nullptr) continue;
    const Label label = {one.number, rule_.code()};
    for (uint64_t chunk = 0; chunk < one.counts->chunks(); ++chunk) {
      if (!one.counts->ChunkChanged(chunk)) continue;
      const absl::string_view counters = one.counts->Chunk(chunk);
      if (rule_.never()) {
        write(FilterChunkKey(table_, shard_, {chunk}), counters);
        continue;
      }
      value.assign(reinterpret_cast<const char*>(&label), sizeof(label));
      value.append(counters.data(), counters.size());
      write(FilterChunkKey(table_, shard_, {chunk, true, one.number % 2}), value);
    }
    one.counts->MarkSaved();
  }
}

uint64_t CountingFilter::bytes() const {
  uint64_t bytes = 0;
  for (const Generation& generation : generations_)
    bytes += generation.counts != nullptr ? generation.counts->bytes() : 0;
  return bytes;
}

}  // namespace hearth
