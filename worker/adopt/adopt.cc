#include "worker/adopt/adopt.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/artifact/bundle.h"
#include "common/artifact/manifest.h"
#include "common/artifact/safetensors.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"
#include "embedding/rocksdb_store.h"
#include "embedding/row_record.h"
#include "embedding/snapshot_reader.h"
#include "model/adopt/parameters.h"
#include "model/adopt/rows.h"
#include "model/batch/batch.h"
#include "model/batch/path_step.h"
#include "worker/bundle/golden_records.h"
#include "worker/bundle/score.h"
#include "worker/dense/dense_replica.h"
#include "worker/log/expression.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

constexpr uint64_t kGoldenHead = 20'000;  // records of the log that the golden ones come from
constexpr double kPredictionMax = 1e-6;   // a probability of a task that stays may move by so much
constexpr uint32_t kManifestSchema = 1;
constexpr const char* kDenseFile = "dense.safetensors";

struct Source {
  HeldSnapshot held;
  Job job;
};

absl::StatusOr<Source> OpenSource(const AdoptOptions& options) {
  Source source;
  const SnapshotCheck check = options.dry_run ? SnapshotCheck::kLengths : SnapshotCheck::kChecksums;
  HEARTH_ASSIGN_OR_RETURN(source.held, HoldNewestSnapshot(options.snapshot, check));
  const std::string path = JoinPath(source.held.folder, "MANIFEST");
  HEARTH_ASSIGN_OR_RETURN(source.job, ParseJob(source.held.manifest.job(), path));
  HEARTH_RETURN_IF_ERROR(CheckTables(source.held.folder, source.job));
  if (const absl::Status valid = ValidateJob(source.job); !valid.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": this build refuses its job: ", valid.message(),
                                                      "; go on with it by the Hearth that wrote it, commit ",
                                                      source.held.manifest.commit()));
  }
  return source;
}

// The job as its first start would have it.
absl::StatusOr<Job> EffectiveJob(const AdoptOptions& options, const Manifest& manifest, uint64_t step) {
  Job job = options.job;
  if (!job.training().has_lanes()) job.mutable_training()->set_lanes(manifest.lanes());
  DecidePieces(&job);
  HEARTH_RETURN_IF_ERROR(ValidateJob(job));
  const uint64_t steps_max = job.training().steps_max();
  if (steps_max > 0 && steps_max <= step) {
    return absl::FailedPreconditionError(absl::StrCat("training.steps_max: is ", steps_max,
                                                      ", and the run goes on from step ", step,
                                                      ": there is nothing left to train; give more, or --step 0"));
  }
  return job;
}

absl::Status CheckFolder(const std::string& out) {
  const std::string snapshots = JoinPath(out, "snapshots");
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, CommittedSnapshots(snapshots));
  if (steps.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(out, ": has a model already, at step ", steps.back(),
                                                    "; an adoption makes a run's first snapshot: give another --out"));
}

// ---- The tasks that are born

bool IsBorn(const AdoptionPlan& plan, const std::string& parameter) {
  return std::any_of(plan.parameters.begin(), plan.parameters.end(),
                     [&](const ParameterMove& move) { return move.name == parameter && move.from.empty(); });
}

// Of the towers: the base rate of each task. Those whose tower is carried are given any. *told: a line where a rate is
// a guess.
absl::StatusOr<std::vector<double>> BaseRates(const Job& job, const AdoptionPlan& plan, std::string* told) {
  Job asked = job;
  std::vector<std::string> counted;
  for (Task& task : *asked.mutable_task()) {
    if (task.has_base_rate()) continue;
    if (IsBorn(plan, absl::StrCat("tower.", PathStep(task.name()), ".output.bias"))) {
      counted.push_back(task.name());
    } else {
      task.set_base_rate(0.5);
    }
  }
  const std::vector<Log> logs(asked.log().begin(), asked.log().end());
  std::shared_ptr<const LogSchema> schema;
  std::vector<LogFile> files;
  if (!counted.empty()) {
    const std::string how =
        absl::StrCat("task \"", counted[0],
                     "\" is born with the rate of positives in the job's logs, which are read for it "
                     "(or give task.base_rate)");
    absl::StatusOr<std::shared_ptr<const LogSchema>> opened = LogSchema::Open(asked, logs);
    if (!opened.ok()) return Annotate(opened.status(), how);
    schema = *std::move(opened);
    absl::StatusOr<std::vector<LogFile>> listed = ListLogFiles(asked, logs);
    if (!listed.ok()) return Annotate(listed.status(), how);
    files = *std::move(listed);
    if (files.empty()) {
      *told = absl::StrCat(
          "task \"", counted[0],
          "\" is born with a base rate of 0.5: no log file is there to count it over; give task.base_rate\n");
    }
  }
  return CountBaseRates(asked, schema, files, kBaseRateRecordsMax);
}

// ---- The golden records

// What both models read of one record.
struct Golden {
  std::string log;
  std::vector<GoldenRecord> before, now;  // the same records, of each
  std::string why_not;                    // where there are none
};

// The job as it reads `log` for a prediction alone: no label, and columns that only the other job knows are absent.
absl::StatusOr<Job> ReadingJob(const Job& job, const Job& files, const ScoredLog& scored, ScoredLog* log) {
  Job reading = job;
  reading.set_data_dir(files.data_dir());
  *reading.mutable_side_table() = files.side_table();
  *reading.mutable_limits() = files.limits();
  for (Task& task : *reading.mutable_task()) {
    task.set_label("1");
    task.clear_mask();
  }
  *log = scored;
  log->user.clear();
  log->log.clear_known_task();
  const auto add = [&](const std::string& column) { log->log.add_absent_column(column); };
  const auto add_all = [&](const std::string& expression) -> absl::Status {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> columns, Expression::ColumnsOf(expression));
    for (const std::string& column : columns) add(column);
    return absl::OkStatus();
  };
  for (const Slot& slot : reading.slot()) {
    if (slot.value().empty()) {
      add(slot.column().empty() ? slot.name() : slot.column());
    } else {
      HEARTH_RETURN_IF_ERROR(add_all(slot.value()));
    }
  }
  for (const DenseFeature& dense : reading.dense()) {
    if (dense.value().empty()) {
      add(dense.name());
    } else {
      HEARTH_RETURN_IF_ERROR(add_all(dense.value()));
    }
  }
  return reading;
}

absl::StatusOr<Golden> ReadGolden(const AdoptOptions& options, const Job& before, const Job& now) {
  Golden golden;
  HEARTH_ASSIGN_OR_RETURN(ScoredLog scored, ChooseLog(now, options.log, {}));
  golden.log = scored.name;
  for (std::string& path : *scored.log.mutable_path()) path = ResolvePath(now, path);
  const auto sample = [&](const Job& job) -> absl::StatusOr<std::vector<GoldenRecord>> {
    ScoredLog log;
    HEARTH_ASSIGN_OR_RETURN(const Job reading, ReadingJob(job, now, scored, &log));
    return SampleRecords(reading, log, static_cast<size_t>(options.golden), kGoldenHead);
  };
  HEARTH_ASSIGN_OR_RETURN(std::vector<GoldenRecord> old_records, sample(before));
  HEARTH_ASSIGN_OR_RETURN(std::vector<GoldenRecord> records, sample(now));
  // What one job takes for a bad record the other need not.
  std::map<std::pair<uint32_t, uint64_t>, GoldenRecord*> place;
  for (GoldenRecord& record : old_records) place[{record.file, record.offset}] = &record;
  for (GoldenRecord& record : records) {
    const auto found = place.find({record.file, record.offset});
    if (found == place.end()) continue;
    golden.before.push_back(std::move(*found->second));
    golden.now.push_back(std::move(record));
  }
  if (golden.now.empty()) golden.why_not = absl::StrCat("log \"", golden.log, "\" has no valid record");
  return golden;
}

// Without an answer where the log is not there and nobody asked for it; what else goes wrong is an error.
absl::StatusOr<Golden> GoldenOf(const AdoptOptions& options, const Job& before, const Job& now) {
  Golden none;
  if (options.golden == 0) {
    none.why_not = "--golden 0";
    return none;
  }
  absl::StatusOr<Golden> golden = ReadGolden(options, before, now);
  if (golden.ok() || !options.log.empty() || !absl::IsNotFound(golden.status())) return golden;
  none.why_not = std::string(golden.status().message());
  return none;
}

std::vector<Sign> SignsOf(const std::vector<GoldenRecord>& records) {
  std::vector<Sign> signs;
  for (const GoldenRecord& record : records) {
    for (const std::vector<uint64_t>& of_slot : record.signs) signs.insert(signs.end(), of_slot.begin(), of_slot.end());
  }
  std::sort(signs.begin(), signs.end());
  signs.erase(std::unique(signs.begin(), signs.end()), signs.end());
  return signs;
}

// The weights of these signs' rows as the new stores hold them.
absl::StatusOr<WantedRows> ReadBack(const Job& job, const std::vector<Sign>& signs, KvStore* store) {
  std::vector<KvKey> keys;
  for (const Sign sign : signs) keys.push_back(KeyOf(sign, job.training().shards()));
  KvValues values;
  HEARTH_RETURN_IF_ERROR(store->MultiGet(keys, &values));
  WantedRows rows;
  for (size_t i = 0; i < signs.size(); ++i) {
    if (!values.found(i)) continue;
    RowMeta meta;
    const Table& table = job.table(static_cast<int>(TableOf(signs[i])) - 1);
    HEARTH_RETURN_IF_ERROR(DecodeMeta(signs[i], values[i], RowWordsOf(table), &meta));
    if (!IsAdmitted(meta)) continue;
    std::vector<float>& weights = rows[signs[i]];
    weights.resize(table.dim());
    RowWeights(table, 0).Decode(WordsOf(values[i]), weights.data());
  }
  return rows;
}

// Logits [records, tasks] of a model as its file has it.
absl::StatusOr<std::vector<float>> Predict(Job job, bool mean, const std::string& dense,
                                           const std::vector<GoldenRecord>& records, const WantedRows& rows) {
  job.mutable_training()->mutable_dense_optimizer()->set_ema_serves(mean);
  const std::vector<double> base_rates(static_cast<size_t>(job.task_size()), 0.5);  // overwritten by Restore
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<DenseReplica> replica, DenseReplica::Create(job, base_rates));
  HEARTH_RETURN_IF_ERROR(replica->Restore(dense));
  const std::unique_ptr<Batch> batch = BatchOf(job, records);
  for (RowGroup& group : batch->groups) {
    group.rows.assign(group.unique.size() * group.dim, 0.0f);
    for (size_t i = 0; i < group.unique.size(); ++i) {
      const auto found = rows.find(group.unique[i]);
      if (found == rows.end() || found->second.empty()) continue;
      std::copy(found->second.begin(), found->second.end(), group.rows.begin() + i * group.dim);
    }
  }
  return replica->Predict(*batch);
}

// ---- The new run's folder

class Maker {
 public:
  Maker(const AdoptOptions& options, const Source& source, const Job& job, AdoptionPlan* plan, uint64_t step)
      : options_(options), source_(source), job_(job), plan_(*plan), step_(step) {}

  // Everything but the last rename, in `folder`. What is told of it.
  absl::StatusOr<std::string> Fill(const std::string& folder) {
    snapshot_ = JoinPath(folder, absl::StrCat("snapshots/", step_));
    HEARTH_ASSIGN_OR_RETURN(base_rates_, BaseRates(job_, plan_, &told_));
    HEARTH_ASSIGN_OR_RETURN(golden_, GoldenOf(options_, source_.job, job_));
    HEARTH_RETURN_IF_ERROR(MakeDirectories(snapshot_));
    HEARTH_RETURN_IF_ERROR(MakeRows(JoinPath(folder, "rows")));
    HEARTH_RETURN_IF_ERROR(RemoveTree(JoinPath(folder, "rows")));
    HEARTH_RETURN_IF_ERROR(MakeDense());
    HEARTH_ASSIGN_OR_RETURN(const std::string check, Compare());
    HEARTH_RETURN_IF_ERROR(Commit());
    HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder, "job.txtpb"), PrintJob(job_)));
    uint64_t rows = 0;
    for (size_t i = 0; i < plan_.tables.size(); ++i) rows += rows_.tables[i].rows;
    return absl::StrFormat("%s%s%sstep %d, %d rows, %d parameters, model hash %016x\n", check, told_, TellFiles(),
                           step_, rows, parameters_, manifest_.model_hash());
  }

 private:
  absl::Status MakeRows(const std::string& live) {
    RocksDbOptions rocksdb;  // without disk_bytes_max: that is one server's, and these are the rows of all
    rocksdb.disk_free_bytes_min = job_.snapshot().disk_free_bytes_min();
    HEARTH_RETURN_IF_ERROR(MakeDirectories(live));
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<KvStore> store, OpenRocksDbStore(live, rocksdb));
    for (const Sign sign : SignsOf(golden_.before)) old_rows_[sign];
    HEARTH_ASSIGN_OR_RETURN(
        rows_, TakeOverRows(source_.held, source_.job, job_, plan_, options_.restart, store.get(), &old_rows_));
    for (size_t i = 0; i < plan_.tables.size(); ++i) CountTable(static_cast<int>(i));
    for (size_t i = plan_.tables.size(); i < rows_.tables.size(); ++i)
      plan_.table_lines[i].dropped = rows_.tables[i].rows;
    HEARTH_ASSIGN_OR_RETURN(new_rows_, ReadBack(job_, SignsOf(golden_.now), store.get()));
    return store->Checkpoint(JoinPath(snapshot_, "ps-0"));
  }

  void CountTable(int table) {
    const AdoptedTable& counts = rows_.tables[static_cast<size_t>(table)];
    AdoptionPlan::Line& line = plan_.table_lines[static_cast<size_t>(table)];
    const TableMove& move = plan_.tables[static_cast<size_t>(table)];
    line.carried = counts.rows;
    line.reset = move.from >= 0 && !move.state ? counts.rows : 0;
    line.dropped = counts.expired;
    const auto add = [&](const std::string& text) { absl::StrAppend(&line.how, line.how.empty() ? "" : "; ", text); };
    if (counts.expired > 0) {
      add("some expire under the new job");
      plan_.changes.push_back(absl::StrCat("rows of table \"", job_.table(table).name(), "\" expire"));
    }
    if (counts.counters > 0) add(absl::StrCat(counts.counters, " counts of signs without a row"));
    if (counts.counters_left > 0) add(absl::StrCat("without ", counts.counters_left, " counts of signs without a row"));
  }

  absl::Status MakeDense() {
    HEARTH_ASSIGN_OR_RETURN(const SafetensorsFile old, ReadSafetensors(OldDense()));
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<DenseReplica> replica, DenseReplica::Create(job_, base_rates_));
    const bool had_mean = std::any_of(old.tensors.begin(), old.tensors.end(),
                                      [](const NamedTensor& tensor) { return tensor.name.rfind("ema.", 0) == 0; });
    mean_ = had_mean && job_.training().dense_optimizer().ema_decay() > 0;
    if (had_mean && !mean_) absl::StrAppend(&told_, "the mean of the weights is dropped: the job has no ema_decay\n");
    HEARTH_RETURN_IF_ERROR(replica->Overwrite(mean_, [&](const std::vector<NamedTensor>& places) {
      return Annotate(TakeOverParameters(plan_, old.tensors, job_.seed(), places), OldDense());
    }));
    parameters_ = replica->parameters();
    HEARTH_ASSIGN_OR_RETURN(dense_hash_, replica->Save(JoinPath(snapshot_, kDenseFile), step_));
    return absl::OkStatus();
  }

  // Every task that stays, by both models over the same records.
  absl::StatusOr<std::string> Compare() {
    std::string text = DescribeAdoption(plan_);
    for (const std::string& change : plan_.changes) absl::StrAppend(&text, "predictions may change: ", change, "\n");
    if (golden_.now.empty()) {
      absl::StrAppend(&text, "not compared with the old model: ", golden_.why_not, "\n");
      return text;
    }
    double largest = 0;
    std::string of;
    for (const bool mean : {false, true}) {
      if (mean && !mean_) continue;
      HEARTH_ASSIGN_OR_RETURN(const std::vector<float> before,
                              Predict(source_.job, mean, OldDense(), golden_.before, old_rows_));
      HEARTH_ASSIGN_OR_RETURN(const std::vector<float> now,
                              Predict(job_, mean, JoinPath(snapshot_, kDenseFile), golden_.now, new_rows_));
      for (int task = 0; task < job_.task_size(); ++task) {
        const int from = plan_.tasks[static_cast<size_t>(task)];
        if (from < 0) continue;
        for (size_t i = 0; i < golden_.now.size(); ++i) {
          const size_t old_tasks = static_cast<size_t>(source_.job.task_size());
          const double difference = std::fabs(ProbabilityOf(now[i * static_cast<size_t>(job_.task_size()) + task]) -
                                              ProbabilityOf(before[i * old_tasks + static_cast<size_t>(from)]));
          if (!of.empty() && (std::isnan(largest) || difference <= largest)) continue;
          largest = difference;
          of = job_.task(task).name();
        }
      }
    }
    if (of.empty()) {
      absl::StrAppend(&text, "not compared with the old model: no task stays\n");
      return text;
    }
    if (plan_.changes.empty() && !(largest <= kPredictionMax)) {
      return absl::InternalError(absl::StrFormat(
          "task \"%s\" predicts otherwise by %g for a record of log \"%s\", and nothing in the adoption says why; "
          "nothing was made: report this with both jobs, or do without the comparison with --golden 0",
          of, largest, golden_.log));
    }
    absl::StrAppendFormat(&text,
                          "compared with the old model over %d records of log \"%s\": largest difference %.2g (%s)%s\n",
                          golden_.now.size(), golden_.log, largest, of, plan_.changes.empty() ? ", bound 1e-06" : "");
    return text;
  }

  absl::Status Commit() {
    const Manifest& old = source_.held.manifest;
    manifest_.set_schema(kManifestSchema);
    manifest_.set_step(step_);
    manifest_.set_job(PrintJob(job_));
    manifest_.set_lanes(job_.training().lanes());
    manifest_.set_shards(job_.training().shards());
    manifest_.set_servers(1);
    for (uint32_t lane = 0; lane < manifest_.lanes(); ++lane) {
      LaneState* const state = manifest_.add_lane();
      state->mutable_cursor()->set_lane(lane);
      state->mutable_ledger();
    }
    HEARTH_ASSIGN_OR_RETURN(std::vector<FileEntry> files, DescribeFiles(snapshot_, {"ps-0", kDenseFile}));
    for (FileEntry& file : files) *manifest_.add_file() = std::move(file);
    for (int table = 0; table < job_.table_size(); ++table) {
      TableStats* const stats = manifest_.add_table();
      stats->set_name(job_.table(table).name());
      const AdoptedTable& rows = rows_.tables[static_cast<size_t>(table)];
      stats->set_rows(rows.rows);
      if (rows.clock.has_time_s()) *stats->mutable_clock() = rows.clock;
    }
    manifest_.set_rows_hash(rows_.rows_hash);
    manifest_.set_dense_hash(dense_hash_);
    manifest_.set_model_hash(ModelHash(rows_.rows_hash, dense_hash_));
    manifest_.set_dense_parameters(static_cast<uint64_t>(parameters_));
    manifest_.set_commit(BuildCommit());
    trained_ = FilesTrained(source_.job, old);
    if (!options_.again) *manifest_.mutable_consumed() = trained_;
    Adoption* const adoption = manifest_.mutable_adoption();
    adoption->set_step(old.step());
    adoption->set_model_hash(old.model_hash());
    adoption->set_first_step(step_);
    return CommitManifest(snapshot_, manifest_);
  }

  // What the old model has been trained on, to be told where the new run's logs name it again.
  static ConsumedFiles FilesTrained(const Job& job, const Manifest& manifest) {
    ConsumedFiles trained;
    *trained.mutable_newest() = manifest.consumed().newest();
    const std::vector<LogFile> listed(manifest.log_file().begin(), manifest.log_file().end());
    const std::vector<LaneState> lanes = LanesOf(manifest);
    for (const LogFile& file : listed) {
      if (file.log() >= static_cast<uint32_t>(job.log_size())) continue;
      const bool begun = NewestEpoch(lanes) > 0 || !PlacesOf(job, listed, lanes, file).untouched;
      if (begun && !file.taken_off() && file.bytes() > 0) trained.add_newest(IdentityOf(file));
    }
    const int more = trained.newest_size() - kConsumedKnownMax;
    if (more > 0) trained.mutable_newest()->erase(trained.newest().begin(), trained.newest().begin() + more);
    return trained;
  }

  // Told now: a start refuses files that the model was trained on, but for those of a directory, which it reads anew.
  std::string TellFiles() const {
    std::string text;
    if (trained_.newest().empty() || options_.again) return text;
    const std::set<uint64_t> trained(trained_.newest().begin(), trained_.newest().end());
    std::vector<std::string> again;
    for (const Log& log : job_.log()) {
      if (!log.directory().empty()) {
        absl::StrAppend(&text, "log \"", log.name(),
                        "\" reads every file of its directory, also what the model was trained on: ",
                        "move that away first, unless it is to be trained again\n");
      }
    }
    const absl::StatusOr<std::vector<LogFile>> files = ListLogFiles(job_, {job_.log().begin(), job_.log().end()});
    if (!files.ok()) return text;
    for (const LogFile& file : *files) {
      if (trained.count(IdentityOf(file)) > 0) again.push_back(file.path());
    }
    if (again.empty()) return text;
    return absl::StrCat(text, "the model was trained on ", again.size(), again.size() == 1 ? " file" : " files",
                        " of the job's logs already, ", again[0], again.size() == 1 ? "" : " the first",
                        ": take them off, or train with --again\n");
  }

  std::string OldDense() const { return JoinPath(source_.held.folder, kDenseFile); }

  const AdoptOptions& options_;
  const Source& source_;
  const Job& job_;
  AdoptionPlan& plan_;
  const uint64_t step_;
  std::string snapshot_;
  std::vector<double> base_rates_;
  Golden golden_;
  WantedRows old_rows_, new_rows_;
  AdoptedRows rows_;
  bool mean_ = false;  // the weights' running mean is carried
  std::string told_;   // of the tasks that are born
  ConsumedFiles trained_;
  int64_t parameters_ = 0;
  uint64_t dense_hash_ = 0;
  Manifest manifest_;
};

// Without reading a row: how many there are the MANIFEST says.
std::string DescribeDryRun(const Source& source, AdoptionPlan plan) {
  std::map<std::string, uint64_t> rows;
  for (const TableStats& table : source.held.manifest.table()) rows[table.name()] = table.rows();
  for (size_t i = 0; i < plan.tables.size(); ++i) {
    if (plan.tables[i].from < 0) continue;
    plan.table_lines[i].carried = rows[source.job.table(plan.tables[i].from).name()];
    if (!plan.tables[i].state) plan.table_lines[i].reset = plan.table_lines[i].carried;
  }
  for (size_t i = 0; i < plan.dropped_tables.size(); ++i) {
    plan.table_lines[plan.tables.size() + i].dropped = rows[source.job.table(plan.dropped_tables[i]).name()];
  }
  std::string text = DescribeAdoption(plan);
  for (const std::string& change : plan.changes) absl::StrAppend(&text, "predictions may change: ", change, "\n");
  return text;
}

absl::StatusOr<std::string> AdoptOnce(const AdoptOptions& options) {
  HEARTH_ASSIGN_OR_RETURN(const Source source, OpenSource(options));
  const uint64_t step = options.restart ? 0 : source.held.manifest.step();
  HEARTH_ASSIGN_OR_RETURN(const Job job, EffectiveJob(options, source.held.manifest, step));
  HEARTH_ASSIGN_OR_RETURN(AdoptionPlan plan, PlanAdoption(source.job, job, options.rules));
  const std::string from = absl::StrFormat("from %s, step %d, model hash %016x\n", source.held.folder,
                                           source.held.manifest.step(), source.held.manifest.model_hash());
  if (options.dry_run) return absl::StrCat(from, DescribeDryRun(source, std::move(plan)));
  std::string report;
  HEARTH_RETURN_IF_ERROR(PublishFolder(options.out, [&](const std::string& folder) -> absl::Status {
    absl::StatusOr<std::string> filled = Maker(options, source, job, &plan, step).Fill(folder);
    if (!filled.ok()) return source.held.hold.Explain(filled.status());
    report = *std::move(filled);
    return absl::OkStatus();
  }));
  return absl::StrCat(from, report);
}

}  // namespace

absl::StatusOr<std::string> Adopt(const AdoptOptions& options) {
  if (!options.dry_run) HEARTH_RETURN_IF_ERROR(CheckFolder(options.out));
  return AgainIfRemoved([&] { return AdoptOnce(options); });
}

}  // namespace hearth
