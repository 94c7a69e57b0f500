#include "worker/step/rest_gate.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace hearth {
namespace {

TEST(RestGate, ReportsAStepWithoutRecordsOnceAndJoinsItWhenAnotherWorkerMakesIt) {
  std::vector<std::pair<uint64_t, bool>> reports;
  RestGate gate(Env::Real(), [&](uint64_t step, bool without_records) {
    reports.emplace_back(step, without_records);
    return absl::OkStatus();
  });
  EXPECT_TRUE(gate.Moves(1).ok());
  EXPECT_FALSE(gate.rests());
  EXPECT_FALSE(*gate.Joins(2));
  EXPECT_FALSE(*gate.Joins(2));
  EXPECT_TRUE(gate.rests());
  gate.Join(3);
  gate.WaitForNews();  // returns: something was told
  EXPECT_TRUE(*gate.Joins(2));
  EXPECT_FALSE(gate.rests());
  EXPECT_TRUE(*gate.Joins(3));
  gate.Join(2);  // overtaken
  EXPECT_FALSE(*gate.Joins(4));
  EXPECT_EQ(reports, (std::vector<std::pair<uint64_t, bool>>{{1, false}, {2, true}, {4, true}}));
}

TEST(RestGate, AStopOpensItForGood) {
  RestGate gate(Env::Real(), nullptr);
  EXPECT_FALSE(*gate.Joins(1));
  gate.Open();
  gate.WaitForNews();
  for (uint64_t step = 1; step < 5; ++step) EXPECT_TRUE(*gate.Joins(step));
}

}  // namespace
}  // namespace hearth
