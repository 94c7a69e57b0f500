// The reader on a real log, with the jobs that ship. Needs the data beside the source tree; elsewhere these tests are
// skipped.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "common/base/file.h"
#include "common/job/config.h"
#include "tests/worker/text_files.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

const char kData[] = HEARTH_SOURCE_DIR "/../shared/data/kuairand-pure";

class KuaiRand : public testing::Test {
 protected:
  void SetUp() override {
    if (!PathExists(JoinPath(kData, "README.md"))) GTEST_SKIP() << "KuaiRand-Pure is not at " << kData;
  }
  static Job LoadShipped(const std::string& name) {
    auto job = LoadJob(JoinPath(HEARTH_SOURCE_DIR "/scripts/jobs", name), {std::string("data_dir=") + kData});
    EXPECT_TRUE(job.ok()) << job.status();
    EXPECT_TRUE(ValidateJob(*job).ok()) << ValidateJob(*job);
    return *job;
  }
};

struct Counts {
  Ledger ledger;
  uint64_t records = 0;
  std::vector<uint64_t> labelled, positives;
  double Rate(int task) const { return static_cast<double>(positives[task]) / static_cast<double>(labelled[task]); }
};

// Reads at most batches_max batches of one lane.
Counts Read(const Job& job, const std::vector<Log>& logs, uint32_t lane, uint32_t lanes, int batches_max,
            uint32_t batch_size = 0) {
  FileList files(Env::Real());
  files.Append(*ListLogFiles(job, logs), true);
  LaneReaderOptions options;
  options.job = job;
  options.logs = logs;
  options.files = &files;
  options.lane = lane;
  options.lanes = lanes;
  options.batch_size = batch_size;
  options.scratch = testing::TempDir();
  options.env = Env::Real();
  Counts counts;
  counts.labelled.resize(job.task_size());
  counts.positives.resize(job.task_size());
  auto reader = LaneReader::Open(options);
  EXPECT_TRUE(reader.ok()) << reader.status();
  for (int i = 0; reader.ok() && i < batches_max; ++i) {
    auto batch = (*reader)->Next();
    EXPECT_TRUE(batch.ok()) << batch.status();
    if (!batch.ok() || *batch == nullptr) break;
    counts.records += (*batch)->records;
    counts.ledger.set_read(counts.ledger.read() + (*batch)->delta.read());
    counts.ledger.set_rejected(counts.ledger.rejected() + (*batch)->delta.rejected());
    counts.ledger.set_filtered(counts.ledger.filtered() + (*batch)->delta.filtered());
    for (size_t k = 0; k < (*batch)->labels.size(); ++k) {
      counts.labelled[k % job.task_size()] += (*batch)->mask[k] != 0;
      counts.positives[k % job.task_size()] += (*batch)->labels[k] != 0;
    }
  }
  return counts;
}

constexpr int kAll = 1 << 30;

TEST_F(KuaiRand, HasTheRowsAndPositiveRatesOfItsReadme) {
  Job job = LoadShipped("kuairand.txtpb");
  job.clear_slot();  // labels alone
  Log log = job.log(1);
  log.clear_where();
  const Counts counts = Read(job, {log}, 0, 1, kAll, 8192);
  EXPECT_EQ(counts.records, 228329u);
  EXPECT_EQ(counts.ledger.read(), 228329u);
  EXPECT_EQ(counts.ledger.rejected(), 0u);
  const double expected[] = {0.442, 0.311, 0.162, 0.044, 0.0171, 0.0185};
  const double rounding[] = {5e-4, 5e-4, 5e-4, 5e-4, 5e-5, 5e-5};
  ASSERT_EQ(job.task_size(), 6);
  for (int task = 0; task < 6; ++task)
    EXPECT_NEAR(counts.Rate(task), expected[task], rounding[task]) << job.task(task).name();
}

TEST_F(KuaiRand, ShippedJobsReadTheirDaysAndNoOthers) {
  for (const auto& [name, train, held_out] :
       {std::make_tuple("kuairand.txtpb", 185061, 43268), std::make_tuple("kuairand-tune.txtpb", 115574, 69487)}) {
    Job job = LoadShipped(name);
    job.clear_slot();
    const Counts days = Read(job, {job.log(1)}, 0, 1, kAll);
    EXPECT_EQ(days.records, static_cast<uint64_t>(train)) << name;
    EXPECT_EQ(days.ledger.filtered(), 228329u - train) << name;
    const Counts split = Read(job, {job.split(0).log()}, 0, 1, kAll, job.split(0).batch_size());
    EXPECT_EQ(split.records, static_cast<uint64_t>(held_out)) << name;
  }
}

TEST_F(KuaiRand, ShippedJobsReadTheHistoryWithMaskedTasksAndAllSlots) {
  for (const char* const name : {"kuairand.txtpb", "kuairand-tune.txtpb"}) {
    const Job job = LoadShipped(name);
    EXPECT_EQ(job.slot_size(), 37);
    const std::vector<Log> logs(job.log().begin(), job.log().end());
    const Counts counts = Read(job, logs, 1, 2, 20);
    EXPECT_EQ(counts.records, 20u * 1024);
    const uint64_t all = counts.records;
    EXPECT_THAT(counts.labelled, testing::ElementsAre(0, all, 0, 0, all, 0));
    EXPECT_GT(counts.Rate(1), 0.1);
    EXPECT_GT(counts.Rate(4), 0.001);
  }
}

TEST_F(KuaiRand, EachRecordOfTheTestDaysHasASignInEachSlot) {
  const Job job = LoadShipped("kuairand.txtpb");
  FileList files(Env::Real());
  const std::vector<Log> logs = {job.split(0).log()};
  files.Append(*ListLogFiles(job, logs), true);
  LaneReaderOptions options;
  options.job = job;
  options.logs = logs;
  options.files = &files;
  options.batch_size = 4096;
  options.env = Env::Real();
  const auto reader = LaneReader::Open(options);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto batch = *(*reader)->Next();
  ASSERT_EQ(batch->groups.size(), 1u);
  const RowGroup& group = batch->groups[0];
  ASSERT_EQ(group.offsets.size(), static_cast<size_t>(37 * batch->records + 1));
  // Distinct signs of each slot: joined columns vary, none is missing throughout.
  std::map<std::string, size_t> distinct;
  for (int slot = 0; slot < 37; ++slot) {
    std::map<int64_t, int> seen;
    for (int64_t r = 0; r < batch->records; ++r) {
      const int64_t bag = slot * batch->records + r;
      ASSERT_LT(group.offsets[bag], group.offsets[bag + 1]);
      for (int64_t i = group.offsets[bag]; i < group.offsets[bag + 1]; ++i) ++seen[group.row_of[i]];
    }
    EXPECT_GE(seen.size(), 2u) << job.slot(slot).name();
    distinct[job.slot(slot).name()] = seen.size();
  }
  EXPECT_GT(distinct["user_id"], 1000u);
  EXPECT_GT(distinct["tag"], 30u);
  EXPECT_GE(distinct["hour"], 2u);
}

}  // namespace
}  // namespace hearth
