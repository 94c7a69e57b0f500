// A worker's page for Prometheus: what it tells the scheduler in its Progress.
#pragma once

#include <map>
#include <string>

#include "absl/status/status.h"
#include "common/base/metrics.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// One thread.
class ProgressMetrics {
 public:
  explicit ProgressMetrics(int rank);

  // As MetricRegistry::Serve.
  absl::Status Serve(const Metrics& metrics);
  void Show(const Progress& progress);
  void ShowRefused(uint64_t messages) { refused_->RaiseTo(static_cast<double>(messages)); }  // Transport::refused
  std::string Text() const { return registry_.Text(); }

 private:
  MetricRegistry registry_;
  Counter* refused_;
  Gauge* step_;
  Histogram* pull_;
  std::map<std::string, Counter*> records_;  // by fate
  std::map<std::string, Counter*> seconds_;  // by phase
  Counter* training_;
};

}  // namespace hearth
