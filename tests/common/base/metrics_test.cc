#include "common/base/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <memory>
#include <vector>

#include "common/base/status.h"
#include "tests/common/loopback.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Metrics, SayNameUnitMeaningAndLabels) {
  MetricRegistry metrics("worker", 3);
  Counter* const samples = metrics.NewCounter({"trained", "samples", "Records whose step was applied."});
  samples->Add(2);
  samples->Add(40);
  metrics.NewGauge({"staleness_max", "steps", "Highest staleness seen."})->Set(1);
  Histogram* const pull = metrics.NewHistogram({"pull", "seconds", "From sending a pull to its last reply."});
  pull->Observe(0.002);
  pull->Observe(0.2);
  const std::string text = metrics.Text();
  EXPECT_THAT(text, AllOf(HasSubstr("# HELP hearth_trained_samples_total Records whose step was applied."),
                          HasSubstr("# TYPE hearth_trained_samples_total counter"),
                          HasSubstr("hearth_trained_samples_total{rank=\"3\",role=\"worker\"} 42"),
                          HasSubstr("hearth_staleness_max_steps{rank=\"3\",role=\"worker\"} 1"),
                          HasSubstr("# TYPE hearth_pull_seconds histogram"),
                          HasSubstr("hearth_pull_seconds_count{rank=\"3\",role=\"worker\"} 2"),
                          HasSubstr("le=\"0.0025\"} 1"), HasSubstr("le=\"0.25\"} 2")));
}

TEST(Metrics, ACounterIsRaisedToATotalAndNeverFalls) {
  MetricRegistry metrics("ps", 1);
  Counter* const spilled = metrics.NewCounter({"spilled", "rows", "Rows spilled."});
  for (const double total : {3.0, 7.0, 5.0}) spilled->RaiseTo(total);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_spilled_rows_total{rank=\"1\",role=\"ps\"} 7"));
}

TEST(Metrics, OneNameMayHaveSeveralLabels) {
  MetricRegistry metrics("worker", 0);
  const MetricSpec auc = {"auc", "", "Streaming AUC of a task."};
  metrics.NewGauge(auc, {{"task", "click"}})->Set(0.75);
  metrics.NewGauge(auc, {{"task", "like"}})->Set(0.875);
  EXPECT_THAT(metrics.Text(), AllOf(HasSubstr("task=\"click\"} 0.75"), HasSubstr("task=\"like\"} 0.875")));
}

TEST(MetricsDeathTest, ANameIsDeclaredOnce) {
  MetricRegistry metrics("ps", 1);
  metrics.NewCounter({"rows", "", "Rows."});
  EXPECT_DEATH(metrics.NewCounter({"rows", "", "Rows."}), "declared twice");
  EXPECT_DEATH(metrics.NewCounter({"rows", "", "Something else."}, {{"table", "ids"}}), "two meanings");
}

TEST(Metrics, AreServedAsText) {
  MetricRegistry metrics("ps", 1);
  metrics.NewGauge({"rows", "", "Live rows."})->Set(7);
  uint16_t port;
  { port = TakenPort().port(); }
  ASSERT_TRUE(metrics.Serve("127.0.0.1", port - 1u).ok()) << "rank 1 listens one above";
  EXPECT_THAT(HttpGet(port, "/metrics"), AllOf(HasSubstr("200 OK"), HasSubstr("Content-Type: text/plain"),
                                               HasSubstr("hearth_rows{rank=\"1\",role=\"ps\"} 7")));
  EXPECT_THAT(HttpGet(port, "/"), HasSubstr("404"));
  EXPECT_THAT(HttpGet(port, "/metrics?a=b"), HasSubstr("hearth_rows"));
}

TEST(Metrics, AGaugeIsNotThereBeforeItsFirstValue) {
  MetricRegistry metrics("scheduler", 0);
  Gauge* const loss = metrics.NewGauge({"loss", "", "Mean loss."});
  EXPECT_THAT(metrics.Text(), Not(HasSubstr("hearth_loss{"))) << "0 would be a loss that nobody measured";
  loss->Set(0);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_loss{rank=\"0\",role=\"scheduler\"} 0"));
  loss->Set(0.5);
  EXPECT_THAT(metrics.Text(), HasSubstr("hearth_loss{rank=\"0\",role=\"scheduler\"} 0.5"));
}

// Clients that say little and stay: others are served beside them, and the page ends without them.
TEST(Metrics, ClientsThatSayNothingHoldUpNobody) {
  auto metrics = std::make_unique<MetricRegistry>("ps", 0);
  metrics->NewGauge({"rows", "", "Live rows."})->Set(7);
  uint16_t port;
  { port = TakenPort().port(); }
  ASSERT_TRUE(metrics->Serve("127.0.0.1", port).ok());
  std::vector<int> silent;
  const sockaddr_in address = Loopback(port);
  for (int i = 0; i < 40; ++i) {
    silent.push_back(socket(AF_INET, SOCK_STREAM, 0));
    ASSERT_EQ(connect(silent.back(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    ASSERT_EQ(write(silent.back(), "G", 1), 1);
  }
  EXPECT_THAT(HttpGet(port, "/metrics"), HasSubstr("hearth_rows"));
  metrics.reset();  // with the old page: never, as long as one of them says a byte now and then
  for (const int fd : silent) close(fd);
}

TEST(Metrics, ThePageOutlivesAMomentWithoutDescriptors) {
  MetricRegistry metrics("ps", 0);
  metrics.NewGauge({"rows", "", "Live rows."})->Set(7);
  uint16_t port;
  { port = TakenPort().port(); }
  ASSERT_TRUE(metrics.Serve("127.0.0.1", port).ok());
  const int client = socket(AF_INET, SOCK_STREAM, 0);
  std::vector<int> all;
  for (int fd; (fd = dup(client)) >= 0;) all.push_back(fd);
  const sockaddr_in address = Loopback(port);
  ASSERT_EQ(connect(client, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  const std::string request = "GET /metrics HTTP/1.0\r\n\r\n";
  ASSERT_EQ(write(client, request.data(), request.size()), static_cast<ssize_t>(request.size()));
  pollfd answered = {client, POLLIN, 0};
  EXPECT_EQ(poll(&answered, 1, 300), 0) << "nothing can be accepted now";
  for (const int fd : all) close(fd);
  std::string answer;
  char chunk[4096];
  for (ssize_t got; (got = read(client, chunk, sizeof(chunk))) > 0;) answer.append(chunk, static_cast<size_t>(got));
  EXPECT_THAT(answer, HasSubstr("hearth_rows"));
  close(client);
}

TEST(Metrics, PortZeroIsOff) {
  MetricRegistry metrics("ps", 1);
  EXPECT_TRUE(metrics.Serve("127.0.0.1", 0).ok());
}

TEST(Metrics, APortInUseIsNamedWithTheRemedy) {
  MetricRegistry metrics("ps", 1);
  const TakenPort taken;
  const absl::Status status = metrics.Serve("127.0.0.1", taken.port() - 1u);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_EQ(ExitCodeOf(status), kExitIo);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(std::to_string(taken.port())), HasSubstr("--set metrics.prometheus_port=")));
  EXPECT_TRUE(absl::IsInvalidArgument(metrics.Serve("127.0.0.1", 65535)));
  EXPECT_TRUE(absl::IsInvalidArgument(metrics.Serve("localhost", 9000)));
}

}  // namespace
}  // namespace hearth
