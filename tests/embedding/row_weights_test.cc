#include "embedding/row_weights.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/base/env.h"
#include "common/base/half.h"
#include "embedding/sign.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

struct Format {
  Table::Weights weights;
  uint16_t (*by_chance)(float x, uint32_t random);
  float (*to_float)(uint16_t code);
  uint16_t max;
};
const Format kFormats[] = {{Table::FLOAT16, ToHalfByChance, FromHalf, 0x7bff},
                           {Table::BFLOAT16, ToBfloatByChance, FromBfloat, 0x7f7f}};

Table MakeTable(Table::Weights weights, uint32_t dim) {
  Table table;
  table.set_weights(weights);
  table.set_dim(dim);
  return table;
}

// Any finite number: of each exponent as often.
float AnyFloat(Random* random) {
  while (true) {
    const uint32_t bits = static_cast<uint32_t>(random->Next());
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    if (std::isfinite(x)) return x;
  }
}

// The slow way: the two neighbours by search among all codes, the probability in double.
TEST(RowWeights, RoundsByChanceUpWithThePartOfTheWayAsItsProbability) {
  Random random(1);
  for (const Format& format : kFormats) {
    for (int round = 0; round < 100; ++round) {
      // Of a FLOAT16's own exponents, and below them.
      float x = std::ldexp(static_cast<float>(0.5 + 0.5 * random.Uniform()), static_cast<int>(random.Below(44)) - 28);
      if (random.Below(2) == 0) x = -x;
      uint16_t low = 0, high = format.max;  // of |x|
      while (high - low > 1) {
        const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
        (format.to_float(middle) <= std::abs(x) ? low : high) = middle;
      }
      const double below = format.to_float(low), above = format.to_float(high);
      const double part = (std::abs(double{x}) - below) / (above - below);
      // Spread evenly over what the low 13, 16 and 32 bits may be.
      constexpr uint32_t kDraws = 1 << 16;
      uint32_t up = 0;
      for (uint32_t draw = 0; draw < kDraws; ++draw) {
        const uint16_t code = format.by_chance(x, draw * 0x10001u);
        ASSERT_EQ((code & 0x8000) != 0, x < 0);
        ASSERT_TRUE((code & 0x7fff) == low || (code & 0x7fff) == high) << x;
        up += (code & 0x7fff) == high ? 1 : 0;
      }
      EXPECT_NEAR(up / double{kDraws}, part, 3.0 / kDraws) << x;
    }
  }
}

TEST(RowWeights, LeavesWhatTheFormatHasAsItIsWhateverTheChance) {
  Random random(2);
  for (const Format& format : kFormats) {
    for (uint32_t code = 0; code < 0x10000; ++code) {
      if ((code & 0x7fff) > format.max) continue;
      const float x = format.to_float(static_cast<uint16_t>(code));
      ASSERT_EQ(format.by_chance(x, static_cast<uint32_t>(random.Next())), code);
      ASSERT_EQ(format.by_chance(x, 0xffffffffu), code);
    }
  }
}

TEST(RowWeights, StaysFiniteBeyondTheLargestNumberAndKeepsTheSign) {
  const float most = std::numeric_limits<float>::max();
  for (const Format& format : kFormats) {
    for (const float x : {most, -most}) {
      const RowWeights weights(MakeTable(format.weights, 1), 1);
      char words[4];
      float nearest = 0;
      weights.Encode(&x, words);
      weights.Decode(words, &nearest);
      const float by_chance = format.to_float(format.by_chance(x, 0xffffffffu));
      const float expected = std::copysign(format.to_float(format.max), x);
      EXPECT_EQ(nearest, expected);
      EXPECT_EQ(by_chance, expected);
    }
  }
}

TEST(RowWeights, GivesBackWhatRoundMadeOfAnyNumberOfWeights) {
  Random random(3);
  for (const Table::Weights kind : {Table::FLOAT32, Table::FLOAT16, Table::BFLOAT16}) {
    for (const uint32_t dim : {1u, 2u, 7u, 16u, 63u, 64u, 65u, 129u, 4096u}) {
      const RowWeights weights(MakeTable(kind, dim), 1);
      EXPECT_EQ(weights.words(), kind == Table::FLOAT32 ? dim : (dim + 1) / 2);
      std::vector<float> before(dim), after(dim), once_more(dim);
      for (float& x : before) x = AnyFloat(&random);
      std::vector<char> bytes(weights.words() * sizeof(float) + 1, 'x');
      weights.Encode(before.data(), bytes.data());
      EXPECT_EQ(bytes.back(), 'x');
      if (kind != Table::FLOAT32 && dim % 2 != 0) {
        EXPECT_EQ(bytes[dim * 2] | bytes[dim * 2 + 1], 0) << "equal rows have equal bytes";
      }
      weights.Decode(bytes.data(), after.data());
      std::vector<float> rounded = before;
      weights.Round(rounded.data());
      EXPECT_EQ(std::memcmp(after.data(), rounded.data(), dim * sizeof(float)), 0);
      weights.EncodeByChance(MakeSign(1, 2), 3, after.data(), bytes.data());
      weights.Decode(bytes.data(), once_more.data());
      EXPECT_EQ(std::memcmp(once_more.data(), after.data(), dim * sizeof(float)), 0);
    }
  }
}

TEST(RowWeights, SmallUpdatesCountInFullOnAverage) {
  // A thousand steps, each a fortieth of what the nearest number would need to change at all.
  for (const Format& format : kFormats) {
    constexpr uint32_t kDim = 256;
    const RowWeights weights(MakeTable(format.weights, kDim), 7);
    std::vector<float> row(kDim, 1.0f);
    std::vector<char> words(weights.words() * sizeof(float));
    weights.Encode(row.data(), words.data());
    const float update = (format.to_float(static_cast<uint16_t>(format.max == 0x7bff ? 0x3c01 : 0x3f81)) - 1) / 80;
    for (uint64_t step = 1; step <= 1000; ++step) {
      weights.Decode(words.data(), row.data());
      for (float& x : row) x += update;
      weights.EncodeByChance(MakeSign(1, 5), step, row.data(), words.data());
    }
    weights.Decode(words.data(), row.data());
    double mean = 0;
    for (const float x : row) mean += (x - 1) / kDim;
    EXPECT_NEAR(mean / (1000 * update), 1, 0.06);
  }
}

TEST(RowWeights, KeepsTheKnownAnswersThatSnapshotsDependOn) {
  const float before[] = {0.1f, -0.1f, 1e-6f, 3.14159f, -2.71828f};
  for (const auto& [format, expected] :
       {std::make_pair(kFormats[0], std::vector<uint16_t>{0x2e66, 0xae66, 0x0011, 0x4248, 0xc170, 0}),
        std::make_pair(kFormats[1], std::vector<uint16_t>{0x3dcd, 0xbdcd, 0x3586, 0x4049, 0xc02e, 0})}) {
    const RowWeights weights(MakeTable(format.weights, 5), 42);
    std::vector<uint16_t> codes(6);
    weights.EncodeByChance(MakeSign(2, 12345), 678, before, reinterpret_cast<char*>(codes.data()));
    EXPECT_EQ(codes, expected);
  }
}

}  // namespace
}  // namespace hearth
