// A row's weights as it holds them: 32-bit numbers, or 16-bit ones, two to a word.
#pragma once

#include <cstdint>

#include "common/proto/job.pb.h"
#include "embedding/sign.h"

namespace hearth {

// 32-bit words of `dim` weights in a row: an odd 16-bit one has 16 bits of zero behind it.
uint64_t WeightWordsOf(Table::Weights weights, uint32_t dim);

// Weights of 16 bits are rounded to the nearest (ties to even) where a row is born or taken over, and where an update
// changes them by chance: up with the probability that is the part of the way, so that on average small updates count
// in full (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", §3). The random bits come from (seed,
// sign, step) alone: the same on any number of processes and after any resume. What is beyond the largest finite number
// becomes that one. Immutable, so any thread may use it.
class RowWeights {
 public:
  RowWeights(const Table& config, uint64_t seed) : kind_(config.weights()), dim_(config.dim()), seed_(seed) {}

  bool packed() const { return kind_ != Table::FLOAT32; }
  uint64_t words() const { return WeightWordsOf(kind_, dim_); }

  // words [words()] ↔ weights [dim]. Words lie anywhere. REQUIRES for Encode: they are finite.
  void Decode(const char* words, float* weights) const;
  void Encode(const float* weights, char* words) const;
  // What Decode would give after Encode.
  void Round(float* weights) const;
  // After an update of the row of `sign` at `step`: by chance, where they are of 16 bits.
  void EncodeByChance(Sign sign, uint64_t step, const float* weights, char* words) const;

 private:
  Table::Weights kind_;
  uint32_t dim_;
  uint64_t seed_;
};

// x to 16 bits, up or down as the low bits of `random` have it: 13 of a FLOAT16 from 2^-14 on, all 32 below that, 16 of
// a BFLOAT16. REQUIRES: x is finite.
uint16_t ToHalfByChance(float x, uint32_t random);
uint16_t ToBfloatByChance(float x, uint32_t random);
uint16_t ToBfloat(float x);  // nearest, ties to even
float FromBfloat(uint16_t bfloat);

}  // namespace hearth
