// A few records of a log, the same ones whoever asks: what a model is compared by with itself in another form.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"
#include "worker/bundle/score.h"

namespace hearth {

struct GoldenRecord {
  uint32_t file = 0;
  uint64_t offset = 0;
  std::vector<std::vector<uint64_t>> signs;  // by slot
  std::vector<float> dense, labels, mask;
  std::vector<std::pair<std::string, std::string>> raw;  // column and text, where an exporter filled it in
};

// Of the log's first records, about `head`, those with the least hash of their place, at most `count`. In file order.
absl::StatusOr<std::vector<GoldenRecord>> SampleRecords(const Job& job, const ScoredLog& scored, size_t count,
                                                        uint64_t head);
std::unique_ptr<Batch> BatchOf(const Job& job, const std::vector<GoldenRecord>& records);
double ProbabilityOf(float logit);

}  // namespace hearth
