#include "scripts/hearth/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/artifact/manifest.h"
#include "common/artifact/safetensors.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/rocksdb_store.h"
#include "scripts/hearth/supervise.h"

namespace hearth {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

std::string NewRun(const std::string& name) {
  const std::string run = absl::StrCat(testing::TempDir(), "/inspect_", getpid(), "_", name);
  std::filesystem::remove_all(run);
  return run;
}

void Commit(const std::string& run, uint64_t step, const std::string& job = "name: 'small' task { name: 'click' }") {
  Manifest manifest;
  manifest.set_schema(1);
  manifest.set_step(step);
  manifest.set_job(job);
  manifest.set_lanes(2);
  manifest.set_shards(4);
  manifest.set_servers(1);
  manifest.set_model_hash(0xabcdef0123456789u);
  for (uint32_t l = 0; l < 2; ++l) {
    LaneState* lane = manifest.add_lane();
    lane->mutable_cursor()->set_lane(l);
    lane->mutable_cursor()->set_window(7 + l);
    lane->mutable_ledger()->set_read(100);
    lane->mutable_ledger()->set_trained(98);
    lane->mutable_ledger()->set_rejected(2);
  }
  TableStats* table = manifest.add_table();
  table->set_name("user");
  table->set_rows(1234);
  table->set_bytes_disk(5678);
  Evaluation* evaluation = manifest.add_evaluation();
  evaluation->set_split("test");
  evaluation->set_read(120);
  evaluation->set_rejected(3);
  evaluation->set_step(step);
  Evaluation::Task* task = evaluation->add_task();
  task->set_name("click");
  task->set_samples(10);
  task->set_auc(0.75);
  const std::string folder = absl::StrCat(run, "/snapshots/", step);
  ASSERT_TRUE(MakeDirectories(folder).ok());
  ASSERT_TRUE(WriteFileAtomically(folder + "/rows", "rows").ok());
  const std::vector<FileEntry> entries = *DescribeFiles(folder, {"rows"});
  for (const FileEntry& entry : entries) *manifest.add_file() = entry;
  ASSERT_TRUE(CommitManifest(folder, manifest).ok());
}

// A snapshot that is whole: one server without a row, and dense state.
void CommitWhole(const std::string& run, uint64_t step) {
  const std::string folder = absl::StrCat(run, "/snapshots/", step);
  ASSERT_TRUE(MakeDirectories(folder).ok());
  ASSERT_TRUE(WriteFileAtomically(folder + "/rows", "rows").ok());
  const std::vector<NamedTensor> tensors = {{"weight", "F32", {1}, absl::Span<const char>("abcd", 4)}};
  ASSERT_TRUE(WriteSafetensors(folder + "/dense.safetensors", tensors, {}).ok());
  const auto store = OpenRocksDbStore(absl::StrCat(run, "/live-", step), RocksDbOptions());
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE((*store)->Checkpoint(folder + "/ps-0").ok());
  Manifest manifest;
  manifest.set_schema(1);
  manifest.set_step(step);
  manifest.set_job("name: 'small'");
  manifest.set_lanes(1);
  manifest.add_lane();
  manifest.set_servers(1);
  manifest.set_shards(1);
  manifest.set_dense_hash(HashTensors(tensors));
  manifest.set_model_hash(ModelHash(0, HashTensors(tensors)));
  const std::vector<FileEntry> entries = *DescribeFiles(folder, {"dense.safetensors", "ps-0", "rows"});
  for (const FileEntry& entry : entries) *manifest.add_file() = entry;
  ASSERT_TRUE(CommitManifest(folder, manifest).ok());
}

TEST(Inspect, ShowsStepTablesCursorsLedgerEvaluationsAndHash) {
  const std::string run = NewRun("json");
  Commit(run, 40);
  const auto json = nlohmann::json::parse(*InspectSnapshot(run + "/snapshots/40", true));
  EXPECT_EQ(json["step"], 40);
  EXPECT_EQ(json["job"], "small");
  EXPECT_EQ(json["lanes"], 2);
  EXPECT_EQ(json["model_hash"], "abcdef0123456789");
  EXPECT_EQ(json["tables"]["user"]["rows"], 1234);
  EXPECT_EQ(json["samples"]["read"], 200);
  EXPECT_EQ(json["samples"]["rejected"], 4);
  EXPECT_EQ(json["lane_states"][1]["window"], 8);
  EXPECT_EQ(json["evaluations"]["test"]["read"], 120);
  EXPECT_EQ(json["evaluations"]["test"]["rejected"], 3);
  EXPECT_EQ(json["evaluations"]["test"]["tasks"]["click"]["auc"], 0.75);
  EXPECT_TRUE(json["evaluations"]["test"]["tasks"]["click"]["gauc"].is_null());
  const std::string text = *InspectSnapshot(run + "/snapshots/40", false);
  for (const char* part :
       {"40", "small", "abcdef0123456789", "1234", "5678", "read 200 = trained 196 + rejected 4", "0.75000"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST(Inspect, TakesTheNewestOfARunWhoseManifestReadsWell) {
  const std::string run = NewRun("newest");
  for (const uint64_t step : {9, 10, 100}) Commit(run, step);
  ASSERT_TRUE(MakeDirectories(run + "/snapshots/200").ok());  // never committed
  EXPECT_THAT(HoldSnapshotAt(run)->folder, EndsWith("/snapshots/100"));
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/100/MANIFEST", "schema: 1\n").ok());
  EXPECT_THAT(HoldSnapshotAt(run)->folder, EndsWith("/snapshots/10"));
}

TEST(Inspect, TellsMissingFromCorrupt) {
  const std::string run = NewRun("wrong");
  EXPECT_EQ(ExitCodeOf(HoldSnapshotAt(run).status()), kExitNoInput);
  ASSERT_TRUE(MakeDirectories(run + "/snapshots/3").ok());
  EXPECT_EQ(ExitCodeOf(HoldSnapshotAt(run).status()), kExitNoInput);
  const absl::Status uncommitted = HoldSnapshotAt(run + "/snapshots/3").status();
  EXPECT_EQ(ExitCodeOf(uncommitted), kExitBadData);
  EXPECT_THAT(std::string(uncommitted.message()), HasSubstr("MANIFEST"));
  Commit(run, 4);
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/4/rows", "row").ok());  // cut off
  const absl::Status corrupt = InspectSnapshot(run + "/snapshots/4", true).status();
  EXPECT_EQ(ExitCodeOf(corrupt), kExitBadData);
  EXPECT_THAT(std::string(corrupt.message()), HasSubstr("rows"));
}

// RocksDB's threads outlive a test. They inherit its mask, so that signals of later tests do not come to them.
class Verify : public testing::Test {
  Supervisor takes_the_signals_;
};

TEST_F(Verify, NamesTheFileWhoseBytesChanged) {
  const std::string run = NewRun("verify");
  Commit(run, 4);
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/4/rows", "r0ws").ok());
  EXPECT_TRUE(InspectSnapshot(run + "/snapshots/4", true).ok());  // the length is right
  const absl::Status corrupt = VerifySnapshotAt(run + "/snapshots/4").status();
  EXPECT_EQ(ExitCodeOf(corrupt), kExitBadData);
  EXPECT_THAT(std::string(corrupt.message()), HasSubstr("/snapshots/4/rows"));
}

TEST(Inspect, ShowsAJobWhoseNameIsNotUtf8) {
  const std::string run = NewRun("latin");
  Commit(run, 4, "name: 'caf\\351'");
  EXPECT_EQ(nlohmann::json::parse(*InspectSnapshot(run, true))["job"], "caf\uFFFD");
}

TEST_F(Verify, SaysThatTheNewestOfARunIsNotWholeAndWhichOneIs) {
  const std::string run = NewRun("verify_run");
  for (const uint64_t step : {9, 10, 100}) CommitWhole(run, step);
  const absl::StatusOr<std::string> whole = VerifySnapshotAt(run);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_THAT(*whole, HasSubstr("/snapshots/100: whole"));

  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/100/MANIFEST", "schema: 1\n").ok());
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/10/rows", "r0ws").ok());
  const absl::Status older = VerifySnapshotAt(run).status();
  EXPECT_EQ(ExitCodeOf(older), kExitBadData);
  const std::string said(older.message());
  EXPECT_THAT(said, HasSubstr("/snapshots/100/MANIFEST: "));
  EXPECT_THAT(said, HasSubstr("/snapshots/10/rows: "));
  EXPECT_THAT(said, HasSubstr("/snapshots/9: whole: step 9"));

  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/9/rows", "r0ws").ok());
  const absl::Status none = VerifySnapshotAt(run).status();
  EXPECT_EQ(ExitCodeOf(none), kExitBadData);
  EXPECT_THAT(std::string(none.message()), HasSubstr("/snapshots/9/rows: "));
}

TEST_F(Verify, ComparesTheDenseHashAndTheModelHash) {
  const std::string run = NewRun("verify_hashes");
  CommitWhole(run, 3);
  const Manifest good = *ReadManifest(run + "/snapshots/3");
  Manifest bad = good;
  bad.set_dense_hash(good.dense_hash() ^ 1);
  bad.set_model_hash(ModelHash(bad.rows_hash(), bad.dense_hash()));
  ASSERT_TRUE(CommitManifest(run + "/snapshots/3", bad).ok());
  const absl::Status dense = VerifySnapshotAt(run).status();
  EXPECT_EQ(ExitCodeOf(dense), kExitBadData);
  EXPECT_THAT(std::string(dense.message()), HasSubstr("/snapshots/3/dense.safetensors: "));
  bad = good;
  bad.set_model_hash(good.model_hash() ^ 1);
  ASSERT_TRUE(CommitManifest(run + "/snapshots/3", bad).ok());
  const absl::Status model = VerifySnapshotAt(run).status();
  EXPECT_EQ(ExitCodeOf(model), kExitBadData);
  EXPECT_THAT(std::string(model.message()), HasSubstr("model_hash"));
}

}  // namespace
}  // namespace hearth
