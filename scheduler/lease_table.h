// Which worker holds which lane, how far each lane is, and the list of files. Pure state: no clock, no I/O.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

class LeaseTable {
 public:
  // Lane l goes to worker l mod `workers`. `restored`: the lanes of a MANIFEST, or empty at a first start, when every
  // lane begins at the beginning. FailedPrecondition (with the remedy) where there are more workers than lanes;
  // DataLoss where `restored` is not one state for each lane.
  static absl::StatusOr<LeaseTable> Make(uint32_t lanes, uint32_t workers, const std::vector<LaneState>& restored);

  uint32_t lanes() const { return static_cast<uint32_t>(lanes_.size()); }
  // In lane order. REQUIRES: worker < workers.
  std::vector<LaneState> LeasesOf(uint32_t worker) const;
  // The list of files has grown to `files_end` since the lanes came to the end of an epoch: it goes on.
  void Reopen(uint32_t files_end);
  // Whether all lanes are at the end of an epoch, and `step`, where they are, is the cut at that end or later.
  bool AtEpochEnd(uint64_t step) const;
  // The epoch in which training goes on: the lanes' one, or the next where all of them are at its end.
  uint32_t epoch() const;
  // Counts over all lanes.
  Ledger TotalLedger() const;
  // Records that could not be read, over all lanes: what is rejected, less the records of steps that were skipped.
  uint64_t BadRecords() const;

  // Every lane as it is at a new cut, in lane order. Internal where a lane is missing, went backwards, or its ledger
  // does not add up; nothing is changed then.
  absl::Status Advance(const std::vector<LaneState>& lanes);

  const std::vector<LogFile>& files() const { return files_; }
  bool files_closed() const { return files_closed_; }
  // Appends; REQUIRES: numbers go on without a gap, and the list was not closed.
  void AppendFiles(const std::vector<LogFile>& files, bool closed);
  // Files listed that the slowest lane has not reached.
  uint64_t FilesBehind() const;

 private:
  LeaseTable(std::vector<LaneState> lanes, uint32_t workers) : lanes_(std::move(lanes)), workers_(workers) {}

  std::vector<LaneState> lanes_;  // lane l at position l
  uint32_t workers_;
  std::vector<LogFile> files_;
  bool files_closed_ = false;
};

// Internal unless read = trained + rejected + filtered.
absl::Status CheckLedger(const Ledger& ledger);

}  // namespace hearth
