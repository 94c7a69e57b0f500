// What one lane has to show for itself at a cut: cursor, ledger and dead letters of applied steps, and nothing of what
// was merely read ahead (docs/PROTOCOL.md §1).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/proto/control.pb.h"
#include "model/batch/batch.h"
#include "worker/step/step_clock.h"

namespace hearth {

// One thread.
class LaneAccount {
 public:
  // Takes up the lane where `state` left it: cuts its dead-letter file, folder/lane-<l>.tsv, back to the recorded
  // length. DataLoss when the file is shorter than that.
  static absl::StatusOr<std::unique_ptr<LaneAccount>> Open(const std::string& folder, const LaneState& state);

  // Enters an applied step's batch. `skipped`: its records are rejected and dead-lettered as non-finite;
  // files[file_of[i]] is then looked up, by number. Internal when the reader's counts do not add up.
  absl::Status Enter(const Batch& batch, bool skipped, const std::vector<LogFile>& files);

  // Makes the dead-letter file and its name durable, and notes what a LaneState needs beside cursor and ledger.
  // `epoch_ended`: at this cut, whether this lane knew it or another did.
  absl::Status Sync(const SegmentEnd& end, bool epoch_ended, uint32_t skipped_in_row);
  const LaneState& state() const { return state_; }
  // The newest one of this process, as an example: path, offset, reason; empty where there was none.
  const std::string& dead_letter() const { return dead_letter_; }

 private:
  LaneAccount(std::string path, const LaneState& state, OwnedFile file)
      : path_(std::move(path)), state_(state), file_(std::move(file)) {}
  void EnterLabels(const Batch& batch);
  absl::Status Append(const std::string& lines);

  const std::string path_;
  LaneState state_;
  std::string dead_letter_;
  OwnedFile file_;  // null: not there before the first dead letter
  bool name_is_durable_ = false;
};

}  // namespace hearth
