#include "worker/evaluator.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/artifact/reading.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "worker/step/pipeline.h"

namespace hearth {
namespace {

constexpr size_t kChunkRecordsMax = 16384;      // in one message
constexpr int64_t kDiagnosedRecordsMax = 2048;  // one forward and backward over them

}  // namespace

absl::StatusOr<std::unique_ptr<Evaluator>> Evaluator::Open(const EvaluatorOptions& options) {
  std::unique_ptr<Evaluator> evaluator(new Evaluator(options));
  for (int split = 0; split < options.job.split_size(); ++split) {
    const uint32_t log = options.first_split_log + static_cast<uint32_t>(split);
    HEARTH_ASSIGN_OR_RETURN(std::vector<LogFile> files, ListLogFiles(options.job, {options.logs[log]}));
    for (LogFile& file : files) file.set_log(log);
    evaluator->files_.push_back(std::move(files));
  }
  return evaluator;
}

Evaluator::Evaluator(const EvaluatorOptions& options)
    : options_(options), puller_(options.clients, kPortEvaluatePull) {}
Evaluator::~Evaluator() = default;

absl::StatusOr<std::vector<Evaluation>> Evaluator::Run(DenseReplica* replica, uint64_t step,
                                                       const std::vector<int>& splits) {
  std::vector<std::string> tasks;
  for (const Task& task : options_.job.task()) tasks.push_back(task.name());
  std::vector<Evaluation> evaluations;
  for (const int split : splits) {
    const Split& config = options_.job.split(split);
    const std::string where = absl::StrCat("split ", config.name());
    auto rows = Predict(replica, split, step);
    if (!rows.ok()) return Annotate(rows.status(), where);
    if (options_.worker != 0) {
      HEARTH_RETURN_IF_ERROR(SendToFirst(*rows, split, step));
      continue;
    }
    HEARTH_RETURN_IF_ERROR(Annotate(Gather(split, step, &*rows), where));
    HEARTH_RETURN_IF_ERROR(Annotate(CheckRejected(options_.job.limits(), *rows), where));
    HEARTH_RETURN_IF_ERROR(SortPredictions(&*rows));
    evaluations.push_back(ScorePredictions(*rows, tasks, config.name(), step));
    if (split == 0) {
      HEARTH_ASSIGN_OR_RETURN(const std::vector<std::unique_ptr<Batch>> head, ReadHead(split, step));
      if (!head.empty()) {
        HEARTH_ASSIGN_OR_RETURN(*evaluations.back().mutable_diagnostics(),
                                replica->Diagnose(head, kDiagnosedRecordsMax));
      }
    }
    if (config.predictions()) {
      const std::string folder = JoinPath(options_.dir, "predictions");
      HEARTH_RETURN_IF_ERROR(MakeDirectories(folder));
      HEARTH_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(JoinPath(folder, config.name() + ".tsv.zst"),
                                                                  OutputFile::Links::kReplace));
      HEARTH_RETURN_IF_ERROR(WritePredictions(file.get(), *rows, tasks, files_[static_cast<size_t>(split)]));
    }
    spdlog::info("event=evaluated split={} step={} records={} bad_records={}", Quoted(config.name()), step,
                 rows->records(), rows->rejected);
  }
  return evaluations;
}

absl::StatusOr<std::unique_ptr<LaneReader>> Evaluator::OpenReader(int split, int lane, int lanes, FileList* files) {
  const Split& config = options_.job.split(split);
  files->Append(files_[static_cast<size_t>(split)], /*closed=*/true);
  LaneReaderOptions reading;
  reading.job = options_.job;
  reading.logs = options_.logs;
  reading.schema = options_.schema;
  reading.files = files;
  reading.lane = static_cast<uint32_t>(lane);
  reading.lanes = static_cast<uint32_t>(lanes);
  reading.batch_size = std::max<uint32_t>(1, config.batch_size());
  reading.keep_user = !config.user().empty();
  reading.keep_user_text = config.predictions() && !config.user().empty();
  reading.user_column = config.user();
  reading.scratch = options_.scratch;
  reading.env = options_.env;
  return LaneReader::Open(reading);
}

absl::Status Evaluator::PullRows(uint64_t step, Batch* batch) {
  std::vector<TableRows> tables;
  ListTables(batch, RowsOf::kPull, &tables);
  for (TableRows& table : tables) table.occurrences = {};  // read only: nothing is counted
  return puller_.ReadOnly(step, absl::MakeSpan(tables));
}

// The split's first records, read once more: whoever evaluated them, the sample is the same.
absl::StatusOr<std::vector<std::unique_ptr<Batch>>> Evaluator::ReadHead(int split, uint64_t step) {
  FileList files(options_.env);
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<LaneReader> reader, OpenReader(split, 0, 1, &files));
  std::vector<std::unique_ptr<Batch>> head;
  for (int64_t records = 0; records < kDiagnosedRecordsMax;) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> batch, reader->Next());
    if (batch == nullptr) break;
    if (batch->records == 0) continue;
    HEARTH_RETURN_IF_ERROR(PullRows(step, batch.get()));
    records += batch->records;
    head.push_back(std::move(batch));
  }
  return head;
}

// This worker's share of the split: the pieces of lane `worker` of `workers`.
absl::StatusOr<PredictionRows> Evaluator::Predict(DenseReplica* replica, int split, uint64_t step) {
  FileList files(options_.env);
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<LaneReader> reader,
                          OpenReader(split, options_.worker, options_.workers, &files));
  PredictionRows rows;
  rows.tasks = static_cast<uint32_t>(options_.job.task_size());
  Reading reading;
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> batch, reader->Next());
    if (batch == nullptr) break;
    MergeReading(batch->reading, &reading);
    if (batch->records == 0) {
      rows.Append(batch.get(), {});  // its counts
      continue;
    }
    HEARTH_RETURN_IF_ERROR(PullRows(step, batch.get()));
    HEARTH_ASSIGN_OR_RETURN(const std::vector<float> logits, replica->Predict(*batch));
    rows.Append(batch.get(), logits);
    HEARTH_RETURN_IF_ERROR(CheckRecordCount(options_.job.split(split).records_max(), rows));
  }
  const std::string name = Quoted(options_.job.split(split).name());
  if (rows.rejected > 0) {
    spdlog::warn("event=bad_records_left_out split={} bad_records={} first={}", name, rows.rejected,
                 Quoted(rows.bad_record));
  }
  for (const Reading::Column& column : reading.column()) {
    spdlog::warn("event=no_numbers_read_as_missing split={} column={} unreadable={} first={}", name,
                 Quoted(column.name()), column.unreadable(), Quoted(column.example()));
  }
  for (const Reading::Join& join : reading.join()) {
    spdlog::info("event=joined split={} side_table={} matched={} unmatched={} without_key={}", name,
                 Quoted(join.side_table()), join.matched(), join.unmatched(), join.without_key());
  }
  return rows;
}

// At least one chunk, so that worker 0 hears of everyone.
absl::Status Evaluator::SendToFirst(const PredictionRows& rows, int split, uint64_t step) {
  const size_t chunks = std::max<size_t>(1, (rows.records() + kChunkRecordsMax - 1) / kChunkRecordsMax);
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    Header header;
    header.lane = static_cast<uint32_t>(options_.worker);
    header.step = step;
    header.split = static_cast<uint32_t>(split);
    header.n = chunk;
    header.next_cut = chunks;
    const size_t begin = chunk * kChunkRecordsMax;
    Bytes message = EncodePredictions(rows, begin, std::min(rows.records(), begin + kChunkRecordsMax), header);
    HEARTH_RETURN_IF_ERROR(
        options_.transport->Send(kPortEvaluate, {options_.clients.ranks.worker(0), kPortEvaluate}, std::move(message)));
  }
  return absl::OkStatus();
}

// Adds the other workers' results of this split. Order of arrival does not matter: rows are sorted later. Results of
// later splits wait.
absl::Status Evaluator::Gather(int split, uint64_t step, PredictionRows* rows) {
  Mailbox* mailbox = options_.transport->Open(kPortEvaluate);
  std::vector<std::set<uint64_t>> got(static_cast<size_t>(options_.workers));     // chunks, by worker
  std::vector<uint64_t> expected(static_cast<size_t>(options_.workers), kNever);  // their number, once known
  expected[0] = 0;
  std::vector<Message> waiting = std::move(early_);
  early_.clear();
  const auto missing = [&] {
    for (size_t w = 0; w < got.size(); ++w) {
      if (got[w].size() < expected[w]) return true;
    }
    return false;
  };
  while (missing()) {
    std::optional<Message> message;
    if (!waiting.empty()) {
      message = std::move(waiting.back());
      waiting.pop_back();
    } else {
      message = mailbox->Receive(kNever);  // however long the others take; who dies ends the job
    }
    if (!message.has_value()) continue;
    HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message->payload.span()));
    if (header.lane >= got.size()) {
      return absl::InternalError(
          absl::StrCat("evaluation results from worker ", header.lane, ", which does not exist"));
    }
    const bool later = header.step > step || (header.step == step && header.split > static_cast<uint32_t>(split));
    if (later) {
      early_.push_back(*std::move(message));
      continue;
    }
    const bool of_this = header.step == step && header.split == static_cast<uint32_t>(split);
    if (!of_this || !got[header.lane].insert(header.n).second) continue;  // repeated
    expected[header.lane] = header.next_cut;
    HEARTH_ASSIGN_OR_RETURN(const PredictionRows more, DecodePredictions(message->payload.span()));
    if (more.tasks != rows->tasks) {
      return absl::InternalError(
          absl::StrCat("evaluation results of worker ", header.lane, " are of ", more.tasks, " tasks"));
    }
    rows->Append(more);
    HEARTH_RETURN_IF_ERROR(CheckRecordCount(options_.job.split(split).records_max(), *rows));
  }
  early_.insert(early_.end(), std::make_move_iterator(waiting.begin()), std::make_move_iterator(waiting.end()));
  return absl::OkStatus();
}

}  // namespace hearth
