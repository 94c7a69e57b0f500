#include "ps/server_metrics.h"

#include <utility>

namespace hearth {

ServerMetrics::ServerMetrics(const Job& job, int rank) : registry_("ps", rank) {
  const std::pair<MessageKind, const char*> kinds[] = {{MessageKind::kPull, "pull"},
                                                       {MessageKind::kPush, "push"},
                                                       {MessageKind::kPrefetch, "prefetch"},
                                                       {MessageKind::kReadOnlyPull, "read_only_pull"}};
  for (const auto& [kind, name] : kinds) {
    requests_[kind] =
        registry_.NewCounter({"requests", "", "Workers' messages taken in, repeats too"}, {{"kind", name}});
  }
  refused_ =
      registry_.NewCounter({"refused", "messages", "Dropped: they had no proof that a rank of this job sent them"});
  step_ = registry_.NewGauge({"step", "", "Last step applied"});
  for (const Table& table : job.table()) {
    const MetricLabels labels = {{"table", table.name()}};
    const auto gauge = [&](const char* name, const char* unit, const char* meaning) {
      return registry_.NewGauge({name, unit, meaning}, labels);
    };
    const auto counter = [&](const char* name, const char* meaning) {
      return registry_.NewCounter({name, "rows", meaning}, labels);
    };
    TableFigures figures;
    figures.rows = gauge("live", "rows", "Live rows: exact at a cut, an upper bound between");
    figures.rows_in_memory = gauge("memory", "rows", "Records in the memory tier");
    figures.bytes_memory = gauge("memory", "bytes", "Bytes of the memory tier");
    figures.bytes_disk = gauge("disk", "bytes", "Bytes in RocksDB, this table's share by estimate");
    figures.hit_ratio = gauge("memory_hit_ratio", "", "Records that training pulls found in memory, of all they read");
    figures.cold_hit_ratio = gauge(
        "cold_hit_ratio", "", "Rows that were brought into memory in time for their pull, of those not there before");
    figures.spilled = counter("spilled", "Leavings of the memory tier for RocksDB");
    figures.prefetched = counter("prefetched", "Brought into memory ahead of their pull");
    figures.hits = counter("memory_hits", "Records that training pulls found in memory");
    figures.misses = counter("memory_misses", "Records that training pulls had to read from RocksDB");
    tables_.push_back(figures);
  }
}

absl::Status ServerMetrics::Serve(const Metrics& metrics) {
  return registry_.Serve(metrics.prometheus_address(), metrics.prometheus_port());
}

void ServerMetrics::Count(MessageKind request) {
  const auto found = requests_.find(request);
  if (found != requests_.end()) found->second->Add(1);
}

void ServerMetrics::Show(uint64_t step, const std::vector<TableStats>& tables) {
  step_->Set(static_cast<double>(step));
  for (size_t i = 0; i < tables_.size() && i < tables.size(); ++i) {
    const TableStats& from = tables[i];
    const TableFigures& to = tables_[i];
    to.rows->Set(static_cast<double>(from.rows()));
    to.rows_in_memory->Set(static_cast<double>(from.rows_in_memory()));
    to.bytes_memory->Set(static_cast<double>(from.bytes_memory()));
    to.bytes_disk->Set(static_cast<double>(from.bytes_disk()));
    const double reads = static_cast<double>(from.memory_hits() + from.memory_misses());
    if (reads > 0) to.hit_ratio->Set(static_cast<double>(from.memory_hits()) / reads);
    const double cold = static_cast<double>(from.prefetch_hits() + from.memory_misses());
    if (cold > 0) to.cold_hit_ratio->Set(static_cast<double>(from.prefetch_hits()) / cold);
    to.spilled->RaiseTo(static_cast<double>(from.rows_spilled()));
    to.prefetched->RaiseTo(static_cast<double>(from.rows_prefetched()));
    to.hits->RaiseTo(static_cast<double>(from.memory_hits()));
    to.misses->RaiseTo(static_cast<double>(from.memory_misses()));
  }
}

}  // namespace hearth
