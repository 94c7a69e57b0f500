#include "common/metrics.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/status.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// A port that is taken as long as this lives.
class TakenPort {
 public:
  TakenPort() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = Loopback(0);
    socklen_t length = sizeof(address);
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&address), length), 0);
    EXPECT_EQ(listen(fd_, 1), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length), 0);
    port_ = ntohs(address.sin_port);
  }
  ~TakenPort() { close(fd_); }
  uint16_t port() const { return port_; }

 private:
  const int fd_;
  uint16_t port_ = 0;
};

std::string Get(uint16_t port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Loopback(port);
  EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  const std::string request = absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
  std::string answer;
  char chunk[4096];
  for (ssize_t got; (got = read(fd, chunk, sizeof(chunk))) > 0;) answer.append(chunk, static_cast<size_t>(got));
  close(fd);
  return answer;
}

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
  ASSERT_TRUE(metrics.Serve("127.0.0.1", port).ok());
  EXPECT_THAT(Get(port, "/metrics"), AllOf(HasSubstr("200 OK"), HasSubstr("Content-Type: text/plain"),
                                           HasSubstr("hearth_rows{rank=\"1\",role=\"ps\"} 7")));
}

TEST(Metrics, PortZeroIsOff) {
  MetricRegistry metrics("ps", 1);
  EXPECT_TRUE(metrics.Serve("127.0.0.1", 0).ok());
}

TEST(Metrics, APortInUseIsNamedWithTheRemedy) {
  MetricRegistry metrics("ps", 1);
  const TakenPort taken;
  const absl::Status status = metrics.Serve("127.0.0.1", taken.port());
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_EQ(ExitCodeOf(status), kExitIo);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(std::to_string(taken.port())), HasSubstr("--set metrics.prometheus_port=")));
  EXPECT_TRUE(absl::IsInvalidArgument(metrics.Serve("127.0.0.1", 70000)));
}

}  // namespace
}  // namespace hearth
