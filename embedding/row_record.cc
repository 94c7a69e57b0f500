#include "embedding/row_record.h"

#define XXH_INLINE_ALL  // a hash state on the stack needs its definition
#include <xxhash.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace hearth {

absl::Status DecodeMeta(Sign sign, absl::string_view value, uint64_t floats, RowMeta* meta) {
  const uint64_t full = sizeof(RowMeta) + floats * sizeof(float);
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

uint64_t RowHash(TableNumber table, Sign sign, const RowMeta& meta, absl::Span<const float> weights_and_state) {
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, &table, sizeof(table));
  XXH3_64bits_update(&state, &sign, sizeof(sign));
  XXH3_64bits_update(&state, &meta, sizeof(meta));
  XXH3_64bits_update(&state, weights_and_state.data(), weights_and_state.size() * sizeof(float));
  return XXH3_64bits_digest(&state);
}

}  // namespace hearth
