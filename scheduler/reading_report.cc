#include "scheduler/reading_report.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/artifact/reading.h"
#include "common/base/logging.h"
#include "scheduler/lease_table.h"

namespace hearth {

namespace {

constexpr uint32_t kBatchNormRecordsMin = 4;   // of a lane in a step; with fewer its mean and variance say nothing
constexpr uint64_t kJoinedRecordsMin = 1000;   // before a join is called bad that finds something
constexpr uint64_t kUnjoinedRecordsMin = 100;  // before one is that finds nothing
constexpr size_t kListedMax = 8;

std::string OfColumn(const Reading::Column& column) {
  return absl::StrCat("column ", Quoted(column.name()), " holds no number in ", column.unreadable(),
                      " records, for example ", Quoted(column.example()));
}

// Each lane's trained records are all in its label counts.
bool KnowsLabels(const std::vector<LaneState>& lanes) {
  return std::all_of(lanes.begin(), lanes.end(), [](const LaneState& lane) {
    if (lane.reading().task_size() == 0) return lane.ledger().trained() == 0;
    const Reading::Task& task = lane.reading().task(0);
    return task.positives() + task.negatives() + task.masked() == lane.ledger().trained();
  });
}

std::string ListedFew(std::vector<std::string> names) {
  const size_t all = names.size();
  if (all > kListedMax) names.resize(kListedMax);
  return absl::StrCat(absl::StrJoin(names, ", "), all > kListedMax ? ", …" : "");
}

}  // namespace

Ledger SumOfLedgers(const std::vector<LaneState>& lanes) {
  Ledger sum;
  for (const LaneState& lane : lanes) AddLedger(lane.ledger(), &sum);
  return sum;
}

Reading SumOfReadings(const std::vector<LaneState>& lanes) {
  Reading sum;
  for (const LaneState& lane : lanes) MergeReading(lane.reading(), &sum);
  return sum;
}

std::vector<Warning> WarningsOfJob(const Job& job) {
  const Training& training = job.training();
  if (job.model().kind() != Model::HOME && !job.model().home_expert()) return {};
  uint32_t least = training.batch_size();
  for (const Log& log : job.log()) {
    if (log.has_batch_size()) least = std::min(least, log.batch_size());
  }
  const uint32_t records = least / std::max(1u, training.lanes());
  if (records >= kBatchNormRecordsMin) return {};
  return {{"batch_norm",
           absl::StrCat("a lane's batch has ", std::max(1u, records), " records (batch_size ", least, " over ",
                        training.lanes(),
                        " lanes), too few for BatchNorm's mean and variance; raise training.batch_size, or start anew "
                        "with fewer training.lanes")}};
}

std::vector<Warning> WarningsSoFar(const Reading& reading) {
  std::vector<Warning> warnings;
  for (const Reading::Column& column : reading.column()) {
    warnings.push_back(
        {absl::StrCat("column ", column.name()),
         absl::StrCat(OfColumn(column),
                      ", so far; it reads as missing there: a label is masked, a feature takes its value "
                      "for missing (docs/EXPRESSIONS.md)")});
  }
  for (const Reading::Join& join : reading.join()) {
    const uint64_t keys = join.matched() + join.unmatched();
    const bool nothing = join.matched() == 0 && join.unmatched() >= kUnjoinedRecordsMin;
    if (!nothing && (keys < kJoinedRecordsMin || join.unmatched() * 2 <= keys)) continue;
    warnings.push_back({absl::StrCat("side_table ", join.side_table()),
                        absl::StrCat("side_table ", Quoted(join.side_table()), ": ", join.unmatched(), " of ", keys,
                                     " keys of the log match no row so far, for example ", Quoted(join.example()),
                                     "; keys match as texts (7 is not 7.0): write them alike in both files")});
  }
  return warnings;
}

std::vector<Warning> WarningsAtEnd(const Job& job, const std::vector<LaneState>& lanes) {
  std::vector<Warning> warnings;
  const Reading reading = SumOfReadings(lanes);
  for (const Reading::Join& join : reading.join()) {
    if (join.matched() > 0 || join.unmatched() == 0) continue;
    warnings.push_back({absl::StrCat("side_table ", join.side_table()),
                        absl::StrCat("side_table ", Quoted(join.side_table()), ": none of ", join.unmatched(),
                                     " keys of the log matches a row, for example ", Quoted(join.example()),
                                     "; keys match as texts (7 is not 7.0): write them alike in both files")});
  }
  for (int i = 0; KnowsLabels(lanes) && i < std::min(job.task_size(), reading.task_size()); ++i) {
    const Reading::Task& task = reading.task(i);
    const uint64_t labelled = task.positives() + task.negatives();
    const std::string what = absl::StrCat("task ", Quoted(job.task(i).name()), ": label ", Quoted(job.task(i).label()));
    if (labelled == 0 && task.masked() > 0) {
      warnings.push_back({absl::StrCat("label ", i), absl::StrCat(what, " is unknown on all ", task.masked(),
                                                                  " trained records; the task learned nothing")});
    } else if (labelled > 0 && (task.positives() == 0 || task.negatives() == 0)) {
      warnings.push_back({absl::StrCat("label ", i),
                          absl::StrCat(what, " is ", task.positives() == 0 ? "never" : "always", " positive, on all ",
                                       labelled, " labelled records; the task learned nothing")});
    }
  }
  std::vector<std::string> idle;
  for (const LaneState& lane : lanes) {
    if (lane.ledger().read() == 0) idle.push_back(absl::StrCat(lane.cursor().lane()));
  }
  const size_t idle_lanes = idle.size();
  if (idle_lanes > 0 && idle_lanes < lanes.size()) {
    warnings.push_back(
        {"idle lanes",
         absl::StrCat(idle_lanes, " of ", lanes.size(), " lanes had nothing to read (lane ", ListedFew(std::move(idle)),
                      "), so steps were smaller than training.batch_size: give the logs more pieces "
                      "(log.piece_bytes of plain text, log.piece_batches of compressed), or start anew "
                      "with fewer training.lanes")});
  }
  return warnings;
}

std::vector<Warning> WarningsOfEvaluation(const Evaluation& evaluation) {
  std::vector<Warning> warnings;
  for (const Evaluation::Task& task : evaluation.task()) {
    if (task.samples() > 0 && task.positives() > 0 && task.positives() < task.samples()) continue;
    const std::string cause = task.samples() == 0 ? "no record with a label"
                                                  : absl::StrCat(task.positives() == 0 ? "no positive" : "no negative",
                                                                 " label among ", task.samples());
    warnings.push_back({absl::StrCat("split ", evaluation.split(), " ", task.name()),
                        absl::StrCat("split ", Quoted(evaluation.split()), ", task ", Quoted(task.name()), ": ", cause,
                                     ", so its figures say nothing")});
  }
  return warnings;
}

absl::Status CheckTrained(const Job& job, const std::vector<LaneState>& lanes) {
  const Ledger ledger = SumOfLedgers(lanes);
  const Reading reading = SumOfReadings(lanes);
  uint64_t labelled = 0;
  for (const Reading::Task& task : reading.task()) labelled += task.positives() + task.negatives();
  if (ledger.trained() > 0 && (labelled > 0 || !KnowsLabels(lanes))) return absl::OkStatus();
  std::string cause;
  if (ledger.read() == 0) {
    std::vector<std::string> sources;
    for (const Log& log : job.log()) {
      for (const std::string& path : log.path()) sources.push_back(path);
      if (!log.directory().empty()) sources.push_back(log.directory());
    }
    cause = absl::StrCat("there was not one record to read in ", ListedFew(std::move(sources)));
  } else {
    cause = absl::StrCat(ledger.read(), " records were read, of which ", ledger.rejected(), " were rejected, ",
                         ledger.filtered(), " filtered and ", ledger.trained(), " trained without a label");
    if (ledger.rejected() > 0) absl::StrAppend(&cause, "; dead-letter/ says why each was rejected");
    for (const Reading::Column& column : reading.column()) absl::StrAppend(&cause, "; ", OfColumn(column));
  }
  return absl::DataLossError(
      absl::StrCat("nothing was trained: ", cause, "; mend the logs or the job, and start anew in another folder"));
}

}  // namespace hearth
