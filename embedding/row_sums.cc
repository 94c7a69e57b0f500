#include "embedding/row_sums.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "embedding/lifecycle.h"
#include "embedding/row_record.h"

namespace hearth {
namespace {

constexpr uint32_t kVersion = 1;

// As they are stored, little-endian.
struct Head {
  uint32_t version;
  uint32_t expire_after_steps;
  uint64_t step;
  uint64_t words;
};
static_assert(sizeof(Head) == 24);
struct Entry {
  uint64_t hash;
  int64_t rows;
  int64_t records;
  uint64_t last_step;
};
static_assert(sizeof(Entry) == 32);

}  // namespace

void RowSums::Change(const RowMeta& meta, uint64_t hash, int64_t records) {
  Sum& sum = by_step_[expire_after_steps_ == 0 ? 0 : meta.last_step];
  sum.hash += hash;
  sum.records += records;
  if (IsAdmitted(meta)) sum.rows += records;
}

uint64_t RowSums::DropExpired(uint64_t step) {
  uint64_t rows = 0;
  for (auto it = by_step_.begin(); it != by_step_.end();) {
    RowMeta meta;
    meta.last_step = it->first;
    const bool expired = IsExpired(meta, expire_after_steps_, step);
    if (expired) rows += static_cast<uint64_t>(std::max<int64_t>(0, it->second.rows));
    // A step whose rows all moved on has nothing left to say.
    const bool empty = it->second.records == 0 && it->second.hash == 0;
    if (expired || empty) {
      by_step_.erase(it++);
    } else {
      ++it;
    }
  }
  return rows;
}

uint64_t RowSums::hash() const {
  uint64_t hash = 0;
  for (const auto& [step, sum] : by_step_) hash += sum.hash;
  return hash;
}

uint64_t RowSums::rows() const {
  int64_t rows = 0;
  for (const auto& [step, sum] : by_step_) rows += sum.rows;
  return static_cast<uint64_t>(rows);
}

uint64_t RowSums::records() const {
  int64_t records = 0;
  for (const auto& [step, sum] : by_step_) records += sum.records;
  return static_cast<uint64_t>(records);
}

std::string RowSums::Encode(uint64_t step, uint64_t words) const {
  std::vector<Entry> entries;
  for (const auto& [last_step, sum] : by_step_) entries.push_back({sum.hash, sum.rows, sum.records, last_step});
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.last_step < b.last_step; });
  const Head head = {kVersion, expire_after_steps_, step, words};
  std::string bytes(reinterpret_cast<const char*>(&head), sizeof(head));
  bytes.append(reinterpret_cast<const char*>(entries.data()), entries.size() * sizeof(Entry));
  return bytes;
}

absl::Status RowSums::Decode(absl::string_view bytes, uint64_t* step, uint64_t* words) {
  Head head;
  if (bytes.size() < sizeof(head) || (bytes.size() - sizeof(head)) % sizeof(Entry) != 0) {
    return absl::DataLossError(absl::StrCat("sums of rows of ", bytes.size(), " bytes; use an older snapshot"));
  }
  std::memcpy(&head, bytes.data(), sizeof(head));
  if (head.version != kVersion) {
    return absl::DataLossError(absl::StrCat("sums of rows of version ", head.version, ", this is ", kVersion,
                                            "; use the Hearth that wrote them"));
  }
  expire_after_steps_ = head.expire_after_steps;
  *step = head.step;
  *words = head.words;
  by_step_.clear();
  for (size_t at = sizeof(head); at < bytes.size(); at += sizeof(Entry)) {
    Entry entry;
    std::memcpy(&entry, bytes.data() + at, sizeof(entry));
    by_step_[static_cast<uint32_t>(entry.last_step)] = {entry.hash, entry.rows, entry.records};
  }
  return absl::OkStatus();
}

}  // namespace hearth
