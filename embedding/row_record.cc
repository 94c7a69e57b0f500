#include "embedding/row_record.h"

#define XXH_INLINE_ALL  // a hash state on the stack needs its definition
#include <xxhash.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace hearth {

absl::Status DecodeMeta(Sign sign, absl::string_view value, uint64_t words, RowMeta* meta) {
  const uint64_t full = sizeof(RowMeta) + words * sizeof(float);
  if (value.size() >= sizeof(RowMeta)) {
    std::memcpy(meta, value.data(), sizeof(RowMeta));
    if ((meta->flags & ~kRowAdmitted) != 0) {
      return absl::DataLossError(absl::StrCat("record of sign ", sign, " (table ", TableOf(sign), ", id ", IdOf(sign),
                                              ") has flags ", meta->flags,
                                              "; the store is damaged, or of a newer Hearth"));
    }
    if (value.size() == (IsAdmitted(*meta) ? full : sizeof(RowMeta))) return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat("record of sign ", sign, " (table ", TableOf(sign), ", id ", IdOf(sign),
                                          ") has ", value.size(), " bytes, this job's rows have ", full,
                                          ", its counters ", sizeof(RowMeta),
                                          "; the store is damaged or another job's"));
}

void DecodeFloats(const Table& table, absl::string_view value, float* floats) {
  const RowWeights weights(table, 0);
  weights.Decode(WordsOf(value), floats);
  std::memcpy(floats + table.dim(), WordsOf(value) + weights.words() * sizeof(float),
              (RowWordsOf(table) - weights.words()) * sizeof(float));
}

void AppendFloats(const Table& table, const float* floats, std::string* value) {
  const RowWeights weights(table, 0);
  const size_t begin = value->size();
  value->resize(begin + RowWordsOf(table) * sizeof(float));
  weights.Encode(floats, value->data() + begin);
  std::memcpy(value->data() + begin + weights.words() * sizeof(float), floats + table.dim(),
              (RowWordsOf(table) - weights.words()) * sizeof(float));
}

uint64_t RecordHash(Sign sign, absl::string_view value) {
  constexpr size_t kHead = sizeof(TableNumber) + sizeof(Sign);
  const TableNumber table = TableOf(sign);
  char head[kHead];
  std::memcpy(head, &table, sizeof(table));
  std::memcpy(head + sizeof(table), &sign, sizeof(sign));
  char whole[1024];
  if (kHead + value.size() <= sizeof(whole)) {
    std::memcpy(whole, head, kHead);
    std::memcpy(whole + kHead, value.data(), value.size());
    return XXH3_64bits(whole, kHead + value.size());
  }
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, head, kHead);
  XXH3_64bits_update(&state, value.data(), value.size());
  return XXH3_64bits_digest(&state);
}

uint64_t RowHash(TableNumber table, Sign sign, const RowMeta& meta, absl::Span<const float> words) {
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, &table, sizeof(table));
  XXH3_64bits_update(&state, &sign, sizeof(sign));
  XXH3_64bits_update(&state, &meta, sizeof(meta));
  XXH3_64bits_update(&state, words.data(), words.size() * sizeof(float));
  return XXH3_64bits_digest(&state);
}

}  // namespace hearth
