// Which jobs are one job: what decides a model, and what a run may change on its way.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// Of what decides the model's bits from the first step on: names, folders, splits, limits, metrics, the job's end, and
// what a run's processes do it with are left out.
uint64_t JobHash(const Job& job);

// A field in which a run's job is another one than the job of the snapshot that it goes on from.
struct JobChange {
  enum Kind {
    kFree,     // no bit depends on it
    kCarried,  // holds from the snapshot's step on; the bits are a function of the job and of these
    kFiles,    // a log's path: the list of files judges it (scheduler/source.h)
    kRefused,
  };
  Kind kind;
  std::string field;        // "table[0].optimizer.learning_rate"
  std::string before, now;  // as text; "(absent)"
  std::string why;          // of what is refused: what the field decides, and the way out

  std::string ToString() const;  // "training.batch_size: 512 -> 1024"
};
// By field, where `before` is the snapshot's job: where a log ends more may change than inside one. docs/OPERATIONS.md
// has the table of all fields.
std::vector<JobChange> ChangesOf(const Job& before, const Job& now, const Manifest& snapshot);
std::vector<JobChange> OfKind(const std::vector<JobChange>& changes, JobChange::Kind kind);
// What somebody can do whose changes are refused. Behind their list.
constexpr absl::string_view kWaysOutOfRefusal =
    "set these fields back, train into another --out, or take the model over into another folder: hearth adopt DIR JOB "
    "--out NEWDIR";
// The refused ones, a line each: the change, and why.
std::vector<std::string> RefusalsOf(const std::vector<JobChange>& changes);

// Fields that decide what rows and dense parameters mean, as "table[0].dim: 8 != 16": where two jobs agree, a snapshot
// of one may be evaluated by the other. How logs and side tables are read, what counts as a positive, and how a
// training would go on is free.
std::vector<std::string> ModelDifferences(const Job& a, const Job& b);

}  // namespace hearth
