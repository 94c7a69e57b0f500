// The contract of worker/collective/collective.h, over every implementation.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "tests/conformance/world.h"

namespace hearth {

// Everybody can make everybody's parts: a lane's numbers are a function of (seed, lane, place).
enum class Numbers { kIntegers, kFloats };
inline std::vector<float> PartOf(uint64_t seed, int lane, size_t n, Numbers numbers) {
  Random random(Mix64(seed) + Mix64(static_cast<uint64_t>(lane)));
  std::vector<float> part(n);
  for (float& x : part) {
    // Integers add exactly in any order. Floats of very different sizes do not: another order gives other bits.
    const uint64_t draw = random.Next();
    x = numbers == Numbers::kIntegers
            ? static_cast<float>(static_cast<int>(draw % 2001) - 1000)
            : std::ldexp(static_cast<float>(random.Uniform() - 0.5), static_cast<int>(draw % 40));
  }
  return part;
}
inline std::vector<char> TailOf(uint64_t seed, int lane, size_t m) {
  std::vector<char> tail(m);
  for (size_t i = 0; i < m; ++i) tail[i] = static_cast<char>(Mix64(seed + i) + static_cast<uint64_t>(lane));
  return tail;
}

// The slow truth: one loop over the lanes.
inline std::vector<float> SumInLaneOrder(uint64_t seed, int lanes, size_t n, Numbers numbers) {
  std::vector<float> sum = PartOf(seed, 0, n, numbers);
  for (int lane = 1; lane < lanes; ++lane) {
    const std::vector<float> part = PartOf(seed, lane, n, numbers);
    for (size_t j = 0; j < n; ++j) sum[j] = sum[j] + part[j];
  }
  return sum;
}

inline void CheckSumParts(Collective* collective, uint64_t seed, int lanes, size_t n, size_t m, Numbers numbers) {
  std::vector<std::vector<float>> sums;
  std::vector<std::vector<char>> tails;
  for (int lane = collective->worker(); lane < lanes; lane += collective->workers()) {
    sums.push_back(PartOf(seed, lane, n, numbers));
    tails.push_back(TailOf(seed, lane, m));
  }
  std::vector<Collective::Part> parts;
  for (size_t i = 0; i < sums.size(); ++i) parts.push_back({sums[i], tails[i]});
  std::vector<float> sum(n, -7.0f);
  std::vector<char> all_tails(static_cast<size_t>(lanes) * m, 'x');
  const absl::Status status = collective->SumParts(lanes, parts, absl::MakeSpan(sum), absl::MakeSpan(all_tails));
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<float> want = SumInLaneOrder(seed, lanes, n, numbers);
  EXPECT_TRUE(n == 0 || std::memcmp(sum.data(), want.data(), n * sizeof(float)) == 0)
      << "lanes " << lanes << ", n " << n << ", worker " << collective->worker() << " of " << collective->workers();
  for (int lane = 0; lane < lanes; ++lane) {
    const std::vector<char> tail = TailOf(seed, lane, m);
    EXPECT_TRUE(m == 0 || std::memcmp(all_tails.data() + static_cast<size_t>(lane) * m, tail.data(), m) == 0)
        << "lane " << lane;
  }
}

constexpr int kLanesMax = 7;
constexpr size_t kOddLengths[] = {0, 1, 2, 3, 15, 16, 17, 97, 4096, 4099, 20011};

class CollectiveConformance : public testing::TestWithParam<Implementation<CollectiveWorld>> {
 protected:
  void SetUp() override { world_ = GetParam().make(); }
  std::unique_ptr<CollectiveWorld> world_;
};

TEST_P(CollectiveConformance, SumsOfIntegersAreExact) {
  world_->Run([](Collective* collective) {
    for (int lanes = collective->workers(); lanes <= kLanesMax; ++lanes) {
      for (size_t n : kOddLengths) CheckSumParts(collective, n, lanes, n, 5, Numbers::kIntegers);
    }
  });
}

TEST_P(CollectiveConformance, SumsOfFloatsHaveTheBitsOfTheLaneOrder) {
  world_->Run([](Collective* collective) {
    for (int lanes = collective->workers(); lanes <= kLanesMax; ++lanes) {
      for (size_t n : kOddLengths) CheckSumParts(collective, 100 + n, lanes, n, n % 13, Numbers::kFloats);
    }
  });
}

// So that the test above means something.
TEST(CollectiveReference, AnotherOrderOfTheLanesGivesOtherBits) {
  const size_t n = 1000;
  const std::vector<float> a = PartOf(1, 0, n, Numbers::kFloats), b = PartOf(1, 1, n, Numbers::kFloats),
                           c = PartOf(1, 2, n, Numbers::kFloats);
  int differ = 0;
  for (size_t j = 0; j < n; ++j) differ += (a[j] + b[j]) + c[j] != a[j] + (b[j] + c[j]);
  EXPECT_GT(differ, 100);
}

TEST_P(CollectiveConformance, PartsWithoutFloatsOrWithoutTailsAreFine) {
  world_->Run([](Collective* collective) {
    const int lanes = collective->workers() + 1;
    CheckSumParts(collective, 1, lanes, 0, 0, Numbers::kFloats);
    CheckSumParts(collective, 2, lanes, 0, 9, Numbers::kFloats);
    CheckSumParts(collective, 3, lanes, 9, 0, Numbers::kFloats);
  });
}

TEST_P(CollectiveConformance, OneWorkersMinusZeroStaysAsItIs) {
  world_->Run([](Collective* collective) {
    const float part[] = {-0.0f, 1.0f};
    std::vector<Collective::Part> parts = {{part, {}}};
    float sum[2] = {};
    ASSERT_TRUE(collective->SumParts(collective->workers(), parts, sum, {}).ok());
    EXPECT_TRUE(std::signbit(sum[0])) << "(−0) + (−0) + … is −0; 0 + (−0) is not";
    EXPECT_EQ(sum[1], static_cast<float>(collective->workers()));
  });
}

TEST_P(CollectiveConformance, BroadcastBringsTheRootsBytesToAll) {
  world_->Run([](Collective* collective) {
    for (int root = 0; root < collective->workers(); ++root) {
      for (size_t bytes : {size_t{0}, size_t{1}, size_t{999}, size_t{1'000'003}}) {
        std::vector<char> data = TailOf(root == collective->worker() ? 1 : 2, root, bytes);
        ASSERT_TRUE(collective->Broadcast(root, absl::MakeSpan(data)).ok());
        EXPECT_EQ(data, TailOf(1, root, bytes));
      }
    }
  });
}

TEST_P(CollectiveConformance, ManyCallsInARowDoNotMix) {
  world_->Run([](Collective* collective) {
    Random random(5);  // the same choices everywhere
    for (int call = 0; call < 300; ++call) {
      const int lanes = collective->workers() + static_cast<int>(random.Below(3));
      switch (random.Below(3)) {
        case 0:
          CheckSumParts(collective, random.Next(), lanes, random.Below(50), random.Below(9), Numbers::kFloats);
          break;
        case 1: {
          const int root = static_cast<int>(random.Below(static_cast<uint64_t>(collective->workers())));
          std::vector<char> data = TailOf(root == collective->worker() ? 1 : 2, call, 10);
          ASSERT_TRUE(collective->Broadcast(root, absl::MakeSpan(data)).ok());
          ASSERT_EQ(data, TailOf(1, call, 10));
          break;
        }
        default:
          ASSERT_TRUE(collective->Barrier().ok());
      }
    }
  });
}

}  // namespace hearth
