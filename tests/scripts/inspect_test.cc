#include "scripts/hearth/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/config.h"
#include "common/file.h"
#include "common/manifest.h"
#include "common/status.h"

namespace hearth {
namespace {

using testing::HasSubstr;

std::string NewRun(const std::string& name) {
  const std::string run = absl::StrCat(testing::TempDir(), "/inspect_", getpid(), "_", name);
  std::filesystem::remove_all(run);
  return run;
}

void Commit(const std::string& run, uint64_t step) {
  Manifest manifest;
  manifest.set_schema(1);
  manifest.set_step(step);
  manifest.set_job("name: 'small' task { name: 'click' }");
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
  EXPECT_THAT(*FindSnapshotFolder(run), HasSubstr("/snapshots/100"));
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/100/MANIFEST", "schema: 1\n").ok());
  EXPECT_THAT(*FindSnapshotFolder(run), HasSubstr("/snapshots/10"));
}

TEST(Inspect, TellsMissingFromCorrupt) {
  const std::string run = NewRun("wrong");
  EXPECT_EQ(ExitCodeOf(FindSnapshotFolder(run).status()), kExitNoInput);
  ASSERT_TRUE(MakeDirectories(run + "/snapshots/3").ok());
  EXPECT_EQ(ExitCodeOf(FindSnapshotFolder(run).status()), kExitNoInput);
  const absl::Status uncommitted = FindSnapshotFolder(run + "/snapshots/3").status();
  EXPECT_EQ(ExitCodeOf(uncommitted), kExitBadData);
  EXPECT_THAT(std::string(uncommitted.message()), HasSubstr("MANIFEST"));
  Commit(run, 4);
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/4/rows", "row").ok());  // cut off
  const absl::Status corrupt = InspectSnapshot(run + "/snapshots/4", true).status();
  EXPECT_EQ(ExitCodeOf(corrupt), kExitBadData);
  EXPECT_THAT(std::string(corrupt.message()), HasSubstr("rows"));
}

TEST(Verify, NamesTheFileWhoseBytesChanged) {
  const std::string run = NewRun("verify");
  Commit(run, 4);
  ASSERT_TRUE(WriteFileAtomically(run + "/snapshots/4/rows", "r0ws").ok());
  EXPECT_TRUE(InspectSnapshot(run + "/snapshots/4", true).ok());  // the length is right
  const absl::Status corrupt = VerifySnapshotAt(run + "/snapshots/4").status();
  EXPECT_EQ(ExitCodeOf(corrupt), kExitBadData);
  EXPECT_THAT(std::string(corrupt.message()), HasSubstr("/snapshots/4/rows"));
}

}  // namespace
}  // namespace hearth
