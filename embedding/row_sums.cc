#include "embedding/row_sums.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "embedding/row_record.h"

namespace hearth {
namespace {

constexpr uint32_t kVersion = 1;

// As they are stored, little-endian.
struct Head {
  uint32_t version;
  uint32_t rule;  // ExpiryRule::code
  uint64_t step;
  uint64_t words;
};
static_assert(sizeof(Head) == 24);
struct Entry {
  uint64_t hash;
  int64_t rows;
  int64_t records;
  uint64_t first_step;
};
static_assert(sizeof(Entry) == 32);

}  // namespace

uint32_t RowSums::FirstOf(uint32_t last_step) const {
  if (!rule_.by_time()) return rule_.never() ? 0 : last_step;
  if (marks_.empty() || last_step < marks_.front()) return 0;
  if (last_step >= marks_.back()) return static_cast<uint32_t>(marks_.back());  // most of them
  return static_cast<uint32_t>(*std::prev(std::upper_bound(marks_.begin(), marks_.end(), last_step)));
}

void RowSums::Change(const RowMeta& meta, uint64_t hash, int64_t records) {
  Sum& sum = by_step_[FirstOf(meta.last_step)];
  sum.hash += hash;
  sum.records += records;
  if (IsAdmitted(meta)) sum.rows += records;
}

uint64_t RowSums::DropExpired(uint64_t horizon) {
  uint64_t rows = 0;
  marks_.erase(marks_.begin(), std::lower_bound(marks_.begin(), marks_.end(), horizon));
  for (auto it = by_step_.begin(); it != by_step_.end();) {
    const bool expired = it->first < horizon;
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
  for (const auto& [first_step, sum] : by_step_) entries.push_back({sum.hash, sum.rows, sum.records, first_step});
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.first_step < b.first_step; });
  const Head head = {kVersion, rule_.code(), step, words};
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
  const bool marked = rule_.by_time() && rule_ == ExpiryRule::OfCode(head.rule);
  rule_ = ExpiryRule::OfCode(head.rule);
  *step = head.step;
  *words = head.words;
  by_step_.clear();
  for (size_t at = sizeof(head); at < bytes.size(); at += sizeof(Entry)) {
    Entry entry;
    std::memcpy(&entry, bytes.data() + at, sizeof(entry));
    if (marked && entry.first_step != 0 && !std::binary_search(marks_.begin(), marks_.end(), entry.first_step)) {
      return absl::DataLossError(
          absl::StrCat("sums of rows from step ", entry.first_step, " on, where the MANIFEST has no mark"));
    }
    by_step_[static_cast<uint32_t>(entry.first_step)] = {entry.hash, entry.rows, entry.records};
  }
  return absl::OkStatus();
}

}  // namespace hearth
