#include "scripts/hearth/generate.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/output_file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "scripts/hearth/hidden_model.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kSpecBytesMax = 1 << 20;
constexpr uint64_t kSchemaBytesMax = 16 << 20;
constexpr char kGenerator[] = "hearth generate";  // schema.json of a folder of ours says so
constexpr uint64_t kIdsMax = uint64_t{1} << 50;   // a raw id has 52 bits
constexpr uint64_t kTableIdsMax = 50000000;       // a job's side table holds so many rows
constexpr uint64_t kRecordsMax = 100000000000;
constexpr uint64_t kTestRecordsMax = 50000000;  // their probabilities are held in memory
constexpr uint64_t kMsOfDay = 86400000;
constexpr uint64_t kStartMs = 1704067200000;        // 2024-01-01 00:00 UTC
constexpr uint32_t kProbabilityScale = 1000000000;  // bayes.tsv has nine decimals

// --- the spec ---

class SpecErrors : public google::protobuf::io::ErrorCollector {
 public:
  explicit SpecErrors(std::string path) : path_(std::move(path)) {}
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    lines.push_back(absl::StrCat(path_, ":", line + 1, ":", column + 1, ": ", message));
  }
  std::vector<std::string> lines;

 private:
  const std::string path_;
};

void CheckRange(const std::string& field, double value, double least, double most, std::vector<std::string>* faults) {
  if (value >= least && value <= most) return;
  faults->push_back(absl::StrCat(field, ": is ", value, "; give a value from ", least, " to ", most));
}

void CheckIds(const std::string& field, const Ids& ids, uint64_t count_max, std::vector<std::string>* faults) {
  if (!ids.has_count()) {
    faults->push_back(absl::StrCat(field, ".count: is absent; say how many ids there are"));
  } else {
    CheckRange(field + ".count", static_cast<double>(ids.count()), 1, static_cast<double>(count_max), faults);
  }
  CheckRange(field + ".zipf", ids.zipf(), 0, 5, faults);
}

bool IsPlainName(const std::string& name) {
  return !name.empty() &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; });
}

// A column that an expression can name.
bool IsColumnName(const std::string& name) {
  return IsPlainName(name) && !std::isdigit(static_cast<unsigned char>(name[0]));
}

std::string Dump(const Json& json) { return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n"; }

// --- columns ---

struct Column {
  const char* name;
  const char* type;
  const char* meaning;
};
constexpr Column kLogColumns[] = {{"user_id", "id", "who"},
                                  {"video_id", "id", "what was shown"},
                                  {"day", "integer", "1 is the first day of the training log"},
                                  {"hour", "integer", "0 .. 23"},
                                  {"time_ms", "integer", "milliseconds since 1970; never falls"},
                                  {"tab", "category", "the scene, from 0"},
                                  {"position", "number", "place in the feed, 1 .. 20"}};
constexpr Column kUserColumns[] = {{"activity", "category", "0 .. 4"},
                                   {"age", "category", "1 .. 7; empty where unknown"},
                                   {"register_days", "number", "days since the user joined"}};
constexpr Column kVideoColumns[] = {{"author_id", "id", "who made the video"},
                                    {"tag", "list of ids", "comma-separated inside quotes; may be empty"},
                                    {"video_type", "category", "0 .. 3"},
                                    {"duration_ms", "number", "length of the video"}};

void AppendUser(const UserAttributes& user, std::string* line) {
  absl::StrAppend(line, user.activity, ",");
  if (user.age != 0) absl::StrAppend(line, user.age);
  absl::StrAppend(line, ",", user.register_days);
}
void AppendVideo(const VideoAttributes& video, std::string* line) {
  absl::StrAppend(line, video.author, ",");
  if (video.tags.size() > 1) line->push_back('"');
  for (size_t i = 0; i < video.tags.size(); ++i) absl::StrAppend(line, i ? "," : "", video.tags[i]);
  if (video.tags.size() > 1) line->push_back('"');
  absl::StrAppend(line, ",", video.type, ",", video.duration_ms);
}

template <size_t n>
std::string Names(const Column (&columns)[n]) {
  return absl::StrJoin(columns, ",", [](std::string* out, const Column& column) { out->append(column.name); });
}

std::string Extension(const GeneratorSpec& spec) {
  return spec.compression() == GeneratorSpec::ZSTD ? ".csv.zst" : ".csv";
}
uint64_t Parts(const GeneratorSpec& spec) { return (spec.records() + spec.part_records() - 1) / spec.part_records(); }
std::string PartName(const GeneratorSpec& spec, uint64_t part) {
  return absl::StrFormat("train/part-%04d%s", part, Extension(spec));
}

// --- the true probabilities' own figures ---

// Entries are q << 1 | label, q the probability in units of 1e-9. Ties count one half. Sorts its argument.
std::optional<double> AucOf(std::vector<uint32_t>* entries) {
  std::sort(entries->begin(), entries->end());
  double positives = 0, negatives = 0, wins = 0;
  for (size_t i = 0; i < entries->size();) {
    double tied[2] = {0, 0};
    const uint32_t q = (*entries)[i] >> 1;
    for (; i < entries->size() && (*entries)[i] >> 1 == q; ++i) ++tied[(*entries)[i] & 1];
    wins += tied[1] * (negatives + tied[0] / 2);
    positives += tied[1];
    negatives += tied[0];
  }
  if (positives == 0 || negatives == 0) return std::nullopt;
  return wins / (positives * negatives);
}

struct TaskTruth {
  uint64_t train_positives = 0;
  std::vector<uint32_t> test;  // q << 1 | label
};

Json NumberOrNull(std::optional<double> value) { return value ? Json(*value) : Json(nullptr); }

Json TruthFigures(const GeneratorTask& task, uint64_t train_records, TaskTruth* truth,
                  const std::vector<uint64_t>& users, const std::vector<uint32_t>& by_user) {
  double log_loss = 0, weighted = 0, weight = 0;
  uint64_t positives = 0, gauc_users = 0;
  for (const uint32_t entry : truth->test) {
    const double p = std::min(std::max((entry >> 1) * 1e-9, 1e-9), 1 - 1e-9);
    log_loss -= PortableLog(entry & 1 ? p : 1 - p);
    positives += entry & 1;
  }
  std::vector<uint32_t> group;
  for (size_t i = 0; i < by_user.size();) {
    group.clear();
    const uint64_t user = users[by_user[i]];
    for (; i < by_user.size() && users[by_user[i]] == user; ++i) group.push_back(truth->test[by_user[i]]);
    const std::optional<double> auc = AucOf(&group);
    if (!auc) continue;
    ++gauc_users;
    weighted += *auc * static_cast<double>(group.size());
    weight += static_cast<double>(group.size());
  }
  const double samples = static_cast<double>(truth->test.size());
  Json figures;
  figures["category"] = task.category();
  figures["rate_requested"] = task.positive_rate();
  figures["rate_train"] = static_cast<double>(truth->train_positives) / static_cast<double>(train_records);
  figures["rate_test"] = samples > 0 ? Json(static_cast<double>(positives) / samples) : Json(nullptr);
  figures["samples"] = truth->test.size();
  figures["positives"] = positives;
  figures["auc"] = NumberOrNull(AucOf(&truth->test));
  figures["gauc"] = weight > 0 ? Json(weighted / weight) : Json(nullptr);
  figures["gauc_users"] = gauc_users;
  figures["log_loss"] = samples > 0 ? Json(log_loss / samples) : Json(nullptr);
  return figures;
}

// --- writing ---

class LogWriter {
 public:
  LogWriter(const GeneratorSpec& spec, const std::string& out)
      : spec_(spec),
        out_(out),
        model_(spec),
        record_seed_(SeedOf(spec.seed(), "records")),
        truth_(spec.task_size()),
        probabilities_(spec.task_size()) {}

  absl::Status WriteTables();
  absl::Status WriteTrain();
  absl::Status WriteTest();
  // bayes.json, and the table for people.
  absl::Status WriteFigures(std::string* report);
  const HiddenModel::Moments& moments() const { return model_.moments(); }

 private:
  std::string Header() const;
  // Draws record `index` of train + test and leaves its line in line_.
  void MakeRecord(uint64_t index);

  const GeneratorSpec& spec_;
  const std::string out_;
  const HiddenModel model_;
  const uint64_t record_seed_;
  std::vector<TaskTruth> truth_;
  std::vector<uint64_t> test_users_;

  // Of the record at hand.
  std::vector<double> probabilities_;  // [tasks]
  std::vector<bool> labels_;           // [tasks]
  Impression impression_;
  VideoAttributes video_;
  std::string line_;
};

std::string LogWriter::Header() const {
  std::string header = Names(kLogColumns);
  if (!spec_.side_tables()) absl::StrAppend(&header, ",", Names(kUserColumns), ",", Names(kVideoColumns));
  for (const GeneratorTask& task : spec_.task()) absl::StrAppend(&header, ",", task.name());
  return header + "\n";
}

void LogWriter::MakeRecord(uint64_t index) {
  Random random(Mix64(record_seed_ ^ Mix64(index)));
  const bool test = index >= spec_.records();
  const uint64_t place = test ? index - spec_.records() : index;
  const uint64_t count = test ? spec_.test_records() : spec_.records();
  const uint64_t span_ms = kMsOfDay * (test ? spec_.test_days() : spec_.days());
  // Each record lies inside its own slice of the span: in order, and evenly spread.
  const uint64_t since_ms = (test ? spec_.days() * kMsOfDay : 0) +
                            static_cast<uint64_t>((static_cast<double>(place) + random.Uniform()) /
                                                  static_cast<double>(count) * static_cast<double>(span_ms));
  impression_ = model_.Draw(&random, static_cast<uint32_t>(since_ms % kMsOfDay));
  const UserAttributes user = model_.User(impression_.user);
  model_.Video(impression_.video, &video_);
  model_.Probabilities(impression_, user, video_, absl::MakeSpan(probabilities_));
  line_.clear();
  absl::StrAppend(&line_, impression_.user, ",", impression_.video, ",", 1 + since_ms / kMsOfDay, ",");
  absl::StrAppend(&line_, impression_.hour, ",", kStartMs + since_ms, ",", impression_.tab, ",", impression_.position);
  if (!spec_.side_tables()) {
    line_.push_back(',');
    AppendUser(user, &line_);
    line_.push_back(',');
    AppendVideo(video_, &line_);
  }
  labels_.clear();
  for (const double p : probabilities_) {
    labels_.push_back(random.Uniform() < p);
    line_.append(labels_.back() ? ",1" : ",0");
  }
  line_.push_back('\n');
}

absl::Status LogWriter::WriteTables() {
  if (!spec_.side_tables()) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(const auto users, OutputFile::Create(JoinPath(out_, "user.csv")));
  users->Append(absl::StrCat("user_id,", Names(kUserColumns), "\n"));
  for (uint64_t id = 1; id <= spec_.user().count(); ++id) {
    line_ = absl::StrCat(id, ",");
    AppendUser(model_.User(id), &line_);
    line_.push_back('\n');
    users->Append(line_);
  }
  HEARTH_RETURN_IF_ERROR(users->Close());
  HEARTH_ASSIGN_OR_RETURN(const auto videos, OutputFile::Create(JoinPath(out_, "video.csv")));
  videos->Append(absl::StrCat("video_id,", Names(kVideoColumns), "\n"));
  for (uint64_t id = 1; id <= spec_.video().count(); ++id) {
    model_.Video(id, &video_);
    line_ = absl::StrCat(id, ",");
    AppendVideo(video_, &line_);
    line_.push_back('\n');
    videos->Append(line_);
  }
  return videos->Close();
}

absl::Status LogWriter::WriteTrain() {
  for (uint64_t part = 0; part < Parts(spec_); ++part) {
    HEARTH_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(JoinPath(out_, PartName(spec_, part))));
    file->Append(Header());
    const uint64_t end = std::min(spec_.records(), (part + 1) * spec_.part_records());
    for (uint64_t index = part * spec_.part_records(); index < end; ++index) {
      MakeRecord(index);
      file->Append(line_);
      for (size_t t = 0; t < truth_.size(); ++t) truth_[t].train_positives += labels_[t];
    }
    HEARTH_RETURN_IF_ERROR(file->Close());
  }
  return absl::OkStatus();
}

absl::Status LogWriter::WriteTest() {
  const std::string name = "test" + Extension(spec_);
  HEARTH_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(JoinPath(out_, name)));
  HEARTH_ASSIGN_OR_RETURN(const auto bayes, OutputFile::Create(JoinPath(out_, "bayes.tsv.zst")));
  std::string header = "source\toffset\tuser";
  for (const GeneratorTask& task : spec_.task()) absl::StrAppend(&header, "\tlabel_", task.name());
  for (const GeneratorTask& task : spec_.task()) absl::StrAppend(&header, "\tp_", task.name());
  bayes->Append(header + "\n");
  file->Append(Header());
  for (uint64_t index = 0; index < spec_.test_records(); ++index) {
    MakeRecord(spec_.records() + index);
    std::string truth_line = absl::StrCat(name, "\t", file->bytes(), "\t", impression_.user);
    file->Append(line_);
    for (const bool label : labels_) truth_line.append(label ? "\t1" : "\t0");
    for (size_t t = 0; t < truth_.size(); ++t) {
      const uint32_t q = static_cast<uint32_t>(probabilities_[t] * kProbabilityScale + 0.5);
      truth_[t].test.push_back(q << 1 | static_cast<uint32_t>(labels_[t]));
      char text[16];
      std::snprintf(text, sizeof(text), "\t%u.%09u", q / kProbabilityScale, q % kProbabilityScale);
      truth_line.append(text);
    }
    truth_line.push_back('\n');
    bayes->Append(truth_line);
    test_users_.push_back(impression_.user);
  }
  HEARTH_RETURN_IF_ERROR(file->Close());
  return bayes->Close();
}

absl::Status LogWriter::WriteFigures(std::string* report) {
  std::vector<uint32_t> by_user(test_users_.size());
  std::iota(by_user.begin(), by_user.end(), 0);
  std::stable_sort(by_user.begin(), by_user.end(),
                   [this](uint32_t a, uint32_t b) { return test_users_[a] < test_users_[b]; });
  Json json;
  json["schema"] = 1;
  json["seed"] = spec_.seed();
  json["records"] = {{"train", spec_.records()}, {"test", spec_.test_records()}};
  absl::StrAppendFormat(report, "%-20s %-10s %9s %9s %9s %9s %9s\n", "task", "category", "asked", "train", "test",
                        "AUC", "GAUC");
  for (int t = 0; t < spec_.task_size(); ++t) {
    const GeneratorTask& task = spec_.task(t);
    const Json figures = TruthFigures(task, spec_.records(), &truth_[t], test_users_, by_user);
    const auto text = [&figures](const char* key) {
      return figures[key].is_null() ? std::string("-") : absl::StrFormat("%.5f", figures[key].get<double>());
    };
    absl::StrAppendFormat(report, "%-20s %-10s %9s %9s %9s %9s %9s\n", task.name(), task.category(),
                          text("rate_requested"), text("rate_train"), text("rate_test"), text("auc"), text("gauc"));
    json["tasks"][task.name()] = figures;
  }
  absl::StrAppend(report,
                  "AUC and GAUC: of the true probabilities on the test log; no model can be expected to do better.\n");
  return WriteFileAtomically(JoinPath(out_, "bayes.json"), Dump(json));
}

template <size_t n>
void DescribeColumns(const Column (&columns)[n], Json* list) {
  for (const Column& column : columns) {
    list->push_back({{"name", column.name}, {"type", column.type}, {"meaning", column.meaning}});
  }
}

Json DescribeSchema(const GeneratorSpec& spec) {
  Json log = Json::array(), user = Json::array(), video = Json::array();
  DescribeColumns(kLogColumns, &log);
  if (spec.side_tables()) {
    user.push_back({{"name", "user_id"}, {"type", "id"}, {"meaning", "key"}});
    video.push_back({{"name", "video_id"}, {"type", "id"}, {"meaning", "key"}});
  }
  DescribeColumns(kUserColumns, spec.side_tables() ? &user : &log);
  DescribeColumns(kVideoColumns, spec.side_tables() ? &video : &log);
  for (const GeneratorTask& task : spec.task()) {
    log.push_back(
        {{"name", task.name()}, {"type", "label"}, {"meaning", "1: it happened. Category " + task.category()}});
  }
  Json train = Json::array();
  for (uint64_t part = 0; part < Parts(spec); ++part) train.push_back(PartName(spec, part));
  Json schema;
  schema["schema"] = 1;
  schema["generator"] = kGenerator;
  schema["name"] = spec.name();
  schema["seed"] = spec.seed();
  schema["format"] = "CSV with a header line; fields with a comma are quoted; lines end with \\n";
  schema["files"] = {{"train", train}, {"test", "test" + Extension(spec)}, {"bayes", "bayes.tsv.zst"}};
  schema["log"] = log;
  if (spec.side_tables()) {
    schema["user.csv"] = user;
    schema["video.csv"] = video;
  }
  return schema;
}

// --- the job ---

void AddSlot(const std::string& name, const std::string& table, Slot::Kind kind, Slot::Hash hash, Job* job) {
  Slot* slot = job->add_slot();
  slot->set_name(name);
  slot->set_table(table);
  slot->set_kind(kind);
  slot->set_hash(hash);
}

void AddTable(const std::string& name, uint32_t dim, uint64_t memory_rows_max, Job* job) {
  Table* table = job->add_table();
  table->set_name(name);
  table->set_dim(dim);
  table->set_memory_rows_max(memory_rows_max);
  table->mutable_optimizer()->set_kind(Optimizer::ADAGRAD);
}

void AddStandardDense(const std::string& name, double mean, double deviation, Job* job) {
  DenseFeature* dense = job->add_dense();
  dense->set_name(name);
  dense->set_transform(DenseFeature::STANDARD);
  dense->set_mean(std::round(mean));
  dense->set_deviation(std::max(1.0, std::round(deviation)));
}

void AddFeatures(const HiddenModel::Moments& moments, uint64_t memory_rows_max, Job* job) {
  for (const char* name : {"user", "video", "author", "tag"}) AddTable(name, 16, memory_rows_max, job);
  AddTable("context", 8, memory_rows_max, job);
  AddSlot("user_id", "user", Slot::ID, Slot::RAW, job);
  AddSlot("video_id", "video", Slot::ID, Slot::RAW, job);
  AddSlot("author_id", "author", Slot::ID, Slot::RAW, job);
  AddSlot("tag", "tag", Slot::LIST, Slot::RAW, job);
  job->mutable_slot(job->slot_size() - 1)->set_pooling(Slot::MEAN);
  for (const char* name : {"tab", "hour", "activity", "age", "video_type"}) {
    AddSlot(name, "context", Slot::ID, Slot::SALTED, job);
  }
  AddSlot("position", "context", Slot::BUCKET, Slot::SALTED, job);
  for (const double boundary : {3, 6, 10, 15}) job->mutable_slot(job->slot_size() - 1)->add_boundary(boundary);
  AddSlot("duration_bucket", "context", Slot::BUCKET, Slot::SALTED, job);
  job->mutable_slot(job->slot_size() - 1)->set_column("duration_ms");
  for (const double boundary : {5000, 8000, 12000, 16000, 20000, 27000, 40000, 70000}) {
    job->mutable_slot(job->slot_size() - 1)->add_boundary(boundary);
  }
  AddStandardDense("duration_ms", moments.duration_mean, moments.duration_deviation, job);
  AddStandardDense("register_days", moments.register_days_mean, moments.register_days_deviation, job);
}

void AddSideTable(const std::string& name, Log* train, Log* test, Job* job) {
  SideTable* table = job->add_side_table();
  table->set_name(name);
  table->set_path(name + ".csv");
  table->set_key(name + "_id");
  train->add_join(name);
  test->add_join(name);
}

Job MakeJob(const GeneratorSpec& spec, const HiddenModel::Moments& moments) {
  Job job;
  job.set_name(spec.name());
  job.set_seed(spec.seed());
  Log* train = job.add_log();
  train->set_name("train");
  for (uint64_t part = 0; part < Parts(spec); ++part) train->add_path(PartName(spec, part));
  train->set_piece_bytes(1 << 20);
  Split* split = job.add_split();
  split->set_name("test");
  split->set_predictions(true);
  split->set_user("user_id");
  Log* test = split->mutable_log();
  test->set_name("test");
  test->add_path("test" + Extension(spec));
  if (spec.side_tables()) {
    AddSideTable("user", train, test, &job);
    AddSideTable("video", train, test, &job);
  }
  for (const GeneratorTask& task : spec.task()) {
    Task* of_job = job.add_task();
    of_job->set_name(task.name());
    of_job->set_category(task.category());
    of_job->set_label(task.name());
    of_job->set_base_rate(task.positive_rate());
  }
  AddFeatures(moments, spec.memory_rows_max(), &job);
  job.mutable_model()->set_kind(Model::HOME);
  job.mutable_training()->set_batch_size(1024);
  job.MergeFrom(spec.job());
  if (!job.snapshot().has_every_steps()) {
    const uint64_t steps = std::max<uint64_t>(1, spec.records() / job.training().batch_size());
    job.mutable_snapshot()->set_every_steps(static_cast<uint32_t>(std::max<uint64_t>(1, steps / spec.snapshots())));
  }
  return job;
}

bool IsGenerated(const std::string& folder) {
  const absl::StatusOr<std::string> text = ReadFile(JoinPath(folder, "schema.json"), kSchemaBytesMax);
  if (!text.ok()) return false;
  const Json schema = Json::parse(*text, nullptr, false);
  return schema.is_object() && schema.value("generator", Json()) == kGenerator;
}

// A folder that may be written: absent, empty, or an earlier log of ours, which then goes.
absl::Status PrepareFolder(const std::string& out) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(out));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(out));
  if (!names.empty() && !IsGenerated(out)) {
    return absl::FailedPreconditionError(absl::StrCat(
        out, ": holds \"", names[0], "\", and no schema.json of hearth generate; give --out an empty or new folder"));
  }
  for (const char* name :
       {"job.txtpb", "train", "test.csv", "test.csv.zst", "bayes.tsv.zst", "bayes.json", "user.csv", "video.csv"}) {
    HEARTH_RETURN_IF_ERROR(RemoveTree(JoinPath(out, name)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GeneratorSpec> LoadGeneratorSpec(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kSpecBytesMax));
  SpecErrors errors(path);
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  GeneratorSpec spec;
  if (!parser.ParseFromString(text, &spec)) return absl::InvalidArgumentError(absl::StrJoin(errors.lines, "\n"));
  return spec;
}

std::vector<std::string> FaultsOfSpec(const GeneratorSpec& spec) {
  std::vector<std::string> faults;
  CheckRange("records", static_cast<double>(spec.records()), 1, kRecordsMax, &faults);
  CheckRange("test_records", static_cast<double>(spec.test_records()), 0, kTestRecordsMax, &faults);
  CheckRange("days", spec.days(), 1, 36500, &faults);
  CheckRange("test_days", spec.test_days(), 1, 36500, &faults);
  CheckRange("part_records", static_cast<double>(spec.part_records()), 1, kRecordsMax, &faults);
  if (spec.part_records() > 0)
    CheckRange("records / part_records", static_cast<double>(Parts(spec)), 1, 100000, &faults);
  const uint64_t ids_max = spec.side_tables() ? kTableIdsMax : kIdsMax;
  CheckIds("user", spec.user(), ids_max, &faults);
  CheckIds("video", spec.video(), ids_max, &faults);
  CheckIds("author", spec.author(), kIdsMax, &faults);
  CheckIds("tag", spec.tag(), kIdsMax, &faults);
  CheckRange("tags_max", spec.tags_max(), 0, 64, &faults);
  CheckRange("tabs", spec.tabs(), 1, 1000, &faults);
  CheckRange("factors", spec.factors(), 1, 256, &faults);
  CheckRange("logit_deviation", spec.logit_deviation(), 0, 10, &faults);
  CheckRange("interaction_share", spec.interaction_share(), 0, 1, &faults);
  CheckRange("memory_rows_max", static_cast<double>(spec.memory_rows_max()), 1, 4e9, &faults);
  CheckRange("snapshots", spec.snapshots(), 1, 1000, &faults);
  const Training& training = spec.job().training();
  CheckRange("job.training.batch_size", training.batch_size(), 1, 1 << 24, &faults);
  CheckRange("task (how many)", spec.task_size(), 1, 256, &faults);
  std::set<std::string> taken = {"user_id", "video_id"};
  for (const auto* columns : {&kLogColumns})
    for (const Column& column : *columns) taken.insert(column.name);
  for (const Column& column : kUserColumns) taken.insert(column.name);
  for (const Column& column : kVideoColumns) taken.insert(column.name);
  for (int i = 0; i < spec.task_size(); ++i) {
    const GeneratorTask& task = spec.task(i);
    const std::string where = absl::StrCat("task[", i, "]");
    if (!IsColumnName(task.name())) {
      faults.push_back(absl::StrCat(where, ".name: is \"", task.name(),
                                    "\"; begin with a letter or '_', and use letters, digits and '_'"));
    } else if (!taken.insert(task.name()).second) {
      faults.push_back(
          absl::StrCat(where, ".name: \"", task.name(), "\" is taken; names of tasks and columns are unique"));
    }
    if (!IsPlainName(task.category())) {
      faults.push_back(absl::StrCat(where, ".category: is \"", task.category(), "\"; name HoME's group of this task"));
    }
    CheckRange(where + ".positive_rate", task.positive_rate(), 1e-6, 1 - 1e-6, &faults);
  }
  return faults;
}

Job JobForSpec(const GeneratorSpec& spec) { return MakeJob(spec, HiddenModel(spec).moments()); }

absl::Status GenerateLog(GeneratorSpec spec, const std::string& out, std::string* report) {
  const std::vector<std::string> faults = FaultsOfSpec(spec);
  if (!faults.empty()) return absl::InvalidArgumentError(absl::StrJoin(faults, "\n"));
  LogWriter writer(spec, out);
  const Job job = MakeJob(spec, writer.moments());
  HEARTH_RETURN_IF_ERROR(ValidateJob(job));  // spec.job may hold anything
  HEARTH_RETURN_IF_ERROR(PrepareFolder(out));
  // The schema first: from now on the folder is known to be ours, wherever this ends.
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(out, "schema.json"), Dump(DescribeSchema(spec))));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(out, "train")));
  HEARTH_RETURN_IF_ERROR(writer.WriteTables());
  HEARTH_RETURN_IF_ERROR(writer.WriteTrain());
  HEARTH_RETURN_IF_ERROR(writer.WriteTest());
  HEARTH_RETURN_IF_ERROR(writer.WriteFigures(report));
  std::string text = "# Made by `hearth generate`; paths are relative to this file.\n";
  std::string body;
  google::protobuf::TextFormat::PrintToString(job, &body);
  return WriteFileAtomically(JoinPath(out, "job.txtpb"), text + body);
}

absl::Status Generate(const GenerateOptions& options, std::string* report) {
  HEARTH_ASSIGN_OR_RETURN(GeneratorSpec spec, LoadGeneratorSpec(options.spec_path));
  if (options.seed) spec.set_seed(*options.seed);
  if (options.records && spec.records() > 0) {
    const double scale = static_cast<double>(*options.records) / static_cast<double>(spec.records());
    spec.set_test_records(static_cast<uint64_t>(std::round(static_cast<double>(spec.test_records()) * scale)));
    spec.set_records(*options.records);
  }
  return Annotate(GenerateLog(spec, options.out, report), options.spec_path);
}

}  // namespace hearth
