#include "ps/server_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace hearth {
namespace {

using ::testing::HasSubstr;

TEST(ServerMetrics, SayWhatWasAskedAndWhatTheTablesHold) {
  Job job;
  job.add_table()->set_name("user");
  ServerMetrics metrics(job, 2);
  metrics.Count(MessageKind::kPull);
  metrics.Count(MessageKind::kPull);
  metrics.Count(MessageKind::kPush);
  std::vector<TableStats> stats(1);
  metrics.Show(1, stats);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_step{rank=\"2\",role=\"ps\"} 1"));
  stats[0].set_rows_in_memory(40);
  stats[0].set_rows_spilled(7);
  stats[0].set_rows_prefetched(5);
  stats[0].set_memory_hits(3);
  stats[0].set_memory_misses(1);
  metrics.Show(9, stats);
  const std::string text = metrics.Text();
  const std::string labels = "{rank=\"2\",role=\"ps\",table=\"user\"} ";
  EXPECT_THAT(text, HasSubstr("hearth_step{rank=\"2\",role=\"ps\"} 9"));
  metrics.ShowRefused(3);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_refused_messages_total{rank=\"2\",role=\"ps\"} 3"));
  EXPECT_THAT(text, HasSubstr("hearth_requests_total{rank=\"2\",role=\"ps\",kind=\"pull\"} 2"));
  EXPECT_THAT(text, HasSubstr("hearth_requests_total{rank=\"2\",role=\"ps\",kind=\"push\"} 1"));
  EXPECT_THAT(text, HasSubstr("hearth_memory_rows" + labels + "40"));
  EXPECT_THAT(text, HasSubstr("hearth_spilled_rows_total" + labels + "7"));
  EXPECT_THAT(text, HasSubstr("hearth_prefetched_rows_total" + labels + "5"));
  EXPECT_THAT(text, HasSubstr("hearth_memory_hit_ratio" + labels + "0.75"));
}

}  // namespace
}  // namespace hearth
