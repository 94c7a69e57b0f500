// `hearth plan`: what a job will need and take (plan.h), from the job, its own log, what was measured, and what the
// person who plans says. Starts nothing but what --calibrate asks for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "scripts/hearth/launch.h"
#include "scripts/hearth/plan.h"

namespace hearth {

struct PlanOptions {
  Programs programs;
  std::string job;  // empty: --calibrate alone
  std::vector<std::string> overrides;
  int servers = 1;
  int workers = 1;
  int nodes = 1;
  std::vector<std::string> rows;   // "N", for all tables together, or "TABLE=N"
  std::vector<std::string> signs;  // "TABLE=N"
  bool calibrate = false;          // measure this machine first
  std::string out;                 // where to keep what was measured
  std::string calibration;         // a file that --out kept
  std::string measured;            // a run's folder: its dense step and its rows are taken from run.json
  std::string hostfile;            // hosts for the ping of --calibrate
  bool json = false;
};

// The text to print. InvalidArgument on an option that says nothing or names no table.
absl::StatusOr<std::string> PlanRun(const PlanOptions& options);

std::string DescribePlan(const Plan& plan, const PlanInput& input);
std::string PlanAsJson(const Plan& plan, const PlanInput& input);

// "TABLE=N" or "N" (no name), N as 3000000 or 3e6.
struct NamedNumber {
  std::string name;
  double number = 0;
};
absl::StatusOr<NamedNumber> ParseNamedNumber(absl::string_view text);

// Distinct signs of a full step of each table, and the share of them that is new, from the first records of the job's
// own log, read as lane 0 reads it; the reader's records a second, too. NotFound where there is no log to read.
struct LogSample {
  double records = 0;
  double records_per_s = 0;
  double fill = 1;            // mean batch over a full one: a window's last one is short
  std::vector<double> signs;  // a step, added over lanes
  std::vector<double> fresh;
};
absl::StatusOr<LogSample> SampleLog(const Job& job, uint64_t records_max);

}  // namespace hearth
