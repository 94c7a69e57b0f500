#include "worker/step/progress_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace hearth {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(ProgressMetrics, SayWhatProgressSays) {
  ProgressMetrics metrics(3);
  Progress progress;
  progress.set_step(12);
  progress.mutable_ledger()->set_trained(640);
  progress.mutable_time()->set_forward_backward(1.5);
  progress.mutable_time()->set_total(4);
  progress.add_pull_seconds(0.002);
  metrics.Show(progress);
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("hearth_step{rank=\"3\",role=\"worker\"} 12"));
  metrics.ShowRefused(2);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_refused_messages_total{rank=\"3\",role=\"worker\"} 2"));
  EXPECT_THAT(text, HasSubstr("hearth_records_total{rank=\"3\",role=\"worker\",fate=\"trained\"} 640"));
  EXPECT_THAT(text, HasSubstr("hearth_phase_seconds_total{rank=\"3\",role=\"worker\",phase=\"forward_backward\"} 1.5"));
  EXPECT_THAT(text, HasSubstr("hearth_training_seconds_total{rank=\"3\",role=\"worker\"} 4"));
  EXPECT_THAT(text, Not(HasSubstr("phase=\"total\""))) << "a sum over phases would count each second twice";
  EXPECT_THAT(text, HasSubstr("hearth_pull_seconds_count{rank=\"3\",role=\"worker\"} 1"));
}

}  // namespace
}  // namespace hearth
