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
  uint32_t expire_after_steps = 0;
};
static_assert(sizeof(Label) == 8);

uint32_t GenerationOf(uint64_t step, uint32_t expire_after_steps) {
  return expire_after_steps == 0 ? 0 : static_cast<uint32_t>(step / expire_after_steps);
}
bool CountsAt(uint64_t step, const Label& label) {
  return uint64_t{label.generation} + 1 >= GenerationOf(step, label.expire_after_steps);
}

// Takes it off the value. False: no generation of up to `step` has such a chunk.
bool TakeLabel(const FilterChunk& chunk, uint64_t step, absl::string_view* value, Label* label) {
  if (!chunk.aged) return true;
  if (value->size() < sizeof(Label)) return false;
  std::memcpy(label, value->data(), sizeof(Label));
  value->remove_prefix(sizeof(Label));
  return label->expire_after_steps > 0 && label->generation <= GenerationOf(step, label->expire_after_steps) &&
         label->generation % 2 == chunk.parity;
}

}  // namespace

CountingFilter::CountingFilter(const Table& config, TableNumber table, uint32_t shard)
    : admission_(config.admission()), expire_after_steps_(config.expire_after_steps()), table_(table), shard_(shard) {}

absl::StatusOr<std::unique_ptr<CountingFilter>> CountingFilter::Load(const Table& config, TableNumber table,
                                                                     uint32_t shard, uint64_t step, KvStore* store) {
  const uint32_t expire_after_steps = config.expire_after_steps();
  std::unique_ptr<CountingFilter> filter;
  std::vector<KvWrite> removes;
  bool fits = true;
  const KvRange chunks = FilterChunksOf(table, shard);
  HEARTH_RETURN_IF_ERROR(store->Scan(chunks.first, chunks.last, [&](KvKey key, absl::string_view value) {
    const FilterChunk chunk = FilterChunkOf(key);
    Label label;
    fits = TakeLabel(chunk, step, &value, &label);
    if (!fits) return false;
    const bool of_another_rule = label.expire_after_steps != expire_after_steps;
    if (of_another_rule) removes.push_back({key, {}, true});
    if (!CountsAt(step, label)) return true;
    if (filter == nullptr) filter = std::make_unique<CountingFilter>(config, table, shard);
    fits = of_another_rule ? filter->CountsOf(GenerationOf(step, expire_after_steps))->AddChunk(chunk.number, value)
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

bool CountingFilter::Counts(const Generation& generation, uint64_t step) const {
  return generation.counts != nullptr && CountsAt(step, {generation.number, expire_after_steps_});
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

uint32_t CountingFilter::Estimate(uint64_t step, Sign sign) const {
  uint32_t sum = 0;
  for (const Generation& generation : generations_) {
    if (Counts(generation, step)) sum = AddSaturating(sum, generation.counts->Estimate(sign));
  }
  return sum;
}

void CountingFilter::Add(uint64_t step, Sign sign, uint32_t occurrences) {
  CountsOf(GenerationOf(step, expire_after_steps_))->Add(sign, occurrences);
}

uint64_t CountingFilter::Hash(uint64_t step) const {
  uint64_t sum = 0;
  for (const Generation& generation : generations_) {
    if (!Counts(generation, step)) continue;
    sum += expire_after_steps_ == 0 ? generation.counts->Hash({table_, shard_})
                                    : generation.counts->Hash({table_, shard_, generation.number});
  }
  return sum;
}

void CountingFilter::Save(uint64_t step, const std::function<void(KvKey, absl::string_view value)>& write) {
  std::string value;
  for (Generation& generation : generations_) {
    if (!Counts(generation, step)) generation.counts.reset();
    if (generation.counts == nullptr) continue;
    const Label label = {generation.number, expire_after_steps_};
    for (uint64_t chunk = 0; chunk < generation.counts->chunks(); ++chunk) {
      if (!generation.counts->ChunkChanged(chunk)) continue;
      const absl::string_view counters = generation.counts->Chunk(chunk);
      if (expire_after_steps_ == 0) {
        write(FilterChunkKey(table_, shard_, {chunk}), counters);
        continue;
      }
      value.assign(reinterpret_cast<const char*>(&label), sizeof(label));
      value.append(counters.data(), counters.size());
      write(FilterChunkKey(table_, shard_, {chunk, true, generation.number % 2}), value);
    }
    generation.counts->MarkSaved();
  }
}

uint64_t CountingFilter::bytes() const {
  uint64_t bytes = 0;
  for (const Generation& generation : generations_)
    bytes += generation.counts != nullptr ? generation.counts->bytes() : 0;
  return bytes;
}

}  // namespace hearth
