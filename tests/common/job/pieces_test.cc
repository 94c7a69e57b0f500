#include "common/job/pieces.h"

#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "common/base/file.h"
#include "common/job/config.h"
#include "common/job/identity.h"

namespace hearth {
namespace {

Job JobOf(const std::string& text) {
  Job job;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &job));
  job.set_data_dir(testing::TempDir());
  return job;
}

// Files of so many bytes, without content on the disk.
void Make(const std::string& name, uint64_t bytes) {
  const std::string path = JoinPath(testing::TempDir(), name);
  ASSERT_TRUE(WriteFileAtomically(path, "").ok());
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(bytes)), 0);
}

uint64_t PieceOf(Job job) {
  DecidePieces(&job);
  return PieceBytes(job.log(0));
}

TEST(Pieces, EachLaneOfASmallLogHasAShare) {
  Make("small", 160'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "small" })")), 80'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 4 } log { path: "small" })")), 40'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 4 } log { path: "small" path: "small" })")), 20'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "small" shuffle { pieces: true } })")), 5'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 400 } log { path: "small" })")), 4096) << "not without end";
}

TEST(Pieces, ALargerLogIsBalancedAndALargeOneHasPiecesOfTheLargestSize) {
  Make("ten", 10 << 20);
  Make("large", uint64_t{200} << 20);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "ten" })")), (10 << 20) / 4);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "large" })")), kPieceBytesMax);
}

TEST(Pieces, WhatTheJobSaysStandsAndWhatCannotBeSeenIsLeft) {
  Make("small", 160'001);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "small" piece_bytes: 77 })")), 77);
  EXPECT_EQ(PieceOf(JobOf(R"(training { lanes: 2 } log { path: "gone" })")), kPieceBytesMax);
  Job tailed = JobOf(R"(training { lanes: 2 } log { directory: "d" })");
  DecidePieces(&tailed);
  EXPECT_FALSE(tailed.log(0).has_piece_bytes());
}

// A snapshot of the version before has the old default written out; a job of it that says nothing has the same hash.
TEST(Pieces, AJobThatSaysNothingIsTheJobWithPiecesOf4MiB) {
  const Job absent = JobOf(R"(log { name: "l" path: "small" })");
  const Job written = JobOf(R"(log { name: "l" path: "small" piece_bytes: 4194304 })");
  EXPECT_EQ(JobHash(absent), JobHash(written));
  EXPECT_TRUE(ChangesOf(absent, written, Manifest()).empty());
}

}  // namespace
}  // namespace hearth
