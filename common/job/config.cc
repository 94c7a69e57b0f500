#include "common/job/config.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/artifact/bundle_chain.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/pieces.h"
#include "common/job/quality.h"

namespace hearth {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Reflection;
using ProtoMessage = google::protobuf::Message;
using google::protobuf::TextFormat;

constexpr uint64_t kJobBytesMax = 16u << 20;
constexpr uint32_t kHoursMax = 876'000;                     // a hundred years
constexpr uint32_t kReadAheadBatchesMax = 120;              // with staleness within MemoryTier::kAheadStepsMax
constexpr uint64_t kBloomCountersMax = uint64_t{64} << 30;  // of a table, over all logical shards: 1 or 4 bytes each

// --- text
// -------------------------------------------------------------------------------------------------------------

class ErrorList : public google::protobuf::io::ErrorCollector {
 public:
  explicit ErrorList(std::string name) : name_(std::move(name)) {}
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    errors_.push_back(absl::StrCat(name_, ":", line + 1, ":", column + 1, ": ", message));
  }
  void AddWarning(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    AddError(line, column, message);
  }
  const std::vector<std::string>& errors() const { return errors_; }

 private:
  std::string name_;
  std::vector<std::string> errors_;
};

// --- overrides
// --------------------------------------------------------------------------------------------------------

absl::Status OverrideError(const std::string& override, absl::string_view cause) {
  return absl::InvalidArgumentError(absl::StrCat("--set ", override, ": ", cause));
}

std::string FieldNames(const Descriptor* descriptor) {
  std::vector<std::string> names;
  for (int i = 0; i < descriptor->field_count(); ++i) names.push_back(descriptor->field(i)->name());
  return absl::StrJoin(names, ", ");
}

// The element of a repeated message field that "[…]" means: a position, or the `name` of one.
absl::StatusOr<ProtoMessage*> ElementOf(ProtoMessage* message, const FieldDescriptor* field, absl::string_view key,
                                        const std::string& override) {
  const Reflection* reflection = message->GetReflection();
  const int size = reflection->FieldSize(*message, field);
  int index = -1;
  if (!absl::SimpleAtoi(key, &index)) {
    index = -1;  // SimpleAtoi leaves a 0 behind
    const FieldDescriptor* name = field->message_type()->FindFieldByName("name");
    for (int i = 0; name != nullptr && i < size && index < 0; ++i) {
      const ProtoMessage& element = reflection->GetRepeatedMessage(*message, field, i);
      if (element.GetReflection()->GetString(element, name) == std::string(key)) index = i;
    }
  }
  if (index < 0 || index >= size) {
    return OverrideError(override, absl::StrCat("there is no ", field->name(), "[", std::string(key), "]; the job has ",
                                                size, "; give a position from 0, or a name"));
  }
  return reflection->MutableRepeatedMessage(message, field, index);
}

absl::Status SetScalar(ProtoMessage* message, const FieldDescriptor* field, const std::string& value,
                       const std::string& override) {
  const Reflection* reflection = message->GetReflection();
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
    return OverrideError(
        override,
        absl::StrCat(field->name(), " is a message; set one of its fields: ", FieldNames(field->message_type())));
  }
  std::vector<std::string> values = {value};
  if (field->is_repeated()) {
    reflection->ClearField(message, field);
    values = value.empty() ? std::vector<std::string>() : absl::StrSplit(value, ',');
  }
  for (const std::string& one : values) {
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
      if (field->is_repeated()) {
        reflection->AddString(message, field, one);
      } else {
        reflection->SetString(message, field, one);
      }
      continue;
    }
    ErrorList quiet("");  // without one libprotobuf writes to stderr by itself
    TextFormat::Parser parser;
    parser.RecordErrorsTo(&quiet);
    if (one.empty() || !parser.ParseFieldValueFromString(one, field, message)) {
      std::string remedy = absl::StrCat("give a ", field->cpp_type_name());
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
        std::vector<std::string> names;
        for (int i = 0; i < field->enum_type()->value_count(); ++i)
          names.push_back(field->enum_type()->value(i)->name());
        remedy = absl::StrCat("give one of ", absl::StrJoin(names, ", "));
      }
      return OverrideError(override, absl::StrCat("\"", one, "\" is no value for ", field->full_name(), "; ", remedy));
    }
  }
  return absl::OkStatus();
}

absl::Status ApplyOverride(const std::string& override, Job* job) {
  const size_t equals = override.find('=');
  if (equals == std::string::npos || equals == 0) return OverrideError(override, "not of the form path=value");
  const std::string path = override.substr(0, equals);
  const std::string value = override.substr(equals + 1);
  if (path == "data_dir") {  // on the command line a relative folder is relative to where the user stands
    job->set_data_dir(std::filesystem::absolute(value.empty() ? "." : value).lexically_normal().string());
    return absl::OkStatus();
  }
  ProtoMessage* message = job;
  const std::vector<std::string> segments = absl::StrSplit(path, '.');
  for (size_t i = 0; i < segments.size(); ++i) {
    std::string name = segments[i];
    std::string key;
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      if (name.back() != ']') return OverrideError(override, absl::StrCat("\"", name, "\" lacks its ]"));
      key = name.substr(bracket + 1, name.size() - bracket - 2);
      name.resize(bracket);
    }
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
    if (field == nullptr) {
      return OverrideError(
          override, absl::StrCat("there is no field \"", name, "\" in ", message->GetDescriptor()->name(), "; it has ",
                                 FieldNames(message->GetDescriptor())));
    }
    const bool last = i + 1 == segments.size();
    if (last && bracket == std::string::npos) return SetScalar(message, field, value, override);
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE || last) {
      return OverrideError(override, absl::StrCat("\"", segments[i], "\" does not name a field to set"));
    }
    if (field->is_repeated()) {
      HEARTH_ASSIGN_OR_RETURN(message, ElementOf(message, field, key, override));
    } else {
      message = message->GetReflection()->MutableMessage(message, field);
    }
  }
  return OverrideError(override, "names no field");
}

// --- defaults written out
// -----------------------------------------------------------------------

void WriteDefaults(ProtoMessage* message) {
  const Descriptor* descriptor = message->GetDescriptor();
  const Reflection* reflection = message->GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->is_repeated()) {
        for (int k = 0; k < reflection->FieldSize(*message, field); ++k) {
          WriteDefaults(reflection->MutableRepeatedMessage(message, field, k));
        }
      } else {
        WriteDefaults(reflection->MutableMessage(message, field));
      }
      continue;
    }
    if (field->is_repeated() || reflection->HasField(*message, field) || !field->has_default_value()) continue;
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        reflection->SetInt32(message, field, field->default_value_int32());
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        reflection->SetInt64(message, field, field->default_value_int64());
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        reflection->SetUInt32(message, field, field->default_value_uint32());
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        reflection->SetUInt64(message, field, field->default_value_uint64());
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        reflection->SetDouble(message, field, field->default_value_double());
        break;
      case FieldDescriptor::CPPTYPE_FLOAT:
        reflection->SetFloat(message, field, field->default_value_float());
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection->SetBool(message, field, field->default_value_bool());
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        reflection->SetEnum(message, field, field->default_value_enum());
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        reflection->SetString(message, field, field->default_value_string());
        break;
      case FieldDescriptor::CPPTYPE_MESSAGE:
        break;
    }
  }
}

// --- validation
// -------------------------------------------------------------------------------------------------------

// Collects "field: cause; remedy" lines.
class Faults {
 public:
  void Add(absl::string_view field, absl::string_view cause, absl::string_view remedy) {
    lines_.push_back(absl::StrCat(field, ": ", cause, "; ", remedy));
  }
  void Range(const std::string& field, double value, double least, double most) {
    if (!(value >= least && value <= most)) {
      Add(field, absl::StrCat("is ", value), absl::StrCat("give a value from ", least, " to ", most));
    }
  }
  // Every element of a repeated message has a name, and no two the same.
  template <typename Elements>
  std::set<std::string> Names(const std::string& field, const Elements& elements) {
    std::set<std::string> names;
    for (int i = 0; i < elements.size(); ++i) {
      const std::string& name = elements[i].name();
      const std::string where = absl::StrCat(field, "[", i, "].name");
      if (name.empty()) {
        Add(where, "is empty", "name it");
      } else if (name.find_first_of("/\\\t\n\" ") != std::string::npos) {
        Add(where, absl::StrCat("\"", name, "\" holds a space, quote or slash"),
            "use letters, digits, '_', '-' and '.'");
      } else if (!names.insert(name).second) {
        Add(where, absl::StrCat("\"", name, "\" is taken"), "names are unique");
      }
    }
    return names;
  }
  std::vector<std::string> Take() { return std::move(lines_); }

 private:
  std::vector<std::string> lines_;
};

bool IsUtf8(const std::string& text) {
  // The length of a sequence and the bounds of its second byte follow from the first: Unicode's table 3-7.
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return i + k < text.size() ? static_cast<uint8_t>(text[i + k]) : 0; };
    const uint8_t first = byte(0);
    if (first < 0x80) {
      ++i;
      continue;
    }
    if (first < 0xc2 || first > 0xf4) return false;
    const size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    const uint8_t least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const uint8_t most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (byte(1) < least || byte(1) > most) return false;
    for (size_t k = 2; k < length; ++k) {
      if (byte(k) < 0x80 || byte(k) > 0xbf) return false;
    }
    i += length;
  }
  return true;
}

// Names and expressions go into JSON, which is UTF-8. Files' names, and what a log holds, are bytes.
void CheckUtf8(const ProtoMessage& message, const std::string& prefix, Faults* faults) {
  static const auto* const bytes = new std::set<std::string>{"data_dir",  "path",      "directory",    "end_marker",
                                                             "delimiter", "separator", "missing_value"};
  const Reflection* reflection = message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const int size = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
    for (int k = 0; k < size; ++k) {
      const bool repeated = field->is_repeated();
      const std::string where = repeated ? absl::StrCat(prefix, field->name(), "[", k, "]") : prefix + field->name();
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        CheckUtf8(repeated ? reflection->GetRepeatedMessage(message, field, k) : reflection->GetMessage(message, field),
                  where + ".", faults);
      } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING && bytes->count(field->name()) == 0) {
        const std::string text =
            repeated ? reflection->GetRepeatedString(message, field, k) : reflection->GetString(message, field);
        if (!IsUtf8(text)) {
          faults->Add(where, absl::StrCat("\"", absl::CHexEscape(text), "\" is not UTF-8"), "write it in UTF-8");
        }
      }
    }
  }
}

void CheckExpression(const std::string& where, const std::string& text, Faults* faults) {
  if (text.size() <= kExpressionBytesMax) return;
  faults->Add(where, absl::StrCat("is ", text.size(), " bytes long, more than ", kExpressionBytesMax),
              "shorten it, or put the list that it spells out into a side_table");
}

void CheckDelimiter(const std::string& text, const std::string& where, Faults* faults) {
  const std::string delimiter = text == "\\t" ? "\t" : text;
  if (delimiter.size() == 1 && delimiter != "\"" && delimiter != "\n" && delimiter != "\r") return;
  faults->Add(where + ".delimiter", absl::StrCat("is \"", absl::CHexEscape(text), "\""),
              "give one character; \"\\\\t\" for tab");
}

void CheckLog(const Log& log, const std::string& where, const std::set<std::string>& side_tables,
              const std::set<std::string>& tasks, bool for_split, Faults* faults) {
  if (log.path().empty() == log.directory().empty()) {
    faults->Add(where, log.path().empty() ? "names no file" : "has both path and directory", "give path or directory");
  }
  if (for_split && !log.directory().empty()) faults->Add(where + ".directory", "a split cannot grow", "give path");
  CheckDelimiter(log.delimiter(), where, faults);
  if (log.format() == Log::JSON_LINES) {
    const auto refuse = [&](const char* field, bool given) {
      if (given) faults->Add(absl::StrCat(where, ".", field), "is for format DELIMITED alone", "leave it out");
    };
    // Not whether they are given: an effective job has the defaults written out.
    refuse("delimiter", log.delimiter() != Log::default_instance().delimiter());
    refuse("header", !log.header());
    refuse("multiline_records", log.multiline_records());
  } else if (!log.header() && log.column().empty()) {
    faults->Add(where + ".column", "is empty and there is no header", "name the columns");
  }
  for (const std::string& name : log.join()) {
    if (!side_tables.count(name))
      faults->Add(where + ".join", absl::StrCat("there is no side_table \"", name, "\""), "name one");
  }
  for (const std::string& name : log.known_task()) {
    if (!tasks.count(name))
      faults->Add(where + ".known_task", absl::StrCat("there is no task \"", name, "\""), "name one");
  }
  CheckExpression(where + ".where", log.where(), faults);
  CheckExpression(where + ".time_ms", log.time_ms(), faults);
  if (for_split && !log.time_ms().empty()) {
    faults->Add(where + ".time_ms", "a split's records age nothing", "leave it out");
  }
  faults->Range(where + ".piece_bytes", static_cast<double>(PieceBytes(log)), 1, 1e15);
  faults->Range(where + ".piece_batches", log.piece_batches(), 1, 1e6);
  if (log.has_batch_size()) faults->Range(where + ".batch_size", log.batch_size(), 1, 1 << 24);
  faults->Range(where + ".idle_seconds_max", log.idle_seconds_max(), 0, 1e9);
  const bool shuffled = log.shuffle().pieces() || log.shuffle().window_records_max() > 0;
  if (shuffled && (for_split || !log.directory().empty())) {
    faults->Add(where + ".shuffle", for_split ? "a split is read in order" : "a stream keeps its order",
                "leave it out");
  }
  faults->Range(where + ".shuffle.window_records_max", static_cast<double>(log.shuffle().window_records_max()), 0, 1e9);
}

void CheckSchedule(const Schedule& schedule, const std::string& where, Faults* faults) {
  constexpr double kStepsMax = 4294967295;  // as a row counts them
  const auto kind = schedule.kind();
  faults->Range(where + ".warmup_steps", static_cast<double>(schedule.warmup_steps()), 0, kStepsMax);
  faults->Range(where + ".warmup_start", schedule.warmup_start(), 0, 1);
  faults->Range(where + ".gamma", schedule.gamma(), 0, 1);
  faults->Range(where + ".end_fraction", schedule.end_fraction(), 0, 1);
  faults->Range(where + ".power", schedule.power(), 0.01, 100);
  if (kind == Schedule::STEP) {
    faults->Range(where + ".step_every", static_cast<double>(schedule.step_every()), 1, kStepsMax);
  } else if (schedule.step_every() > 0) {
    faults->Add(where + ".step_every", "is for kind STEP alone", "set kind: STEP, or leave it out");
  }
  if (kind == Schedule::COSINE || kind == Schedule::POLYNOMIAL) {
    faults->Range(where + ".decay_steps", static_cast<double>(schedule.decay_steps()), 1, kStepsMax);
    if (schedule.decay_steps() > 0 && schedule.decay_steps() <= schedule.warmup_steps()) {
      faults->Add(where + ".decay_steps",
                  absl::StrCat("is ", schedule.decay_steps(), " with warmup_steps ", schedule.warmup_steps()),
                  "it counts from the job's first step: give more than warmup_steps");
    }
  } else if (schedule.decay_steps() > 0) {
    faults->Add(where + ".decay_steps", "is for kinds COSINE and POLYNOMIAL alone", "set such a kind, or leave it out");
  }
}

// Fields of which some kinds know nothing; the settings of 0.1, which a job may name beside any kind, are not looked
// at.
void CheckKindsFields(const Optimizer& optimizer, const std::string& where, Faults* faults) {
  const Optimizer& absent = Optimizer::default_instance();
  const auto is_for = [&](const char* field, bool given, const std::vector<Optimizer::Kind>& kinds) {
    if (!given || std::count(kinds.begin(), kinds.end(), optimizer.kind()) > 0) return;
    const std::string names = absl::StrJoin(
        kinds, " and ", [](std::string* out, Optimizer::Kind kind) { out->append(Optimizer::Kind_Name(kind)); });
    const bool one = kinds.size() == 1;
    faults->Add(absl::StrCat(where, ".", field), absl::StrCat("is for kind", one ? " " : "s ", names, " alone"),
                absl::StrCat("set ", one ? "kind: " + names : "such a kind", ", or leave it out"));
  };
  is_for("momentum", optimizer.momentum() != absent.momentum(), {Optimizer::MOMENTUM});
  is_for("nesterov", optimizer.nesterov(), {Optimizer::MOMENTUM});
  is_for("accumulator_decay", optimizer.accumulator_decay() != absent.accumulator_decay(),
         {Optimizer::ADAGRAD, Optimizer::ROWWISE_ADAGRAD});
  is_for("l1", optimizer.l1() != absent.l1(), {Optimizer::FTRL});
  is_for("l2", optimizer.l2() != absent.l2(), {Optimizer::FTRL});
  is_for("beta", optimizer.beta() != absent.beta(), {Optimizer::FTRL});
  if (optimizer.weight_decay() > 0 && optimizer.kind() == Optimizer::FTRL) {
    faults->Add(where + ".weight_decay", "is not for kind FTRL", "set l2, or leave it out");
  }
}

void CheckOptimizer(const Optimizer& optimizer, const std::string& where, Faults* faults) {
  faults->Range(where + ".learning_rate", optimizer.learning_rate(), 0, 1e6);
  faults->Range(where + ".initial_accumulator", optimizer.initial_accumulator(), 0, 1e30);
  faults->Range(where + ".epsilon", optimizer.epsilon(), 0, 1);
  faults->Range(where + ".beta1", optimizer.beta1(), 0, 0.9999999);
  faults->Range(where + ".beta2", optimizer.beta2(), 0, 0.9999999);
  CheckSchedule(optimizer.schedule(), where + ".schedule", faults);
  faults->Range(where + ".momentum", optimizer.momentum(), 0, 0.9999999);
  faults->Range(where + ".accumulator_decay", optimizer.accumulator_decay(), 0, 1);
  faults->Range(where + ".weight_decay", optimizer.weight_decay(), 0, 1e3);
  faults->Range(where + ".clip_norm", optimizer.clip_norm(), 0, 1e30);
  faults->Range(where + ".l1", optimizer.l1(), 0, 1e6);
  faults->Range(where + ".l2", optimizer.l2(), 0, 1e6);
  faults->Range(where + ".beta", optimizer.beta(), 0, 1e6);
  CheckKindsFields(optimizer, where, faults);
}

void CheckTable(const Table& table, const std::string& where, uint32_t shards, Faults* faults) {
  faults->Range(where + ".dim", table.dim(), 1, 4096);
  faults->Range(where + ".init_uniform", table.init_uniform(), 0, 1e6);
  faults->Range(where + ".memory_rows_max", static_cast<double>(table.memory_rows_max()), 1, 4e9);
  faults->Range(where + ".admission.count_min", table.admission().count_min(), 1, 1e9);
  CheckOptimizer(table.optimizer(), where + ".optimizer", faults);
  faults->Range(where + ".expire_after_steps", table.expire_after_steps(), 0, 0x7fffffff);
  faults->Range(where + ".expire_after_hours", table.expire_after_hours(), 0, kHoursMax);
  if (table.expire_after_steps() > 0 && table.expire_after_hours() > 0) {
    faults->Add(where + ".expire_after_hours", "is set beside expire_after_steps",
                "give one of them: rows expire by one rule");
  }
  if (table.admission().counter() == Admission::BLOOM) {
    faults->Range(where + ".admission.bloom_counters", static_cast<double>(table.admission().bloom_counters()), 64,
                  4e9);
    const uint32_t generations = table.expire_after_steps() > 0 || table.expire_after_hours() > 0 ? 2 : 1;
    if (table.admission().bloom_counters() > kBloomCountersMax / generations / std::max<uint32_t>(1, shards)) {
      faults->Add(where + ".admission.bloom_counters",
                  absl::StrCat("is ", table.admission().bloom_counters(), " in each of ", shards, " training.shards",
                               generations > 1 ? ", twice where rows expire" : ""),
                  absl::StrCat("give fewer: at most ", kBloomCountersMax, " counters in all"));
    }
    faults->Range(where + ".admission.bloom_hashes", table.admission().bloom_hashes(), 1, 16);
  }
}

// A log without times would let no row of the table expire, or those of the others too late.
void CheckTimes(const Job& job, Faults* faults) {
  const auto by_time = std::find_if(job.table().begin(), job.table().end(),
                                    [](const Table& table) { return table.expire_after_hours() > 0; });
  if (by_time == job.table().end()) return;
  for (int i = 0; i < job.log_size(); ++i) {
    if (!job.log(i).time_ms().empty()) continue;
    faults->Add(absl::StrCat("log[", i, "].time_ms"),
                absl::StrCat("is empty, and table \"", by_time->name(), "\" has expire_after_hours"),
                "give the records' time, such as the name of a column that counts milliseconds since 1970");
  }
}

void CheckSlots(const Job& job, const std::set<std::string>& tables, Faults* faults) {
  for (int i = 0; i < job.slot_size(); ++i) {
    const Slot& slot = job.slot(i);
    const std::string where = absl::StrCat("slot[", i, "] \"", slot.name(), "\"");
    if (!tables.count(slot.table())) {
      faults->Add(where + ".table", absl::StrCat("there is no table \"", slot.table(), "\""),
                  absl::StrCat("give one of ", absl::StrJoin(tables, ", ")));
    }
    if (slot.kind() == Slot::LIST && slot.separator().size() != 1) {
      faults->Add(where + ".separator", absl::StrCat("is \"", slot.separator(), "\""), "give one character");
    }
    faults->Range(where + ".values_max", slot.values_max(), 1, 100000);
    if (!slot.salt().empty() && slot.hash() != Slot::SALTED) {
      faults->Add(where + ".salt", "is for hash SALTED alone", "leave it out, or set hash: SALTED");
    }
    CheckExpression(where + ".value", slot.value(), faults);
    for (int k = 1; k < slot.boundary_size(); ++k) {
      if (!(slot.boundary(k - 1) < slot.boundary(k))) {
        faults->Add(where + ".boundary", "is not ascending", "sort it, without repeats");
        break;
      }
    }
    if (slot.kind() != Slot::BUCKET && slot.boundary_size() > 0) {
      faults->Add(where + ".boundary", "is for kind BUCKET alone", "set kind: BUCKET, or leave boundary out");
    }
  }
}

void CheckTasks(const Job& job, Faults* faults) {
  if (job.task().empty()) faults->Add("task", "is empty", "give at least one task");
  for (int i = 0; i < job.task_size(); ++i) {
    const Task& task = job.task(i);
    const std::string where = absl::StrCat("task[", i, "] \"", task.name(), "\"");
    if (task.label().empty()) faults->Add(where + ".label", "is empty", "give an expression over the log's columns");
    CheckExpression(where + ".label", task.label(), faults);
    CheckExpression(where + ".mask", task.mask(), faults);
    if (task.category().empty()) faults->Add(where + ".category", "is empty", "name HoME's group of this task");
    faults->Range(where + ".weight", task.weight(), 0, 1e6);
    if (task.has_base_rate() && !(task.base_rate() > 0 && task.base_rate() < 1)) {
      faults->Add(where + ".base_rate", absl::StrCat("is ", task.base_rate()), "give a value inside (0, 1)");
    }
  }
}

void CheckModel(const Model& model, Faults* faults) {
  const std::pair<const char*, uint32_t> sizes[] = {{"shared_experts_1", model.shared_experts_1()},
                                                    {"category_experts_1", model.category_experts_1()},
                                                    {"shared_experts_2", model.shared_experts_2()},
                                                    {"category_experts_2", model.category_experts_2()},
                                                    {"task_experts_2", model.task_experts_2()},
                                                    {"hidden_1", model.hidden_1()},
                                                    {"hidden_2", model.hidden_2()},
                                                    {"width_1", model.width_1()},
                                                    {"width_2", model.width_2()},
                                                    {"gate_subspaces", model.gate_subspaces()},
                                                    {"gate_rank_1", model.gate_rank_1()},
                                                    {"gate_rank_2", model.gate_rank_2()},
                                                    {"tower_hidden", model.tower_hidden()},
                                                    {"experts", model.experts()}};
  for (const auto& [name, value] : sizes) faults->Range(absl::StrCat("model.", name), value, 1, 65536);
  faults->Range("model.batch_norm_momentum", model.batch_norm_momentum(), 0, 1);
  faults->Range("model.batch_norm_window_records", static_cast<double>(model.batch_norm_window_records()), 1, 1e12);
  faults->Range("model.batch_norm_epsilon", model.batch_norm_epsilon(), 1e-12, 1);
}

// Why the model has no parameters that the group matches; empty where it has.
std::string WhyNothingMatches(DenseOptimizer::Group::Match match, const Model& model) {
  if (match == DenseOptimizer::Group::GATES && model.kind() == Model::SHARED_BOTTOM) {
    return "matches nothing: model.kind SHARED_BOTTOM has no gates";
  }
  const bool batch_norm = model.kind() == Model::HOME || model.home_expert();
  if (match == DenseOptimizer::Group::BATCH_NORM && !batch_norm) {
    return absl::StrCat("matches nothing: model.kind ", Model::Kind_Name(model.kind()),
                        " has no BatchNorm without home_expert");
  }
  return "";
}

void CheckGroups(const DenseOptimizer& optimizer, const Model& model, const std::string& where, Faults* faults) {
  std::set<DenseOptimizer::Group::Match> matched;
  for (int i = 0; i < optimizer.group_size(); ++i) {
    const DenseOptimizer::Group& group = optimizer.group(i);
    const std::string at = absl::StrCat(where, ".group[", i, "]");
    const std::string name = DenseOptimizer::Group::Match_Name(group.match());
    faults->Range(at + ".learning_rate_factor", group.learning_rate_factor(), 0, 1e6);
    faults->Range(at + ".weight_decay", group.weight_decay(), 0, 1e3);
    if (!group.has_match()) {
      faults->Add(at + ".match", "is absent", "give one of GATES, EXPERTS, TOWERS, BATCH_NORM");
      continue;
    }
    if (!matched.insert(group.match()).second) {
      faults->Add(at + ".match", absl::StrCat(name, " is taken"), "give each kind of parameter one group");
    }
    const std::string why = WhyNothingMatches(group.match(), model);
    if (!why.empty()) faults->Add(at + ".match", absl::StrCat(name, " ", why), "leave the group out");
    if (group.weight_decay() > 0 && group.match() == DenseOptimizer::Group::BATCH_NORM) {
      faults->Add(at + ".weight_decay", "matrices alone decay, and BATCH_NORM has none", "leave it out");
    } else if (group.weight_decay() > 0 && optimizer.kind() != DenseOptimizer::ADAMW) {
      faults->Add(at + ".weight_decay", "is for kind ADAMW alone", "set kind: ADAMW, or leave it out");
    }
  }
}

void CheckDenseOptimizer(const DenseOptimizer& optimizer, const Model& model, Faults* faults) {
  const std::string where = "training.dense_optimizer";
  faults->Range(where + ".learning_rate", optimizer.learning_rate(), 0, 1e6);
  faults->Range(where + ".beta1", optimizer.beta1(), 0, 0.9999999);
  faults->Range(where + ".beta2", optimizer.beta2(), 0, 0.9999999);
  faults->Range(where + ".epsilon", optimizer.epsilon(), 0, 1);
  CheckSchedule(optimizer.schedule(), where + ".schedule", faults);
  faults->Range(where + ".weight_decay", optimizer.weight_decay(), 0, 1e3);
  if (optimizer.weight_decay() > 0 && optimizer.kind() != DenseOptimizer::ADAMW) {
    faults->Add(where + ".weight_decay", "is for kind ADAMW alone", "set kind: ADAMW, or leave it out");
  }
  CheckGroups(optimizer, model, where, faults);
  faults->Range(where + ".ema_decay", optimizer.ema_decay(), 0, 0.9999999);
  if (optimizer.ema_serves() && optimizer.ema_decay() == 0) {
    faults->Add(where + ".ema_serves", "there is no mean of the weights", "set ema_decay, or leave it out");
  }
}

void CheckTraining(const Job& job, Faults* faults) {
  const Training& training = job.training();
  faults->Range("training.batch_size", training.batch_size(), 1, 1 << 24);
  if (training.has_lanes()) {
    faults->Range("training.lanes", training.lanes(), 1, 4096);
    if (training.lanes() > training.batch_size()) {
      faults->Add("training.lanes", absl::StrCat("is ", training.lanes(), " with batch_size ", training.batch_size()),
                  "give each lane at least one record");
    }
    for (int i = 0; i < job.log_size(); ++i) {
      if (job.log(i).has_batch_size() && job.log(i).batch_size() < training.lanes()) {
        faults->Add(absl::StrCat("log[", i, "].batch_size"),
                    absl::StrCat("is ", job.log(i).batch_size(), " with ", training.lanes(), " lanes"),
                    "give each lane at least one record");
      }
    }
  }
  faults->Range("training.staleness", training.staleness(), 0, 64);
  faults->Range("training.epochs", training.epochs(), 1, 1e6);
  faults->Range("training.threads", training.threads(), 1, 1024);
  faults->Range("training.shards", training.shards(), 1, 1 << 20);
  faults->Range("training.read_ahead_batches_max", training.read_ahead_batches_max(), 1, kReadAheadBatchesMax);
  faults->Range("training.clip_norm", training.clip_norm(), 0, 1e30);
  CheckDenseOptimizer(training.dense_optimizer(), job.model(), faults);
  for (int i = 0; i < job.log_size(); ++i) {
    if (training.epochs() > 1 && !job.log(i).directory().empty()) {
      faults->Add("training.epochs", absl::StrCat("is ", training.epochs(), " and log[", i, "] is a stream"),
                  "a stream has one epoch");
    }
  }
}

// What names a figure of an evaluation. Null where there is no such split.
const Split* CheckFigure(const Job& job, const std::string& where, const std::string& split, const std::string& task,
                         Quality::Metric metric, Faults* faults) {
  const auto found =
      std::find_if(job.split().begin(), job.split().end(), [&](const Split& one) { return one.name() == split; });
  if (found == job.split().end()) {
    faults->Add(where + ".split", absl::StrCat("there is no split \"", split, "\""), "name one of the job's splits");
    return nullptr;
  }
  const bool known = task.empty() || std::any_of(job.task().begin(), job.task().end(),
                                                 [&](const Task& one) { return one.name() == task; });
  if (!known) {
    faults->Add(where + ".task", absl::StrCat("there is no task \"", task, "\""),
                "name one of the job's tasks, or leave it out for the mean over all");
  }
  if (metric == Quality::GAUC && found->user().empty()) {
    faults->Add(where + ".metric", absl::StrCat("is GAUC, and split \"", split, "\" has no user"),
                "give the split its user, or choose AUC");
  }
  if (metric == Quality::CALIBRATION && task.empty()) {
    faults->Add(where + ".metric", "is CALIBRATION of all tasks, whose errors would cancel each other",
                "name a task, or choose LOG_LOSS");
  }
  return &*found;
}

void CheckBest(const Job& job, Faults* faults) {
  const Best& best = job.snapshot().best();
  if (HasBest(job)) CheckFigure(job, "snapshot.best", best.split(), best.task(), best.metric(), faults);
  if (!HasBest(job) && best.has_task()) faults->Add("snapshot.best.split", "is absent", "name one of the job's splits");
  if (!HasBest(job) && job.training().stop_after_no_gain() > 0) {
    faults->Add("training.stop_after_no_gain", "there is no figure to gain",
                "give snapshot.best its split, or leave it out");
  }
}

void CheckRequirements(const Job& job, Faults* faults) {
  for (int i = 0; i < job.export_().require_size(); ++i) {
    const Requirement& one = job.export_().require(i);
    const std::string where = absl::StrCat("export.require[", i, "]");
    if (job.export_().delta_every_steps() == 0) {
      faults->Add(where, "the run publishes nothing", "set export.delta_every_steps, or leave it out");
    }
    if (!one.has_min() && !one.has_max()) faults->Add(where, "has no bound", "give min, max or both");
    if (one.has_min() && one.has_max() && one.min() > one.max()) {
      faults->Add(where, absl::StrCat("min ", one.min(), " is above max ", one.max()), "nothing would be published");
    }
    const Split* const split = CheckFigure(job, where, one.split(), one.task(), one.metric(), faults);
    if (split == nullptr) continue;
    const uint32_t every_steps = split->every_steps();
    if (every_steps == 0 || job.export_().delta_every_steps() % every_steps != 0) {
      faults->Add(where + ".split",
                  absl::StrCat("\"", one.split(), "\" is evaluated every ", every_steps, " steps, published is every ",
                               job.export_().delta_every_steps()),
                  "give it an every_steps of which export.delta_every_steps is a multiple");
    }
  }
}

void CheckExport(const Job& job, Faults* faults) {
  const Export& config = job.export_();
  const uint32_t every_steps = std::max<uint32_t>(1, job.snapshot().every_steps());
  if (config.delta_every_steps() % every_steps != 0) {
    faults->Add("export.delta_every_steps", absl::StrCat("is ", config.delta_every_steps()),
                absl::StrCat("give a multiple of snapshot.every_steps = ", every_steps, ", or 0 for none"));
  }
  bool rows = false;
  for (const absl::string_view name : absl::StrSplit(config.format(), ',')) {
    const bool has_rows = name == "all" || name == "hps" || name == "npy" || name == "int8";
    rows |= has_rows;
    if (!has_rows && name != "onnx" && name != "triton" && name != "safetensors") {
      faults->Add("export.format", absl::StrCat("there is no \"", name, "\""),
                  "give all, or some of onnx,triton,hps,npy,safetensors,int8");
    }
  }
  if (!rows) faults->Add("export.format", "has no rows for deltas to change", "add hps or npy");
  CheckRequirements(job, faults);
  faults->Range("export.deltas_max", config.deltas_max(), 1, kDeltasMax);
  faults->Range("export.waiting_max", config.waiting_max(), 1, 1e6);
}

}  // namespace

absl::StatusOr<Job> ParseJob(const std::string& text, const std::string& name_for_errors) {
  ErrorList errors(name_for_errors);
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  Job job;
  if (!parser.ParseFromString(text, &job) || !errors.errors().empty()) {
    return absl::InvalidArgumentError(absl::StrJoin(errors.errors(), "\n"));
  }
  return job;
}

absl::StatusOr<Job> LoadJob(const std::string& path, const std::vector<std::string>& overrides) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kJobBytesMax));
  HEARTH_ASSIGN_OR_RETURN(Job job, ParseJob(text, path));
  std::error_code ignored;
  const std::filesystem::path folder = std::filesystem::absolute(path, ignored).parent_path();
  job.set_data_dir((folder / job.data_dir()).lexically_normal().string());
  std::vector<std::string> faults;
  for (const std::string& override : overrides) {
    const absl::Status status = ApplyOverride(override, &job);
    if (!status.ok()) faults.push_back(std::string(status.message()));
  }
  if (!faults.empty()) return absl::InvalidArgumentError(absl::StrJoin(faults, "\n"));
  return job;
}

std::vector<std::string> FaultsOf(const Job& job) {
  Faults faults;
  CheckUtf8(job, "", &faults);
  const std::set<std::string> tables = faults.Names("table", job.table());
  const std::set<std::string> tasks = faults.Names("task", job.task());
  const std::set<std::string> side_tables = faults.Names("side_table", job.side_table());
  faults.Names("slot", job.slot());
  faults.Names("dense", job.dense());
  faults.Names("log", job.log());
  faults.Names("split", job.split());

  if (job.log().empty()) faults.Add("log", "is empty", "give at least one log to train on");
  for (int i = 0; i < job.log_size(); ++i) {
    CheckLog(job.log(i), absl::StrCat("log[", i, "]"), side_tables, tasks, false, &faults);
  }
  for (int i = 0; i < job.split_size(); ++i) {
    CheckLog(job.split(i).log(), absl::StrCat("split[", i, "].log"), side_tables, tasks, true, &faults);
    faults.Range(absl::StrCat("split[", i, "].batch_size"), job.split(i).batch_size(), 1, 1 << 24);
    faults.Range(absl::StrCat("split[", i, "].records_max"), static_cast<double>(job.split(i).records_max()), 1, 1e12);
    const uint32_t every_steps = std::max<uint32_t>(1, job.snapshot().every_steps());
    if (job.split(i).every_steps() % every_steps != 0) {
      faults.Add(absl::StrCat("split[", i, "].every_steps"), absl::StrCat("is ", job.split(i).every_steps()),
                 absl::StrCat("give a multiple of snapshot.every_steps = ", every_steps, ", or 0 for none"));
    }
  }
  for (int i = 0; i < job.side_table_size(); ++i) {
    if (job.side_table(i).path().empty())
      faults.Add(absl::StrCat("side_table[", i, "].path"), "is empty", "name a file");
    CheckDelimiter(job.side_table(i).delimiter(), absl::StrCat("side_table[", i, "]"), &faults);
    if (job.side_table(i).key().empty())
      faults.Add(absl::StrCat("side_table[", i, "].key"), "is empty", "name a column");
  }
  if (job.slot().empty() && job.dense().empty())
    faults.Add("slot", "there is no slot and no dense feature", "give some");
  if (job.table_size() > 4095) faults.Add("table", absl::StrCat("there are ", job.table_size()), "at most 4095");
  for (int i = 0; i < job.table_size(); ++i) {
    CheckTable(job.table(i), absl::StrCat("table[", i, "] \"", job.table(i).name(), "\""), job.training().shards(),
               &faults);
  }
  CheckTimes(job, &faults);
  CheckTasks(job, &faults);
  CheckSlots(job, tables, &faults);
  for (int i = 0; i < job.dense_size(); ++i) {
    CheckExpression(absl::StrCat("dense[", i, "].value"), job.dense(i).value(), &faults);
    if (job.dense(i).transform() == DenseFeature::STANDARD && !(job.dense(i).deviation() > 0)) {
      faults.Add(absl::StrCat("dense[", i, "].deviation"), absl::StrCat("is ", job.dense(i).deviation()),
                 "give one above 0");
    }
  }
  CheckModel(job.model(), &faults);
  CheckTraining(job, &faults);
  faults.Range("snapshot.every_steps", job.snapshot().every_steps(), 1, 4e9);
  faults.Range("snapshot.keep", job.snapshot().keep(), 1, 1e6);
  CheckBest(job, &faults);
  CheckExport(job, &faults);
  faults.Range("store.read_threads", job.store().read_threads(), 0, 256);
  faults.Range("store.compaction_threads", job.store().compaction_threads(), 0, 256);
  faults.Range("store.memory_bytes_max", static_cast<double>(job.store().memory_bytes_max()), 0, 1e18);
  faults.Range("limits.bad_records_max_fraction", job.limits().bad_records_max_fraction(), 0, 1);
  faults.Range("limits.record_bytes_max", job.limits().record_bytes_max(), 16, 1 << 30);
  faults.Range("limits.spool_bytes_max", static_cast<double>(job.limits().spool_bytes_max()), 1, 1e18);
  faults.Range("metrics.prometheus_port", job.metrics().prometheus_port(), 0, 65535);
  faults.Range("metrics.progress_seconds", job.metrics().progress_seconds(), 0.01, 1e6);
  faults.Range("metrics.validation_window_records", static_cast<double>(job.metrics().validation_window_records()), 0,
               1e15);
  faults.Range("metrics.profile.steps", job.metrics().profile().steps(), 0, 1000);
  return faults.Take();
}

absl::Status ValidateJob(const Job& job) {
  const std::vector<std::string> faults = FaultsOf(job);
  if (faults.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(faults, "\n"));
}

bool TooManyBadRecords(const Limits& limits, uint64_t bad, uint64_t read) {
  return bad >= std::max<uint64_t>(1, limits.bad_records_min()) &&
         static_cast<double>(bad) > limits.bad_records_max_fraction() * static_cast<double>(read);
}

Job WithDefaults(Job job) {
  WriteDefaults(&job);
  return job;
}

std::string PrintJob(const Job& job) {
  std::string text;
  TextFormat::PrintToString(WithDefaults(job), &text);
  return text;
}

const std::string& SaltText(const Slot& slot) { return slot.salt().empty() ? slot.name() : slot.salt(); }

std::string ResolvePath(const Job& job, const std::string& path) { return JoinPath(job.data_dir(), path); }

}  // namespace hearth
