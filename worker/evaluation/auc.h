// Ranking metrics (docs/MODEL.md §7): exact on evaluation, bucketed while training.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "common/proto/control.pb.h"

namespace hearth {

// Exact AUC, ties count one half: (Σ ranks of positives − P(P+1)/2) / (P·N) over mid-ranks. Nothing where one class is
// absent.
std::optional<double> Auc(absl::Span<const float> scores, absl::Span<const float> labels);

struct Gauc {
  std::optional<double> value;  // Σ_u w_u AUC_u / Σ_u w_u over users with both classes, w_u = impressions of u
  uint64_t users = 0;           // that counted
  uint64_t impressions = 0;
};
// users[i] identifies the user of record i; kNoUser: it has none, and is left out.
Gauc GroupedAuc(absl::Span<const float> scores, absl::Span<const float> labels, absl::Span<const uint64_t> users);

// Everything a report says of one task on one split. Log loss is the mean, computed from logits without overflow.
// `logits` and probabilities agree; entries with mask 0 are left out.
struct TaskScores {
  std::vector<float> logits;
  std::vector<float> labels;
  std::vector<uint64_t> users;  // empty: no GAUC
};
Evaluation::Task Evaluate(const std::string& name, const TaskScores& scores);

// Binary cross-entropy of a logit, without overflow.
double LogLoss(double logit, bool positive);

// Streaming histograms of predictions, TaskMetric's buckets (256). The scheduler adds them up and reads an AUC off them
// (scheduler/progress.h, StreamingAuc).
constexpr int kAucBuckets = 256;
void AddPrediction(TaskMetric* metric, float logit, bool positive, double loss);

}  // namespace hearth
