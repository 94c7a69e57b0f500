#include "model/adopt/plan.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/rows.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "model/adopt/plan_parameters.h"
#include "model/batch/batch.h"

namespace hearth {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Reflection;
using google::protobuf::TextFormat;

std::string Quote(const std::string& name) { return absl::StrCat("\"", name, "\""); }
std::string QuoteAll(const std::vector<std::string>& names) {
  std::vector<std::string> quoted;
  for (const std::string& name : names) quoted.push_back(Quote(name));
  return absl::StrJoin(quoted, ", ");
}
const char* Are(size_t count) { return count == 1 ? "is" : "are"; }

// ---- Names

// What is matched of a task, slot, dense feature or table.
struct Named {
  std::string name, was;
};
template <typename List>
std::vector<Named> NamesOf(const List& list) {
  std::vector<Named> names;
  for (const auto& one : list) names.push_back({one.name(), one.was()});
  return names;
}

struct Matched {
  std::vector<int> from;  // [of the new job] of the old job; negative: born
  std::vector<int> left;  // of the old job: nobody takes them over
};

class Matcher {
 public:
  Matcher(const AdoptionRules& rules, std::vector<std::string>* faults) : faults_(faults) {
    dropped_.insert(rules.dropped.begin(), rules.dropped.end());
  }

  Matched Match(const std::string& kind, const std::vector<Named>& before, const std::vector<Named>& now) {
    Matched matched;
    std::map<std::string, int> old;
    for (size_t i = 0; i < before.size(); ++i) old[before[i].name] = static_cast<int>(i);
    std::vector<int> taken_by(before.size(), -1);
    std::vector<std::string> born, gone;
    for (size_t i = 0; i < now.size(); ++i) {
      const int from = SourceOf(kind, now[i], old);
      matched.from.push_back(from);
      if (from < 0) {
        born.push_back(now[i].name);
        continue;
      }
      int& taker = taken_by[static_cast<size_t>(from)];
      if (taker >= 0) {
        faults_->push_back(absl::StrCat(
            kind, "s ", Quote(now[static_cast<size_t>(taker)].name), " and ", Quote(now[i].name), " both take over ",
            Quote(before[static_cast<size_t>(from)].name), ": one can; correct `was`, or give the other a new name"));
      }
      taker = static_cast<int>(i);
    }
    for (size_t i = 0; i < before.size(); ++i) {
      if (taken_by[i] >= 0) continue;
      matched.left.push_back(static_cast<int>(i));
      if (!Drops(kind, before[i].name)) gone.push_back(before[i].name);
    }
    if (!born.empty() && !gone.empty()) {
      faults_->push_back(absl::StrCat(
          kind, " ", QuoteAll(gone), " ", Are(gone.size()), " gone and ", QuoteAll(born), " ", Are(born.size()),
          " new: if one is another under a new name, say so on the new one (was: ", Quote(gone[0]),
          "); if it is to go: --drop ", kind, ":", gone[0]));
    }
    return matched;
  }

  // Of the old model; asked for each name that --drop may have.
  bool Drops(const std::string& kind, const std::string& name) {
    return dropped_.count(absl::StrCat(kind, ":", name)) > 0;
  }

  void CheckDropped(const std::map<std::string, std::vector<Named>>& before) const {
    for (const std::string& dropped : dropped_) {
      const std::string kind = dropped.substr(0, dropped.find(':'));
      const auto of_kind = before.find(kind);
      if (of_kind == before.end() || kind.size() == dropped.size()) {
        faults_->push_back(
            absl::StrCat("--drop ", dropped, ": give KIND:NAME, where KIND is task, slot, dense or table"));
        continue;
      }
      const std::string name = dropped.substr(kind.size() + 1);
      std::vector<std::string> names;
      for (const Named& one : of_kind->second) names.push_back(one.name);
      if (std::find(names.begin(), names.end(), name) != names.end()) continue;
      faults_->push_back(absl::StrCat("--drop ", dropped, ": the model has no ", kind, " ", Quote(name),
                                      names.empty() ? "" : absl::StrCat("; it has ", QuoteAll(names))));
    }
  }

 private:
  int SourceOf(const std::string& kind, const Named& one, const std::map<std::string, int>& old) {
    const auto by_name = old.find(one.name);
    const auto by_was = one.was.empty() ? old.end() : old.find(one.was);
    // An adopted job says `was` still: there its own name is the model's.
    const auto found = by_was != old.end() ? by_was : by_name;
    if (found != old.end()) return Drops(kind, found->first) ? -1 : found->second;
    if (one.was.empty()) return -1;
    std::vector<std::string> names;
    for (const auto& [name, index] : old) names.push_back(name);
    faults_->push_back(absl::StrCat(kind, " ", Quote(one.name), ": was: ", Quote(one.was), ": the model has no such ",
                                    kind, names.empty() ? "" : absl::StrCat("; it has ", QuoteAll(names)),
                                    ". Correct it, or leave `was` out if the ", kind, " is new"));
    return -1;
  }

  std::set<std::string> dropped_;
  std::vector<std::string>* const faults_;
};

// ---- Fields

std::string ValueOf(const google::protobuf::Message& message, const FieldDescriptor* field) {
  const Reflection* reflection = message.GetReflection();
  if (!field->is_repeated()) {
    std::string text;
    TextFormat::PrintFieldValueToString(message, field, -1, &text);
    return text;
  }
  std::vector<std::string> texts;
  for (int i = 0; i < reflection->FieldSize(message, field); ++i) {
    TextFormat::PrintFieldValueToString(message, field, i, &texts.emplace_back());
  }
  return absl::StrCat("[", absl::StrJoin(texts, ", "), "]");
}

// "pooling: SUM -> MEAN" of each field but those named. Fields that hold messages are left out.
std::vector<std::string> FieldChanges(const google::protobuf::Message& before, const google::protobuf::Message& now,
                                      const std::set<std::string>& but) {
  std::vector<std::string> changes;
  const auto* descriptor = before.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (but.count(std::string(field->name())) > 0 || field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) continue;
    const std::string was = ValueOf(before, field);
    const std::string is = ValueOf(now, field);
    if (was != is) changes.push_back(absl::StrCat(field->name(), ": ", was, " -> ", is));
  }
  return changes;
}

// ---- The planner

class Planner {
 public:
  Planner(const Job& before, const Job& now, const AdoptionRules& rules)
      : before_(WithDefaults(before)), now_(WithDefaults(now)), rules_(rules), matcher_(rules, &faults_) {}

  absl::StatusOr<AdoptionPlan> Plan() {
    matcher_.CheckDropped({{"task", NamesOf(before_.task())},
                           {"slot", NamesOf(before_.slot())},
                           {"dense", NamesOf(before_.dense())},
                           {"table", NamesOf(before_.table())}});
    PlanTables();
    PlanSlots();
    PlanDense();
    PlanTasks();
    if (faults_.empty()) PlanParameters(before_, now_, rules_.truncate, names_, &plan_, &faults_);
    if (!faults_.empty()) return absl::FailedPreconditionError(absl::StrJoin(faults_, "\n"));
    return std::move(plan_);
  }

 private:
  using Line = AdoptionPlan::Line;
  static Line LineOf(const std::string& kind, const std::string& name, const std::string& unit) {
    Line line;
    line.what = absl::StrCat(kind, " ", name);
    line.unit = unit;
    return line;
  }
  static void Renamed(const std::string& was, const std::string& is, std::vector<std::string>* how) {
    if (was != is) how->push_back(absl::StrCat("was ", Quote(was)));
  }
  void Changes(const std::string& why) { plan_.changes.push_back(why); }

  void PlanTables() {
    const Matched matched = matcher_.Match("table", NamesOf(before_.table()), NamesOf(now_.table()));
    for (int i = 0; i < now_.table_size(); ++i) {
      TableMove move;
      move.from = matched.from[static_cast<size_t>(i)];
      Line line = LineOf("table", now_.table(i).name(), "rows");
      std::vector<std::string> how;
      if (move.from >= 0) PlanTable(before_.table(move.from), now_.table(i), &move, &how);
      line.how = absl::StrJoin(how, "; ");
      plan_.tables.push_back(move);
      plan_.table_lines.push_back(std::move(line));
    }
    plan_.dropped_tables = matched.left;
    for (const int i : matched.left) plan_.table_lines.push_back(LineOf("table", before_.table(i).name(), "rows"));
  }

  void PlanTable(const Table& was, const Table& is, TableMove* move, std::vector<std::string>* how) {
    Renamed(was.name(), is.name(), how);
    move->dims = std::min(was.dim(), is.dim());
    if (is.dim() < was.dim()) {
      if (!rules_.truncate) {
        faults_.push_back(absl::StrCat("table ", Quote(is.name()), ".dim: ", was.dim(), " -> ", is.dim(), ": ",
                                       was.dim() - is.dim(), " columns of its rows would go; keep dim: ", was.dim(),
                                       ", or let them go with --truncate"));
      }
      Changes(absl::StrCat("table ", Quote(is.name()), " has lost columns"));
    }
    if (is.dim() != was.dim()) {
      how->push_back(absl::StrCat("dim ", was.dim(), " -> ", is.dim(),
                                  is.dim() > was.dim() ? ", new columns are zero" : ", the last columns go"));
    }
    if (is.weights() != was.weights()) {
      const bool rounded = is.weights() != Table::FLOAT32;
      how->push_back(absl::StrCat("weights ", Table::Weights_Name(was.weights()), " -> ",
                                  Table::Weights_Name(is.weights()), rounded ? ", rounded to the nearest" : ""));
      if (rounded) Changes(absl::StrCat("table ", Quote(is.name()), " has rounded weights"));
    }
    const bool same_kind = was.optimizer().kind() == is.optimizer().kind();
    move->state = same_kind && was.dim() == is.dim();
    if (!same_kind) {
      how->push_back(absl::StrCat("optimizer ", Optimizer::Kind_Name(was.optimizer().kind()), " -> ",
                                  Optimizer::Kind_Name(is.optimizer().kind())));
    }
    if (!move->state) how->push_back("optimizer state begins anew");
    const auto counts = [](const Table& table, Admission::Counter counter) {
      return table.admission().count_min() > 1 && table.admission().counter() == counter;
    };
    move->counters = counts(was, Admission::EXACT) && counts(is, Admission::EXACT);
    if (counts(was, Admission::EXACT) && !move->counters) how->push_back("counts of signs without a row begin anew");
    if (counts(was, Admission::BLOOM)) how->push_back("its counting filters begin anew");
  }

  // The new table that holds an old one's rows; negative: none.
  int TableAfter(const std::string& old_name) const {
    for (size_t i = 0; i < plan_.tables.size(); ++i) {
      if (plan_.tables[i].from >= 0 && before_.table(plan_.tables[i].from).name() == old_name)
        return static_cast<int>(i);
    }
    return -1;
  }

  // A new slot is read with zeros: were its rows zero too, neither would ever move.
  void CheckLive(const Slot& slot) {
    for (const Table& table : now_.table()) {
      if (table.name() != slot.table() || table.init_uniform() > 0) continue;
      faults_.push_back(absl::StrCat("slot ", Quote(slot.name()), " is new and table ", Quote(table.name()),
                                     ".init_uniform is 0: its rows and what reads them would stay zero for ever; give "
                                     "the table an init_uniform above 0"));
    }
  }

  void PlanSlots() {
    const Matched matched = matcher_.Match("slot", NamesOf(before_.slot()), NamesOf(now_.slot()));
    plan_.slots = matched.from;
    const FeatureLayout old_layout = MakeFeatureLayout(before_);
    const FeatureLayout layout = MakeFeatureLayout(now_);
    names_.input.assign(static_cast<size_t>(layout.width), kZeros);
    for (int i = 0; i < now_.slot_size(); ++i) {
      const FeatureLayout::SlotPlace& place = layout.slots[static_cast<size_t>(i)];
      const int from = plan_.slots[static_cast<size_t>(i)];
      Line line = LineOf("slot", now_.slot(i).name(), "columns");
      if (from < 0) {
        CheckLive(now_.slot(i));
        line.born = static_cast<uint64_t>(place.dim);
        line.how = "read with zeros";
        plan_.lines.push_back(std::move(line));
        continue;
      }
      std::vector<std::string> how;
      PlanSlot(before_.slot(from), now_.slot(i), &how);
      const FeatureLayout::SlotPlace& old_place = old_layout.slots[static_cast<size_t>(from)];
      const int shared = std::min(place.dim, old_place.dim);
      // Behind them rows are zero: were readers zero too, neither would ever move.
      for (int d = 0; d < place.dim; ++d) {
        names_.input[static_cast<size_t>(place.offset + d)] = d < shared ? int64_t{old_place.offset} + d : kBornAt;
      }
      line.carried = static_cast<uint64_t>(shared);
      line.born = static_cast<uint64_t>(place.dim - shared);
      line.dropped = static_cast<uint64_t>(old_place.dim - shared);
      line.how = absl::StrJoin(how, "; ");
      plan_.lines.push_back(std::move(line));
    }
    for (const int i : matched.left) {
      const Slot& slot = before_.slot(i);
      Line line = LineOf("slot", slot.name(), "columns");
      line.dropped = static_cast<uint64_t>(old_layout.slots[static_cast<size_t>(i)].dim);
      if (const int table = TableAfter(slot.table()); table >= 0)
        line.how = absl::StrCat("its rows stay in table ", now_.table(table).name());
      plan_.lines.push_back(std::move(line));
      Changes(absl::StrCat("slot ", Quote(slot.name()), " is gone"));
    }
    for (int i = 0; i < now_.dense_size(); ++i) dense_columns_.push_back(layout.dense_offset + i);
    old_dense_offset_ = old_layout.dense_offset;
  }

  void PlanSlot(const Slot& was, const Slot& is, std::vector<std::string>* how) {
    Renamed(was.name(), is.name(), how);
    const std::string who = absl::StrCat("slot ", Quote(is.name()));
    const std::string or_drop = absl::StrCat(", or let it begin anew with --drop slot:", was.name());
    const int table = TableAfter(was.table());
    if (table < 0 || now_.table(table).name() != is.table()) {
      faults_.push_back(absl::StrCat(
          who, ".table: ", Quote(is.table()), " does not hold its rows, which are those of table ", Quote(was.table()),
          table < 0 ? ", which is gone" : absl::StrCat("; set table: ", Quote(now_.table(table).name())), or_drop));
    }
    if (was.hash() != is.hash()) {
      faults_.push_back(absl::StrCat(who, ".hash: ", Slot::Hash_Name(was.hash()), " -> ", Slot::Hash_Name(is.hash()),
                                     ": its rows are found by the old one alone; set it back", or_drop));
    } else if (was.hash() == Slot::SALTED && SaltText(was) != SaltText(is)) {
      faults_.push_back(absl::StrCat(who, ": its rows are hashed with ", Quote(SaltText(was)),
                                     ", and a hash cannot be undone: add salt: ", Quote(SaltText(was)), or_drop));
    } else if (was.name() != is.name() && is.hash() == Slot::SALTED) {
      how->push_back("rows kept by its salt");
    }
    Slot then = was, later = is;  // a column is called like its slot where nothing is said
    if (then.value().empty() && then.column().empty()) then.set_column(then.name());
    if (later.value().empty() && later.column().empty()) later.set_column(later.name());
    const std::vector<std::string> changes = FieldChanges(then, later, {"name", "was", "salt", "hash", "table"});
    if (changes.empty()) return;
    how->push_back(absl::StrJoin(changes, ", "));
    Changes(absl::StrCat(who, " is read otherwise: ", absl::StrJoin(changes, ", ")));
  }

  void PlanDense() {
    const Matched matched = matcher_.Match("dense", NamesOf(before_.dense()), NamesOf(now_.dense()));
    plan_.dense = matched.from;
    for (int i = 0; i < now_.dense_size(); ++i) {
      const int from = plan_.dense[static_cast<size_t>(i)];
      Line line = LineOf("dense", now_.dense(i).name(), "columns");
      if (from < 0) {
        line.born = 1;
        line.how = "read with zeros";
        plan_.lines.push_back(std::move(line));
        continue;
      }
      line.carried = 1;
      names_.input[static_cast<size_t>(dense_columns_[static_cast<size_t>(i)])] = old_dense_offset_ + from;
      DenseFeature was = before_.dense(from), is = now_.dense(i);
      if (was.value().empty()) was.set_value(absl::StrCat("`", was.name(), "`"));
      if (is.value().empty()) is.set_value(absl::StrCat("`", is.name(), "`"));
      std::vector<std::string> how;
      Renamed(was.name(), is.name(), &how);
      const std::vector<std::string> changes = FieldChanges(was, is, {"name", "was"});
      if (!changes.empty()) {
        how.push_back(absl::StrJoin(changes, ", "));
        Changes(absl::StrCat("dense ", Quote(is.name()), " is read otherwise: ", absl::StrJoin(changes, ", ")));
      }
      line.how = absl::StrJoin(how, "; ");
      plan_.lines.push_back(std::move(line));
    }
    for (const int i : matched.left) {
      Line line = LineOf("dense", before_.dense(i).name(), "columns");
      line.dropped = 1;
      plan_.lines.push_back(std::move(line));
      Changes(absl::StrCat("dense ", Quote(before_.dense(i).name()), " is gone"));
    }
  }

  void PlanTasks() {
    const Matched matched = matcher_.Match("task", NamesOf(before_.task()), NamesOf(now_.task()));
    plan_.tasks = names_.tasks = matched.from;
    PlanCategories();
  }

  // By name; one that is called otherwise by the tasks that it has: a category is nothing but its tasks.
  void PlanCategories() {
    std::map<std::string, std::set<std::string>> came_from;  // of each new one: the old ones of its tasks
    std::set<std::string> old;
    for (const Task& task : before_.task()) old.insert(task.category());
    for (int i = 0; i < now_.task_size(); ++i) {
      std::set<std::string>& sources = came_from[now_.task(i).category()];
      const int from = plan_.tasks[static_cast<size_t>(i)];
      if (from >= 0) sources.insert(before_.task(from).category());
    }
    std::map<std::string, int> claims;
    for (const auto& [category, sources] : came_from) {
      if (old.count(category) == 0 && sources.size() == 1 && came_from.count(*sources.begin()) == 0)
        ++claims[*sources.begin()];
    }
    for (const auto& [category, sources] : came_from) {
      if (old.count(category) > 0) {
        names_.categories[category] = category;
      } else if (sources.size() == 1 && came_from.count(*sources.begin()) == 0 && claims[*sources.begin()] == 1) {
        names_.categories[category] = *sources.begin();
      }
    }
    if (now_.model().kind() != Model::HOME) return;
    for (int i = 0; i < now_.task_size(); ++i) {
      const int from = plan_.tasks[static_cast<size_t>(i)];
      if (from < 0) continue;
      const auto category = names_.categories.find(now_.task(i).category());
      if (category != names_.categories.end() && category->second == before_.task(from).category()) continue;
      Changes(absl::StrCat("task ", Quote(now_.task(i).name()), " is in another category: ",
                           before_.task(from).category(), " -> ", now_.task(i).category()));
    }
    std::set<std::string> kept;
    for (const auto& [category, source] : names_.categories) kept.insert(source);
    for (const std::string& category : old) {
      if (kept.count(category) == 0)
        Changes(absl::StrCat("category ", Quote(category), " is gone, whose experts all tasks saw"));
    }
  }

  const Job before_, now_;
  const AdoptionRules rules_;
  std::vector<std::string> faults_;
  Matcher matcher_;
  AdoptionPlan plan_;
  MatchedNames names_;
  std::vector<int> dense_columns_;  // of the model's input
  int old_dense_offset_ = 0;
};

}  // namespace

absl::StatusOr<AdoptionPlan> PlanAdoption(const Job& before, const Job& now, const AdoptionRules& rules) {
  return Planner(before, now, rules).Plan();
}

std::string DescribeAdoption(const AdoptionPlan& plan) {
  std::vector<std::vector<std::string>> rows = {{"what", "of", "carried", "born", "reset", "dropped", "how"}};
  for (const auto* lines : {&plan.table_lines, &plan.lines}) {
    for (const AdoptionPlan::Line& line : *lines) {
      rows.push_back({line.what, line.unit, absl::StrCat(line.carried), absl::StrCat(line.born),
                      absl::StrCat(line.reset), absl::StrCat(line.dropped), line.how});
    }
  }
  return FormatRows(rows, {0, 1, 6});
}

}  // namespace hearth
