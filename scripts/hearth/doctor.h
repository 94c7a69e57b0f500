// `hearth doctor`: whether this machine can run a job, before one is tried on it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "scripts/hearth/launch.h"

namespace hearth {

struct DoctorOptions {
  Programs programs;
  std::string out = ".";    // where runs are to lie
  std::string hostfile;     // the two ranks of the ping are on its hosts
  int prometheus_port = 0;  // 0: none is looked at
  int ranks = 4;            // ports are looked at for so many
  int64_t ping_us_max = 60 * 1000000;
  bool built_for_gpus = false;
};

struct Finding {
  std::string what;
  bool fine = true;
  std::string text;  // what was found; of a fault the cause and the remedy
};

// MPI, a ping between two ranks, programs and their libraries, cores, memory, disk, ports, GPU. Starts nothing but
// programs of ours that say their version, mpirun, and the ping.
std::vector<Finding> Diagnose(const DoctorOptions& options);
std::string DescribeFindings(const std::vector<Finding>& findings);  // a table for people
bool AllFine(const std::vector<Finding>& findings);

struct Ran {
  int code = 0;
  std::string text;  // of both outputs
};
// Runs a program to its end, or kills it at the deadline.
absl::StatusOr<Ran> RunFor(const std::vector<std::string>& argv, int64_t us_max);

// What hearth-ping says, which two ranks under mpirun run; an error has cause and remedy.
absl::StatusOr<std::string> PingRanks(const DoctorOptions& options);

}  // namespace hearth
