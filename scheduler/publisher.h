// Publishes committed snapshots for serving while the job trains (docs/OPERATIONS.md, "Publishing"): the first one as a
// full export DIR/export/<step>, the next ones as deltas on it. Each is made by a child process, one at a time, and
// appears by one rename, so what has been published is read from the folders alone, and a kill at any time leaves
// nothing to mend.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/artifact/bundle_chain.h"
#include "common/base/env.h"
#include "common/base/process.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct PublicationFigures {
  uint64_t base = 0;  // the newest link: step of its full export, its place behind that, its step
  uint64_t seq = 0;
  uint64_t step = 0;
  uint64_t published = 0;  // by this process
  uint64_t failures = 0;
  uint64_t left_out = 0;        // snapshots that waited too long
  uint64_t withheld = 0;        // snapshots that fell short of export.require
  std::string withheld_reason;  // of the newest one
  uint64_t waiting = 0;
  double seconds = 0;  // from the newest one's commit to its appearance
  std::string reason;  // of the newest failure
};

// One thread, which outlives it: the child dies with it. Never blocks.
class Publisher {
 public:
  struct Options {
    Env* env = nullptr;
    Job job;               // effective; export.delta_every_steps > 0
    std::string dir;       // the run's folder
    std::string programs;  // folder of hearth-export and hearth-delta
  };
  // `committed`: steps of the snapshots in DIR, ascending; the run goes on from the last one. What was published beyond
  // it is set aside; what is committed and not published waits. `finished`: the last one is the job's end. Where the
  // run has forked (history.h), whoever serves may hold deltas of the line that it left, on the same full export:
  // nothing goes on from an export of before the fork, and the next publication is a full one.
  Publisher(Options options, const std::vector<uint64_t>& committed, bool finished);

  // A snapshot was committed.
  void Committed(uint64_t step, bool job_finished);
  // Sees to the child; to be called about every 100 ms. True when a publication ended.
  bool Poll();

  // The snapshot is still to be published and must stay.
  bool Waits(uint64_t step) const { return waiting_.count(step) > 0; }
  bool working() const { return child_ != nullptr; }
  // Nothing waits, or the oldest one was tried in vain a few times.
  bool done() const;
  PublicationFigures figures() const;

 private:
  bool IsDue(uint64_t step, bool job_finished) const;
  // Falls short of export.require, by what its MANIFEST says; then it is told.
  bool Withholds(uint64_t step);
  void BoundWaiting();
  // Reads what is published, and forgets what no longer has to wait.
  absl::Status Look();
  void StartChild();
  void Finish(int code);
  void Fail(const std::string& reason);
  uint64_t tip() const { return chain_.empty() ? 0 : chain_.back().step; }

  const Options options_;
  const std::string out_;                // DIR/export
  std::map<uint64_t, int64_t> waiting_;  // step → when it was committed, or found
  std::optional<uint64_t> forked_at_;    // the step to which the run's newest fork went back
  std::vector<BundleLink> chain_;        // the newest one, as last read
  bool needs_base_ = false;              // no delta can be made on the chain
  std::unique_ptr<ChildProcess> child_;
  uint64_t child_step_ = 0;
  bool child_makes_delta_ = false;
  uint32_t tries_ = 0;  // of the oldest one, in vain
  int64_t retry_at_us_ = 0;
  PublicationFigures figures_;
};

}  // namespace hearth
