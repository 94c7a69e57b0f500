#include "scripts/hearth/plan_command.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/file_list.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/log_list.h"
#include "common/job/pieces.h"
#include "embedding/sign.h"
#include "scripts/hearth/calibrate.h"
#include "scripts/hearth/prepare.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kSampleRecords = 20000;

int TableOfName(const Job& job, const std::string& name) {
  for (int t = 0; t < job.table_size(); ++t) {
    if (job.table(t).name() == name) return t;
  }
  return -1;
}

absl::Status NoSuchTable(const Job& job, const std::string& option, const std::string& name) {
  std::vector<std::string> names;
  for (const Table& table : job.table()) names.push_back(table.name());
  return absl::InvalidArgumentError(
      absl::StrCat(option, " ", name, "=…: the job has no table of that name; it has ", absl::StrJoin(names, ", ")));
}

// Signs of a step where no log says them: a value for each record and slot, each another sign.
void SetSignsAtMost(const Job& job, std::vector<PlanTable>* tables) {
  for (PlanTable& table : *tables) table.signs_from = "upper bound: batch_size times its slots, no sign twice";
  for (const Slot& slot : job.slot()) {
    const int table = TableOfName(job, slot.table());
    if (table >= 0) (*tables)[static_cast<size_t>(table)].signs += job.training().batch_size();
  }
}

absl::Status SetSigns(const PlanOptions& options, const Job& job, PlanInput* input) {
  const absl::StatusOr<LogSample> sample = SampleLog(job, kSampleRecords);
  if (sample.ok()) {
    input->rates.read_records_per_s = sample->records_per_s;
    input->fill = sample->fill;
    for (size_t t = 0; t < input->tables.size(); ++t) {
      input->tables[t].signs = sample->signs[t];
      input->tables[t].fresh = sample->fresh[t];
      input->tables[t].signs_from = absl::StrFormat("from %.0f records of the job's log", sample->records);
    }
  } else {
    SetSignsAtMost(job, &input->tables);
  }
  for (const std::string& text : options.signs) {
    HEARTH_ASSIGN_OR_RETURN(const NamedNumber given, ParseNamedNumber(text));
    const int table = TableOfName(job, given.name);
    if (table < 0) return NoSuchTable(job, "--signs", given.name);
    PlanTable* const to = &input->tables[static_cast<size_t>(table)];
    to->signs = given.number;
    to->signs_from = "--signs";
  }
  return absl::OkStatus();
}

// Said for a table, else its part of what is said for all, else a measured run's, else what memory may hold.
absl::Status SetRows(const PlanOptions& options, const Job& job, const MeasuredRun& measured, PlanInput* input) {
  for (size_t t = 0; t < input->tables.size(); ++t) {
    input->tables[t].rows = static_cast<double>(job.table(static_cast<int>(t)).memory_rows_max());
    input->tables[t].rows_from = "memory_rows_max, for want of --rows";
  }
  for (const auto& [name, rows] : measured.rows) {
    const int table = TableOfName(job, name);
    if (table < 0) continue;
    input->tables[static_cast<size_t>(table)].rows = rows;
    input->tables[static_cast<size_t>(table)].rows_from = "of the run that --measured names";
  }
  double signs = 0;
  for (const PlanTable& table : input->tables) signs += table.signs;
  for (const bool of_all : {true, false}) {
    for (const std::string& text : options.rows) {
      HEARTH_ASSIGN_OR_RETURN(const NamedNumber given, ParseNamedNumber(text));
      if (given.name.empty() != of_all) continue;
      if (of_all) {
        for (PlanTable& table : input->tables) {
          table.rows =
              signs > 0 ? given.number * table.signs / signs : given.number / static_cast<double>(input->tables.size());
          table.rows_from = "its part of --rows, by its signs a step";
        }
        continue;
      }
      const int table = TableOfName(job, given.name);
      if (table < 0) return NoSuchTable(job, "--rows", given.name);
      input->tables[static_cast<size_t>(table)].rows = given.number;
      input->tables[static_cast<size_t>(table)].rows_from = "--rows";
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Job> JobToPlan(const PlanOptions& options) {
  HEARTH_ASSIGN_OR_RETURN(Job job, LoadValidJob(options.job, options.overrides));
  if (!job.training().has_lanes()) job.mutable_training()->set_lanes(static_cast<uint32_t>(options.workers));
  HEARTH_RETURN_IF_ERROR(CheckWorkers(job, options.workers, false));
  HEARTH_RETURN_IF_ERROR(CheckExpressions(job, options.job));
  DecidePieces(&job);
  return job;
}

std::string InBytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  size_t unit = 0;
  for (; bytes >= 999.5 && unit + 1 < std::size(units); ++unit) bytes /= 1000;
  return absl::StrFormat(unit == 0 || bytes >= 99.95 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
}
std::string InSeconds(double seconds) {
  return seconds < 1e-3 ? absl::StrFormat("%.0f us", seconds * 1e6) : absl::StrFormat("%.2f ms", seconds * 1e3);
}

Json AsJson(const std::vector<PlanFigure>& figures) {
  Json json = Json::array();
  for (const PlanFigure& figure : figures) {
    json.push_back({{"what", figure.what},
                    {"value", figure.value},
                    {"largest", figure.largest},
                    {"at_most", figure.at_most},
                    {"how", figure.how}});
  }
  return json;
}

}  // namespace

absl::StatusOr<NamedNumber> ParseNamedNumber(absl::string_view text) {
  NamedNumber result;
  const size_t equals = text.rfind('=');
  if (equals != absl::string_view::npos) result.name = std::string(text.substr(0, equals));
  const absl::string_view number = equals == absl::string_view::npos ? text : text.substr(equals + 1);
  const bool named = equals == absl::string_view::npos || equals > 0;
  if (!named || !absl::SimpleAtod(number, &result.number) || !(result.number >= 0) || result.number > 1e15) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", std::string(text), "\": a number of rows or signs, as 3000000 or 3e6, or TABLE=NUMBER"));
  }
  return result;
}

absl::StatusOr<LogSample> SampleLog(const Job& job, uint64_t records_max) {
  const std::vector<Log> logs(job.log().begin(), job.log().end());
  if (logs.empty() || std::any_of(logs.begin(), logs.end(), [](const Log& log) { return !log.directory().empty(); })) {
    return absl::NotFoundError("the job's log is a directory, whose files are still to come");
  }
  HEARTH_RETURN_IF_ERROR(CheckInputs(job));
  LaneReaderOptions options;
  options.job = job;
  for (Log& log : *options.job.mutable_log()) log.clear_shuffle();  // its batches are alike, and need no spool
  options.logs.assign(options.job.log().begin(), options.job.log().end());
  HEARTH_ASSIGN_OR_RETURN(options.schema, LogSchema::Open(options.job, options.logs));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<LogFile> listed, ListLogFiles(options.job, options.logs));
  FileList files(Env::Real());
  files.Append(listed, /*closed=*/true);
  options.files = &files;
  options.lanes = job.training().lanes();
  options.env = Env::Real();
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<LaneReader> reader, LaneReader::Open(options));

  const size_t tables = static_cast<size_t>(job.table_size());
  const double lane_records =
      std::max(1.0, std::floor(static_cast<double>(job.training().batch_size()) / options.lanes));
  LogSample sample;
  sample.signs.assign(tables, 0);
  sample.fresh.assign(tables, 0);
  double batches = 0;
  double counted = 0;  // records of the batches that signs are counted in: the full ones, or all while none is full
  bool full = false;
  absl::flat_hash_set<Sign> seen;
  int64_t read_us = 0;
  while (sample.records < static_cast<double>(records_max)) {
    const int64_t begin_us = Env::Real()->NowUs();
    HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<Batch> batch, reader->Next());
    read_us += Env::Real()->NowUs() - begin_us;
    if (batch == nullptr || batch->kind == Batch::Kind::kAtEnd) break;
    const double records = static_cast<double>(batch->records);
    sample.records += records;
    ++batches;
    if (records >= lane_records && !full) {
      full = true;
      counted = 0;
      sample.signs.assign(tables, 0);
    }
    if (full && records < lane_records) continue;  // fewer records repeat fewer signs
    counted += records;
    std::vector<double> signs(tables, 0), fresh(tables, 0);
    for (const RowGroup& group : batch->groups) {
      for (const Sign sign : group.unique) {
        const size_t table = TableOf(sign) - 1;
        ++signs[table];
        fresh[table] += seen.insert(sign).second ? 1 : 0;
      }
    }
    for (size_t t = 0; t < tables; ++t) {
      sample.signs[t] += signs[t];
      sample.fresh[t] = signs[t] > 0 ? fresh[t] / signs[t] : 0;  // the last batch says best how many are new
    }
  }
  if (counted == 0) return absl::NotFoundError("the job's log has no record");
  for (double& signs : sample.signs) signs *= job.training().batch_size() / counted;
  sample.fill = sample.records / (batches * lane_records);
  if (read_us > 0) sample.records_per_s = sample.records / (static_cast<double>(read_us) * 1e-6);
  return sample;
}

absl::StatusOr<std::string> PlanRun(const PlanOptions& options) {
  Job job;
  if (!options.job.empty()) {
    HEARTH_ASSIGN_OR_RETURN(job, JobToPlan(options));
  } else if (!options.calibrate) {
    return absl::InvalidArgumentError("JOB: the job to plan for; without one only --calibrate says anything");
  }
  Calibration calibration;
  if (options.calibrate) {
    CalibrateOptions calibrate;
    calibrate.programs = options.programs;
    calibrate.hostfile = options.hostfile;
    calibrate.job = options.job.empty() ? nullptr : &job;
    HEARTH_ASSIGN_OR_RETURN(calibration, Calibrate(calibrate));
    for (const std::string& fault : calibration.faults) Say(absl::StrCat("not measured: ", fault));
    if (!options.out.empty()) {
      HEARTH_RETURN_IF_ERROR(WriteFileAtomically(options.out, PrintCalibration(calibration)));
    }
    if (options.job.empty()) return PrintCalibration(calibration);
  } else if (!options.calibration.empty()) {
    HEARTH_ASSIGN_OR_RETURN(calibration, ReadCalibration(options.calibration));
  }
  MeasuredRun measured;
  if (!options.measured.empty()) {
    HEARTH_ASSIGN_OR_RETURN(measured, ReadMeasuredRun(options.measured));
  }

  PlanInput input;
  input.job = job;
  input.servers = static_cast<uint32_t>(options.servers);
  input.workers = static_cast<uint32_t>(options.workers);
  input.nodes = static_cast<uint32_t>(options.nodes);
  input.tables.resize(static_cast<size_t>(job.table_size()));
  input.rates = BuiltInRates(job);
  HEARTH_RETURN_IF_ERROR(SetSigns(options, job, &input));
  HEARTH_RETURN_IF_ERROR(SetRows(options, job, measured, &input));
  const uint64_t parameters = MakePlan(input).dense_parameters;
  if (options.calibrate || !options.calibration.empty()) ApplyCalibration(calibration, parameters, &input.rates);
  if (measured.dense_records_per_s > 0) {
    Calibration of_run;
    of_run.dense_records_per_s = measured.dense_records_per_s;
    of_run.dense_parameters = measured.dense_parameters;
    of_run.cores = input.rates.cores;
    ApplyCalibration(of_run, parameters, &input.rates);
    input.rates.dense_from = absl::StrCat("of ", options.measured, "/run.json");
  }
  const Plan plan = MakePlan(input);
  return options.json ? PlanAsJson(plan, input) : DescribePlan(plan, input);
}

std::string DescribePlan(const Plan& plan, const PlanInput& input) {
  const Training& training = input.job.training();
  std::string text =
      absl::StrFormat("%s on %d servers and %d workers%s: %d lanes, batches of %d, staleness %d, %d dense parameters\n",
                      input.job.name(), input.servers, input.workers,
                      input.nodes > 1 ? absl::StrFormat(", %d nodes", input.nodes) : std::string(), training.lanes(),
                      training.batch_size(), training.staleness(), plan.dense_parameters);
  absl::StrAppendFormat(&text, "logical shards: %d; the fullest server has %d of them, %.2f times the mean\n",
                        training.shards(), plan.shards_largest, plan.largest_over_mean);
  for (const std::string& warning : plan.warnings) absl::StrAppend(&text, "warning: ", warning, "\n");
  const auto line = [&](absl::string_view part, const PlanFigure& figure, const std::string& value,
                        const std::string& largest) {
    absl::StrAppendFormat(&text, "  %-8s %-38s %s%10s %10s  %s\n", part, figure.what, figure.at_most ? "≤" : " ", value,
                          largest == value ? "" : largest, figure.how);
  };
  for (const PlanRank& rank : plan.ranks) {
    absl::StrAppendFormat(&text, "\n%-49s  %10s %10s\n",
                          rank.count > 1 ? absl::StrCat(rank.name, ", each of ", rank.count) : rank.name,
                          rank.name == "server" ? "mean" : "", rank.name == "server" ? "largest" : "");
    for (const PlanFigure& figure : rank.memory) {
      line("memory", figure, InBytes(figure.value), InBytes(figure.largest));
    }
    PlanFigure sum = {"together", 0, 0, false, ""};
    line("memory", sum, InBytes(SumOf(rank.memory, false, false)), InBytes(SumOf(rank.memory, false, true)));
    sum = {"together, with all buffers full", 0, 0, true, ""};
    line("memory", sum, InBytes(SumOf(rank.memory, true, false)), InBytes(SumOf(rank.memory, true, true)));
    for (const PlanFigure& figure : rank.disk) line("disk", figure, InBytes(figure.value), InBytes(figure.largest));
    for (const PlanFigure& figure : rank.network) {
      const bool bytes = absl::StartsWith(figure.what, "bytes");
      const auto shown = [&](double value) { return bytes ? InBytes(value) : absl::StrFormat("%.0f", value); };
      line("network", figure, shown(figure.value), shown(figure.largest));
    }
  }
  if (!plan.node.empty()) absl::StrAppend(&text, "\nthe fullest node\n");
  for (const PlanFigure& figure : plan.node) {
    const bool bytes = absl::StrContains(figure.what, "bytes");
    line("", figure, bytes ? InBytes(figure.value) : absl::StrFormat("%.0f", figure.value),
         bytes ? InBytes(figure.largest) : absl::StrFormat("%.0f", figure.largest));
  }
  absl::StrAppendFormat(&text, "\na step takes %s, %.0f records/s; what bounds it: %s\n", InSeconds(plan.step_seconds),
                        plan.records_per_s, plan.bound);
  for (const PlanFigure& stage : plan.stages) line("", stage, InSeconds(stage.value), InSeconds(stage.largest));
  absl::StrAppend(&text, "\nassumed\n");
  for (const std::string& assumption : plan.assumptions) absl::StrAppend(&text, "  ", assumption, "\n");
  return text;
}

std::string PlanAsJson(const Plan& plan, const PlanInput& input) {
  Json json;
  json["schema"] = 1;
  json["job"] = input.job.name();
  json["ranks"] = {{"ps", input.servers}, {"worker", input.workers}, {"nodes", input.nodes}};
  json["lanes"] = input.job.training().lanes();
  json["dense_parameters"] = plan.dense_parameters;
  json["largest_over_mean"] = plan.largest_over_mean;
  json["tables"] = Json::object();
  for (size_t t = 0; t < input.tables.size(); ++t) {
    const PlanTable& table = input.tables[t];
    json["tables"][input.job.table(static_cast<int>(t)).name()] = {{"rows", table.rows},
                                                                   {"rows_from", table.rows_from},
                                                                   {"signs", table.signs},
                                                                   {"signs_from", table.signs_from},
                                                                   {"fresh", table.fresh}};
  }
  json["plan"] = Json::array();
  for (const PlanRank& rank : plan.ranks) {
    json["plan"].push_back({{"rank", rank.name},
                            {"count", rank.count},
                            {"memory", AsJson(rank.memory)},
                            {"disk", AsJson(rank.disk)},
                            {"network", AsJson(rank.network)}});
  }
  json["node"] = AsJson(plan.node);
  json["stages"] = AsJson(plan.stages);
  json["step_seconds"] = plan.step_seconds;
  json["records_per_s"] = plan.records_per_s;
  json["bound"] = plan.bound;
  json["warnings"] = plan.warnings;
  json["assumptions"] = plan.assumptions;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace hearth
