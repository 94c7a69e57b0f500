// A table over RocksDB whose disk fails at one call after the other.
#include "tests/embedding/failing_disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <vector>

#include "common/base/status.h"
#include "embedding/rocksdb_store.h"
#include "embedding/store_io.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

constexpr TableNumber kTable = 1;
constexpr uint32_t kDim = 64;
constexpr uint64_t kIds = 3000;
constexpr uint64_t kSteps = 13;
constexpr uint64_t kFirstCut = 3;                    // the disk is sound until then
constexpr uint64_t kCuts[] = {kFirstCut, 6, 9, 13};  // each goes on beside the next step

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kRunsMax = 6;
#else
constexpr uint64_t kRunsMax = 40;
#endif

TableOptions MakeTableOptions() {
  TableOptions options;
  options.config.set_name("failing");
  options.config.set_dim(kDim);
  options.config.mutable_admission()->set_count_min(2);
  options.number = kTable;
  options.shards = 4;
  options.memory_rows_max = 250;
  return options;
}

// Rows of many sizes of write: sorted files, and what goes by the write buffer.
Part PartOf(uint64_t step) {
  Random random(step);
  return RandomPart(&random, kTable, kIds, step % 3 == 0 ? 1800 : 300, kDim);
}

// What the table must be after each step.
const std::vector<ReferenceTable>& References() {
  static const auto* const references = [] {
    auto* made = new std::vector<ReferenceTable>{ReferenceTable(MakeTableOptions())};
    for (uint64_t step = 1; step <= kSteps; ++step) {
      made->push_back(made->back());
      made->back().Push(step, 10, {PartOf(step)});
    }
    return made;
  }();
  return *references;
}

// Rows of `signs` after step `step`, for a pull of that step or, with `occurrences`, of the next.
std::vector<float> Expected(uint64_t step, const Part& part, bool read_only) {
  std::vector<float> rows;
  for (size_t i = 0; i < part.signs.size(); ++i) {
    const std::vector<float> row =
        References()[step].Pull(step + !read_only, part.signs[i], read_only ? 0 : part.occurrences[i]);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}

// The rows as a restart finds them in the checkpoint of cut `step`.
void ExpectWhole(const std::string& checkpoint, uint64_t step) {
  ASSERT_TRUE(VerifyRocksDbStore(checkpoint).ok()) << VerifyRocksDbStore(checkpoint);
  const auto store = OpenRocksDbStore(checkpoint, RocksDbOptions());
  ASSERT_TRUE(store.ok()) << store.status();
  const auto table = EmbeddingTable::Open(MakeTableOptions(), store->get());
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ((*table)->stats().rows, References()[step].RowsAt(step));
  Part all;
  for (uint64_t id = 0; id < kIds; ++id) all.signs.push_back(MakeSign(kTable, id));
  std::vector<float> rows(kIds * kDim);
  ASSERT_TRUE((*table)->Pull(step, all.signs, {}, rows.data()).ok());
  EXPECT_EQ(rows, Expected(step, all, true));
  const auto hash = (*table)->Snapshot(step);
  ASSERT_TRUE(hash.ok()) << hash.status();
  EXPECT_EQ(*hash, References()[step].Hash(step));
}

// One run, to its end or to the first error.
class FailingRun {
 public:
  explicit FailingRun(const std::string& folder, FailingDisk* disk) : folder_(folder), disk_(disk) {}

  absl::Status Run(const DiskFault& fault) {
    RocksDbOptions options;
    options.write_buffer_bytes = 64 << 10;
    options.compaction_threads = 4 * kRunsAtOnce;  // RocksDB flushes with a fourth as many; all stores share them
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<KvStore> store, OpenRocksDbStore(JoinPath(folder_, "live"), options));
    store_ = store.get();
    StoreIo io(Env::Real(), store.get(), 2);
    io_ = &io;
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<EmbeddingTable> table, EmbeddingTable::Open(MakeTableOptions(), &io));
    table_ = table.get();
    for (uint64_t step = 1; step <= kSteps; ++step) {
      const absl::Status status = Step(step);
      HEARTH_RETURN_IF_ERROR(status);
      if (step == kFirstCut) disk_->Arm(fault);
    }
    return absl::OkStatus();
  }
  const std::vector<uint64_t>& cuts() const { return cuts_; }  // the copies that are reported to be there
  std::string CheckpointOf(uint64_t step) const { return JoinPath(folder_, absl::StrCat("cut-", step)); }

 private:
  absl::Status Step(uint64_t step) {
    const Part part = PartOf(step);
    HEARTH_RETURN_IF_ERROR(table_->Prefetch(step, part.signs));
    HEARTH_RETURN_IF_ERROR(Pull(step - 1));
    HEARTH_RETURN_IF_ERROR(table_->Push(step, 10, {part.span()}));
    if (cutting_) HEARTH_RETURN_IF_ERROR(FinishCut());
    if (std::count(std::begin(kCuts), std::end(kCuts), step) == 0) return table_->Maintain(step, 500).status();
    HEARTH_RETURN_IF_ERROR(table_->BeginCut(step));
    cutting_ = step;
    HEARTH_RETURN_IF_ERROR(table_->ContinueCut(50).status());
    return step == kFirstCut || step == kSteps ? FinishCut() : absl::OkStatus();
  }
  absl::Status Pull(uint64_t after) {
    const Part part = PartOf(after + 1);
    std::vector<float> rows(part.signs.size() * kDim);
    HEARTH_RETURN_IF_ERROR(table_->Pull(after + 1, part.signs, part.occurrences, rows.data()));
    EXPECT_EQ(rows, Expected(after, part, false)) << "after step " << after;
    return absl::OkStatus();
  }
  absl::Status FinishCut() {
    const uint64_t step = std::exchange(cutting_, 0);
    for (bool more = true; more;) {
      HEARTH_ASSIGN_OR_RETURN(more, table_->ContinueCut(200, /*wait=*/true));
    }
    const std::unique_ptr<Event> copied = Env::Real()->NewEvent();
    absl::Status status;
    io_->Then([&](const absl::Status& written) {
      status = written.ok() ? store_->Checkpoint(CheckpointOf(step)) : written;
      copied->Notify();
    });
    const TableCut cut = table_->EndCut();
    copied->WaitUntil(kNever);
    HEARTH_RETURN_IF_ERROR(status);
    EXPECT_EQ(cut.hash, References()[step].Hash(step));
    EXPECT_EQ(cut.rows, References()[step].RowsAt(step));
    cuts_.push_back(step);
    return absl::OkStatus();
  }

  const std::string folder_;
  FailingDisk* const disk_;
  KvStore* store_ = nullptr;
  StoreIo* io_ = nullptr;
  EmbeddingTable* table_ = nullptr;
  uint64_t cutting_ = 0;  // the cut under way
  std::vector<uint64_t> cuts_;
};

struct Outcome {
  uint64_t calls = 0;
  bool failed = false;  // some call was made to
  absl::Status status;
};

Outcome RunWith(const DiskFault& fault, const std::string& folder) {
  SCOPED_TRACE(
      absl::StrCat("call ", fault.at, fault.once ? " alone: " : " and all after it: ", std::strerror(fault.error)));
  Outcome outcome;
  std::vector<uint64_t> cuts;
  {
    FailingDisk disk(folder);
    FailingRun run(folder, &disk);
    outcome.status = run.Run(fault);
    outcome.calls = disk.calls();
    outcome.failed = !disk.first_failed().empty();
    cuts = run.cuts();
    SCOPED_TRACE(disk.first_failed());
    if (outcome.status.ok()) {
      EXPECT_TRUE(std::equal(cuts.begin(), cuts.end(), std::begin(kCuts), std::end(kCuts)));
    } else {
      EXPECT_TRUE(outcome.failed);
      EXPECT_EQ(ExitCodeOf(outcome.status), kExitIo) << outcome.status;
      EXPECT_NE(outcome.status.message().find(folder), absl::string_view::npos) << outcome.status;
      EXPECT_NE(outcome.status.message().find(std::strerror(fault.error)), absl::string_view::npos) << outcome.status;
    }
    disk.Arm(DiskFault());  // sound again
    EXPECT_FALSE(cuts.empty());
    for (const uint64_t step : cuts) ExpectWhole(run.CheckpointOf(step), step);
  }
  EXPECT_TRUE(RemoveTree(folder).ok());
  return outcome;
}

TEST(FailingDisk, FailsTheChosenCallsOfItsFolderAndKnowsWhatIsSynced) {
  const std::string folder = NewTestFolder(), other = NewTestFolder();
  FailingDisk disk(folder);
  const std::string file = JoinPath(folder, "file");
  disk.Arm({3, /*once=*/true, EIO});  // removed, made, written
  const absl::Status status = WriteFileAtomically(file, "contents");
  EXPECT_NE(status.message().find(std::strerror(EIO)), absl::string_view::npos) << status;
  EXPECT_EQ(disk.first_failed(), absl::StrCat("write ", file, ".tmp"));
  EXPECT_FALSE(PathExists(file));
  disk.Arm({1, /*once=*/false, ENOSPC});
  EXPECT_EQ(WriteFileAtomically(file, "contents").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(MakeDirectories(JoinPath(folder, "sub")).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(WriteFileAtomically(JoinPath(other, "file"), "contents").ok());
  disk.Arm(DiskFault());
  EXPECT_TRUE(WriteFileAtomically(file, "contents").ok());
  EXPECT_GE(disk.calls(), 5u) << "made, written, synced, renamed, and its folder synced";
  EXPECT_TRUE(disk.IsSynced(file) && disk.IsSynced(folder));
  const int fd = open(file.c_str(), O_WRONLY);
  ASSERT_EQ(write(fd, "x", 1), 1);
  close(fd);
  EXPECT_FALSE(disk.IsSynced(file));
  EXPECT_TRUE(disk.IsSynced(folder));
  ASSERT_EQ(unlink(file.c_str()), 0);
  EXPECT_FALSE(disk.IsSynced(folder));
}

class AFailingStore : public testing::TestWithParam<DiskFault> {};

TEST_P(AFailingStore, IsOneClearErrorAndEveryReportedCutIsWhole) {
  const Outcome sound = RunWith(DiskFault(), NewTestFolder());
  ASSERT_TRUE(sound.status.ok()) << sound.status;
  ASSERT_GT(sound.calls, 100u);
  const std::vector<Outcome> outcomes = RunWithFaults(
      GetParam(), sound.calls, kRunsMax, [](const DiskFault& fault) { return RunWith(fault, NewTestFolder()); });
  const auto went_on = [](const Outcome& outcome) { return outcome.status.ok(); };
  std::cout << sound.calls << " calls; of " << outcomes.size() << " runs "
            << std::count_if(outcomes.begin(), outcomes.end(), went_on) << " went on\n";
}

INSTANTIATE_TEST_SUITE_P(All, AFailingStore, testing::ValuesIn(kDiskFaults),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace hearth
