// What people are told of records that could not be used as they were meant: labels that are missing or always the
// same, columns that hold no numbers, joins that find nothing, lanes that have nothing to read. Pure.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct Warning {
  std::string subject;  // of one there is one warning in a run
  std::string line;
};

// Of the job alone, before anything is read. REQUIRES: training.lanes is set.
std::vector<Warning> WarningsOfJob(const Job& job);
// What is certain while training goes on, `reading` being the totals so far.
std::vector<Warning> WarningsSoFar(const Reading& reading);
// What only a whole epoch shows. lanes: their states at its last cut. Labels are not judged where some were trained by
// a version that did not count them.
std::vector<Warning> WarningsAtEnd(const Job& job, const std::vector<LaneState>& lanes);
// Of one evaluation.
std::vector<Warning> WarningsOfEvaluation(const Evaluation& evaluation);

// DataLoss, with the likely cause, where a job that is at its end has trained no record, or none with a label.
absl::Status CheckTrained(const Job& job, const std::vector<LaneState>& lanes);

Ledger SumOfLedgers(const std::vector<LaneState>& lanes);
Reading SumOfReadings(const std::vector<LaneState>& lanes);

}  // namespace hearth
