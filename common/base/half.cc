#include "common/base/half.h"

#include <cstddef>

#include "absl/base/casts.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hearth {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;  // of 32 bits
constexpr uint32_t kBitsLess = 13;          // of the mantissa

#if defined(__x86_64__)
bool HasF16c() {
  static const bool has = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  return has;
}

__attribute__((target("avx,f16c"))) size_t ToHalfByEights(absl::Span<const float> from, uint16_t* to) {
  size_t i = 0;
  for (; i + 8 <= from.size(); i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from.data() + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

__attribute__((target("avx,f16c"))) size_t FromHalfByEights(absl::Span<const uint16_t> from, float* to) {
  size_t i = 0;
  for (; i + 8 <= from.size(); i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.data() + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}
#else
bool HasF16c() { return false; }
size_t ToHalfByEights(absl::Span<const float>, uint16_t*) { return 0; }
size_t FromHalfByEights(absl::Span<const uint16_t>, float*) { return 0; }
#endif

}  // namespace

uint16_t ToHalf(float x) {
  const uint32_t bits = absl::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> kBitsLess & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65,520: half way to the next power
  if (magnitude < 0x38800000) {                                              // 2^-14: fewer bits are left
    // What is added makes the last bit that stays one of 2^-24; the addition rounds.
    const float rounded = absl::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (absl::bit_cast<uint32_t>(rounded) - absl::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t to_even = magnitude >> kBitsLess & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + to_even) >> kBitsLess));
}

float FromHalf(uint16_t half) {
  const uint32_t sign = uint32_t{half} << 16 & 0x80000000, magnitude = half & 0x7fff;
  if (magnitude > 0x7c00) return absl::bit_cast<float>(sign | 0x7fc00000 | magnitude << kBitsLess);
  if (magnitude == 0x7c00) return absl::bit_cast<float>(sign | kInfinity);
  if (magnitude < 0x0400)
    return absl::bit_cast<float>(sign | absl::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  return absl::bit_cast<float>(sign | ((magnitude << kBitsLess) + (112u << 23)));
}

void ToHalf(absl::Span<const float> from, uint16_t* to) {
  for (size_t i = HasF16c() ? ToHalfByEights(from, to) : 0; i < from.size(); ++i) to[i] = ToHalf(from[i]);
}

void FromHalf(absl::Span<const uint16_t> from, float* to) {
  for (size_t i = HasF16c() ? FromHalfByEights(from, to) : 0; i < from.size(); ++i) to[i] = FromHalf(from[i]);
}

}  // namespace hearth
