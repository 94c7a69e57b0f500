#include "common/artifact/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>

#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Snapshots of a few files each, as the scheduler leaves them.
class ManifestTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
    snapshots_ = JoinPath(testing::TempDir(), absl::StrCat("manifest_test-", info->name(), "-", getpid()));
    ASSERT_TRUE(RemoveTree(snapshots_).ok());
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(snapshots_).ok()); }

  std::string Folder(uint64_t step) const { return JoinPath(snapshots_, absl::StrCat(step)); }

  Manifest Commit(uint64_t step) {
    const std::string folder = Folder(step);
    EXPECT_TRUE(MakeDirectories(JoinPath(folder, "ps-0/tables")).ok());
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "dense.safetensors"), absl::StrCat("dense of ", step)).ok());
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "ps-0/tables/000001.sst"), std::string(5000, 'r')).ok());
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "ps-0/CURRENT"), "").ok());
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_job("name: \"a\"\n# xxh3 not a checksum\n");
    manifest.set_rows_hash(7);
    manifest.set_lanes(1);
    manifest.set_shards(1);
    manifest.set_servers(1);
    manifest.add_lane();
    const std::vector<FileEntry> files = DescribeFiles(folder, {"dense.safetensors", "ps-0"}).value();
    manifest.mutable_file()->Assign(files.begin(), files.end());
    EXPECT_TRUE(CommitManifest(folder, manifest).ok());
    return manifest;
  }

  SnapshotChoice Find() const {
    absl::StatusOr<SnapshotChoice> choice = FindNewestSnapshot(snapshots_);
    EXPECT_TRUE(choice.ok()) << choice.status();
    return choice.ok() ? *choice : SnapshotChoice();
  }

  void FlipBit(const std::string& path, size_t at) {
    std::string contents = ReadFile(path).value();
    contents.at(at) ^= 1;
    ASSERT_TRUE(WriteFileAtomically(path, contents).ok());
  }

  std::string snapshots_;
};

TEST_F(ManifestTest, ComesBackAsItWentAndListsFilesOfFolders) {
  const Manifest manifest = Commit(20);
  std::vector<std::string> paths;
  for (const FileEntry& file : manifest.file()) paths.push_back(file.path());
  EXPECT_THAT(paths, ElementsAre("dense.safetensors", "ps-0/CURRENT", "ps-0/tables/000001.sst"));
  EXPECT_EQ(manifest.file(2).bytes(), 5000u);
  const auto read = ReadManifest(Folder(20));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->SerializeAsString(), manifest.SerializeAsString());
  EXPECT_TRUE(VerifyFiles(Folder(20), *read).ok());
}

TEST_F(ManifestTest, TheNewestStepByNumberIsChosen) {
  EXPECT_THAT(Find().folder, IsEmpty()) << "no folder at all is no snapshot";
  Commit(0);
  Commit(9);
  Commit(100);
  ASSERT_TRUE(MakeDirectories(JoinPath(snapshots_, "100.tmp")).ok());
  ASSERT_TRUE(MakeDirectories(JoinPath(snapshots_, "0200")).ok());
  const SnapshotChoice choice = Find();
  EXPECT_EQ(choice.folder, Folder(100));
  EXPECT_EQ(choice.manifest.step(), 100u);
  EXPECT_THAT(choice.passed_over, IsEmpty());
}

TEST_F(ManifestTest, AFolderWithoutManifestIsPassedOver) {
  Commit(10);
  ASSERT_TRUE(MakeDirectories(Folder(20)).ok());
  const SnapshotChoice choice = Find();
  EXPECT_EQ(choice.folder, Folder(10));
  EXPECT_THAT(choice.passed_over, ElementsAre(HasSubstr("20/MANIFEST")));
}

TEST_F(ManifestTest, AFlippedBitOfAnyFileIsFoundAndNamed) {
  Commit(10);
  Commit(20);
  FlipBit(JoinPath(Folder(20), "ps-0/tables/000001.sst"), 4999);
  EXPECT_TRUE(ReadManifest(Folder(20)).ok()) << "lengths are right; only the checksum is not";
  EXPECT_EQ(Find().folder, Folder(20)) << "rows are checked where they are read, until somebody has met a fault";
  ASSERT_TRUE(MarkSuspect(snapshots_).ok());
  SnapshotChoice choice = Find();
  EXPECT_EQ(choice.folder, Folder(10));
  EXPECT_THAT(choice.passed_over, ElementsAre(HasSubstr("000001.sst: checksum")));
  FlipBit(JoinPath(Folder(10), "dense.safetensors"), 0);
  choice = Find();
  EXPECT_THAT(choice.folder, IsEmpty());
  EXPECT_THAT(choice.passed_over, ElementsAre(HasSubstr("000001.sst"), HasSubstr("dense.safetensors")));
}

TEST_F(ManifestTest, MissingAndShortenedFilesAreFoundByReadManifestAlone) {
  Commit(10);
  Commit(20);
  ASSERT_TRUE(RemoveTree(JoinPath(Folder(20), "ps-0/CURRENT")).ok());
  absl::Status status = ReadManifest(Folder(20)).status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("ps-0/CURRENT"));
  ASSERT_TRUE(WriteFileAtomically(JoinPath(Folder(10), "dense.safetensors"), "dense").ok());
  status = ReadManifest(Folder(10)).status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("dense.safetensors: has 5 bytes"));
}

TEST_F(ManifestTest, EveryTruncationAndEveryFlippedByteOfAManifestIsFound) {
  Commit(10);
  const std::string text = ReadFile(JoinPath(Folder(10), "MANIFEST")).value();
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_TRUE(absl::IsDataLoss(ParseManifest(text.substr(0, length), "m").status())) << length;
  }
  for (size_t at = 0; at < text.size(); ++at) {
    std::string damaged = text;
    damaged[at] ^= 4;
    EXPECT_TRUE(absl::IsDataLoss(ParseManifest(damaged, "m").status())) << at;
  }
  EXPECT_TRUE(ParseManifest(text, "m").ok());
  EXPECT_FALSE(ParseManifest(text + "\n", "m").ok());
}

TEST_F(ManifestTest, AnotherStepsManifestAndPathsOutsideAreRefused) {
  Commit(10);
  ASSERT_TRUE(RenamePath(Folder(10), Folder(11)).ok());
  EXPECT_THAT(Find().passed_over, ElementsAre(HasSubstr("is of step 10")));
  Manifest manifest;
  manifest.set_schema(1);
  for (const std::string path : {"../x", "/etc/passwd", "a//b", ""}) {
    manifest.clear_file();
    manifest.add_file()->set_path(path);
    ASSERT_TRUE(WriteFileAtomically(JoinPath(Folder(11), "MANIFEST"), SerializeManifest(manifest)).ok());
    EXPECT_TRUE(absl::IsDataLoss(ReadManifest(Folder(11)).status())) << path;
  }
}

// Falling back removes newer folders, so what may be whole is not passed over.
TEST_F(ManifestTest, ANewerSchemaStopsInsteadOfFallingBack) {
  Commit(10);
  Manifest manifest = Commit(20);
  manifest.set_schema(2);
  ASSERT_TRUE(CommitManifest(Folder(20), manifest).ok());
  const absl::Status status = FindNewestSnapshot(snapshots_).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

// Between two chunks of a file as well as between two files: a disk may take minutes for one.
TEST_F(ManifestTest, VerifyingIsGivenUpBetweenTwoChunks) {
  const Manifest manifest = Commit(10);
  ASSERT_TRUE(MarkSuspect(snapshots_).ok());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(Folder(10), "large"), std::string(5 << 20, 'x')).ok());
  for (const int at : {1, 2, 3, 4}) {
    int asked = 0;
    const GiveUp give_up = [&] { return ++asked == at; };
    EXPECT_TRUE(absl::IsCancelled(HashFile(JoinPath(Folder(10), "large"), give_up).status()));
    EXPECT_EQ(asked, at) << "nothing is read behind it";
  }
  for (const int at : {1, 2, 3}) {
    int asked = 0;
    const GiveUp give_up = [&] { return ++asked == at; };
    EXPECT_TRUE(absl::IsCancelled(FindNewestSnapshot(snapshots_, give_up).status())) << "it is not passed over";
    EXPECT_EQ(asked, at);
  }
  EXPECT_TRUE(FindNewestSnapshot(snapshots_, [] { return false; }).ok());
  ASSERT_TRUE(ClearSuspect(snapshots_).ok());
  EXPECT_FALSE(IsSuspect(snapshots_));
}

// docs/FORMATS.md gives these, so that another tool can check its own.
TEST(ModelHash, GivesTheDocumentedKnownAnswers) {
  EXPECT_EQ(ModelHash(0, 0), 0xd0a66a65c7528968ull);
  EXPECT_EQ(ModelHash(1, 2), 0x07ee86c281446befull);
  EXPECT_NE(ModelHash(2, 1), ModelHash(1, 2));
}

TEST_F(ManifestTest, CountsThatNoRunHasAreDataLossAndPassedOver) {
  Commit(1);
  const Manifest good = Commit(2);
  ASSERT_TRUE(CheckCounts(good, Folder(2)).ok());
  const auto expect_lost = [&](const std::function<void(Manifest*)>& change, const char* why) {
    Manifest bad = good;
    change(&bad);
    const absl::Status status = CheckCounts(bad, Folder(2));
    EXPECT_EQ(ExitCodeOf(status), kExitBadData) << why;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
    ASSERT_TRUE(CommitManifest(Folder(2), bad).ok());
    EXPECT_EQ(Find().folder, Folder(1)) << why;
  };
  expect_lost([](Manifest* m) { m->set_lanes(0); }, "0 lanes");
  expect_lost([](Manifest* m) { m->set_lanes(4097); }, "4097 lanes");
  expect_lost([](Manifest* m) { m->set_lanes(2); }, "1 lanes of 2");
  expect_lost([](Manifest* m) { m->set_servers(0); }, "0 servers");
  expect_lost([](Manifest* m) { m->set_servers(4'000'000'000u); }, "4000000000 servers");
  expect_lost([](Manifest* m) { m->set_shards(0); }, "0 shards");
  expect_lost([](Manifest* m) { m->set_shards((1 << 20) + 1); }, "1048577 shards");
  expect_lost([](Manifest* m) { m->add_log_file()->set_number(1); }, "log file 0 has the number 1");
  expect_lost([](Manifest* m) { m->mutable_lane(0)->mutable_cursor()->set_file(1); }, "is in file 1 of 0");
}

}  // namespace
}  // namespace hearth
