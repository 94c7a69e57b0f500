#include "common/base/metrics.h"

#include <netdb.h>
#include <poll.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "absl/strings/match.h"
#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int kBacklogMax = 16;
constexpr size_t kClientsMax = 16;
constexpr size_t kRequestBytesMax = 8192;
constexpr int64_t kClientUs = 5'000'000;  // for a request and its answer, however slowly their bytes come
constexpr int64_t kNoDescriptorUs = 100'000;

// Answers GET /metrics on a thread of its own. Not prometheus-cpp's own server: its threads have stacks of 100 kB, less
// than Torch's thread-local data alone, so that a worker could start none.
//
// No client can hold it up: each has its time, kClientsMax are served side by side, and one more closes the one that is
// there longest. It ends at once, whoever is connected.
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
    const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const int one = 1;
    const bool listens = fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
                         bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, kBacklogMax) == 0;
    const int end = listens ? eventfd(0, EFD_CLOEXEC) : -1;
    const int error = errno;
    freeaddrinfo(found);
    if (end >= 0) return std::unique_ptr<Page>(new Page(fd, end, std::move(text)));
    if (fd >= 0) close(fd);
    return absl::UnavailableError(std::strerror(error));
  }
  ~Page() {
    const uint64_t one = 1;
    HEARTH_CHECK(write(end_, &one, sizeof(one)) == sizeof(one), "the page's thread cannot be woken");
    thread_.reset();
    close(end_);
    close(listener_);
  }

 private:
  struct Client {
    int fd;
    int64_t until_us;
    std::string request;
    std::string answer;  // once the request is whole
    size_t sent = 0;
  };

  Page(int listener, int end, std::function<std::string()> text)
      : listener_(listener),
        end_(end),
        text_(std::move(text)),
        thread_(Env::Real()->StartThread("metrics", [this] { Run(); })) {}

  void Run() {
    std::vector<Client> clients;  // the one that is there longest first
    int64_t accept_from_us = 0;
    while (true) {
      const int64_t now_us = Env::Real()->NowUs();
      const bool accepts = now_us >= accept_from_us;
      std::vector<pollfd> waits = {{end_, POLLIN, 0}, {listener_, static_cast<short>(accepts ? POLLIN : 0), 0}};
      int64_t next_us = accepts ? kNever : accept_from_us;
      for (const Client& client : clients) {
        waits.push_back({client.fd, static_cast<short>(client.answer.empty() ? POLLIN : POLLOUT), 0});
        next_us = std::min(next_us, client.until_us);
      }
      const int wait_ms = next_us == kNever ? -1 : static_cast<int>(std::max<int64_t>(0, next_us - now_us) / 1000 + 1);
      if (poll(waits.data(), waits.size(), wait_ms) < 0 && errno != EINTR) break;
      if (waits[0].revents != 0) break;
      const int64_t woken_us = Env::Real()->NowUs();
      size_t kept = 0;
      for (size_t i = 0; i < clients.size(); ++i) {
        const bool stays = woken_us < clients[i].until_us && (waits[i + 2].revents == 0 || GoOn(&clients[i]));
        if (!stays) {
          close(clients[i].fd);
        } else {
          if (kept != i) clients[kept] = std::move(clients[i]);
          ++kept;
        }
      }
      clients.resize(kept);
      if (waits[1].revents != 0 && !Accept(woken_us, &clients)) accept_from_us = woken_us + kNoDescriptorUs;
    }
    for (const Client& client : clients) close(client.fd);
  }

  // False: the process has no descriptor for it. The one that waits is taken later.
  bool Accept(int64_t now_us, std::vector<Client>* clients) const {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM;
    if (clients->size() == kClientsMax) {
      close(clients->front().fd);
      clients->erase(clients->begin());
    }
    clients->push_back({fd, now_us + kClientUs, "", "", 0});
    return true;
  }

  // Takes in or sends what goes without waiting. False: done with it.
  bool GoOn(Client* client) const {
    if (client->answer.empty()) {
      char piece[1024];
      const ssize_t got = recv(client->fd, piece, sizeof(piece), 0);
      if (got < 0) return errno == EAGAIN || errno == EINTR;
      if (got == 0 || client->request.size() > kRequestBytesMax) return false;
      client->request.append(piece, static_cast<size_t>(got));
      if (absl::StrContains(client->request, "\r\n\r\n")) client->answer = AnswerTo(client->request);
      return true;
    }
    const ssize_t sent =
        send(client->fd, client->answer.data() + client->sent, client->answer.size() - client->sent, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    client->sent += static_cast<size_t>(sent);
    return client->sent < client->answer.size();
  }

  std::string AnswerTo(const std::string& request) const {
    const bool known = absl::StartsWith(request, "GET /metrics ") || absl::StartsWith(request, "GET /metrics?");
    const std::string body = known ? text_() : "only /metrics is here\n";
    return absl::StrCat("HTTP/1.1 ", known ? "200 OK" : "404 Not Found",
                        "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: ", body.size(),
                        "\r\nConnection: close\r\n\r\n", body);
  }

  const int listener_;
  const int end_;  // readable: the page ends
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

// Is on the page from its first value on: a 0 that nobody measured would be taken for a figure.
class PrometheusGauge : public Gauge {
 public:
  PrometheusGauge(prometheus::Family<prometheus::Gauge>* family, prometheus::Labels labels)
      : family_(family), labels_(std::move(labels)) {}
  void Set(double value) override { family_->Add(labels_).Set(value); }  // Add finds what has these labels

 private:
  prometheus::Family<prometheus::Gauge>* const family_;
  const prometheus::Labels labels_;
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
  const prometheus::Labels own(labels.begin(), labels.end());
  state_->gauges.push_back(std::make_unique<PrometheusGauge>(&family, own));
  return state_->gauges.back().get();
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
