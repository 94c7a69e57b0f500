#include "model/kernels.h"

#include <cmath>
#include <limits>
#include <vector>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth::kernels {
namespace {

std::vector<float> Draw(size_t size, uint64_t seed, double scale = 2) {
  std::vector<float> values(size);
  Random random(seed);
  for (float& value : values) value = static_cast<float>((2 * random.Uniform() - 1) * scale);
  return values;
}

// Swish of y with a neutral BatchNorm: what the loops' own exp makes of it.
std::vector<float> Swish(const std::vector<float>& y) {
  const float zero = 0;
  const float one = 1;
  std::vector<float> out(y.size());
  Forward(NormSwish<float>{static_cast<int64_t>(y.size()), 1, y.data(), &zero, &one, &one, &zero, out.data()}, 0,
          static_cast<int64_t>(y.size()));
  return out;
}

TEST(NormSwish, IsAccurateOverTheWholeRangeOfFloats) {
  std::vector<float> y;
  for (int i = -3000; i <= 3000; ++i) y.push_back(static_cast<float>(i) * 0.01f);
  const std::vector<float> got = Swish(y);
  for (size_t i = 0; i < y.size(); ++i) {
    const double expected = y[i] / (1 + std::exp(-static_cast<double>(y[i])));
    ASSERT_NEAR(got[i], expected, 4e-7 * std::abs(expected)) << y[i];
  }
  const std::vector<float> ends = Swish({-1e30f, -200.0f, 0.0f, 200.0f, 1e30f, std::nanf("")});
  EXPECT_TRUE(std::isfinite(ends[0]));
  EXPECT_NEAR(ends[1], 0, 1e-30);
  EXPECT_EQ(ends[2], 0);
  EXPECT_EQ(ends[3], 200);
  EXPECT_EQ(ends[4], 1e30f);
  EXPECT_TRUE(std::isnan(ends[5]));
}

// Each loop over split ranges must give the bits of one call over everything; that is what makes threads free.
template <typename Run>
void ExpectSplitsGiveTheSameBits(int64_t size, const Run& run) {
  const auto whole = run({{0, size}});
  const auto split = run({{0, 5}, {5, 6}, {6, size}});
  ASSERT_EQ(whole.size(), split.size());
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_EQ(whole[i], split[i]) << "output " << i;
}
using Ranges = std::vector<std::pair<int64_t, int64_t>>;
using Outputs = std::vector<std::vector<float>>;

constexpr int64_t kRows = 23;
constexpr int64_t kWidth = 37;  // two whole lanes of 16 and a rest

TEST(FeatureGate, SplitRowsGiveTheSameBits) {
  const int64_t subspaces = 3;
  const std::vector<float> v = Draw(kRows * kWidth, 1);
  const std::vector<float> mix = Draw(kRows * subspaces, 2);
  const std::vector<float> a = Draw(subspaces * kRows * kWidth, 3);
  const std::vector<float> dx = Draw(kRows * kWidth, 4);
  ExpectSplitsGiveTheSameBits(kRows, [&](const Ranges& ranges) -> Outputs {
    std::vector<float> s = a, m(kRows * subspaces), x(kRows * kWidth), dv(x.size()), da(s.size()), dmix(m.size());
    const FeatureGate<float> gate = {kRows,      kWidth,    subspaces, v.data(), kWidth,
                                     mix.data(), subspaces, s.data(),  m.data(), x.data()};
    for (const auto& [begin, end] : ranges) Forward(gate, begin, end);
    const FeatureGateGradient<float> back = {kRows,    kWidth,    subspaces, v.data(),  kWidth,     s.data(),
                                             m.data(), dx.data(), dv.data(), da.data(), dmix.data()};
    for (const auto& [begin, end] : ranges) Backward(back, begin, end);
    return {s, m, x, dv, da, dmix};
  });
}

TEST(NormSwish, SplitRowsAndColumnsGiveTheSameBits) {
  const std::vector<float> y = Draw(kRows * kWidth, 5);
  const std::vector<float> weight = Draw(kWidth, 6);
  const std::vector<float> bias = Draw(kWidth, 7);
  const std::vector<float> dout = Draw(kRows * kWidth, 8);
  std::vector<double> mean(kWidth), m2(kWidth);
  ColumnMoments(y.data(), kRows, kWidth, 0, kWidth, mean.data(), m2.data());
  std::vector<double> split_mean(kWidth), split_m2(kWidth);
  ColumnMoments(y.data(), kRows, kWidth, 0, 4, split_mean.data(), split_m2.data());
  ColumnMoments(y.data(), kRows, kWidth, 4, kWidth, split_mean.data(), split_m2.data());
  EXPECT_EQ(mean, split_mean);
  EXPECT_EQ(m2, split_m2);
  std::vector<float> center(mean.begin(), mean.end());
  std::vector<float> inv;
  for (double square : m2) inv.push_back(static_cast<float>(1 / std::sqrt(square / kRows)));
  ExpectSplitsGiveTheSameBits(kRows, [&](const Ranges& ranges) -> Outputs {
    std::vector<float> out(y.size());
    const NormSwish<float> norm = {kRows,      kWidth,        y.data(),    center.data(),
                                   inv.data(), weight.data(), bias.data(), out.data()};
    for (const auto& [begin, end] : ranges) Forward(norm, begin, end);
    return {out};
  });
  ExpectSplitsGiveTheSameBits(kWidth, [&](const Ranges& ranges) -> Outputs {
    std::vector<float> dy(y.size()), dweight(kWidth), dbias(kWidth);
    const NormSwishGradient<float> norm = {kRows,         kWidth,     true,           y.data(),
                                           center.data(), inv.data(), weight.data(),  bias.data(),
                                           dout.data(),   dy.data(),  dweight.data(), dbias.data()};
    for (const auto& [begin, end] : ranges) Backward(norm, begin, end);
    return {dy, dweight, dbias};
  });
}

TEST(Mixture, SplitRowsGiveTheSameBits) {
  const std::vector<float> experts = Draw(kRows * 3 * kWidth, 9);  // three side by side
  const std::vector<float> gate = Draw(kRows * 3, 10);
  const std::vector<float> self = Draw(kRows * 2, 11);
  const std::vector<float> dz = Draw(kRows * kWidth, 12);
  const float* block[] = {experts.data(), experts.data() + kWidth, experts.data() + 2 * kWidth};
  const int64_t distance[] = {3 * kWidth, 3 * kWidth, 3 * kWidth};
  ExpectSplitsGiveTheSameBits(kRows, [&](const Ranges& ranges) -> Outputs {
    std::vector<float> g(kRows * 3), u(kRows * 2), z(kRows * kWidth), de(experts.size()), dgate(g.size()),
        dself(u.size());
    const Mixture<float> mixture = {kWidth, 3,           1, 2,        block,    distance, gate.data(),
                                    3,      self.data(), 2, g.data(), u.data(), z.data()};
    for (const auto& [begin, end] : ranges) Forward(mixture, begin, end);
    float* dblock[] = {de.data(), de.data() + kWidth, de.data() + 2 * kWidth};
    const MixtureGradient<float> back = {kWidth,   3,        1,         2,      block,        distance,
                                         g.data(), u.data(), dz.data(), dblock, dgate.data(), dself.data()};
    for (const auto& [begin, end] : ranges) Backward(back, begin, end);
    return {g, u, z, de, dgate, dself};
  });
}

}  // namespace
}  // namespace hearth::kernels
