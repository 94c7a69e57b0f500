#include "common/base/file_lock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <utility>

#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "tests/common/leaping_env.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class FileLockTest : public ::testing::Test {
 protected:
  static constexpr int64_t kWaitUs = 10'000'000;

  FileLockTest() : folder_(TemporaryFolder::Make("file-lock-test").value()), path_(JoinPath(folder_->path(), "lock")) {}

  absl::StatusOr<std::unique_ptr<FileLock>> Take() const { return FileLock::Take(Env::Real(), path_, 0); }
  absl::StatusOr<std::unique_ptr<FileLock>> TakeWhile(std::function<void()> meanwhile) const {
    LeapingEnv env;
    env.before_leap = [&meanwhile] {
      if (meanwhile) std::exchange(meanwhile, nullptr)();
    };
    return FileLock::Take(&env, path_, kWaitUs);
  }
  // A process that has the lock until it is killed.
  pid_t Hold() const {
    int ready[2];
    HEARTH_CHECK(pipe(ready) == 0);
    const pid_t holder = fork();
    if (holder == 0) {
      const auto lock = Take();
      const char taken = lock.ok() ? 'y' : 'n';
      if (write(ready[1], &taken, 1) != 1) _exit(1);
      while (true) pause();
    }
    char taken = 0;
    HEARTH_CHECK(read(ready[0], &taken, 1) == 1 && taken == 'y');
    close(ready[0]);
    close(ready[1]);
    return holder;
  }
  static void Kill(pid_t process) {
    HEARTH_CHECK(kill(process, SIGKILL) == 0 && waitpid(process, nullptr, 0) == process);
  }

  const std::unique_ptr<TemporaryFolder> folder_;
  const std::string path_;
};

TEST_F(FileLockTest, WhatAnotherProcessHoldsIsRefusedWithItsNameAndFreeOnceThatIsKilled) {
  const pid_t holder = Hold();
  for (const bool waits : {false, true}) {
    const absl::Status held = waits ? TakeWhile({}).status() : Take().status();
    EXPECT_TRUE(absl::IsFailedPrecondition(held)) << held;
    EXPECT_THAT(std::string(held.message()),
                AllOf(HasSubstr(path_), HasSubstr(absl::StrCat("process ", holder, " on ", HostName()))));
  }
  Kill(holder);
  const auto lock = Take();
  EXPECT_TRUE(lock.ok()) << lock.status();
  EXPECT_EQ(ReadFile(path_).value(), absl::StrCat("process ", getpid(), " on ", HostName(), "\n"));
}

TEST_F(FileLockTest, NamesNobodyOnceItWasGivenUpAndItsHolderStillWhereAnotherWasRefused) {
  auto lock = Take();
  ASSERT_TRUE(lock.ok()) << lock.status();
  EXPECT_FALSE(Take().ok());
  EXPECT_THAT(ReadFile(path_).value(), HasSubstr(absl::StrCat("process ", getpid())));
  lock->reset();
  EXPECT_EQ(ReadFile(path_).value(), "");
}

TEST_F(FileLockTest, AHolderThatIsAboutToEndIsWaitedFor) {
  const pid_t holder = Hold();
  const auto lock = TakeWhile([holder] { Kill(holder); });
  EXPECT_TRUE(lock.ok()) << lock.status();
}

TEST_F(FileLockTest, WhoWaitedForAFileThatIsRemovedMakesANewOne) {
  std::unique_ptr<FileLock> first = Take().value();
  const auto second = TakeWhile([&] { first->Remove(); });
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_FALSE(Take().ok()) << "the file that is there is the one that is held";
  (*second)->Remove();
  EXPECT_FALSE(PathExists(path_));
}

TEST_F(FileLockTest, TwoOfOneProcessShutEachOtherOut) {
  std::unique_ptr<FileLock> first = Take().value();
  EXPECT_FALSE(Take().ok());
  first.reset();
  EXPECT_TRUE(PathExists(path_)) << "it stays for the next one";
  EXPECT_TRUE(Take().ok());
}

TEST_F(FileLockTest, ALinkThatSomebodyPlantedInItsPlaceIsRefused) {
  const std::string victim = JoinPath(folder_->path(), "victim");
  ASSERT_TRUE(WriteFileAtomically(victim, "theirs").ok());
  ASSERT_EQ(symlink(victim.c_str(), path_.c_str()), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(Take().status())) << Take().status();
  EXPECT_EQ(ReadFile(victim).value(), "theirs");
}

}  // namespace
}  // namespace hearth
