#include "common/base/half.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

TEST(Half, EveryHalfComesBackAsItWas) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float x = FromHalf(static_cast<uint16_t>(half));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(FromHalf(ToHalf(x))));
    } else {
      EXPECT_EQ(ToHalf(x), half) << x;
    }
  }
  EXPECT_EQ(FromHalf(0x3c00), 1.0f);
  EXPECT_EQ(FromHalf(0xc000), -2.0f);
  EXPECT_EQ(FromHalf(0x0001), 0x1p-24f);
  EXPECT_EQ(FromHalf(0x7bff), 65504.0f);
}

TEST(Half, IsTheNearestAndOfTwoTheEvenOne) {
  EXPECT_EQ(ToHalf(1.0f + 0x1p-11f), 0x3c00);
  EXPECT_EQ(ToHalf(1.0f + 0x3p-11f), 0x3c02);
  EXPECT_EQ(ToHalf(0x1p-25f), 0x0000);
  EXPECT_EQ(ToHalf(0x1.8p-24f), 0x0002);
  EXPECT_EQ(ToHalf(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(ToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(ToHalf(-1e30f), 0xfc00);
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x =
        static_cast<float>((random.Uniform() - 0.5) * std::exp2(static_cast<double>(random.Below(40)) - 24));
    const uint16_t half = ToHalf(x);
    const double error = std::abs(double{FromHalf(half)} - x);
    for (const int beside : {-1, 1}) {
      const double other = FromHalf(static_cast<uint16_t>(half + beside));
      if (!std::isfinite(other) || (half & 0x7fff) == 0) continue;
      EXPECT_LE(error, std::abs(other - x)) << x;
    }
  }
}

// Eight at a time, by an instruction, as one by one.
TEST(Half, ManyAtOnceHaveTheSameBits) {
  Random random(2);
  for (size_t size : {0u, 1u, 7u, 8u, 9u, 31u, 1000u}) {
    for (int round = 0; round < 50; ++round) {
      std::vector<float> numbers(size);
      for (float& x : numbers) {
        const uint32_t bits = static_cast<uint32_t>(random.Next());  // NaNs, infinities and the smallest among them
        std::memcpy(&x, &bits, sizeof(x));
      }
      std::vector<uint16_t> halves(size);
      ToHalf(numbers, halves.data());
      for (size_t i = 0; i < size; ++i) ASSERT_EQ(halves[i], ToHalf(numbers[i])) << BitsOf(numbers[i]);
      for (uint16_t& half : halves) half = static_cast<uint16_t>(random.Next());
      FromHalf(halves, numbers.data());
      for (size_t i = 0; i < size; ++i) ASSERT_EQ(BitsOf(numbers[i]), BitsOf(FromHalf(halves[i]))) << halves[i];
    }
  }
}

}  // namespace
}  // namespace hearth
