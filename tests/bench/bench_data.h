// What the benches draw: ids as a log has them, and batches of rows as a server gets them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/base/env.h"
#include "common/base/status.h"
#include "embedding/embedding_table.h"
#include "embedding/sign.h"

namespace hearth {

constexpr uint32_t kDim = 16;
constexpr uint64_t kRowBytes = (kDim + 1) * sizeof(float);  // weights and row-wise Adagrad's state
constexpr double kZipfExponent = 1.05;

// The log of the jobs: slots with ids of their own.
constexpr uint32_t kSlots = 26;
constexpr uint64_t kIdsOfSlot = 10'000'000;
constexpr uint64_t kBatchRecords = 2048;

// Ranks of ids in no order that a table could use.
inline Sign SignOfRank(uint64_t rank) { return MakeSign(1, Mix64(rank)); }

// A rank in [0, count) with probability ~ 1 / (rank + 1)^s: rejection-inversion (Hörmann and Derflinger 1996).
class Zipf {
 public:
  Zipf(uint64_t count, double s)
      : s_(s), first_(H(1.5) - 1), last_(H(static_cast<double>(count) + 0.5)), count_(count) {}
  uint64_t Draw(Random* random) const {
    while (true) {
      const double u = last_ + random->Uniform() * (first_ - last_);
      const double x = std::pow(1 + u * (1 - s_), 1 / (1 - s_));
      const uint64_t k = std::clamp<uint64_t>(static_cast<uint64_t>(x + 0.5), 1, count_);
      if (u >= H(static_cast<double>(k) + 0.5) - std::pow(static_cast<double>(k), -s_)) return k - 1;
    }
  }

 private:
  double H(double x) const { return (std::pow(x, 1 - s_) - 1) / (1 - s_); }

  double s_, first_, last_;
  uint64_t count_;
};

// The rows of one step.
struct RowBatch {
  std::vector<Sign> signs;            // [count], ascending
  std::vector<uint32_t> occurrences;  // [count]
  std::vector<float> gradients;       // [count, kDim]
};

// `drawn`: a sign for each occurrence.
inline RowBatch BatchOf(std::vector<Sign> drawn, Random* random) {
  std::sort(drawn.begin(), drawn.end());
  RowBatch batch;
  for (const Sign sign : drawn) {
    if (batch.signs.empty() || batch.signs.back() != sign) {
      batch.signs.push_back(sign);
      batch.occurrences.push_back(0);
    }
    ++batch.occurrences.back();
  }
  for (size_t i = 0; i < batch.signs.size() * kDim; ++i) {
    batch.gradients.push_back(static_cast<float>(random->Uniform() - 0.5));
  }
  return batch;
}

inline TableOptions BenchTable(uint64_t memory_rows_max) {
  TableOptions options;
  options.config.set_name("bench");
  options.config.set_dim(kDim);
  options.config.mutable_optimizer()->set_kind(Optimizer::ROWWISE_ADAGRAD);
  options.memory_rows_max = memory_rows_max;
  return options;
}

inline void Check(const absl::Status& status) { HEARTH_CHECK(status.ok(), "", status.ToString()); }

inline double SecondsSince(int64_t begin_us) { return static_cast<double>(Env::Real()->NowUs() - begin_us) * 1e-6; }

}  // namespace hearth
