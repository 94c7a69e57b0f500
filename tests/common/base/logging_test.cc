#include "common/base/logging.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The default logger is the process's: each test puts back what it found.
class LoggingTest : public testing::Test {
 protected:
  LoggingTest() : before_(spdlog::default_logger()) {}
  ~LoggingTest() override { spdlog::set_default_logger(before_); }
  const std::string path_ = JoinPath(testing::TempDir(), absl::StrCat("logging_test-", getpid(), ".log"));

 private:
  const std::shared_ptr<spdlog::logger> before_;
};

TEST(Quoted, HoldsAnyTextOnOneLine) {
  EXPECT_EQ(Quoted("it's Zürich"), "\"it's Zürich\"");
  EXPECT_EQ(Quoted("a \"b\" \\ c\n\x01"), R"("a \"b\" \\ c\n\x01")");
  EXPECT_EQ(Quoted(""), "\"\"");
}

TEST_F(LoggingTest, EventsGoToTheFileAndWarningsToStderrToo) {
  testing::internal::CaptureStderr();
  ASSERT_TRUE(StartLogging("worker-1", path_).ok());
  spdlog::info("event=step step={}", 7);
  spdlog::warn("event=skip step={}", 8);
  FlushLogging();
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              AllOf(HasSubstr("warning worker-1 event=skip step=8"), Not(HasSubstr("event=step"))));
  EXPECT_THAT(ReadFile(path_).value(), AllOf(HasSubstr(" info worker-1 event=step step=7\n"),
                                             HasSubstr(" warning worker-1 event=skip step=8\n")));
  ASSERT_TRUE(StartLogging("worker-1", path_).ok());
  spdlog::info("event=again");
  EXPECT_THAT(ReadFile(path_).value(), AllOf(HasSubstr("event=step"), HasSubstr("event=again"))) << "a restart appends";
  ASSERT_TRUE(RemoveTree(path_).ok());
}

TEST_F(LoggingTest, WithoutAFileEverythingGoesToStderr) {
  testing::internal::CaptureStderr();
  ASSERT_TRUE(StartLogging("hearth", "").ok());
  spdlog::info("event=start");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr(" info hearth event=start"));
}

TEST_F(LoggingTest, ALinkThatSomebodyPlantedInTheLogsPlaceIsRefused) {
  ASSERT_TRUE(WriteFileAtomically(path_ + ".victim", "theirs").ok());
  ASSERT_EQ(symlink((path_ + ".victim").c_str(), path_.c_str()), 0);
  const absl::Status status = StartLogging("ps-0", path_);
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(path_), HasSubstr("symbolic link"), HasSubstr("remove")));
  EXPECT_EQ(ReadFile(path_ + ".victim").value(), "theirs");
  ASSERT_TRUE(RemoveTree(path_).ok());
  ASSERT_TRUE(RemoveTree(path_ + ".victim").ok());
}

TEST_F(LoggingTest, AFileThatCannotBeOpenedIsNamed) {
  const absl::Status status = StartLogging("ps-0", "/proc/no/such/file.log");
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("/proc/no/such/file.log"));
}

}  // namespace
}  // namespace hearth
