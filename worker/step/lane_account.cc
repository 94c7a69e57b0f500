#include "worker/step/lane_account.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/artifact/reading.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/log_list.h"

namespace hearth {

absl::StatusOr<std::unique_ptr<LaneAccount>> LaneAccount::Open(const std::string& folder, const LaneState& state) {
  std::string path = JoinPath(folder, absl::StrCat("lane-", state.cursor().lane(), ".tsv"));
  const uint64_t kept = state.dead_letter_bytes();
  // Through the descriptor from here on: the name may lead elsewhere by the next look.
  absl::StatusOr<OwnedFile> file = OpenForWriting(path, Writing::kAppendExisting);
  if (!file.ok() && !absl::IsNotFound(file.status())) return file.status();
  uint64_t there = 0;
  if (file.ok()) {
    struct stat info;
    if (fstat(fileno(file->get()), &info) != 0) return ErrorOf(errno, "stat", path);
    there = static_cast<uint64_t>(info.st_size);
  }
  if (there < kept) {
    return absl::DataLossError(absl::StrCat(path, ": ", there, " bytes, the snapshot counts ", kept,
                                            "; put the file back, or start with --fresh in another folder"));
  }
  if (there > kept && ftruncate(fileno(file->get()), static_cast<off_t>(kept)) != 0) {
    return ErrorOf(errno, "truncate", path);
  }
  return std::unique_ptr<LaneAccount>(new LaneAccount(std::move(path), state, file.ok() ? *std::move(file) : nullptr));
}

absl::Status LaneAccount::Enter(const Batch& batch, bool skipped, const std::vector<LogFile>& files) {
  const uint64_t records = static_cast<uint64_t>(batch.records);
  const uint64_t accounted = records + batch.delta.rejected() + batch.delta.filtered();
  if (batch.delta.read() != accounted) {
    return absl::InternalError(absl::StrCat("lane ", batch.lane, ", step ", batch.step, ": the reader counts ",
                                            batch.delta.read(), " records read, of which ", records, " valid, ",
                                            batch.delta.rejected(), " rejected, ", batch.delta.filtered(),
                                            " filtered"));
  }
  Ledger* ledger = state_.mutable_ledger();
  ledger->set_read(ledger->read() + batch.delta.read());
  ledger->set_filtered(ledger->filtered() + batch.delta.filtered());
  ledger->set_rejected(ledger->rejected() + batch.delta.rejected() + (skipped ? records : 0));
  ledger->set_trained(ledger->trained() + (skipped ? 0 : records));
  if (skipped) state_.set_non_finite(state_.non_finite() + records);
  MergeReading(batch.reading, state_.mutable_reading());
  if (!skipped) EnterLabels(batch);
  *state_.mutable_cursor() = batch.cursor;
  HEARTH_RETURN_IF_ERROR(Append(batch.dead_letters));
  if (!skipped) return absl::OkStatus();
  std::string lines;
  for (size_t i = 0; i < records; ++i) {
    const LogFile* const file = FindFile(files, batch.file_of[i]);
    const absl::string_view path = file != nullptr ? absl::string_view(file->path()) : "?";
    absl::StrAppend(&lines, path, "\t", batch.offset[i], "\tloss or gradient not finite in step ", batch.step, "\n");
  }
  return Append(lines);
}

void LaneAccount::EnterLabels(const Batch& batch) {
  if (batch.records == 0) return;
  const size_t tasks = batch.mask.size() / static_cast<size_t>(batch.records);
  Reading* const reading = state_.mutable_reading();
  while (reading->task_size() < static_cast<int>(tasks)) reading->add_task();
  for (size_t t = 0; t < tasks; ++t) {
    uint64_t positives = 0, labelled = 0;
    for (size_t cell = t; cell < batch.mask.size(); cell += tasks) {
      labelled += batch.mask[cell] != 0;
      positives += batch.mask[cell] != 0 && batch.labels[cell] != 0;
    }
    Reading::Task* const task = reading->mutable_task(static_cast<int>(t));
    task->set_positives(task->positives() + positives);
    task->set_negatives(task->negatives() + labelled - positives);
    task->set_masked(task->masked() + static_cast<uint64_t>(batch.records) - labelled);
  }
}

absl::Status LaneAccount::Append(const std::string& lines) {
  if (lines.empty()) return absl::OkStatus();
  if (file_ == nullptr) {
    HEARTH_RETURN_IF_ERROR(MakeDirectories(path_.substr(0, path_.rfind('/'))));
    HEARTH_ASSIGN_OR_RETURN(file_, OpenForWriting(path_, Writing::kAppend));
  }
  if (std::fwrite(lines.data(), 1, lines.size(), file_.get()) != lines.size()) return ErrorOf(errno, "write", path_);
  state_.set_dead_letter_bytes(state_.dead_letter_bytes() + lines.size());
  dead_letter_ = lines.substr(0, lines.find('\n'));
  return absl::OkStatus();
}

absl::Status LaneAccount::Sync(const SegmentEnd& end, bool epoch_ended, uint32_t skipped_in_row) {
  state_.set_segment_ends_at(end.step);
  state_.set_epoch_ends_at(end.of_epoch ? end.step : 0);
  if (epoch_ended) state_.mutable_cursor()->set_end_of_epoch(true);
  state_.set_skipped_in_row(skipped_in_row);
  if (file_ == nullptr) return absl::OkStatus();
  if (std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0) return ErrorOf(errno, "fsync", path_);
  if (name_is_durable_) return absl::OkStatus();
  const std::string folder = path_.substr(0, path_.rfind('/'));
  HEARTH_RETURN_IF_ERROR(FsyncPath(folder));
  HEARTH_RETURN_IF_ERROR(FsyncPath(JoinPath(folder, "..")));  // Append may have made the folder too
  name_is_durable_ = true;
  return absl::OkStatus();
}

}  // namespace hearth
