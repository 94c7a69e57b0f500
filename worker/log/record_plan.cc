#include "worker/log/record_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/artifact/reading.h"
#include "common/job/config.h"
#include "worker/log/delimited.h"
#include "worker/log/number.h"

namespace hearth {

namespace {

constexpr int kLogBuckets = 1024;  // floor(log2(1 + |x|)) of a finite double is at most this
constexpr size_t kExampleBytesMax = 64;
constexpr double kTimeMsMin = 946'684'800'000.0;    // 2000-01-01: seconds in the place of milliseconds lie before it,
constexpr double kTimeMsEnd = 4'102'444'800'000.0;  // 2100-01-01: and microseconds behind it
constexpr uint64_t kMissingRawId = kIdMask;         // so a raw id may not be this one

float Transformed(const DenseFeature& config, double value) {
  double result = value;
  switch (config.transform()) {
    case DenseFeature::NONE:
      break;
    case DenseFeature::LOG1P:
      result = std::copysign(std::log1p(std::fabs(value)), value);
      break;
    case DenseFeature::STANDARD:
      result = (value - config.mean()) / config.deviation();
      break;
  }
  const float narrow = static_cast<float>(result);
  return std::isfinite(narrow) ? narrow : static_cast<float>(config.missing());
}

std::string SyntaxFault(absl::string_view what, const absl::Status& status) {
  return absl::StrCat(what, ": ", status.message(), "; correct the expression");
}

}  // namespace

struct RecordPlan::SlotPlan {
  int index = 0;  // in the job
  Slot::Kind kind = Slot::ID;
  Slot::Hash hash = Slot::SALTED;
  TableNumber table = 0;
  uint64_t salt = 0;
  int column = 0;
  bool has_value = false;
  Expression value;  // instead of column
  bool missing_has_row = true;
  Sign missing_sign = 0;
  std::vector<std::string> missing_values;
  char separator = ',';
  bool json = false;  // its column may hold an array of JSON
  uint32_t values_max = 0;
  std::vector<double> boundaries;
  std::vector<Sign> buckets;  // [boundaries + 1], or [2 · kLogBuckets + 1] from −kLogBuckets on

  Sign SignOf(absl::string_view text) const { return MakeSign(table, HashId(text, salt)); }
  // Calls visit(part) for each part of a LIST's text that is not missing, until it says false.
  template <typename Visit>
  void ForEachPart(absl::string_view text, const Visit& visit) const {
    const bool array = json && text.front() == kJsonElement;
    const char between = array ? kJsonElement : separator;
    for (size_t begin = array ? 1 : 0; begin <= text.size();) {
      const size_t end = std::min(text.find(between, begin), text.size());
      const absl::string_view part = text.substr(begin, end - begin);
      if (!IsMissing(part) && !visit(part)) return;
      begin = end + 1;
    }
  }
  bool IsMissing(absl::string_view text) const {
    if (text.empty()) return true;
    return std::any_of(missing_values.begin(), missing_values.end(), [&](const std::string& m) { return text == m; });
  }
  Sign BucketOf(double x) const {
    if (!boundaries.empty()) {
      return buckets[std::upper_bound(boundaries.begin(), boundaries.end(), x) - boundaries.begin()];
    }
    const int magnitude = static_cast<int>(std::floor(std::log2(1 + std::fabs(x))));
    return buckets[kLogBuckets + (x < 0 ? -magnitude : magnitude)];
  }
};

RecordPlan::RecordPlan() = default;
RecordPlan::~RecordPlan() = default;

// --- From the job to a plan ---

class PlanCompiler {
 public:
  PlanCompiler(const Job& job, const Log& log, absl::Span<const std::string> columns, const std::string& user_column,
               std::vector<std::string>* faults)
      : job_(job),
        log_(log),
        columns_(columns.begin(), columns.end()),
        user_column_(user_column),
        faults_(faults),
        plan_(new RecordPlan()) {
    if (log.format() != Log::JSON_LINES) return;
    const std::vector<JsonFields::Column> read = RecordPlan::JsonColumns(job, log, user_column);
    plan_->json_ = std::make_unique<JsonFields>(read);
    columns_.clear();
    for (const JsonFields::Column& column : read) columns_.push_back(column.path);
  }

  std::unique_ptr<const RecordPlan> Compile(const AttributeTables& tables) {
    const size_t before = faults_->size();
    CheckColumns();
    AddJoins(tables);
    if (!log_.where().empty()) {
      plan_->has_where_ = true;
      plan_->where_ = Parse("where", log_.where());
    }
    if (!log_.time_ms().empty()) {
      plan_->has_time_ = true;
      plan_->time_ms_ = Parse("time_ms", log_.time_ms());
    }
    for (int i = 0; i < job_.slot_size(); ++i) AddSlot(i);
    for (const DenseFeature& dense : job_.dense()) AddDense(dense);
    for (const Task& task : job_.task()) AddTask(task);
    if (!user_column_.empty()) plan_->user_ = Resolve("the user of GAUC", user_column_);
    plan_->positions_ = next_position_;
    if (faults_->size() > before) return nullptr;
    return std::move(plan_);
  }

 private:
  void Fault(absl::string_view what, absl::string_view cause) {
    faults_->push_back(absl::StrCat("log \"", log_.name(), "\": ", what, ": ", cause));
  }

  void CheckColumns() {
    const auto delimiter = DelimiterOf(log_.delimiter(), "log");
    if (delimiter.ok()) {
      plan_->delimiter_ = *delimiter;
    } else {
      Fault("delimiter", delimiter.status().message());
    }
    std::set<std::string> seen;
    for (const std::string& column : columns_) {
      if (!seen.insert(column).second) {
        Fault("header", absl::StrCat("column \"", column, "\" comes twice; give each column a name of its own"));
      }
    }
    plan_->log_columns_ = static_cast<int>(columns_.size());
    absent_ = plan_->log_columns_;
    next_position_ = absent_ + 1;
    plan_->names_.assign(columns_.begin(), columns_.end());
    plan_->names_.emplace_back();
  }

  int LogColumn(absl::string_view name) const {
    const auto found = std::find(columns_.begin(), columns_.end(), name);
    return found == columns_.end() ? -1 : static_cast<int>(found - columns_.begin());
  }
  bool DeclaredAbsent(absl::string_view name) const {
    return std::find(log_.absent_column().begin(), log_.absent_column().end(), name) != log_.absent_column().end();
  }

  void AddJoins(const AttributeTables& tables) {
    for (const std::string& name : log_.join()) {
      const auto loaded = tables.find(name);
      const SideTable* config = nullptr;
      for (const SideTable& side : job_.side_table()) {
        if (side.name() == name) config = &side;
      }
      if (loaded == tables.end() || config == nullptr) {
        Fault("join", absl::StrCat("there is no side_table \"", name, "\"; correct the name"));
        continue;
      }
      const std::string& key = config->log_key().empty() ? config->key() : config->log_key();
      int position = LogColumn(key);
      if (position < 0 && DeclaredAbsent(key)) position = absent_;
      if (position < 0) {
        Fault(absl::StrCat("join of \"", name, "\""),
              absl::StrCat("the log has no key column \"", key,
                           "\"; set side_table.log_key, or list it in absent_column"));
        continue;
      }
      plan_->joins_.push_back({loaded->second.get(), position, {}});
    }
  }

  int SidePosition(RecordPlan::JoinPlan* join, int column) {
    for (const auto& [known, position] : join->columns) {
      if (known == column) return position;
    }
    join->columns.emplace_back(column, next_position_);
    plan_->names_.push_back(absl::StrCat(join->table->name(), ".", join->table->columns()[column]));
    return next_position_++;
  }

  // The position of a column; a fault and the position of the absent one where there is none.
  int Resolve(absl::string_view what, absl::string_view name) {
    const int own = LogColumn(name);
    if (own >= 0) return own;
    std::vector<std::string> holders;
    int position = -1;
    for (RecordPlan::JoinPlan& join : plan_->joins_) {
      int column = join.table->ColumnOf(name);
      const std::string prefix = join.table->name() + ".";
      if (column < 0 && name.substr(0, prefix.size()) == prefix)
        column = join.table->ColumnOf(name.substr(prefix.size()));
      if (column < 0) continue;
      holders.push_back(join.table->name());
      if (position < 0) position = SidePosition(&join, column);
    }
    if (holders.size() > 1) {
      Fault(what, absl::StrCat("column \"", name, "\" is in side tables ", absl::StrJoin(holders, " and "), "; write ",
                               holders[0], ".", name));
    }
    if (position >= 0) return position;
    if (DeclaredAbsent(name)) return absent_;
    const auto similar = std::find_if(columns_.begin(), columns_.end(), [&](const std::string& column) {
      return absl::EqualsIgnoreCase(absl::StripAsciiWhitespace(column), name);
    });
    Fault(what, absl::StrCat("reads column \"", name, "\", which neither the log nor a joined side table has; ",
                             similar == columns_.end() ? "correct the name" : absl::StrCat("it has \"", *similar, "\""),
                             ". Only where the log is meant to lack it: absent_column"));
    return absent_;
  }

  Expression Parse(absl::string_view what, absl::string_view text) {
    const Expression::Columns columns = [&](absl::string_view name) { return Resolve(what, name); };
    auto parsed = Expression::Parse(text, columns);
    if (parsed.ok()) return *std::move(parsed);
    faults_->push_back(absl::StrCat("log \"", log_.name(), "\": ", SyntaxFault(what, parsed.status())));
    return Expression();
  }
  static std::string ColumnText(const std::string& name) { return absl::StrCat("`", name, "`"); }

  void AddSlot(int index) {
    const Slot& slot = job_.slot(index);
    const std::string what = absl::StrCat("slot \"", slot.name(), "\"");
    RecordPlan::SlotPlan plan;
    plan.index = index;
    plan.kind = slot.kind();
    plan.hash = slot.hash();
    for (int i = 0; i < job_.table_size(); ++i) {
      if (job_.table(i).name() == slot.table()) plan.table = static_cast<TableNumber>(i + 1);
    }
    plan.salt = slot.hash() == Slot::SALTED ? SaltOf(SaltText(slot)) : 0;
    plan.has_value = !slot.value().empty();
    if (plan.has_value) {
      plan.value = Parse(what, slot.value());
      if (slot.kind() == Slot::LIST) Fault(what, "value gives one number; a LIST needs a column");
      if (slot.missing_value_size() > 0) Fault(what, "missing_value is for a column; write it into the expression");
    } else {
      plan.column = Resolve(what, slot.column().empty() ? slot.name() : slot.column());
    }
    plan.missing_has_row = slot.missing() == Slot::OWN_ROW;
    plan.missing_sign = slot.hash() == Slot::RAW ? MakeSign(plan.table, kMissingRawId) : plan.SignOf("");
    plan.missing_values.assign(slot.missing_value().begin(), slot.missing_value().end());
    plan.separator = slot.separator().empty() ? ',' : slot.separator()[0];
    plan.json = plan_->json_ != nullptr && plan.column < plan_->log_columns_;
    plan.values_max = slot.values_max();
    if (slot.kind() == Slot::BUCKET) AddBuckets(slot, what, &plan);
    if (slot.hash() == Slot::RAW && slot.kind() != Slot::BUCKET) {
      plan_->raw_slots_.push_back(static_cast<int>(plan_->slots_.size()));
    }
    plan_->slots_.push_back(std::move(plan));
  }

  void AddBuckets(const Slot& slot, const std::string& what, RecordPlan::SlotPlan* plan) {
    plan->boundaries.assign(slot.boundary().begin(), slot.boundary().end());
    const bool by_log = plan->boundaries.empty();
    if (by_log && slot.hash() == Slot::RAW) {
      Fault(what, "a bucket without boundaries may be negative; use hash SALTED or HASHED, or give boundaries");
    }
    const int last = by_log ? kLogBuckets : static_cast<int>(plan->boundaries.size());
    for (int bucket = by_log ? -kLogBuckets : 0; bucket <= last; ++bucket) {
      plan->buckets.push_back(slot.hash() == Slot::RAW ? MakeSign(plan->table, static_cast<uint64_t>(bucket))
                                                       : plan->SignOf(absl::StrCat(bucket)));
    }
  }

  void AddDense(const DenseFeature& dense) {
    const std::string what = absl::StrCat("dense \"", dense.name(), "\"");
    plan_->dense_.push_back({Parse(what, dense.value().empty() ? ColumnText(dense.name()) : dense.value()), dense});
  }

  void AddTask(const Task& task) {
    RecordPlan::TaskPlan plan;
    plan.known = log_.known_task().empty() ||
                 std::find(log_.known_task().begin(), log_.known_task().end(), task.name()) != log_.known_task().end();
    if (plan.known) {
      plan.label = Parse(absl::StrCat("label of task \"", task.name(), "\""), task.label());
      plan.has_mask = !task.mask().empty();
      if (plan.has_mask) plan.mask = Parse(absl::StrCat("mask of task \"", task.name(), "\""), task.mask());
    }
    plan_->tasks_.push_back(std::move(plan));
  }

  const Job& job_;
  const Log& log_;
  std::vector<std::string> columns_;  // of the log
  const std::string& user_column_;
  std::vector<std::string>* const faults_;
  std::unique_ptr<RecordPlan> plan_;
  int absent_ = 0;
  int next_position_ = 0;
};

std::vector<std::string> FaultsOfExpressions(const Job& job, const std::vector<Log>& logs) {
  std::vector<std::string> faults;
  const auto check = [&faults](const std::string& what, absl::string_view text) {
    if (text.empty()) return;
    const auto parsed = Expression::ColumnsOf(text);
    if (!parsed.ok()) faults.push_back(SyntaxFault(what, parsed.status()));
  };
  for (const Log& log : logs) {
    check(absl::StrCat("log \"", log.name(), "\": where"), log.where());
    check(absl::StrCat("log \"", log.name(), "\": time_ms"), log.time_ms());
  }
  for (const Slot& slot : job.slot()) check(absl::StrCat("slot \"", slot.name(), "\""), slot.value());
  for (const DenseFeature& dense : job.dense()) check(absl::StrCat("dense \"", dense.name(), "\""), dense.value());
  for (const Task& task : job.task()) {
    check(absl::StrCat("label of task \"", task.name(), "\""), task.label());
    check(absl::StrCat("mask of task \"", task.name(), "\""), task.mask());
  }
  return faults;
}

std::unique_ptr<const RecordPlan> RecordPlan::Compile(const Job& job, const Log& log,
                                                      absl::Span<const std::string> columns,
                                                      const AttributeTables& tables, const std::string& user_column,
                                                      std::vector<std::string>* faults) {
  return PlanCompiler(job, log, columns, user_column, faults).Compile(tables);
}

std::vector<JsonFields::Column> RecordPlan::JsonColumns(const Job& job, const Log& log,
                                                        const std::string& user_column) {
  std::vector<JsonFields::Column> columns;
  const auto add = [&](const std::string& name) -> JsonFields::Column* {
    const auto found = std::find_if(columns.begin(), columns.end(), [&](const auto& one) { return one.path == name; });
    if (found != columns.end()) return &*found;
    const bool absent = std::count(log.absent_column().begin(), log.absent_column().end(), name) > 0;
    const bool joined = std::any_of(log.join().begin(), log.join().end(), [&](const std::string& table) {
      return absl::StartsWith(name, absl::StrCat(table, "."));
    });
    if (absent || joined) return nullptr;
    columns.push_back({name, false});
    return &columns.back();
  };
  const auto add_all = [&](const std::string& expression) {
    const auto names = Expression::ColumnsOf(expression);
    for (const std::string& name : names.ok() ? *names : std::vector<std::string>()) add(name);
  };
  for (const SideTable& table : job.side_table()) {
    if (std::count(log.join().begin(), log.join().end(), table.name()) > 0) {
      add(table.log_key().empty() ? table.key() : table.log_key());
    }
  }
  if (!log.where().empty()) add_all(log.where());
  if (!log.time_ms().empty()) add_all(log.time_ms());
  for (const Slot& slot : job.slot()) {
    if (!slot.value().empty()) {
      add_all(slot.value());
    } else if (JsonFields::Column* column = add(slot.column().empty() ? slot.name() : slot.column())) {
      column->may_be_array |= slot.kind() == Slot::LIST;
    }
  }
  for (const DenseFeature& dense : job.dense()) {
    if (dense.value().empty()) {
      add(dense.name());
    } else {
      add_all(dense.value());
    }
  }
  for (const Task& task : job.task()) {
    if (!log.known_task().empty() && std::count(log.known_task().begin(), log.known_task().end(), task.name()) == 0) {
      continue;
    }
    add_all(task.label());
    if (!task.mask().empty()) add_all(task.mask());
  }
  if (!user_column.empty()) add(user_column);
  return columns;
}

// --- From a record to numbers ---

std::string RecordPlan::Split(absl::string_view record, Workspace* workspace) const {
  std::vector<absl::string_view>& fields = workspace->fields;
  if (json_ != nullptr) return json_->Split(record, &workspace->json, &fields, &workspace->scratch);
  const absl::string_view cause = SplitFields(record, delimiter_, &fields, &workspace->scratch);
  if (!cause.empty()) return std::string(cause);
  if (fields.size() == static_cast<size_t>(log_columns_)) return "";
  std::string reason = absl::StrCat("has ", fields.size(), " fields instead of ", log_columns_);
  if (record.find('\r') != absl::string_view::npos) {
    absl::StrAppend(&reason, "; a lone carriage return ends no line here: write the file with \\n");
  }
  return reason;
}

RecordPlan::Fate RecordPlan::Check(absl::string_view record, Workspace* workspace, std::string* reason) const {
  std::vector<absl::string_view>& fields = workspace->fields;
  workspace->unreadable.clear();
  workspace->split = false;
  std::string cause = Split(record, workspace);
  if (!cause.empty()) {
    *reason = std::move(cause);
    return Fate::kBad;
  }
  Join(workspace);
  workspace->split = true;
  if (has_where_ && !where_.Evaluate(fields, &workspace->unreadable).True()) return Fate::kFiltered;
  if (has_time_ && !TakeTime(workspace, reason)) return Fate::kBad;
  for (const int i : raw_slots_) {
    uint64_t id = 0;
    bool bad = false;
    RawId(slots_[i], workspace, &id, &bad);
    if (bad) {
      const SlotPlan& slot = slots_[i];
      char buffer[40];
      *reason = absl::StrCat("RAW slot ", slot.index, ": ",
                             slot.has_value ? std::string(TextOf(slot.value.Evaluate(fields), buffer))
                                            : absl::StrCat("\"", fields[slot.column].substr(0, kExampleBytesMax), "\""),
                             " is no integer from 0 to 2^52 - 2");
      return Fate::kBad;
    }
  }
  return Fate::kValid;
}

bool RecordPlan::TakeTime(Workspace* workspace, std::string* reason) const {
  workspace->time_s = 0;
  const Number time_ms = time_ms_.Evaluate(workspace->fields, &workspace->unreadable);
  if (time_ms.missing()) return true;
  const double value = time_ms.ToDouble();
  if (value >= kTimeMsMin && value < kTimeMsEnd) {
    workspace->time_s = static_cast<uint32_t>(value / 1000);
    return true;
  }
  char buffer[40];
  *reason = absl::StrCat("time_ms: ", std::string(TextOf(time_ms, buffer)),
                         " is no time of the years 2000 to 2099 in milliseconds since 1970");
  return false;
}

void RecordPlan::Join(Workspace* workspace) const {
  std::vector<absl::string_view>& fields = workspace->fields;
  fields.resize(positions_);
  workspace->joined.clear();
  for (const JoinPlan& join : joins_) {
    const bool has_key = !fields[join.key].empty();
    const int64_t row = has_key ? join.table->Find(fields[join.key]) : -1;
    workspace->joined.push_back(row >= 0 ? Joined::kMatched : has_key ? Joined::kUnmatched : Joined::kWithoutKey);
    for (const auto& [column, position] : join.columns) {
      fields[position] = row < 0 ? absl::string_view() : join.table->Field(row, column);
    }
  }
}

void RecordPlan::Count(const Workspace& workspace, Tally* tally) const {
  if (!workspace.split) return;
  const auto exemplify = [&](int position, Tally::Count* count) {
    if (count->example.empty()) count->example = std::string(workspace.fields[position].substr(0, kExampleBytesMax));
  };
  tally->joins_.resize(joins_.size());
  for (size_t i = 0; i < joins_.size(); ++i) {
    Tally::Count* const count = &tally->joins_[i];
    count->matched += workspace.joined[i] == Joined::kMatched;
    count->without_key += workspace.joined[i] == Joined::kWithoutKey;
    if (workspace.joined[i] != Joined::kUnmatched) continue;
    ++count->unmatched;
    exemplify(joins_[i].key, count);
  }
  for (auto it = workspace.unreadable.begin(); it != workspace.unreadable.end(); ++it) {
    if (std::find(workspace.unreadable.begin(), it, *it) != it) continue;  // read by several, counted once
    Tally::Count* const count = &tally->columns_[*it];
    ++count->unreadable;
    exemplify(*it, count);
  }
}

void RecordPlan::Tell(Tally* tally, Reading* reading) const {
  Reading told;
  for (size_t i = 0; i < tally->joins_.size(); ++i) {
    const Tally::Count& count = tally->joins_[i];
    if (count.matched + count.unmatched + count.without_key == 0) continue;
    Reading::Join* const join = told.add_join();
    join->set_side_table(joins_[i].table->name());
    join->set_matched(count.matched);
    join->set_unmatched(count.unmatched);
    join->set_without_key(count.without_key);
    if (count.unmatched > 0) join->set_example(count.example);
  }
  for (const auto& [position, count] : tally->columns_) {
    Reading::Column* const column = told.add_column();
    column->set_name(names_[position]);
    column->set_unreadable(count.unreadable);
    column->set_example(count.example);
  }
  MergeReading(told, reading);
  *tally = Tally();
}

bool RecordPlan::RawId(const SlotPlan& slot, Workspace* workspace, uint64_t* id, bool* bad) {
  const absl::Span<const absl::string_view> fields = workspace->fields;
  const auto take = [&](Number number) { *bad |= !ToNatural(number, id) || *id >= kMissingRawId; };
  const auto parse = [&](absl::string_view text) {
    Number number;
    ReadNumber(text, &number);
    take(number);
  };
  if (slot.has_value) {
    const Number value = slot.value.Evaluate(fields, &workspace->unreadable);
    if (!std::isfinite(value.ToDouble())) return false;
    take(value);
    return true;
  }
  const absl::string_view text = fields[slot.column];
  if (slot.IsMissing(text)) return false;
  if (slot.kind == Slot::ID) {
    parse(text);
    return true;
  }
  slot.ForEachPart(text, [&](absl::string_view part) {  // checks each; AddSlot takes them one by one
    parse(part);
    return true;
  });
  return true;
}

void RecordPlan::AddSlot(const SlotPlan& slot, Workspace* workspace, BatchBuilder* builder) {
  const absl::Span<const absl::string_view> fields = workspace->fields;
  const auto missing = [&] {
    if (slot.missing_has_row) builder->AddSign(slot.index, slot.missing_sign);
  };
  if (slot.has_value || slot.kind == Slot::BUCKET) {
    Number value;
    if (slot.has_value) {
      value = slot.value.Evaluate(fields, &workspace->unreadable);
    } else if (!slot.IsMissing(fields[slot.column])) {
      const NumberText text = ReadNumber(fields[slot.column], &value);
      if (text == NumberText::kUnreadable) workspace->unreadable.push_back(slot.column);
    }
    const double real = value.ToDouble();
    if (!std::isfinite(real)) return missing();
    if (slot.kind == Slot::BUCKET) return builder->AddSign(slot.index, slot.BucketOf(real));
    if (slot.hash == Slot::RAW) {
      uint64_t id = 0;
      ToNatural(value, &id);
      return builder->AddSign(slot.index, MakeSign(slot.table, id));
    }
    char buffer[40];
    return builder->AddSign(slot.index, slot.SignOf(TextOf(value, buffer)));
  }
  const auto sign_of = [&](absl::string_view text) {
    if (slot.hash != Slot::RAW) return slot.SignOf(text);
    Number number;
    uint64_t id = 0;
    ReadNumber(text, &number);
    ToNatural(number, &id);
    return MakeSign(slot.table, id);
  };
  const absl::string_view text = fields[slot.column];
  if (slot.IsMissing(text)) return missing();
  if (slot.kind == Slot::ID) return builder->AddSign(slot.index, sign_of(text));
  uint32_t taken = 0;
  slot.ForEachPart(text, [&](absl::string_view part) {
    if (taken == slot.values_max) return false;
    builder->AddSign(slot.index, sign_of(part));
    return ++taken < slot.values_max;
  });
  if (taken == 0) missing();
}

void RecordPlan::Fill(Workspace* workspace, BatchBuilder* builder) const {
  const absl::Span<const absl::string_view> fields = workspace->fields;
  std::vector<int>* const unreadable = &workspace->unreadable;
  for (const SlotPlan& slot : slots_) AddSlot(slot, workspace, builder);
  workspace->dense.clear();
  for (const DensePlan& dense : dense_) {
    workspace->dense.push_back(Transformed(dense.config, dense.value.Evaluate(fields, unreadable).ToDouble()));
  }
  builder->AddDense(workspace->dense);
  workspace->labels.clear();
  workspace->mask.clear();
  for (const TaskPlan& task : tasks_) {
    // A label that is missing, or rests on what is, is unknown, so masked.
    const Number label = task.known ? task.label.Evaluate(fields, unreadable) : Number();
    const bool known = !label.missing() && (!task.has_mask || task.mask.Evaluate(fields, unreadable).True());
    workspace->labels.push_back(known && label.True() ? 1.0f : 0.0f);
    workspace->mask.push_back(known ? 1.0f : 0.0f);
  }
  builder->AddLabels(workspace->labels, workspace->mask);
  if (has_time_ && workspace->time_s != 0) builder->AddTime(workspace->time_s);
}

absl::string_view RecordPlan::User(const Workspace& workspace) const {
  return user_ < 0 ? absl::string_view() : workspace.fields[user_];
}

}  // namespace hearth
