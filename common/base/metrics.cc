#include "common/base/metrics.h"

#include <netdb.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>

#include "absl/strings/match.h"
#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int kBacklogMax = 16;
constexpr size_t kRequestBytesMax = 8192;
constexpr int64_t kClientSeconds = 2;  // for each piece of a request or an answer

// Answers GET /metrics on a thread of its own, a connection at a time. Not prometheus-cpp's own server: its threads
// have stacks of 100 kB, less than Torch's thread-local data alone, so that a worker could start none.
class Page {
 public:
  static absl::StatusOr<std::unique_ptr<Page>> Open(const std::string& address, uint32_t port,
                                                    std::function<std::string()> text) {
    addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
    addrinfo* found = nullptr;
    if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("metrics.prometheus_address: ", address, " is no numeric address; give one like 127.0.0.1"));
    }
    const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int one = 1;
    const bool listens = fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
                         bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, kBacklogMax) == 0;
    const int error = errno;
    freeaddrinfo(found);
    if (listens) return std::unique_ptr<Page>(new Page(fd, std::move(text)));
    if (fd >= 0) close(fd);
    return absl::UnavailableError(std::strerror(error));
  }
  ~Page() {
    shutdown(fd_, SHUT_RDWR);  // ends accept
    thread_.reset();
    close(fd_);
  }

 private:
  Page(int fd, std::function<std::string()> text)
      : fd_(fd), text_(std::move(text)), thread_(Env::Real()->StartThread("metrics", [this] { Run(); })) {}

  void Run() {
    while (true) {
      const int client = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client >= 0) {
        Answer(client);
        close(client);
      } else if (errno != EINTR && errno != ECONNABORTED) {
        return;
      }
    }
  }

  void Answer(int client) const {
    const timeval patience = {kClientSeconds, 0};
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    std::string request;
    char piece[1024];
    while (!absl::StrContains(request, "\r\n\r\n")) {
      const ssize_t got = recv(client, piece, sizeof(piece), 0);
      if (got <= 0 || request.size() > kRequestBytesMax) return;
      request.append(piece, static_cast<size_t>(got));
    }
    const bool known = absl::StartsWith(request, "GET /metrics ") || absl::StartsWith(request, "GET /metrics?");
    const std::string body = known ? text_() : "only /metrics is here\n";
    const std::string answer =
        absl::StrCat("HTTP/1.1 ", known ? "200 OK" : "404 Not Found",
                     "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: ", body.size(),
                     "\r\nConnection: close\r\n\r\n", body);
    for (size_t sent = 0; sent < answer.size();) {
      const ssize_t more = send(client, answer.data() + sent, answer.size() - sent, MSG_NOSIGNAL);
      if (more <= 0) return;
      sent += static_cast<size_t>(more);
    }
  }

  const int fd_;
  const std::function<std::string()> text_;
  std::unique_ptr<Thread> thread_;
};

// From a look-up in memory to a snapshot, a factor of about two and a half apart.
const prometheus::Histogram::BucketBoundaries& SecondsBoundaries() {
  static const auto* const boundaries = new prometheus::Histogram::BucketBoundaries{
      0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
      0.05,    0.1,      0.25,    0.5,    1,       2.5,    5,     10,     25,    60};
  return *boundaries;
}

class PrometheusCounter : public Counter {
 public:
  explicit PrometheusCounter(prometheus::Counter* counter) : counter_(counter) {}
  void Add(double amount) override { counter_->Increment(amount); }
  void RaiseTo(double total) override {
    const double missing = total - counter_->Value();
    if (missing > 0) counter_->Increment(missing);
  }

 private:
  prometheus::Counter* const counter_;
};

class PrometheusGauge : public Gauge {
 public:
  explicit PrometheusGauge(prometheus::Gauge* gauge) : gauge_(gauge) {}
  void Set(double value) override { gauge_->Set(value); }

 private:
  prometheus::Gauge* const gauge_;
};

class PrometheusHistogram : public Histogram {
 public:
  explicit PrometheusHistogram(prometheus::Histogram* histogram) : histogram_(histogram) {}
  void Observe(double seconds) override { histogram_->Observe(seconds); }

 private:
  prometheus::Histogram* const histogram_;
};

}  // namespace

struct MetricRegistry::State {
  // Notes the declaration; returns the metric's full name.
  std::string Declare(const MetricSpec& spec, const MetricLabels& labels, absl::string_view unit,
                      absl::string_view end);
  template <typename Handle, typename Family, typename Metric, typename... Options>
  Handle* Keep(std::vector<std::unique_ptr<Handle>>* handles, Family* family, const MetricLabels& labels,
               const Options&... options) {
    const prometheus::Labels own(labels.begin(), labels.end());
    handles->push_back(std::make_unique<Metric>(&family->Add(own, options...)));
    return handles->back().get();
  }

  int rank = 0;  // constant after construction
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  prometheus::Labels constant;
  std::mutex mutex;
  std::map<std::string, std::string> meanings;  // guarded by mutex; full name → what it was declared as
  std::set<std::pair<std::string, prometheus::Labels>> metrics;  // guarded by mutex
  std::vector<std::unique_ptr<Counter>> counters;                // guarded by mutex, like the next two
  std::vector<std::unique_ptr<Gauge>> gauges;
  std::vector<std::unique_ptr<Histogram>> histograms;
  std::unique_ptr<Page> page;  // last: its thread reads the registry
};

std::string MetricRegistry::State::Declare(const MetricSpec& spec, const MetricLabels& labels, absl::string_view unit,
                                           absl::string_view end) {
  const std::string full = absl::StrCat("hearth_", spec.name, unit.empty() ? "" : "_", unit, end);
  HEARTH_CHECK(!spec.name.empty() && !spec.meaning.empty(), "a metric needs a name and a meaning: ", full);
  const auto declared = meanings.try_emplace(full, spec.meaning).first;
  HEARTH_CHECK(declared->second == spec.meaning, "metric ", full, " has two meanings");
  const bool is_new = metrics.emplace(full, prometheus::Labels(labels.begin(), labels.end())).second;
  HEARTH_CHECK(is_new, "metric ", full, " is declared twice");
  return full;
}

MetricRegistry::MetricRegistry(absl::string_view role, int rank) : state_(std::make_unique<State>()) {
  state_->rank = rank;
  state_->constant = {{"role", std::string(role)}, {"rank", std::to_string(rank)}};
}

MetricRegistry::~MetricRegistry() = default;

Counter* MetricRegistry::NewCounter(const MetricSpec& spec, const MetricLabels& labels) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const std::string name = state_->Declare(spec, labels, spec.unit, "_total");
  auto& family =
      prometheus::BuildCounter().Name(name).Help(spec.meaning).Labels(state_->constant).Register(*state_->registry);
  return state_->Keep<Counter, prometheus::Family<prometheus::Counter>, PrometheusCounter>(&state_->counters, &family,
                                                                                           labels);
}

Gauge* MetricRegistry::NewGauge(const MetricSpec& spec, const MetricLabels& labels) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const std::string name = state_->Declare(spec, labels, spec.unit, "");
  auto& family =
      prometheus::BuildGauge().Name(name).Help(spec.meaning).Labels(state_->constant).Register(*state_->registry);
  return state_->Keep<Gauge, prometheus::Family<prometheus::Gauge>, PrometheusGauge>(&state_->gauges, &family, labels);
}

Histogram* MetricRegistry::NewHistogram(const MetricSpec& spec, const MetricLabels& labels) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  HEARTH_CHECK(spec.unit.empty() || spec.unit == "seconds", "histogram ", spec.name, " is not of seconds");
  const std::string name = state_->Declare(spec, labels, "seconds", "");
  auto& family =
      prometheus::BuildHistogram().Name(name).Help(spec.meaning).Labels(state_->constant).Register(*state_->registry);
  return state_->Keep<Histogram, prometheus::Family<prometheus::Histogram>, PrometheusHistogram>(
      &state_->histograms, &family, labels, SecondsBoundaries());
}

absl::Status MetricRegistry::Serve(const std::string& address, uint32_t port) {
  if (port == 0) return absl::OkStatus();
  port += static_cast<uint32_t>(state_->rank);
  const std::string where = absl::StrCat(address, ":", port);
  if (port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("metrics: ", where,
                                                   ": there is no such port; rank r listens on "
                                                   "metrics.prometheus_port + r: lower it"));
  }
  auto page = Page::Open(address, port, [this] { return Text(); });
  if (absl::IsUnavailable(page.status())) {
    return absl::UnavailableError(absl::StrCat(
        "metrics: cannot listen on ", where, ", port ", port, " (metrics.prometheus_port + rank ", state_->rank,
        "): ", page.status().message(), "; give another with --set metrics.prometheus_port=…, or 0 for none"));
  }
  HEARTH_ASSIGN_OR_RETURN(state_->page, std::move(page));
  return absl::OkStatus();
}

std::string MetricRegistry::Text() const { return prometheus::TextSerializer().Serialize(state_->registry->Collect()); }

}  // namespace hearth
