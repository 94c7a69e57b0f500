#include "scheduler/progress.h"

#include <gtest/gtest.h>

#include "common/base/env.h"

namespace hearth {
namespace {

// Every pair of a positive and a negative, one by one.
std::optional<double> SlowAuc(const TaskMetric& metric) {
  double won = 0;
  double pairs = 0;
  for (int p = 0; p < metric.positives_size(); ++p) {
    for (int n = 0; n < metric.negatives_size(); ++n) {
      const double count = static_cast<double>(metric.positives(p) * metric.negatives(n));
      pairs += count;
      won += count * (p > n ? 1 : p == n ? 0.5 : 0);
    }
  }
  if (pairs == 0) return std::nullopt;
  return won / pairs;
}

TEST(StreamingAuc, EqualsTheShareOfPairsInOrder) {
  Random random(3);
  for (int round = 0; round < 200; ++round) {
    TaskMetric metric;
    const uint64_t buckets = 1 + random.Below(20);
    for (uint64_t b = 0; b < buckets; ++b) {
      metric.add_positives(random.Below(4) == 0 ? random.Below(100) : 0);
      metric.add_negatives(random.Below(3) == 0 ? random.Below(100) : 0);
    }
    const std::optional<double> slow = SlowAuc(metric);
    const std::optional<double> fast = StreamingAuc(metric);
    ASSERT_EQ(fast.has_value(), slow.has_value());
    if (slow.has_value()) {
      EXPECT_NEAR(*fast, *slow, 1e-12);
    }
  }
}

ValidationWindow WindowOf(uint64_t first_step, uint64_t last_step, double loss) {
  ValidationWindow window;
  window.set_first_step(first_step);
  window.set_last_step(last_step);
  TaskMetric* metric = window.add_task();
  metric->set_loss_sum(loss);
  metric->set_prediction_sum(1.5);
  metric->set_labelled(2);
  metric->add_positives(1);
  metric->add_negatives(1);
  return window;
}

TEST(ValidationWindows, AreWholeOnceEveryWorkerHasToldAndComeInOrder) {
  ValidationWindows windows(2);
  ASSERT_TRUE(windows.Add(WindowOf(1, 5, 1))->empty());
  ASSERT_TRUE(windows.Add(WindowOf(6, 9, 2))->empty()) << "one worker is ahead";
  const auto first = windows.Add(WindowOf(1, 5, 3));
  ASSERT_EQ(first->size(), 1u);
  EXPECT_EQ((*first)[0].last_step(), 5u);
  EXPECT_DOUBLE_EQ(*MeanLoss({(*first)[0].task(0)}), 1.0);
  EXPECT_DOUBLE_EQ(*CalibrationOf((*first)[0].task(0)), 1.5);
  EXPECT_EQ(windows.Add(WindowOf(6, 9, 2))->at(0).first_step(), 6u);
  ASSERT_TRUE(windows.Add(WindowOf(10, 12, 1))->empty());
  EXPECT_TRUE(absl::IsInternal(windows.Add(WindowOf(11, 12, 1)).status()));
}

TEST(CalibrationOf, IsUndefinedWithoutAPositiveAndOfAnOlderVersionsMetric) {
  TaskMetric metric = WindowOf(1, 2, 1).task(0);
  metric.set_positives(0, 0);
  EXPECT_FALSE(CalibrationOf(metric).has_value());
  metric = WindowOf(1, 2, 1).task(0);
  metric.clear_prediction_sum();
  EXPECT_FALSE(CalibrationOf(metric).has_value());
}

ProgressFigures FullFigures() {
  ProgressFigures figures;
  figures.step = 1200;
  figures.fraction = 0.4375;
  figures.samples_per_s = 12'345;
  figures.remaining_s = 80;
  figures.loss = 0.51234;
  figures.auc = {{"click", 0.75}, {"like", std::nullopt}};
  figures.hit_ratio = 0.982;
  figures.files_behind = 3;
  figures.bad_records = 17;
  return figures;
}

TEST(FormatProgress, ShowsEachFigureOnceAndADashWhereItIsUndefined) {
  EXPECT_EQ(FormatProgress(FullFigures(), false, 0),
            "step 1200   43%  12.3k samples/s  ETA 1:20  before training: loss 0.5123  AUC click 0.7500 like -  hits "
            "98.2%  lag 3 files  bad 17");
  EXPECT_EQ(FormatProgress(ProgressFigures(), false, 0), "step 0  0 samples/s  bad 0");
}

TEST(FormatProgress, DrawsABarAndKeepsToTheTerminalsWidth) {
  EXPECT_NE(FormatProgress(FullFigures(), true, 0).find("43% [========            ]"), std::string::npos);
  EXPECT_EQ(FormatProgress(FullFigures(), true, 40).size(), 40u);
}

TEST(FormatCount, KeepsThreeDigitsOrSo) {
  EXPECT_EQ(FormatCount(950), "950");
  EXPECT_EQ(FormatCount(12'345), "12.3k");
  EXPECT_EQ(FormatCount(4'561'000), "4.56M");
}

TEST(FormatDuration, IsMinutesAndSecondsAndHoursWhereThereAreAny) {
  EXPECT_EQ(FormatDuration(7), "0:07");
  EXPECT_EQ(FormatDuration(725), "12:05");
  EXPECT_EQ(FormatDuration(3723), "1:02:03");
  EXPECT_EQ(FormatDuration(-1), "0:00");
}

}  // namespace
}  // namespace hearth
