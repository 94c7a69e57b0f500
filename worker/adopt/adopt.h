// `hearth adopt`: a run's first snapshot from another model's newest, whatever differs (docs/OPERATIONS.md, "A new
// feature, task or table"). What is taken over is model/adopt's business; here it is read, written, and proved: every
// task that stays is scored by both models over the same records.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"
#include "model/adopt/plan.h"

namespace hearth {

struct AdoptOptions {
  std::string snapshot;  // a snapshot's folder, or a run's (its newest)
  Job job;               // the new one; valid, data_dir absolute
  std::string out;       // the new run's folder; must not exist, or be empty
  AdoptionRules rules;
  bool restart = false;  // the first snapshot is of step 0, else of the old one's step
  bool again = false;    // the new run may train files that the old model was trained on
  bool dry_run = false;  // the plan alone; nothing is made
  int golden = 64;       // records that both models score; 0: none, and then no log is read for it
  std::string log;       // that they come from: name of a split or log; empty: see ChooseLog
};

// A report for people. On an error nothing is left at `out`, nor beside it. The rows' and parameters' bits are a
// function of the old model's hash and of the options.
absl::StatusOr<std::string> Adopt(const AdoptOptions& options);

}  // namespace hearth
