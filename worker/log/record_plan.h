// What one log's record becomes: columns → fields (joined with side tables) → signs, numbers, labels, masks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "embedding/sign.h"
#include "model/batch/batch.h"
#include "worker/log/expression.h"
#include "worker/log/json_lines.h"
#include "worker/log/side_table.h"

namespace hearth {

// What is wrong with the job's expressions, and with those logs' filters, whatever columns there are: one line each, as
// Compile says it behind "log \"NAME\": ". Looks at no file.
std::vector<std::string> FaultsOfExpressions(const Job& job, const std::vector<Log>& logs);

// Immutable; each thread brings its own Workspace.
class RecordPlan {
 public:
  // The columns of a log of JSON lines: the paths that the job reads in its records.
  static std::vector<JsonFields::Column> JsonColumns(const Job& job, const Log& log, const std::string& user_column);

  // columns: of the log's file; of JSON lines it has those that are read. tables: those that log.join names, and they
  // outlive the plan. user_column: empty: none. nullptr where something is wrong; then *faults has one line more for
  // each: log, what reads which column, remedy.
  static std::unique_ptr<const RecordPlan> Compile(const Job& job, const Log& log,
                                                   absl::Span<const std::string> columns, const AttributeTables& tables,
                                                   const std::string& user_column, std::vector<std::string>* faults);
  ~RecordPlan();

  enum class Fate { kValid, kFiltered, kBad };
  enum class Joined : uint8_t { kWithoutKey, kMatched, kUnmatched };
  struct Workspace {
    std::vector<absl::string_view> fields;
    std::string scratch;
    JsonParser json;
    std::vector<float> dense, labels, mask;
    std::vector<int> unreadable;  // positions that were read as a number and hold something else; may repeat
    std::vector<Joined> joined;   // [joins]
    uint32_t time_s = 0;          // 0: none
    bool split = false;           // it has the fields that it should have
  };
  // Splits and joins the record and says what becomes of it. kBad: *reason says why. `record` outlives the use of the
  // workspace.
  Fate Check(absl::string_view record, Workspace* workspace, std::string* reason) const;
  // REQUIRES: Check of the same workspace gave kValid.
  void Fill(Workspace* workspace, BatchBuilder* builder) const;
  absl::string_view User(const Workspace& workspace) const;  // empty where missing

  // What could not be used as it was meant, of the records that were counted.
  class Tally {
   private:
    friend class RecordPlan;
    struct Count {
      uint64_t matched = 0, unmatched = 0, without_key = 0, unreadable = 0;
      std::string example;
    };
    std::vector<Count> joins_;      // [joins]
    std::map<int, Count> columns_;  // by position
  };
  // Counts the record that the workspace holds: after Fill, or after a Check that gave another fate than kValid.
  void Count(const Workspace& workspace, Tally* tally) const;
  // Adds the tally to *reading, under the names of columns and side tables, and begins a new one.
  void Tell(Tally* tally, Reading* reading) const;

 private:
  friend class PlanCompiler;
  struct SlotPlan;
  RecordPlan();

  void Join(Workspace* workspace) const;
  // False: it has a time that no record has. *reason says why.
  bool TakeTime(Workspace* workspace, std::string* reason) const;
  // The id of a RAW slot; false: missing. *bad is set where there is no such id.
  static bool RawId(const SlotPlan& slot, Workspace* workspace, uint64_t* id, bool* bad);
  // Splits the record into the log's columns; a reason why it is bad, or nothing.
  std::string Split(absl::string_view record, Workspace* workspace) const;
  static void AddSlot(const SlotPlan& slot, Workspace* workspace, BatchBuilder* builder);

  // Positions in Workspace::fields: the log's columns, one that is always empty, then the side tables' columns in use.
  struct JoinPlan {
    const AttributeTable* table;
    int key;                                   // position of the log's key
    std::vector<std::pair<int, int>> columns;  // of the table → position
  };
  struct DensePlan {
    Expression value;
    DenseFeature config;
  };
  struct TaskPlan {
    bool known = false;
    Expression label;
    bool has_mask = false;
    Expression mask;
  };
  char delimiter_ = ',';
  std::unique_ptr<const JsonFields> json_;  // in the place of a delimiter
  int log_columns_ = 0;
  int positions_ = 0;
  std::vector<std::string> names_;  // [positions]
  std::vector<JoinPlan> joins_;
  bool has_where_ = false;
  Expression where_;
  bool has_time_ = false;
  Expression time_ms_;
  std::vector<SlotPlan> slots_;
  std::vector<int> raw_slots_;  // those of slots_ whose ids can be bad
  std::vector<DensePlan> dense_;
  std::vector<TaskPlan> tasks_;
  int user_ = -1;
};

}  // namespace hearth
