#include "worker/evaluation/predictions.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/output_file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "worker/evaluation/auc.h"

namespace hearth {
namespace {

// Body of a chunk: this, then the arrays of PredictionRows in their order, user_text as lengths u32 then bytes, then
// bad_record.
struct ChunkHeader {
  uint64_t read = 0;
  uint64_t rejected = 0;
  uint32_t records = 0;
  uint32_t tasks = 0;
  uint32_t has_user = 0;
  uint32_t has_user_text = 0;
  uint32_t bad_record_bytes = 0;
  uint32_t unused = 0;
};

template <typename T>
void Put(std::string* body, const T* values, size_t count) {
  body->append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// Takes arrays off the front of a message, never beyond its end.
class Taker {
 public:
  explicit Taker(absl::Span<const char> bytes) : bytes_(bytes) {}
  template <typename T>
  bool Take(size_t count, std::vector<T>* values) {
    if (count > bytes_.size() / sizeof(T)) return false;
    values->resize(count);
    if (count > 0) std::memcpy(values->data(), bytes_.data(), count * sizeof(T));
    bytes_.remove_prefix(count * sizeof(T));
    return true;
  }
  bool TakeText(size_t length, std::string* text) {
    if (length > bytes_.size()) return false;
    text->assign(bytes_.data(), length);
    bytes_.remove_prefix(length);
    return true;
  }
  bool empty() const { return bytes_.empty(); }

 private:
  absl::Span<const char> bytes_;
};

template <typename T>
void AppendTo(std::vector<T>* to, const std::vector<T>& from) {
  to->insert(to->end(), from.begin(), from.end());
}

template <typename T>
void Reorder(std::vector<T>* values, const std::vector<size_t>& order, size_t width) {
  if (values->empty()) return;
  std::vector<T> sorted;
  sorted.reserve(values->size());
  for (const size_t i : order) {
    for (size_t w = 0; w < width; ++w) sorted.push_back(std::move((*values)[i * width + w]));
  }
  *values = std::move(sorted);
}

// A tab or line break inside a user's text would break the line.
void AppendField(std::string* line, absl::string_view text) {
  for (const char c : text) line->push_back(c == '\t' || c == '\n' || c == '\r' ? ' ' : c);
}

}  // namespace

void PredictionRows::Append(const PredictionRows& more) {
  tasks = more.tasks;
  AppendTo(&file, more.file);
  AppendTo(&offset, more.offset);
  AppendTo(&logits, more.logits);
  AppendTo(&labels, more.labels);
  AppendTo(&user, more.user);
  AppendTo(&user_text, more.user_text);
  read += more.read;
  rejected += more.rejected;
  // The least of all, so that it does not depend on who was heard first.
  if (bad_record.empty() || (!more.bad_record.empty() && more.bad_record < bad_record)) bad_record = more.bad_record;
}

void PredictionRows::Append(Batch* batch, const std::vector<float>& batch_logits) {
  AppendTo(&file, batch->file_of);
  AppendTo(&offset, batch->offset);
  AppendTo(&logits, batch_logits);
  for (size_t cell = 0; cell < batch->labels.size(); ++cell) {
    labels.push_back(batch->mask[cell] == 0 ? kMasked : batch->labels[cell] != 0 ? 1 : 0);
  }
  AppendTo(&user, batch->user);
  for (std::string& text : batch->user_text) user_text.push_back(std::move(text));
  read += batch->delta.read();
  rejected += batch->delta.rejected();
  if (bad_record.empty()) bad_record = batch->dead_letters.substr(0, batch->dead_letters.find('\n'));
}

Bytes EncodePredictions(const PredictionRows& rows, size_t begin, size_t end, Header header) {
  const size_t count = end - begin;
  ChunkHeader chunk;
  chunk.records = static_cast<uint32_t>(count);
  chunk.tasks = rows.tasks;
  chunk.has_user = rows.user.empty() ? 0 : 1;
  chunk.has_user_text = rows.user_text.empty() ? 0 : 1;
  if (begin == 0) {
    chunk.read = rows.read;
    chunk.rejected = rows.rejected;
    chunk.bad_record_bytes = static_cast<uint32_t>(rows.bad_record.size());
  }
  std::string body;
  Put(&body, &chunk, 1);
  Put(&body, rows.file.data() + begin, count);
  Put(&body, rows.offset.data() + begin, count);
  Put(&body, rows.logits.data() + begin * rows.tasks, count * rows.tasks);
  Put(&body, rows.labels.data() + begin * rows.tasks, count * rows.tasks);
  if (chunk.has_user) Put(&body, rows.user.data() + begin, count);
  if (chunk.has_user_text) {
    std::vector<uint32_t> lengths;
    for (size_t i = begin; i < end; ++i) lengths.push_back(static_cast<uint32_t>(rows.user_text[i].size()));
    Put(&body, lengths.data(), count);
    for (size_t i = begin; i < end; ++i) body += rows.user_text[i];
  }
  if (begin == 0) body += rows.bad_record;
  header.kind = MessageKind::kEvaluation;
  return EncodeOpaque(header, body);
}

absl::StatusOr<PredictionRows> DecodePredictions(absl::Span<const char> message) {
  HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message));
  const auto lost = [&] {
    return absl::InternalError(
        absl::StrCat("evaluation results of worker ", header.lane, ", chunk ", header.n, ": sizes do not add up"));
  };
  Taker taker(OpaqueBody(message));
  std::vector<ChunkHeader> chunk;
  if (header.kind != MessageKind::kEvaluation || !taker.Take(1, &chunk)) return lost();
  const size_t count = chunk[0].records;
  PredictionRows rows;
  rows.tasks = chunk[0].tasks;
  rows.read = chunk[0].read;
  rows.rejected = chunk[0].rejected;
  const size_t cells = count * rows.tasks;
  if (!taker.Take(count, &rows.file) || !taker.Take(count, &rows.offset) || !taker.Take(cells, &rows.logits) ||
      !taker.Take(cells, &rows.labels)) {
    return lost();
  }
  if (chunk[0].has_user && !taker.Take(count, &rows.user)) return lost();
  if (chunk[0].has_user_text) {
    std::vector<uint32_t> lengths;
    if (!taker.Take(count, &lengths)) return lost();
    rows.user_text.resize(count);
    for (size_t i = 0; i < count; ++i) {
      if (!taker.TakeText(lengths[i], &rows.user_text[i])) return lost();
    }
  }
  if (!taker.TakeText(chunk[0].bad_record_bytes, &rows.bad_record) || !taker.empty()) return lost();
  return rows;
}

absl::Status CheckRecordCount(uint64_t records_max, const PredictionRows& rows) {
  if (rows.records() <= records_max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "more than records_max = ", records_max, " records; one process holds all of them in memory to score them, some ",
      60 + 5 * rows.tasks, " bytes each: raise split.records_max, or name fewer files"));
}

absl::Status CheckRejected(const Limits& limits, const PredictionRows& rows) {
  if (!TooManyBadRecords(limits, rows.rejected, rows.read)) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(
      rows.rejected, " of ", rows.read, " records are bad, more than limits.bad_records_max_fraction = ",
      limits.bad_records_max_fraction(), "; for example ", rows.bad_record, "; correct the log or raise the limit"));
}

absl::Status SortPredictions(PredictionRows* rows) {
  std::vector<size_t> order(rows->records());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto key = [rows](size_t i) { return std::make_pair(rows->file[i], rows->offset[i]); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (key(order[i - 1]) == key(order[i])) {
      return absl::DataLossError(absl::StrCat("evaluation: the record at byte ", rows->offset[order[i]],
                                              " of file number ", rows->file[order[i]], " was evaluated twice"));
    }
  }
  Reorder(&rows->file, order, 1);
  Reorder(&rows->offset, order, 1);
  Reorder(&rows->logits, order, rows->tasks);
  Reorder(&rows->labels, order, rows->tasks);
  Reorder(&rows->user, order, 1);
  Reorder(&rows->user_text, order, 1);
  return absl::OkStatus();
}

Evaluation ScorePredictions(const PredictionRows& rows, const std::vector<std::string>& tasks, const std::string& split,
                            uint64_t step) {
  Evaluation evaluation;
  evaluation.set_split(split);
  evaluation.set_step(step);
  evaluation.set_read(rows.read);
  evaluation.set_rejected(rows.rejected);
  const size_t count = tasks.size();
  for (size_t t = 0; t < count; ++t) {
    TaskScores scores;
    for (size_t i = 0; i < rows.records(); ++i) {
      if (rows.labels[i * count + t] == PredictionRows::kMasked) continue;
      scores.logits.push_back(rows.logits[i * count + t]);
      scores.labels.push_back(rows.labels[i * count + t]);
      if (!rows.user.empty()) scores.users.push_back(rows.user[i]);
    }
    *evaluation.add_task() = Evaluate(tasks[t], scores);
  }
  return evaluation;
}

absl::Status WritePredictions(OutputFile* file, const PredictionRows& rows, const std::vector<std::string>& tasks,
                              const std::vector<LogFile>& files) {
  std::string text = "source\toffset\tuser";
  for (const std::string& task : tasks) absl::StrAppend(&text, "\tlabel_", task, "\tp_", task);
  text += "\n";
  for (size_t i = 0; i < rows.records(); ++i) {
    AppendField(&text, rows.file[i] < files.size() ? absl::string_view(files[rows.file[i]].path()) : "?");
    absl::StrAppend(&text, "\t", rows.offset[i], "\t");
    if (!rows.user_text.empty()) AppendField(&text, rows.user_text[i]);
    for (size_t t = 0; t < tasks.size(); ++t) {
      const size_t cell = i * tasks.size() + t;
      const double probability = 1.0 / (1.0 + std::exp(-static_cast<double>(rows.logits[cell])));
      const uint8_t known = rows.labels[cell];
      const char* label = known == PredictionRows::kMasked ? "" : known != 0 ? "1" : "0";
      char number[32];
      std::snprintf(number, sizeof(number), "%.10g", probability);
      absl::StrAppend(&text, "\t", label, "\t", number);
    }
    text += "\n";
    file->Append(text);
    text.clear();
  }
  file->Append(text);  // the header, where there is no record
  return file->Close();
}

}  // namespace hearth
