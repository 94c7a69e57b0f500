#include "common/job/identity.h"

#include <google/protobuf/text_format.h>
#include <xxhash.h>

#include <algorithm>
#include <map>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/job/config.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"

namespace hearth {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Reflection;
using google::protobuf::TextFormat;
using ProtoMessage = google::protobuf::Message;

// A salt that is the slot's name is what the slot has without it.
void LeaveOutPlainSalts(Job* job) {
  for (Slot& slot : *job->mutable_slot()) {
    if (slot.has_salt() && SaltText(slot) == slot.name()) slot.clear_salt();
  }
}

// What decides the rows and the dense model from here on. Not: where files lie, how long to go on, how often to save,
// what to evaluate, how much memory to use.
Job Identity(const Job& job) {
  Job identity = job;
  identity.clear_name();
  identity.clear_data_dir();
  identity.clear_snapshot();
  identity.clear_store();
  identity.clear_export_();
  identity.clear_metrics();
  identity.clear_limits();
  identity.clear_split();
  Training* training = identity.mutable_training();
  training->clear_epochs();
  training->clear_steps_max();
  training->clear_read_ahead_batches_max();
  training->clear_threads();
  training->clear_device();
  training->clear_precision();
  training->clear_wire();
  training->clear_idle_ms();
  training->clear_stop_after_no_gain();
  training->mutable_dense_optimizer()->clear_ema_serves();
  for (Table& table : *identity.mutable_table()) table.clear_memory_rows_max();
  for (Log& log : *identity.mutable_log()) log.set_piece_bytes(PieceBytes(log));
  for (Task& task : *identity.mutable_task()) task.clear_was();
  for (Slot& slot : *identity.mutable_slot()) slot.clear_was();
  for (DenseFeature& dense : *identity.mutable_dense()) dense.clear_was();
  for (Table& table : *identity.mutable_table()) table.clear_was();
  LeaveOutPlainSalts(&identity);
  return WithDefaults(identity);
}

using Flat = std::map<std::string, std::string>;

void Flatten(const ProtoMessage& message, const std::string& prefix, Flat* flat) {
  const Descriptor* descriptor = message.GetDescriptor();
  const Reflection* reflection = message.GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    const bool is_message = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    const int size =
        field->is_repeated() ? reflection->FieldSize(message, field) : reflection->HasField(message, field);
    for (int k = 0; k < size; ++k) {
      const std::string path =
          field->is_repeated() ? absl::StrCat(prefix, field->name(), "[", k, "]") : absl::StrCat(prefix, field->name());
      if (is_message) {
        const ProtoMessage& child = field->is_repeated() ? reflection->GetRepeatedMessage(message, field, k)
                                                         : reflection->GetMessage(message, field);
        Flatten(child, path + ".", flat);
      } else {
        TextFormat::PrintFieldValueToString(message, field, field->is_repeated() ? k : -1, &(*flat)[path]);
      }
    }
  }
}

struct Difference {
  std::string field, left, right;
};

std::vector<Difference> Differences(const ProtoMessage& a, const ProtoMessage& b) {
  Flat left, right;
  Flatten(a, "", &left);
  Flatten(b, "", &right);
  std::vector<Difference> differences;
  const std::string absent = "(absent)";
  for (const auto& [path, value] : left) {
    const auto found = right.find(path);
    if (found == right.end() || found->second != value) {
      differences.push_back({path, value, found == right.end() ? absent : found->second});
    }
  }
  for (const auto& [path, value] : right) {
    if (left.count(path) == 0) differences.push_back({path, absent, value});
  }
  return differences;
}

// "table[0].dim" → "table.dim": rules are of all elements.
std::string WithoutIndices(const std::string& field) {
  std::string plain;
  bool inside = false;
  for (const char c : field) {
    inside = inside || c == '[';
    if (!inside) plain += c;
    inside = inside && c != ']';
  }
  return plain;
}

enum class Rule { kFree, kCarried, kFiles, kAtSegmentEnd, kNotWhileSegmentEnds, kWithStaleness, kSameState, kRefused };
struct RuleOf {
  absl::string_view prefix;  // of a field without indices; the first that fits
  Rule rule;
  absl::string_view why;
};
constexpr absl::string_view kInsideALog =
    "inside a log it decides which records a lane has read; it may change where a log or an epoch ends";
constexpr RuleOf kRules[] = {
    {"name", Rule::kFree, ""},
    {"data_dir", Rule::kFree, ""},
    {"snapshot.every_steps", Rule::kWithStaleness, ""},
    {"snapshot", Rule::kFree, ""},
    {"store", Rule::kFree, ""},
    {"export", Rule::kFree, ""},
    {"metrics", Rule::kFree, ""},
    {"limits.record_bytes_max", Rule::kRefused, "it decides which records a cursor counts"},
    {"limits", Rule::kFree, ""},
    {"split", Rule::kFree, ""},
    {"log.path", Rule::kFiles, ""},
    {"log.cut_after", Rule::kCarried, ""},
    {"log.batch_size", Rule::kAtSegmentEnd, kInsideALog},
    {"log.time_ms", Rule::kAtSegmentEnd, kInsideALog},
    {"log", Rule::kRefused, "it decides which records there are, and in which order"},
    {"side_table", Rule::kRefused, "it decides which records there are, and what they hold"},
    {"seed", Rule::kRefused, "every initial value and every shuffle is drawn from it"},
    {"task.weight", Rule::kCarried, ""},
    {"task.base_rate", Rule::kFree, ""},  // of initial values alone
    {"task.was", Rule::kFree, ""},        // of an adoption alone, as those below
    {"task", Rule::kRefused, "it decides what the model's outputs mean"},
    {"slot.was", Rule::kFree, ""},
    {"slot", Rule::kRefused, "it decides what the model's inputs mean"},
    {"dense.was", Rule::kFree, ""},
    {"dense", Rule::kRefused, "it decides what the model's inputs mean"},
    {"table.optimizer.kind", Rule::kRefused, "it decides what a row holds"},
    {"table.optimizer", Rule::kCarried, ""},
    {"table.init_uniform", Rule::kCarried, ""},
    {"table.expire_after_steps", Rule::kCarried, ""},
    {"table.expire_after_hours", Rule::kCarried, ""},
    {"table.memory_rows_max", Rule::kFree, ""},
    {"table.score", Rule::kFree, ""},
    {"table.was", Rule::kFree, ""},
    {"table", Rule::kRefused, "it decides what a row holds, and which rows there are"},
    {"model.batch_norm_momentum", Rule::kCarried, ""},
    {"model.batch_norm_window_records", Rule::kCarried, ""},
    {"model", Rule::kRefused, "it decides the dense model's shape"},
    {"training.batch_size", Rule::kAtSegmentEnd, kInsideALog},
    {"training.staleness", Rule::kNotWhileSegmentEnds,
     "a log or an epoch is about to end, at a step that the old value decided"},
    {"training.epochs", Rule::kFree, ""},
    {"training.steps_max", Rule::kWithStaleness, ""},
    {"training.dense_optimizer.kind", Rule::kSameState, "it decides what the optimizer's state is"},
    {"training.dense_optimizer.ema_serves", Rule::kFree, ""},  // of evaluations and exports alone
    {"training.dense_optimizer", Rule::kCarried, ""},
    {"training.clip_norm", Rule::kCarried, ""},
    {"training.threads", Rule::kCarried, ""},
    {"training.device", Rule::kCarried, ""},
    {"training.precision", Rule::kCarried, ""},
    {"training.wire", Rule::kCarried, ""},
    {"training.read_ahead_batches_max", Rule::kFree, ""},
    {"training.idle_ms", Rule::kFree, ""},
    {"training.stop_after_no_gain", Rule::kFree, ""},
    {"training.lanes", Rule::kAtSegmentEnd,
     "inside a log each lane has its own part of it; it may change where a log or an epoch ends"},
    {"training.shards", Rule::kRefused, "it decides where rows are stored"},
};

constexpr RuleOf kNewLog = {"log", Rule::kFiles, ""};

// "log[3].name" where there were three.
bool IsOfNewLog(const Job& before, absl::string_view field) {
  int number = 0;
  if (!absl::ConsumePrefix(&field, "log[")) return false;
  return absl::SimpleAtoi(field.substr(0, field.find(']')), &number) && number >= before.log_size();
}

const RuleOf& RuleFor(const std::string& field) {
  static constexpr RuleOf kUnknown = {"", Rule::kRefused, "it is part of the model"};
  const std::string plain = WithoutIndices(field);
  for (const RuleOf& rule : kRules) {
    const absl::string_view rest = absl::string_view(plain).substr(0, rule.prefix.size());
    if (rest != rule.prefix) continue;
    if (plain.size() == rule.prefix.size() || plain[rule.prefix.size()] == '.') return rule;
  }
  return kUnknown;
}

bool IsSgd(const Job& job) { return job.training().dense_optimizer().kind() == DenseOptimizer::SGD; }

}  // namespace

uint64_t JobHash(const Job& job) {
  Flat flat;
  Flatten(Identity(job), "", &flat);
  std::string text;
  for (const auto& [path, value] : flat) absl::StrAppend(&text, path, "=", value, "\n");
  return XXH3_64bits(text.data(), text.size());
}

std::string JobChange::ToString() const { return absl::StrCat(field, ": ", before, " -> ", now); }

std::vector<JobChange> ChangesOf(const Job& before, const Job& now, const Manifest& snapshot) {
  const auto effective = [](Job job) {
    for (Log& log : *job.mutable_log()) log.set_piece_bytes(PieceBytes(log));
    LeaveOutPlainSalts(&job);
    return WithDefaults(std::move(job));
  };
  const std::vector<LaneState> lanes = LanesOf(snapshot);
  const bool untouched = snapshot.step() == snapshot.adoption().first_step();  // 0 where there was no adoption
  const bool between_segments = untouched || AtSegmentEnd(lanes, snapshot.step());
  const bool segment_ends = std::any_of(
      lanes.begin(), lanes.end(), [&](const LaneState& lane) { return lane.segment_ends_at() > snapshot.step(); });
  const bool stale = before.training().staleness() > 0 || now.training().staleness() > 0;
  std::vector<JobChange> changes;
  for (Difference& difference : Differences(effective(before), effective(now))) {
    const RuleOf& rule = IsOfNewLog(before, difference.field) ? kNewLog : RuleFor(difference.field);
    JobChange change = {JobChange::kRefused, std::move(difference.field), std::move(difference.left),
                        std::move(difference.right), std::string(rule.why)};
    switch (rule.rule) {
      case Rule::kFree:
        change.kind = JobChange::kFree;
        break;
      case Rule::kCarried:
        change.kind = JobChange::kCarried;
        break;
      case Rule::kFiles:
        change.kind = JobChange::kFiles;
        break;
      case Rule::kWithStaleness:  // cuts decide views where there are several
        change.kind = stale ? JobChange::kCarried : JobChange::kFree;
        break;
      case Rule::kAtSegmentEnd:
        if (between_segments) change.kind = JobChange::kCarried;
        break;
      case Rule::kNotWhileSegmentEnds:
        if (!segment_ends) change.kind = JobChange::kCarried;
        break;
      case Rule::kSameState:  // ADAM and ADAMW keep the same
        if (!IsSgd(before) && !IsSgd(now)) change.kind = JobChange::kCarried;
        break;
      case Rule::kRefused:
        break;
    }
    if (change.kind != JobChange::kRefused) change.why.clear();
    changes.push_back(std::move(change));
  }
  return changes;
}

std::vector<JobChange> OfKind(const std::vector<JobChange>& changes, JobChange::Kind kind) {
  std::vector<JobChange> those;
  for (const JobChange& change : changes) {
    if (change.kind == kind) those.push_back(change);
  }
  return those;
}

std::vector<std::string> RefusalsOf(const std::vector<JobChange>& changes) {
  std::vector<std::string> lines;
  for (const JobChange& change : OfKind(changes, JobChange::kRefused)) {
    lines.push_back(absl::StrCat(change.ToString(), ": ", change.why));
  }
  return lines;
}

std::vector<std::string> ModelDifferences(const Job& a, const Job& b) {
  std::vector<std::string> differences;
  for (const Difference& difference : Differences(Identity(a), Identity(b))) {
    const std::string& field = difference.field;
    const bool of_model = absl::StartsWith(field, "task") || absl::StartsWith(field, "slot") ||
                          absl::StartsWith(field, "dense") || absl::StartsWith(field, "table") ||
                          absl::StartsWith(field, "model") || field == "training.shards";
    const bool of_reading =
        absl::StartsWith(field, "task") && (absl::EndsWith(field, ".label") || absl::EndsWith(field, ".mask"));
    if (!of_model || of_reading || RuleFor(field).rule != Rule::kRefused) continue;
    differences.push_back(absl::StrCat(field, ": ", difference.left, " != ", difference.right));
  }
  return differences;
}

}  // namespace hearth
