#include "worker/evaluation/auc.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/base/status.h"
#include "model/batch/batch.h"

namespace hearth {
namespace {

// Orders as the float does, -0 and +0 the same; the label rides in the lowest bit. REQUIRES: not NaN.
uint64_t SortKey(float score, bool positive) {
  const float value = score + 0.0f;  // -0 → +0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t ordered = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return (uint64_t{ordered} << 1) | (positive ? 1 : 0);
}

bool IsPositive(float label) { return label > 0.5f; }

bool HasNan(absl::Span<const float> values) {
  return std::any_of(values.begin(), values.end(), [](float value) { return std::isnan(value); });
}

// AUC of sorted keys. Counts twice the won pairs in integers, so it is exact up to the last division.
template <typename KeyOf>
std::optional<double> AucOfSorted(size_t begin, size_t end, KeyOf key_of) {
  uint64_t positives = 0;
  uint64_t negatives = 0;
  unsigned __int128 won_twice = 0;
  for (size_t i = begin; i < end;) {
    uint64_t tied[2] = {0, 0};  // negatives, positives
    const uint64_t score = key_of(i) >> 1;
    for (; i < end && key_of(i) >> 1 == score; ++i) ++tied[key_of(i) & 1];
    won_twice += static_cast<unsigned __int128>(tied[1]) * (2 * negatives + tied[0]);
    negatives += tied[0];
    positives += tied[1];
  }
  if (positives == 0 || negatives == 0) return std::nullopt;
  return static_cast<double>(won_twice) / (2.0 * static_cast<double>(positives) * static_cast<double>(negatives));
}

double Sigmoid(double logit) {
  if (logit >= 0) return 1 / (1 + std::exp(-logit));
  const double e = std::exp(logit);
  return e / (1 + e);
}

void SizeHistograms(TaskMetric* metric) {
  if (metric->positives_size() == 0) metric->mutable_positives()->Resize(kAucBuckets, 0);
  if (metric->negatives_size() == 0) metric->mutable_negatives()->Resize(kAucBuckets, 0);
  HEARTH_CHECK(metric->positives_size() == kAucBuckets && metric->negatives_size() == kAucBuckets,
               "a histogram of another number of buckets");
}

}  // namespace

double LogLoss(double logit, bool positive) {
  return std::max(logit, 0.0) - (positive ? logit : 0.0) + std::log1p(std::exp(-std::abs(logit)));
}

std::optional<double> Auc(absl::Span<const float> scores, absl::Span<const float> labels) {
  HEARTH_CHECK(scores.size() == labels.size());
  if (HasNan(scores)) return std::nullopt;
  std::vector<uint64_t> keys(scores.size());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = SortKey(scores[i], IsPositive(labels[i]));
  std::sort(keys.begin(), keys.end());
  return AucOfSorted(0, keys.size(), [&keys](size_t i) { return keys[i]; });
}

Gauc GroupedAuc(absl::Span<const float> scores, absl::Span<const float> labels, absl::Span<const uint64_t> users) {
  HEARTH_CHECK(scores.size() == labels.size() && scores.size() == users.size());
  Gauc gauc;
  if (HasNan(scores)) return gauc;
  std::vector<std::pair<uint64_t, uint64_t>> keys;  // user, key
  keys.reserve(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    if (users[i] != kNoUser) keys.emplace_back(users[i], SortKey(scores[i], IsPositive(labels[i])));
  }
  std::sort(keys.begin(), keys.end());
  double sum = 0;  // over users in ascending hash: the order is a function of the data
  for (size_t begin = 0; begin < keys.size();) {
    size_t end = begin;
    while (end < keys.size() && keys[end].first == keys[begin].first) ++end;
    const auto auc = AucOfSorted(begin, end, [&keys](size_t i) { return keys[i].second; });
    if (auc) {
      ++gauc.users;
      gauc.impressions += end - begin;
      sum += static_cast<double>(end - begin) * *auc;
    }
    begin = end;
  }
  if (gauc.impressions > 0) gauc.value = sum / static_cast<double>(gauc.impressions);
  return gauc;
}

Evaluation::Task Evaluate(const std::string& name, const TaskScores& scores) {
  HEARTH_CHECK(scores.logits.size() == scores.labels.size());
  Evaluation::Task task;
  task.set_name(name);
  uint64_t positives = 0;
  double loss = 0;
  double predicted = 0;
  for (size_t i = 0; i < scores.logits.size(); ++i) {
    const bool positive = IsPositive(scores.labels[i]);
    positives += positive;
    loss += LogLoss(scores.logits[i], positive);
    predicted += Sigmoid(scores.logits[i]);
  }
  const uint64_t samples = scores.logits.size();
  task.set_samples(samples);
  task.set_positives(positives);
  if (samples > 0 && std::isfinite(loss)) task.set_log_loss(loss / static_cast<double>(samples));
  if (positives > 0 && std::isfinite(predicted)) task.set_calibration(predicted / static_cast<double>(positives));
  if (const auto auc = Auc(scores.logits, scores.labels)) task.set_auc(*auc);
  if (!scores.users.empty()) {
    const Gauc gauc = GroupedAuc(scores.logits, scores.labels, scores.users);
    if (gauc.value) task.set_gauc(*gauc.value);
    task.set_gauc_users(gauc.users);
    task.set_gauc_impressions(gauc.impressions);
  }
  return task;
}

void AddPrediction(TaskMetric* metric, float logit, bool positive, double loss) {
  HEARTH_CHECK(!std::isnan(logit), "a batch with NaN logits is skipped before it is counted");
  if (metric->positives_size() != kAucBuckets || metric->negatives_size() != kAucBuckets) SizeHistograms(metric);
  const double prediction = Sigmoid(logit);
  const int bucket = std::min(kAucBuckets - 1, static_cast<int>(prediction * kAucBuckets));
  auto* histogram = positive ? metric->mutable_positives() : metric->mutable_negatives();
  histogram->Set(bucket, histogram->Get(bucket) + 1);
  metric->set_labelled(metric->labelled() + 1);
  metric->set_loss_sum(metric->loss_sum() + loss);
  metric->set_prediction_sum(metric->prediction_sum() + prediction);
}

}  // namespace hearth
