#include "worker/bundle/golden_records.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>

#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

GoldenRecord TakeRecord(const Batch& batch, int64_t record, const Job& job, const FeatureLayout& layout) {
  GoldenRecord sample;
  sample.file = batch.file_of[record];
  sample.offset = batch.offset[record];
  for (int slot = 0; slot < job.slot_size(); ++slot) {
    const RowGroup& group = batch.groups[layout.slots[slot].group];
    const int64_t bag = layout.slots[slot].bag * batch.records + record;
    std::vector<uint64_t>& signs = sample.signs.emplace_back();
    for (int64_t i = group.offsets[bag]; i < group.offsets[bag + 1]; ++i)
      signs.push_back(group.unique[group.row_of[i]]);
  }
  const auto part = [record](const std::vector<float>& all, int count) {
    return std::vector<float>(all.begin() + record * count, all.begin() + (record + 1) * count);
  };
  sample.dense = part(batch.dense, job.dense_size());
  sample.labels = part(batch.labels, job.task_size());
  sample.mask = part(batch.mask, job.task_size());
  return sample;
}

}  // namespace

absl::StatusOr<std::vector<GoldenRecord>> SampleRecords(const Job& job, const ScoredLog& scored, size_t count,
                                                        uint64_t head) {
  const FeatureLayout layout = MakeFeatureLayout(job);
  std::map<uint64_t, GoldenRecord> chosen;
  uint64_t seen = 0;
  const absl::Status visited =
      VisitBatches(job, scored, /*keep_user_text=*/false, [&](Batch* batch) -> absl::StatusOr<bool> {
        for (int64_t record = 0; record < batch->records; ++record) {
          const uint64_t key = Mix64(Mix64(batch->file_of[record]) ^ batch->offset[record]);
          if (chosen.size() == count && key >= chosen.rbegin()->first) continue;
          chosen.emplace(key, TakeRecord(*batch, record, job, layout));
          if (chosen.size() > count) chosen.erase(std::prev(chosen.end()));
        }
        seen += static_cast<uint64_t>(batch->records);
        return seen < head;
      });
  HEARTH_RETURN_IF_ERROR(visited);
  std::vector<GoldenRecord> samples;
  for (auto& [key, sample] : chosen) samples.push_back(std::move(sample));
  std::sort(samples.begin(), samples.end(), [](const GoldenRecord& a, const GoldenRecord& b) {
    return std::make_pair(a.file, a.offset) < std::make_pair(b.file, b.offset);
  });
  return samples;
}

std::unique_ptr<Batch> BatchOf(const Job& job, const std::vector<GoldenRecord>& records) {
  BatchBuilder builder(job);
  for (const GoldenRecord& record : records) {
    for (size_t slot = 0; slot < record.signs.size(); ++slot) {
      for (const uint64_t sign : record.signs[slot]) builder.AddSign(static_cast<int>(slot), sign);
    }
    builder.AddDense(record.dense);
    builder.AddLabels(record.labels, record.mask);
    builder.EndRecord(record.file, record.offset);
  }
  return builder.Build();
}

double ProbabilityOf(float logit) { return 1.0 / (1.0 + std::exp(-static_cast<double>(logit))); }

}  // namespace hearth
