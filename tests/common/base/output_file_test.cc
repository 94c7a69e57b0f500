#include "common/base/output_file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class OutputFileTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = JoinPath(testing::TempDir(), absl::StrCat("output_file_test-", info->name(), "-", getpid()));
    ASSERT_TRUE(RemoveTree(folder_).ok());
    ASSERT_TRUE(MakeDirectories(folder_).ok());
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(folder_).ok()); }
  std::string Path(const std::string& name) const { return JoinPath(folder_, name); }
  static absl::Status Write(const std::string& path, const std::string& text) {
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> file, OutputFile::Create(path));
    file->Append(text);
    return file->Close();
  }
  static mode_t ModeOf(const std::string& path) {
    struct stat info;
    EXPECT_EQ(lstat(path.c_str(), &info), 0) << path;
    return info.st_mode;
  }

  std::string folder_;
};

TEST_F(OutputFileTest, AFileIsTheOldOneOrTheNewOneWholeAndKeepsItsPermissions) {
  ASSERT_TRUE(Write(Path("x"), "old").ok());
  ASSERT_EQ(chmod(Path("x").c_str(), 0640), 0);
  {
    const auto file = OutputFile::Create(Path("x")).value();
    file->Append("half");
  }  // given up
  EXPECT_EQ(ReadFile(Path("x")).value(), "old");
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("x"));
  ASSERT_TRUE(Write(Path("x"), "new").ok());
  EXPECT_EQ(ReadFile(Path("x")).value(), "new");
  EXPECT_EQ(ModeOf(Path("x")) & 0777, 0640u);
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("x"));
}

TEST_F(OutputFileTest, ALinkStaysAndWhatItLeadsToIsWritten) {
  ASSERT_TRUE(Write(Path("target"), "old").ok());
  ASSERT_EQ(symlink("target", Path("link").c_str()), 0);
  ASSERT_EQ(symlink("link", Path("link-to-link").c_str()), 0);
  ASSERT_TRUE(Write(Path("link-to-link"), "new").ok());
  EXPECT_EQ(ReadFile(Path("target")).value(), "new");
  ASSERT_EQ(symlink("not-there-yet", Path("early").c_str()), 0);
  ASSERT_TRUE(Write(Path("early"), "first").ok());
  EXPECT_EQ(ReadFile(Path("not-there-yet")).value(), "first");
  for (const char* link : {"link", "link-to-link", "early"}) EXPECT_TRUE(S_ISLNK(ModeOf(Path(link)))) << link;
  ASSERT_EQ(symlink("b", Path("a").c_str()), 0);
  ASSERT_EQ(symlink("a", Path("b").c_str()), 0);
  EXPECT_THAT(std::string(Write(Path("a"), "x").message()), HasSubstr("leads nowhere"));
}

TEST_F(OutputFileTest, AFileOfOursReplacesALinkThatSomebodyPlanted) {
  ASSERT_TRUE(Write(Path("victim"), "theirs").ok());
  ASSERT_EQ(symlink("victim", Path("ours").c_str()), 0);
  const auto file = OutputFile::Create(Path("ours"), OutputFile::Links::kReplace).value();
  file->Append("ours");
  ASSERT_TRUE(file->Close().ok());
  EXPECT_EQ(ReadFile(Path("victim")).value(), "theirs");
  EXPECT_TRUE(S_ISREG(ModeOf(Path("ours"))));
}

TEST_F(OutputFileTest, APipeGetsTheTextAndStaysAPipe) {
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  const pid_t writer = fork();
  if (writer == 0) _exit(Write(Path("pipe"), "through the pipe").ok() ? 0 : 1);
  EXPECT_EQ(ReadFile(Path("pipe")).value(), "through the pipe");
  int status = 1;
  waitpid(writer, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(S_ISFIFO(ModeOf(Path("pipe"))));
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("pipe"));
}

TEST_F(OutputFileTest, ADeviceIsWrittenIntoAndItsErrorsAreTold) {
  ASSERT_TRUE(Write("/dev/null", "x").ok());
  EXPECT_TRUE(S_ISCHR(ModeOf("/dev/null")));
  const absl::Status full = Write("/dev/full", "x");
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_THAT(std::string(full.message()), HasSubstr("/dev/full"));
  EXPECT_TRUE(S_ISCHR(ModeOf("/dev/full")));
}

// As `command --predictions /dev/stdout > file`: both go into one file, one behind the other.
TEST_F(OutputFileTest, WhatStandardOutputIsAlreadyIsNeitherReplacedNorBegunAnew) {
  const std::string path = Path("out");
  const pid_t child = fork();
  if (child == 0) {
    const int out = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dup2(out, STDOUT_FILENO);
    bool fine = WriteStandardOutput("a table\n").ok();
    for (const std::string& name : {std::string("/dev/stdout"), std::string("/proc/self/fd/1"), path})
      fine = fine && Write(name, name == path ? "by its name\n" : "by its number\n").ok();
    _exit(fine && WriteStandardOutput("the end\n").ok() ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(ReadFile(path).value(), "a table\nby its number\nby its number\nby its name\nthe end\n");
  EXPECT_THAT(ListDirectory(folder_).value(), ElementsAre("out"));
}

TEST_F(OutputFileTest, AFullStandardOutputIsAnError) {
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/full", O_WRONLY), STDOUT_FILENO);
    const bool full = ExitCodeOf(WriteStandardOutput("x")) == kExitIo;
    close(STDOUT_FILENO);
    _exit(full && ExitCodeOf(WriteStandardOutput("x")) == kExitIo ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(OutputFileTest, ABareNameIsAFileInTheFolderWhereOneStands) {
  const std::string name = absl::StrCat("output_file_test_bare-", getpid());
  ASSERT_TRUE(OutputFile::Check(name).ok());
  EXPECT_FALSE(PathExists(name));
  ASSERT_TRUE(Write(name, "x").ok());
  EXPECT_TRUE(S_ISREG(ModeOf(name)));
  ASSERT_TRUE(RemoveTree(name).ok());
}

TEST_F(OutputFileTest, WhatCannotBeIsToldBeforeTheWork) {
  const absl::Status none = OutputFile::Check(Path("none/x"));
  EXPECT_TRUE(absl::IsNotFound(none)) << none;
  EXPECT_THAT(std::string(none.message()), HasSubstr("there is no folder"));
  EXPECT_TRUE(absl::IsFailedPrecondition(OutputFile::Check(folder_)));
  EXPECT_TRUE(absl::IsFailedPrecondition(OutputFile::Check("")));
  EXPECT_THAT(ListDirectory(folder_).value(), testing::IsEmpty());
  if (geteuid() == 0) return;  // may write everywhere
  ASSERT_TRUE(Write(Path("x"), "old").ok());
  ASSERT_EQ(chmod(Path("x").c_str(), 0400), 0);
  EXPECT_TRUE(absl::IsUnavailable(OutputFile::Check(Path("x"))));
}

TEST_F(OutputFileTest, GivesBackThroughZstdWhatWasWritten) {
  Random random(5);
  std::string text;
  for (int i = 0; i < 200000; ++i) absl::StrAppend(&text, random.Below(1000000), "\n");
  const auto file = OutputFile::Create(Path("a.zst")).value();
  for (size_t at = 0; at < text.size(); at += 1000) file->Append(absl::string_view(text).substr(at, 1000));
  ASSERT_TRUE(file->Close().ok());
  EXPECT_EQ(file->bytes(), text.size());
  ASSERT_TRUE(CopyZstdTo(Path("a.zst"), Path("a")).ok());
  EXPECT_EQ(ReadFile(Path("a")).value(), text);
  ASSERT_TRUE(CopyZstdTo(Path("a.zst"), Path("b.zst")).ok());
  ASSERT_TRUE(CopyZstdTo(Path("b.zst"), Path("b")).ok());
  EXPECT_EQ(ReadFile(Path("b")).value(), text);

  const std::string packed = ReadFile(Path("a.zst")).value();
  ASSERT_TRUE(WriteFileAtomically(Path("cut.zst"), packed.substr(0, packed.size() - 100)).ok());
  EXPECT_EQ(ExitCodeOf(CopyZstdTo(Path("cut.zst"), Path("cut"))), kExitBadData);
  EXPECT_FALSE(PathExists(Path("cut")));
}

}  // namespace
}  // namespace hearth
