// Small things that the scheduler's tests share.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/file.h"
#include "common/logging.h"
#include "common/status.h"

namespace hearth {

// An empty folder of this test's own.
inline std::string MakeTestFolder() {
  spdlog::set_level(spdlog::level::off);  // what these tests provoke is no news
  const testing::TestInfo* const test = testing::UnitTest::GetInstance()->current_test_info();
  const std::string folder = JoinPath(
      testing::TempDir(), absl::StrCat("scheduler-", getpid(), "-", test->test_suite_name(), "-", test->name()));
  HEARTH_CHECK(RemoveTree(folder).ok() && MakeDirectories(folder).ok());
  return folder;
}

}  // namespace hearth
