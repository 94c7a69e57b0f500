#include "common/base/status.h"

#include <gtest/gtest.h>

namespace hearth {
namespace {

TEST(Status, EachCodeHasItsDocumentedExitCode) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("x")), 78);
  EXPECT_EQ(ExitCodeOf(absl::FailedPreconditionError("x")), 78);
  EXPECT_EQ(ExitCodeOf(absl::DataLossError("x")), 65);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("x")), 66);
  EXPECT_EQ(ExitCodeOf(absl::ResourceExhaustedError("x")), 74);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("x")), 74);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("x")), 70);
  EXPECT_EQ(ExitCodeOf(absl::AbortedError("x")), 70);
}

TEST(Status, AnnotateKeepsTheCodeAndPutsTheContextInFront) {
  const absl::Status status = Annotate(absl::DataLossError("truncated"), "a.csv");
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(status.message(), "a.csv: truncated");
  EXPECT_TRUE(Annotate(absl::OkStatus(), "a.csv").ok());
}

TEST(StatusDeathTest, CheckNamesPlaceConditionAndMessage) {
  const int rows = 3;
  EXPECT_DEATH(HEARTH_CHECK(rows == 4, "rows ", rows), "check_failed.*status_test.cc:.*rows == 4.*rows 3");
}

}  // namespace
}  // namespace hearth
