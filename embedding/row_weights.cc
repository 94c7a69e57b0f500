#include "embedding/row_weights.h"

#include <algorithm>
#include <cstring>

#include "absl/base/casts.h"
#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/base/half.h"

namespace hearth {
namespace {

constexpr uint16_t kHalfMax = 0x7bff;
constexpr uint16_t kBfloatMax = 0x7f7f;
constexpr uint32_t kBlock = 64;  // weights encoded at a time

// The magnitude no larger than `max`.
uint16_t Finite(uint16_t x, uint16_t max) {
  return static_cast<uint16_t>((x & 0x8000) | std::min<uint16_t>(x & 0x7fff, max));
}

// Codes of up to kBlock weights at a time to where a row has them.
template <typename Encode>
void ToWords(uint32_t dim, char* words, const Encode& encode) {
  uint16_t codes[kBlock];
  for (uint32_t begin = 0; begin < dim; begin += kBlock) {
    const uint32_t count = std::min(kBlock, dim - begin);
    encode(begin, count, codes);
    std::memcpy(words + begin * sizeof(uint16_t), codes, count * sizeof(uint16_t));
  }
  if (dim % 2 != 0) std::memset(words + dim * sizeof(uint16_t), 0, sizeof(uint16_t));
}

}  // namespace

uint64_t WeightWordsOf(Table::Weights weights, uint32_t dim) {
  return weights == Table::FLOAT32 ? dim : (uint64_t{dim} + 1) / 2;
}

// The bits that are cut off are added to by random ones first: they carry with the probability that they are a part of.
uint16_t ToHalfByChance(float x, uint32_t random) {
  const uint32_t bits = absl::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x38800000) {  // 2^-14
    const uint32_t half = ((magnitude - (112u << 23)) + (random & 0x1fff)) >> 13;
    return static_cast<uint16_t>(sign | std::min<uint32_t>(half, kHalfMax));
  }
  // In units of 2^-24: mantissa · 2^−below.
  const uint32_t exponent = std::max<uint32_t>(magnitude >> 23, 1), below = 126 - exponent;  // from 14 on
  const uint64_t mantissa = (magnitude & 0x7fffff) | (magnitude >> 23 != 0 ? 0x800000 : 0);
  if (below > 56) return static_cast<uint16_t>(sign);  // less than 2^-32 of a unit
  const uint64_t part =
      below > 32 ? mantissa >> (below - 32) : mantissa << (32 - below);  // with 32 bits behind the point
  return static_cast<uint16_t>(sign | (part + random) >> 32);
}

uint16_t ToBfloatByChance(float x, uint32_t random) {
  const uint32_t bits = absl::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  return static_cast<uint16_t>(sign | std::min<uint32_t>((magnitude + (random & 0xffff)) >> 16, kBfloatMax));
}

uint16_t ToBfloat(float x) {
  const uint32_t bits = absl::bit_cast<uint32_t>(x);
  return Finite(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16), kBfloatMax);
}

float FromBfloat(uint16_t bfloat) { return absl::bit_cast<float>(uint32_t{bfloat} << 16); }

void RowWeights::Decode(const char* words, float* weights) const {
  if (!packed()) {
    std::memcpy(weights, words, dim_ * sizeof(float));
    return;
  }
  uint16_t codes[kBlock];
  for (uint32_t begin = 0; begin < dim_; begin += kBlock) {
    const uint32_t count = std::min(kBlock, dim_ - begin);
    std::memcpy(codes, words + begin * sizeof(uint16_t), count * sizeof(uint16_t));
    if (kind_ == Table::FLOAT16) {
      FromHalf(absl::MakeConstSpan(codes, count), weights + begin);
    } else {
      for (uint32_t i = 0; i < count; ++i) weights[begin + i] = FromBfloat(codes[i]);
    }
  }
}

void RowWeights::Encode(const float* weights, char* words) const {
  if (!packed()) {
    std::memcpy(words, weights, dim_ * sizeof(float));
    return;
  }
  ToWords(dim_, words, [&](uint32_t begin, uint32_t count, uint16_t* codes) {
    if (kind_ == Table::FLOAT16) {
      ToHalf(absl::MakeConstSpan(weights + begin, count), codes);
      for (uint32_t i = 0; i < count; ++i) codes[i] = Finite(codes[i], kHalfMax);
    } else {
      for (uint32_t i = 0; i < count; ++i) codes[i] = ToBfloat(weights[begin + i]);
    }
  });
}

void RowWeights::Round(float* weights) const {
  for (uint32_t i = 0; packed() && i < dim_; ++i) {
    weights[i] =
        kind_ == Table::FLOAT16 ? FromHalf(Finite(ToHalf(weights[i]), kHalfMax)) : FromBfloat(ToBfloat(weights[i]));
  }
}

void RowWeights::EncodeByChance(Sign sign, uint64_t step, const float* weights, char* words) const {
  if (!packed()) return Encode(weights, words);
  const uint64_t stream = Mix64(Mix64(Mix64(seed_ ^ 0xd1b54a32d192ed03ull) ^ sign) + step);
  ToWords(dim_, words, [&](uint32_t begin, uint32_t count, uint16_t* codes) {
    for (uint32_t i = 0; i < count; i += 2) {  // begin is even: two weights have one number's halves
      const uint64_t random = Mix64(stream + (begin + i) / 2);
      const uint32_t bits[2] = {static_cast<uint32_t>(random), static_cast<uint32_t>(random >> 32)};
      for (uint32_t j = i; j < std::min(i + 2, count); ++j) {
        const float x = weights[begin + j];
        codes[j] = kind_ == Table::FLOAT16 ? ToHalfByChance(x, bits[j - i]) : ToBfloatByChance(x, bits[j - i]);
      }
    }
  });
}

}  // namespace hearth
