#include "common/base/process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string TestPath(const std::string& name) {
  return JoinPath(testing::TempDir(), absl::StrCat("process_test-", getpid(), "-", name));
}

int CodeOf(ChildProcess* child) {
  const auto never = Env::Real()->NewEvent();
  while (!child->Poll().has_value()) never->WaitUntil(Env::Real()->NowUs() + 1000);
  return *child->Poll();
}

TEST(ChildProcess, WhatItSaysIsAppendedToItsLog) {
  const std::string log = TestPath("log");
  ASSERT_TRUE(WriteFileAtomically(log, "before\n").ok());
  auto child = ChildProcess::Start({"/bin/sh", "-c", "echo out; echo error >&2; exit 3"}, log);
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_EQ(CodeOf(child->get()), 3);
  EXPECT_EQ(ReadFile(log).value(), "before\nout\nerror\n");
  ASSERT_TRUE(RemoveTree(log).ok());
}

TEST(ChildProcess, ALinkThatSomebodyPlantedInItsLogsPlaceIsRefused) {
  const std::string log = TestPath("log"), victim = TestPath("victim");
  ASSERT_TRUE(WriteFileAtomically(victim, "theirs").ok());
  ASSERT_EQ(symlink(victim.c_str(), log.c_str()), 0);
  const auto child = ChildProcess::Start({"/bin/sh", "-c", "echo out"}, log);
  EXPECT_TRUE(absl::IsFailedPrecondition(child.status())) << child.status();
  EXPECT_THAT(std::string(child.status().message()), AllOf(HasSubstr(log), HasSubstr("remove it")));
  EXPECT_EQ(ReadFile(victim).value(), "theirs");
  ASSERT_TRUE(RemoveTree(log).ok());
  ASSERT_TRUE(RemoveTree(victim).ok());
}

}  // namespace
}  // namespace hearth
