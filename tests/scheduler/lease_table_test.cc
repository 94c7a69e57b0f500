#include "scheduler/lease_table.h"

#include <gtest/gtest.h>

#include "common/base/status.h"

namespace hearth {
namespace {

LaneState Lane(uint32_t lane, uint32_t epoch, uint64_t read, bool end_of_epoch = false) {
  LaneState state;
  state.mutable_cursor()->set_lane(lane);
  state.mutable_cursor()->set_epoch(epoch);
  state.mutable_cursor()->set_end_of_epoch(end_of_epoch);
  state.mutable_ledger()->set_read(read);
  state.mutable_ledger()->set_trained(read);
  return state;
}

LogFile File(uint32_t number) {
  LogFile file;
  file.set_number(number);
  return file;
}

TEST(LeaseTable, DealsEachLaneToOneWorkerWhateverTheNumberOfWorkers) {
  for (uint32_t lanes = 1; lanes <= 7; ++lanes) {
    for (uint32_t workers = 1; workers <= lanes; ++workers) {
      const LeaseTable table = *LeaseTable::Make(lanes, workers, {});
      std::vector<int> held(lanes, 0);
      for (uint32_t worker = 0; worker < workers; ++worker) {
        for (const LaneState& lane : table.LeasesOf(worker)) {
          EXPECT_EQ(lane.cursor().lane() % workers, worker);
          ++held[lane.cursor().lane()];
        }
      }
      EXPECT_EQ(held, std::vector<int>(lanes, 1));
    }
  }
}

TEST(LeaseTable, RefusesMoreWorkersThanLanesWithTheRemedy) {
  const absl::Status status = LeaseTable::Make(2, 3, {}).status();
  EXPECT_EQ(ExitCodeOf(status), kExitConfig);
  EXPECT_NE(status.message().find("--np-worker 2"), absl::string_view::npos) << status;
}

TEST(LeaseTable, RefusesARestoredStateThatIsNotOneForEachLane) {
  EXPECT_TRUE(LeaseTable::Make(2, 1, {Lane(0, 0, 1), Lane(1, 0, 1)}).ok());
  EXPECT_TRUE(absl::IsDataLoss(LeaseTable::Make(2, 1, {Lane(0, 0, 1)}).status()));
  EXPECT_TRUE(absl::IsDataLoss(LeaseTable::Make(2, 1, {Lane(0, 0, 1), Lane(0, 0, 1)}).status()));
  LaneState wrong = Lane(1, 0, 1);
  wrong.mutable_ledger()->set_rejected(1);
  EXPECT_TRUE(absl::IsDataLoss(LeaseTable::Make(2, 1, {Lane(0, 0, 1), wrong}).status()));
}

TEST(LeaseTable, AdvancesAllLanesOrNone) {
  LeaseTable table = *LeaseTable::Make(2, 1, {Lane(0, 1, 10), Lane(1, 1, 10)});
  LaneState unsound = Lane(1, 1, 20);
  unsound.mutable_ledger()->set_trained(19);
  for (const std::vector<LaneState>& wrong : std::vector<std::vector<LaneState>>{
           {Lane(0, 1, 20)},                  // one is missing
           {Lane(0, 1, 20), Lane(0, 1, 20)},  // one is there twice
           {Lane(0, 1, 20), Lane(1, 0, 20)},  // the epoch went back
           {Lane(0, 1, 20), Lane(1, 1, 9)},   // the ledger went back
           {Lane(0, 1, 20), unsound},         // the ledger does not add up
       }) {
    EXPECT_TRUE(absl::IsInternal(table.Advance(wrong)));
    EXPECT_EQ(table.TotalLedger().read(), 20u);
  }
  EXPECT_TRUE(table.Advance({Lane(0, 2, 30), Lane(1, 1, 10)}).ok());
  EXPECT_EQ(table.TotalLedger().read(), 40u);
  EXPECT_EQ(table.TotalLedger().trained(), 40u);
}

TEST(LeaseTable, BeginsTheNextEpochOnceAllLanesAreAtTheEndOfOne) {
  EXPECT_EQ(LeaseTable::Make(2, 1, {})->epoch(), 0u);
  EXPECT_EQ(LeaseTable::Make(2, 1, {Lane(0, 3, 1, true), Lane(1, 3, 1)})->epoch(), 3u);
  EXPECT_EQ(LeaseTable::Make(2, 1, {Lane(0, 3, 1, true), Lane(1, 3, 1, true)})->epoch(), 4u);
}

TEST(LeaseTable, CountsTheFilesThatTheSlowestLaneHasNotReached) {
  LaneState first = Lane(0, 0, 5);
  first.mutable_cursor()->set_file(2);
  first.mutable_cursor()->set_record(5);
  LaneState second = Lane(1, 0, 5);
  second.mutable_cursor()->set_file(0);
  second.mutable_cursor()->set_record(5);
  LeaseTable table = *LeaseTable::Make(2, 1, {first, second});
  table.AppendFiles({File(0), File(1)}, false);
  table.AppendFiles({File(2), File(3)}, true);
  EXPECT_EQ(table.FilesBehind(), 3u);
  EXPECT_TRUE(table.files_closed());
  EXPECT_EQ(LeaseTable::Make(1, 1, {})->FilesBehind(), 0u);
}

}  // namespace
}  // namespace hearth
