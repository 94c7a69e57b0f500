#include "scheduler/lease_table.h"

#include <algorithm>

#include "common/artifact/reading.h"
#include "common/base/status.h"
#include "common/job/log_list.h"

namespace hearth {

absl::Status CheckLedger(const Ledger& ledger) {
  if (ledger.read() == ledger.trained() + ledger.rejected() + ledger.filtered()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the ledger does not add up: read ", ledger.read(), " != trained ",
                                          ledger.trained(), " + rejected ", ledger.rejected(), " + filtered ",
                                          ledger.filtered()));
}

absl::StatusOr<LeaseTable> LeaseTable::Make(uint32_t lanes, uint32_t workers, const std::vector<LaneState>& restored) {
  HEARTH_CHECK(lanes > 0 && workers > 0);
  if (workers > lanes) {
    return absl::FailedPreconditionError(
        absl::StrCat("there are ", workers, " workers for ", lanes,
                     " lanes, and a worker without a lane has nothing to do; start with --np-worker ", lanes,
                     " or fewer (lanes are fixed at a job's first start by training.lanes)"));
  }
  std::vector<LaneState> states(lanes);
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    states[lane].mutable_cursor()->set_lane(lane);
    states[lane].mutable_ledger();
  }
  if (!restored.empty()) {
    bool whole = restored.size() == lanes;
    for (uint32_t lane = 0; whole && lane < lanes; ++lane) {
      whole = restored[lane].cursor().lane() == lane && CheckLedger(restored[lane].ledger()).ok();
    }
    if (!whole)
      return absl::DataLossError(absl::StrCat("MANIFEST does not hold one sound state for each of ", lanes, " lanes"));
    states = restored;
  }
  return LeaseTable(std::move(states), workers);
}

std::vector<LaneState> LeaseTable::LeasesOf(uint32_t worker) const {
  HEARTH_CHECK(worker < workers_);
  std::vector<LaneState> leases;
  for (uint32_t lane = worker; lane < lanes(); lane += workers_) leases.push_back(lanes_[lane]);
  return leases;
}

void LeaseTable::Reopen(uint32_t files_end) {
  const uint32_t epoch = NewestEpoch(lanes_);
  for (LaneState& lane : lanes_) {
    Cursor* const cursor = lane.mutable_cursor();
    if (!cursor->end_of_epoch() || cursor->epoch() != epoch || cursor->file() >= files_end) continue;
    cursor->clear_end_of_epoch();
    lane.set_epoch_ends_at(0);
  }
}

bool LeaseTable::AtEpochEnd(uint64_t step) const { return hearth::AtEpochEnd(lanes_, step); }

uint32_t LeaseTable::epoch() const {
  const bool ended =
      std::all_of(lanes_.begin(), lanes_.end(), [](const LaneState& lane) { return lane.cursor().end_of_epoch(); });
  return NewestEpoch(lanes_) + (ended ? 1 : 0);
}

Ledger LeaseTable::TotalLedger() const {
  Ledger total;
  for (const LaneState& lane : lanes_) AddLedger(lane.ledger(), &total);
  return total;
}

uint64_t LeaseTable::BadRecords() const {
  uint64_t bad = 0;
  for (const LaneState& lane : lanes_)
    bad += lane.ledger().rejected() - std::min(lane.ledger().rejected(), lane.non_finite());
  return bad;
}

absl::Status LeaseTable::Advance(const std::vector<LaneState>& lanes) {
  if (lanes.size() != lanes_.size()) {
    return absl::InternalError(absl::StrCat("a cut brought ", lanes.size(), " lanes of ", lanes_.size()));
  }
  for (size_t l = 0; l < lanes.size(); ++l) {
    const Cursor& from = lanes_[l].cursor();
    const Cursor& to = lanes[l].cursor();
    if (to.lane() != l) return absl::InternalError(absl::StrCat("lane ", l, " is missing in a cut"));
    if (to.epoch() < from.epoch() || lanes[l].ledger().read() < lanes_[l].ledger().read()) {
      return absl::InternalError(absl::StrCat("lane ", l, " went backwards: from epoch ", from.epoch(), ", ",
                                              lanes_[l].ledger().read(), " records read, to epoch ", to.epoch(), ", ",
                                              lanes[l].ledger().read()));
    }
    HEARTH_RETURN_IF_ERROR(Annotate(CheckLedger(lanes[l].ledger()), absl::StrCat("lane ", l)));
  }
  lanes_ = lanes;
  return absl::OkStatus();
}

void LeaseTable::AppendFiles(const std::vector<LogFile>& files, bool closed) {
  HEARTH_CHECK(!files_closed_ || files.empty());
  for (const LogFile& file : files) {
    HEARTH_CHECK(files_.empty() || file.number() == files_.back().number() + 1);
    files_.push_back(file);
  }
  files_closed_ = closed;
}

uint64_t LeaseTable::FilesBehind() const {
  uint64_t behind = 0;
  if (files_.empty()) return behind;
  const uint64_t end = uint64_t{files_.back().number()} + 1;
  for (const LaneState& lane : lanes_) {
    if (lane.cursor().end_of_epoch()) continue;
    const uint64_t reached = uint64_t{lane.cursor().file()} + (lane.cursor().record() > 0 ? 1 : 0);
    behind = std::max<uint64_t>(behind, end - std::clamp<uint64_t>(reached, files_.front().number(), end));
  }
  return behind;
}

}  // namespace hearth
