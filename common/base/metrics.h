// Metrics for Prometheus: each is declared once, with name, unit and meaning, and is then a handle that any thread may
// change. Served as text 0.0.4 under /metrics. What a run reports at its end does not come from here (run.json has its
// own counts).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace hearth {

// Handles. Thread-safe; they live as long as their registry.
class Counter {
 public:
  virtual ~Counter() = default;
  virtual void Add(double amount) = 0;     // REQUIRES: amount >= 0
  virtual void RaiseTo(double total) = 0;  // adds what is missing of a total kept elsewhere. One thread a counter
};
// Is on the page from its first Set on.
class Gauge {
 public:
  virtual ~Gauge() = default;
  virtual void Set(double value) = 0;
};
class Histogram {
 public:
  virtual ~Histogram() = default;
  virtual void Observe(double seconds) = 0;
};

// One metric. In Prometheus it is called hearth_<name>[_<unit>], with _total behind a counter's; a histogram's unit is
// always seconds. Names are lower case with underscores.
struct MetricSpec {
  std::string name;     // "pull"
  std::string unit;     // "rows", "bytes", "seconds"; empty: a plain number
  std::string meaning;  // one sentence for whoever reads the page
};
using MetricLabels = std::vector<std::pair<std::string, std::string>>;  // {"task", "click"}, beside role and rank

class MetricRegistry {
 public:
  // Every metric carries the labels role and rank.
  MetricRegistry(absl::string_view role, int rank);
  ~MetricRegistry();

  // A second declaration of one name must repeat unit and meaning, and give other labels: anything else aborts.
  Counter* NewCounter(const MetricSpec& spec, const MetricLabels& labels = {});
  Gauge* NewGauge(const MetricSpec& spec, const MetricLabels& labels = {});
  Histogram* NewHistogram(const MetricSpec& spec, const MetricLabels& labels = {});

  // Listens on port + rank until destruction. Port 0: off. Unavailable where the port is taken.
  absl::Status Serve(const std::string& address, uint32_t port);
  // What /metrics would say now.
  std::string Text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
