#include "common/base/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <csignal>
#include <filesystem>

#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = JoinPath(testing::TempDir(), absl::StrCat("file_test-", info->name(), "-", getpid()));
    ASSERT_TRUE(RemoveTree(folder_).ok());
    ASSERT_TRUE(MakeDirectories(folder_).ok());
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(folder_).ok()); }
  std::string Path(const std::string& name) const { return JoinPath(folder_, name); }

  std::string folder_;
};

TEST_F(FileTest, WhatIsWrittenIsReadAndNothingIsLeftBeside) {
  const std::string contents("a\0b\n", 4);
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "old, and longer than the new").ok());
  ASSERT_TRUE(WriteFileAtomically(Path("x"), contents).ok());
  EXPECT_EQ(ReadFile(Path("x")).value(), contents);
  EXPECT_EQ(FileBytes(Path("x")).value(), 4u);
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("x"));
}

TEST_F(FileTest, MissingFilesAreNotFoundAndNamed) {
  for (const absl::Status& status :
       {ReadFile(Path("none")).status(), HashFile(Path("none")).status(), FileBytes(Path("none")).status(),
        ListDirectory(Path("none")).status(), RenamePath(Path("none"), Path("y")), FsyncPath(Path("none")),
        WriteFileAtomically(Path("none/x"), "")}) {
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(Path("none")));
    EXPECT_THAT(std::string(status.message()), HasSubstr("No such file"));
  }
  EXPECT_FALSE(PathExists(Path("none")));
  EXPECT_TRUE(RemoveTree(Path("none")).ok());
}

TEST_F(FileTest, AFileBeyondTheLimitIsRefusedUnread) {
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "12345").ok());
  EXPECT_EQ(ReadFile(Path("x"), 5).value(), "12345");
  EXPECT_TRUE(absl::IsResourceExhausted(ReadFile(Path("x"), 4).status()));
  EXPECT_FALSE(ReadFile(folder_).ok()) << "a folder is not a file";
}

TEST_F(FileTest, FilesWithoutAKnownLengthAreReadToTheirEnd) {
  EXPECT_THAT(ReadFile("/proc/self/status").value(), HasSubstr("Pid:"));
}

TEST_F(FileTest, HashesAreThoseOfXxh3OverTheBytes) {
  std::string contents;
  for (uint32_t i = 0; i < 700000; ++i) contents += static_cast<char>(i * i % 251);
  contents += contents;  // longer than one chunk
  ASSERT_TRUE(WriteFileAtomically(Path("x"), contents).ok());
  EXPECT_EQ(HashFile(Path("x")).value(), XXH3_64bits(contents.data(), contents.size()));
  EXPECT_EQ(HashFileHead(Path("x"), 1000).value(), XXH3_64bits(contents.data(), 1000));
  EXPECT_EQ(HashFileHead(Path("x"), 1u << 30).value(), HashFile(Path("x")).value());
}

TEST_F(FileTest, FoldersAreMadeListedAndRemovedWhole) {
  ASSERT_TRUE(MakeDirectories(Path("a/b/c")).ok());
  ASSERT_TRUE(MakeDirectories(Path("a/b/c")).ok());
  ASSERT_TRUE(WriteFileAtomically(Path("a/b/c/x"), "x").ok());
  ASSERT_TRUE(MakeDirectories(Path("B")).ok());
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("B", "a"));
  ASSERT_TRUE(RenamePath(Path("a/b"), Path("B/b")).ok());
  EXPECT_TRUE(PathExists(Path("B/b/c/x")));
  ASSERT_TRUE(RemoveTree(Path("B")).ok());
  EXPECT_FALSE(PathExists(Path("B")));
  EXPECT_GT(DiskFreeBytes(folder_).value(), 0u);
}

TEST_F(FileTest, AFileGetsASecondNameOrIsCopied) {
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "rows").ok());
  ASSERT_TRUE(LinkFile(Path("x"), Path("linked")).ok());
  ASSERT_TRUE(CopyFile(Path("x"), Path("copied")).ok());
  EXPECT_TRUE(std::filesystem::equivalent(Path("x"), Path("linked")));
  EXPECT_FALSE(std::filesystem::equivalent(Path("x"), Path("copied")));
  EXPECT_EQ(ReadFile(Path("copied")).value(), "rows");
  EXPECT_FALSE(LinkFile(Path("x"), Path("copied")).ok()) << "nothing is written over";
  EXPECT_THAT(std::string(CopyFile(Path("x"), Path("copied")).message()),
              AllOf(HasSubstr(Path("x")), HasSubstr(Path("copied"))));
  EXPECT_TRUE(absl::IsNotFound(CopyFile(Path("y"), Path("z"))));
}

TEST_F(FileTest, WhetherFoldersShareFilesIsTriedAndLeavesNothing) {
  ASSERT_TRUE(MakeDirectories(Path("a")).ok());
  EXPECT_TRUE(CanLinkFiles(folder_, Path("a")));
  EXPECT_FALSE(CanLinkFiles(folder_, "/proc"));
  EXPECT_FALSE(CanLinkFiles(folder_, Path("nowhere")));
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("a"));
  EXPECT_THAT(ListDirectory(Path("a")).value(), ElementsAre());
}

TEST_F(FileTest, APrivateFolderIsThisUsersAlone) {
  ASSERT_TRUE(MakePrivateDirectory(Path("mine")).ok());
  EXPECT_EQ(std::filesystem::status(Path("mine")).permissions(), std::filesystem::perms::owner_all);
  EXPECT_TRUE(MakePrivateDirectory(Path("mine")).ok()) << "of before";
  std::filesystem::permissions(Path("mine"), std::filesystem::perms::all);
  const absl::Status status = MakePrivateDirectory(Path("mine"));
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path("mine")));
  std::filesystem::create_directory_symlink(folder_, Path("planted"));
  EXPECT_TRUE(absl::IsFailedPrecondition(MakePrivateDirectory(Path("planted"))));
}

TEST(JoinPath, KeepsAbsoluteNames) {
  EXPECT_EQ(JoinPath("a", "b"), "a/b");
  EXPECT_EQ(JoinPath("a/", "b"), "a/b");
  EXPECT_EQ(JoinPath("a", "/b"), "/b");
  EXPECT_EQ(JoinPath("", "b"), "b");
  EXPECT_EQ(JoinPath("a", ""), "a");
}

// A limit on a file's length is the nearest thing to a full disk that a test can make.
TEST_F(FileTest, AFullDiskIsResourceExhaustedAndLeavesTheOldFile) {
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "old").ok());
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {1000, limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = WriteFileAtomically(Path("x"), std::string(2000, 'x'));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(ExitCodeOf(status), kExitIo);
  EXPECT_EQ(ReadFile(Path("x")).value(), "old");
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("x"));
}

TEST_F(FileTest, ALinkThatSomebodyPlantedIsReplacedAndNeverFollowed) {
  ASSERT_TRUE(WriteFileAtomically(Path("victim"), "theirs").ok());
  ASSERT_EQ(symlink(Path("victim").c_str(), Path("x.tmp").c_str()), 0);
  ASSERT_EQ(symlink(Path("victim").c_str(), Path("x").c_str()), 0);
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "ours").ok());
  EXPECT_EQ(ReadFile(Path("victim")).value(), "theirs");
  EXPECT_EQ(ReadFile(Path("x")).value(), "ours");
  struct stat info;
  ASSERT_EQ(lstat(Path("x").c_str(), &info), 0);
  EXPECT_TRUE(S_ISREG(info.st_mode));
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("victim", "x"));
}

TEST_F(FileTest, AFileOfOursIsAppendedToMadeAnewOrReplacedAsAsked) {
  const auto put = [&](Writing writing, const char* text) {
    absl::StatusOr<OwnedFile> file = OpenForWriting(Path("x"), writing);
    if (file.ok()) std::fputs(text, file->get());
    return file.status();
  };
  EXPECT_TRUE(absl::IsNotFound(put(Writing::kAppendExisting, "-")));
  EXPECT_FALSE(PathExists(Path("x")));
  ASSERT_TRUE(put(Writing::kAppend, "a").ok());
  ASSERT_TRUE(put(Writing::kAppend, "b").ok());
  ASSERT_TRUE(put(Writing::kAppendExisting, "c").ok());
  EXPECT_EQ(ReadFile(Path("x")).value(), "abc");
  EXPECT_TRUE(absl::IsAlreadyExists(put(Writing::kNew, "-")));
  EXPECT_EQ(ReadFile(Path("x")).value(), "abc");
  ASSERT_TRUE(put(Writing::kReplace, "d").ok());
  EXPECT_EQ(ReadFile(Path("x")).value(), "d");
  ASSERT_TRUE(RemoveTree(Path("x")).ok());
  ASSERT_TRUE(put(Writing::kNew, "e").ok());
  EXPECT_EQ(ReadFile(Path("x")).value(), "e");
}

TEST_F(FileTest, WhatSomebodyPlantedUnderTheNameOfAFileOfOursIsNotWrittenTo) {
  ASSERT_TRUE(WriteFileAtomically(Path("victim"), "theirs").ok());
  ASSERT_EQ(symlink(Path("victim").c_str(), Path("link").c_str()), 0);
  ASSERT_EQ(symlink(Path("nothing").c_str(), Path("dangling").c_str()), 0);
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  ASSERT_EQ(mkdir(Path("folder").c_str(), 0700), 0);
  for (const Writing writing : {Writing::kAppend, Writing::kAppendExisting}) {
    for (const char* name : {"link", "dangling", "pipe", "folder"}) {
      const absl::Status status = OpenForWriting(Path(name), writing).status();
      EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
      EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(Path(name)), HasSubstr("remove it"))) << name;
    }
  }
  // Even with a reader that waits.
  const int reader = open(Path("pipe").c_str(), O_RDONLY | O_NONBLOCK);
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenForWriting(Path("pipe"), Writing::kAppend).status()));
  close(reader);
  for (const char* name : {"link", "dangling", "pipe", "folder"}) {
    EXPECT_TRUE(absl::IsAlreadyExists(OpenForWriting(Path(name), Writing::kNew).status())) << name;
  }
  for (const char* name : {"link", "dangling", "pipe"}) {
    absl::StatusOr<OwnedFile> file = OpenForWriting(Path(name), Writing::kReplace);
    ASSERT_TRUE(file.ok()) << file.status();
    std::fputs("ours", file->get());
    file->reset();
    EXPECT_EQ(ReadFile(Path(name)).value(), "ours");
  }
  EXPECT_FALSE(OpenForWriting(Path("folder"), Writing::kReplace).ok());
  EXPECT_EQ(ReadFile(Path("victim")).value(), "theirs");
  EXPECT_FALSE(PathExists(Path("nothing")));
}

}  // namespace
}  // namespace hearth
