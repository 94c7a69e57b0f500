// `hearth adopt`: what of a model a job of another shape takes over, and what not. Decided from the two jobs alone,
// before a row or a parameter is read: numbers in a job are positions, so everything is matched by name. What cannot be
// taken over is said, never guessed. Free of Torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct AdoptionRules {
  bool truncate = false;             // tables may lose columns, groups may lose experts
  std::vector<std::string> dropped;  // "slot:author": of the old model, to go; what is called so now is born
};

// What becomes of an index along an axis, where it is not an old one.
constexpr int64_t kZeros = -1;   // nothing: where it is read, zeros
constexpr int64_t kBornAt = -2;  // the value of a fresh start

// One table of the new job.
struct TableMove {
  int from = -1;          // of the old job; negative: born
  uint32_t dims = 0;      // weights that are carried
  bool state = false;     // the optimizer's state is, too
  bool counters = false;  // and what counts signs without a row
};

// One parameter of the new job's model, or one of its running statistics.
struct ParameterMove {
  std::string name;
  std::string from;  // of the old model; empty: born
  bool statistic = false;
  std::vector<int64_t> shape, old_shape;
  // [axes][index] an old index, kZeros or kBornAt; empty: the same. kBornAt along axis 0 outweighs kZeros along
  // another.
  std::vector<std::vector<int64_t>> index;
  std::vector<bool> noisy;  // [shape[0] or none] copies that must not stay the same
  std::vector<float> less;  // [shape[0] or none] taken from the value: logits of copies share the original's
  int64_t Carried() const;  // elements
  int64_t Elements() const;
};

struct AdoptionPlan {
  std::vector<TableMove> tables;         // [tables]
  std::vector<int> slots, dense, tasks;  // [of the new job] of the old job; negative: born
  std::vector<ParameterMove> parameters;
  std::vector<int> dropped_tables;  // of the old job
  bool dense_state = false;         // the dense optimizer's moments are carried,
  bool dense_updates = false;       // and its count of updates
  // Why a task that stays may predict something else: a line each. None: it predicts what it did.
  std::vector<std::string> changes;

  // For people: what is carried, born, reset and dropped.
  struct Line {
    std::string what, unit;
    uint64_t carried = 0, born = 0, reset = 0, dropped = 0;
    std::string how;
  };
  std::vector<Line> table_lines;  // [tables, then dropped_tables], their counts not filled in
  std::vector<Line> lines;        // slots, dense features, tasks, and the dense model
};

// FailedPrecondition: everything that is refused, a line each with its remedy. REQUIRES: valid jobs.
absl::StatusOr<AdoptionPlan> PlanAdoption(const Job& before, const Job& now, const AdoptionRules& rules);

// The plan as a table.
std::string DescribeAdoption(const AdoptionPlan& plan);

}  // namespace hearth
