// The rates of a machine, measured in seconds: rows of tables as the job has them, in this process and on a store in a
// temporary folder; two ranks that swap bytes (hearth-ping); and some steps of the job itself with one server and one
// worker. Kept as JSON, with where and when.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"
#include "scripts/hearth/launch.h"
#include "scripts/hearth/plan.h"

namespace hearth {

struct CalibrateOptions {
  Programs programs;
  std::string hostfile;      // hosts of the ping
  const Job* job = nullptr;  // null: a table of the usual width, and no dense step
};

struct Calibration {
  std::string host;
  std::string when;
  uint32_t cores = 0;
  std::vector<RowRates> rows;
  double bytes_per_s = 0;  // 0: not measured, like the others
  double latency_us = 0;
  double dense_records_per_s = 0;
  uint64_t dense_parameters = 0;
  std::vector<std::string> faults;  // what could not be measured, and why
};

absl::StatusOr<Calibration> Calibrate(const CalibrateOptions& options);

std::string PrintCalibration(const Calibration& calibration);
absl::StatusOr<Calibration> ReadCalibration(const std::string& path);  // DataLoss where it is not what the other prints
// Takes what was measured in the place of what `rates` has. Dense records a second are those of another model in the
// proportion of the parameters.
void ApplyCalibration(const Calibration& calibration, uint64_t dense_parameters, PlanRates* rates);

// Records that a worker's dense step takes a second, by a finished run's run.json, and the rows of its tables.
struct MeasuredRun {
  double dense_records_per_s = 0;
  uint64_t dense_parameters = 0;
  std::vector<std::pair<std::string, double>> rows;
};
absl::StatusOr<MeasuredRun> ReadMeasuredRun(const std::string& folder);

// One table's rates: `rows` rows, in batches of some thousands.
absl::StatusOr<RowRates> MeasureRows(const Table& table, uint64_t rows, const std::string& folder);

}  // namespace hearth
