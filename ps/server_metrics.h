// A server's page for Prometheus: requests by kind, and its tables' figures.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/base/metrics.h"
#include "common/net/wire.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// One thread.
class ServerMetrics {
 public:
  ServerMetrics(const Job& job, int rank);

  // As MetricRegistry::Serve.
  absl::Status Serve(const Metrics& metrics);
  void Count(MessageKind request);
  void Show(uint64_t step, const std::vector<TableStats>& tables);  // as Shard::FillStats fills them
  void ShowRefused(uint64_t messages) { refused_->RaiseTo(static_cast<double>(messages)); }  // Transport::refused
  std::string Text() const { return registry_.Text(); }

 private:
  struct TableFigures {
    Gauge* rows;
    Gauge* rows_in_memory;
    Gauge* bytes_memory;
    Gauge* bytes_disk;
    Gauge* hit_ratio;
    Gauge* cold_hit_ratio;
    Counter* spilled;
    Counter* prefetched;
    Counter* hits;
    Counter* misses;
  };

  MetricRegistry registry_;
  std::map<MessageKind, Counter*> requests_;
  Counter* refused_;
  Gauge* step_;
  std::vector<TableFigures> tables_;  // in the job's order
};

}  // namespace hearth
