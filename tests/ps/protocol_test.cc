// The rules of docs/PROTOCOL.md §2 over hundreds of orders of delivery: one sequential run's bits each time, and a run
// that breaks or stands still when one of the rules is left out.
#include <gtest/gtest.h>

#include "tests/ps/cluster.h"

namespace hearth {
namespace {

// The job and the weather of a seed; every third one is calm.
struct Setting {
  explicit Setting(uint64_t seed)
      : plan(Plan::Make(seed, 1 + Mix64(seed) % 4, static_cast<uint32_t>(seed % 4), 14)),
        servers(1 + static_cast<uint32_t>(seed / 4 % 3)) {
    if (seed % 3 != 0) weather = {0.15, 0.15};
  }
  Plan plan;
  uint32_t servers;
  ClusterWeather weather;
};

std::string RunWith(uint64_t seed, ShardOptions::Rules rules) {
  const Setting setting(seed);
  const Reference reference(setting.plan);
  Cluster cluster(setting.plan, reference, setting.servers, seed, setting.weather, rules);
  cluster.Start(0, {});
  std::string fault = cluster.Run(setting.plan.steps);
  if (fault.empty() && cluster.rows_hash() != reference.Hash(setting.plan.steps)) fault = "wrong hash";
  return fault;
}

constexpr uint64_t kSeeds = 300;
constexpr uint64_t kSeedsWithoutARule = 120;

TEST(Protocol, EveryOrderOfDeliveryGivesTheSequentialRunsRowsAndHash) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) ASSERT_EQ(RunWith(seed, {}), "") << "seed " << seed;
}

TEST(Protocol, EveryNumberOfServersGivesTheSameHashAtEveryStaleness) {
  for (uint32_t staleness = 0; staleness <= 3; ++staleness) {
    const Plan plan = Plan::Make(77, 3, staleness, 20);
    const Reference reference(plan);
    for (uint32_t servers = 1; servers <= 3; ++servers) {
      Cluster cluster(plan, reference, servers, 5 * servers, {0.1, 0.1});
      cluster.Start(0, {});
      ASSERT_EQ(cluster.Run(plan.steps), "") << "staleness " << staleness << ", servers " << servers;
      EXPECT_EQ(cluster.rows_hash(), reference.Hash(plan.steps))
          << "staleness " << staleness << ", servers " << servers;
      EXPECT_GT(cluster.repeats_answered(), 0u);
    }
  }
}

TEST(Protocol, ARunResumedFromAnyCutOnOtherServersEqualsTheOneNeverStopped) {
  int resumed = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const Setting setting(seed);
    const Plan& plan = setting.plan;
    const Reference reference(plan);
    for (uint64_t cut = 1; cut < plan.steps; ++cut) {
      if (!plan.IsCut(cut)) continue;
      Cluster before(plan, reference, setting.servers, seed, setting.weather);
      before.Start(0, {});
      ASSERT_EQ(before.Run(cut), "") << "seed " << seed << ", until " << cut;
      ASSERT_EQ(before.rows_hash(), reference.Hash(cut)) << "seed " << seed << ", at " << cut;
      Cluster after(plan, reference, 1 + (setting.servers + seed) % 4, seed + 1, setting.weather);
      after.Start(cut, before.saved());
      ASSERT_EQ(after.Run(plan.steps), "") << "seed " << seed << ", from " << cut;
      ASSERT_EQ(after.rows_hash(), reference.Hash(plan.steps)) << "seed " << seed << ", from " << cut;
      ++resumed;
      break;
    }
  }
  EXPECT_GT(resumed, 30);
}

// How many of the seeds notice, by a fault of this kind.
int Noticed(ShardOptions::Rules rules, const std::string& what) {
  int noticed = 0;
  for (uint64_t seed = 0; seed < kSeedsWithoutARule; ++seed) {
    const std::string fault = RunWith(seed, rules);
    if (fault.find(what) != std::string::npos) ++noticed;
  }
  std::cout << noticed << " of " << kSeedsWithoutARule << " seeds: " << what << "\n";
  return noticed;
}

TEST(Protocol, WithoutKeptRepliesRepeatedPullsReadRowsOfALaterStep) {
  ShardOptions::Rules rules;
  rules.keep_replies = false;
  EXPECT_GT(Noticed(rules, "wrong rows"), 0);
}

TEST(Protocol, WithoutTheUnbrokenRunAPullsViewIsGoneBeforeItArrives) {
  ShardOptions::Rules rules;
  rules.unbroken_run = false;
  EXPECT_GT(Noticed(rules, "is gone"), 0);
}

TEST(Protocol, WithoutTheCutInConditionCTheRunStandsStill) {
  ShardOptions::Rules rules;
  rules.cut_in_condition_c = false;
  EXPECT_GT(Noticed(rules, "dead-lock"), 0);
}

}  // namespace
}  // namespace hearth
