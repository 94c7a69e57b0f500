#include "common/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <set>

#include "common/status.h"

namespace hearth {
namespace {

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
  std::unique_ptr<prometheus::Exposer> exposer;
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
  try {  // the server inside reports by exception
    state_->exposer = std::make_unique<prometheus::Exposer>(where);
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics: cannot listen on ", where, " (", error.what(), "): port ",
                                               port, " (metrics.prometheus_port + rank ", state_->rank,
                                               ") is probably in use; give another with --set "
                                               "metrics.prometheus_port=…, or 0 for none"));
  }
  state_->exposer->RegisterCollectable(state_->registry);
  return absl::OkStatus();
}

std::string MetricRegistry::Text() const { return prometheus::TextSerializer().Serialize(state_->registry->Collect()); }

}  // namespace hearth
