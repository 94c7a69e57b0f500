#include "scripts/hearth/calibrate.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/embedding_table.h"
#include "embedding/rocksdb_store.h"
#include "scripts/hearth/doctor.h"
#include "scripts/hearth/prepare.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kTableBytes = uint64_t{96} << 20;  // of the rows of a table that is measured: beyond any cache
constexpr size_t kBatchSigns = 16384;
constexpr int kRounds = 24;
constexpr int kColdRounds = 9;   // each finds some rows of the rounds before in memory: few
constexpr size_t kKindsMax = 4;  // of tables
constexpr uint64_t kJsonBytesMax = 64 << 20;
constexpr int64_t kPingUsMax = 60'000'000;
constexpr int64_t kStepsUsMax = 180'000'000;
constexpr uint32_t kSteps = 60;

double NsSince(int64_t begin_us, double rows) {
  return static_cast<double>(Env::Real()->NowUs() - begin_us) * 1e3 / rows;
}

// Some rows of the table in ascending order, as a server gets them.
std::vector<Sign> DrawSigns(uint64_t rows, Random* random) {
  std::vector<Sign> signs;
  for (size_t i = 0; i < kBatchSigns; ++i) signs.push_back(MakeSign(1, Mix64(random->Below(rows))));
  std::sort(signs.begin(), signs.end());
  signs.erase(std::unique(signs.begin(), signs.end()), signs.end());
  return signs;
}

// A job of the same model and batches that reads the same logs, ends after some steps, and leaves nothing else behind.
Job ShortJob(Job job) {
  job.clear_split();
  job.clear_export_();
  job.mutable_snapshot()->clear_best();
  job.mutable_snapshot()->set_every_steps(1'000'000'000);
  job.mutable_metrics()->Clear();
  job.mutable_metrics()->set_tensorboard(false);
  Training* training = job.mutable_training();
  training->set_stop_after_no_gain(0);
  training->set_batch_size(std::max(1u, training->batch_size() / std::max(1u, training->lanes())));
  training->set_lanes(1);
  training->set_steps_max(kSteps);
  return job;
}

absl::Status MeasureWire(const CalibrateOptions& options, Calibration* calibration) {
  DoctorOptions doctor;
  doctor.programs = options.programs;
  doctor.hostfile = options.hostfile;
  doctor.ping_us_max = kPingUsMax;
  HEARTH_ASSIGN_OR_RETURN(const std::string line, PingRanks(doctor));
  double mebibyte_us = 0, word_us = 0;
  if (std::sscanf(line.c_str(), "two ranks swap a mebibyte in %lf us, 8 bytes in %lf us", &mebibyte_us, &word_us) !=
          2 ||
      mebibyte_us <= 0) {
    return absl::InternalError(absl::StrCat("hearth-ping says \"", line, "\"; build all of Hearth from one commit"));
  }
  calibration->bytes_per_s = (1 << 20) / (mebibyte_us * 1e-6);
  calibration->latency_us = word_us;
  return absl::OkStatus();
}

absl::Status MeasureDense(const CalibrateOptions& options, const std::string& folder, Calibration* calibration) {
  HEARTH_RETURN_IF_ERROR(CheckInputs(*options.job));
  const std::string job = JoinPath(folder, "job.txtpb");
  const std::string run = JoinPath(folder, "run");
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(job, PrintJob(ShortJob(*options.job))));
  HEARTH_ASSIGN_OR_RETURN(
      const Ran ran, RunFor({JoinPath(options.programs.folder, "hearth"), "train", job, "--out", run}, kStepsUsMax));
  if (ran.code != 0) {
    const size_t at = ran.text.find("hearth: ");
    return absl::UnavailableError(ran.text.substr(at, ran.text.find('\n', at) - at));
  }
  HEARTH_ASSIGN_OR_RETURN(const MeasuredRun measured, ReadMeasuredRun(run));
  calibration->dense_records_per_s = measured.dense_records_per_s;
  calibration->dense_parameters = measured.dense_parameters;
  return absl::OkStatus();
}

double NumberOf(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<double>() : 0;
}

absl::StatusOr<Json> ReadJson(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kJsonBytesMax));
  Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) return absl::DataLossError(absl::StrCat(path, ": is no JSON object"));
  return json;
}

}  // namespace

absl::StatusOr<RowRates> MeasureRows(const Table& table, uint64_t rows, const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<KvStore> store,
                          OpenRocksDbStore(JoinPath(folder, "store"), RocksDbOptions()));
  TableOptions options;
  options.config = table;
  options.config.clear_admission();
  options.config.clear_expire_after_steps();
  options.config.clear_expire_after_hours();
  options.memory_rows_max = 2 * rows;  // none leaves
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<EmbeddingTable> opened, EmbeddingTable::Open(options, store.get()));
  const uint32_t dim = table.dim();
  const std::vector<uint32_t> ones(kBatchSigns, 1);
  const std::vector<float> gradients(kBatchSigns * dim, 0.01f);
  std::vector<float> out(kBatchSigns * dim);
  uint64_t step = 0;
  const auto push = [&](const std::vector<Sign>& signs) {
    const PushPart part = {signs, absl::MakeConstSpan(ones).first(signs.size()),
                           absl::MakeConstSpan(gradients).first(signs.size() * dim)};
    return opened->Push(++step, 1, absl::MakeConstSpan(&part, 1));
  };
  const auto pull = [&](const std::vector<Sign>& signs) {
    return opened->Pull(step + 1, signs, absl::MakeConstSpan(ones).first(signs.size()), out.data());
  };

  RowRates rates;
  rates.dim = dim;
  rates.weights = table.weights();
  rates.optimizer = table.optimizer().kind();
  int64_t insert_us = 0;
  for (uint64_t begin = 0; begin < rows; begin += kBatchSigns) {
    std::vector<Sign> signs;
    for (uint64_t id = begin; id < std::min<uint64_t>(rows, begin + kBatchSigns); ++id) {
      signs.push_back(MakeSign(1, Mix64(id)));
    }
    std::sort(signs.begin(), signs.end());
    const int64_t begin_us = Env::Real()->NowUs();
    HEARTH_RETURN_IF_ERROR(push(signs));
    insert_us += Env::Real()->NowUs() - begin_us;
  }
  Random random(1);
  std::vector<double> pulls, pushes, misses;
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<Sign> signs = DrawSigns(rows, &random);
    int64_t begin_us = Env::Real()->NowUs();
    HEARTH_RETURN_IF_ERROR(pull(signs));
    pulls.push_back(NsSince(begin_us, static_cast<double>(signs.size())));
    begin_us = Env::Real()->NowUs();
    HEARTH_RETURN_IF_ERROR(push(DrawSigns(rows, &random)));
    pushes.push_back(NsSince(begin_us, static_cast<double>(signs.size())));
  }
  HEARTH_RETURN_IF_ERROR(opened->Snapshot(step).status());
  opened.reset();
  HEARTH_ASSIGN_OR_RETURN(opened, EmbeddingTable::Open(options, store.get()));  // nothing is in memory
  for (int round = 0; round < kColdRounds; ++round) {
    const std::vector<Sign> signs = DrawSigns(rows, &random);
    const int64_t begin_us = Env::Real()->NowUs();
    HEARTH_RETURN_IF_ERROR(pull(signs));
    misses.push_back(NsSince(begin_us, static_cast<double>(signs.size())));
  }
  const auto median = [](std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  };
  rates.pull_ns = median(pulls);
  rates.push_ns = median(pushes);
  rates.miss_ns = median(misses);
  rates.insert_ns = std::max(0.0, static_cast<double>(insert_us) * 1e3 / static_cast<double>(rows) - rates.push_ns);
  return rates;
}

absl::StatusOr<Calibration> Calibrate(const CalibrateOptions& options) {
  Calibration calibration;
  calibration.host = HostName();
  calibration.when =
      absl::FormatTime("%Y-%m-%d %H:%M UTC", absl::FromUnixMicros(Env::Real()->WallUs()), absl::UTCTimeZone());
  calibration.cores = UsableCores();
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<TemporaryFolder> folder, TemporaryFolder::Make("hearth-plan"));
  std::vector<Table> tables;
  if (options.job != nullptr) tables.assign(options.job->table().begin(), options.job->table().end());
  if (tables.empty()) tables.emplace_back();
  for (const Table& table : tables) {
    const bool known = std::any_of(calibration.rows.begin(), calibration.rows.end(), [&](const RowRates& one) {
      return one.dim == table.dim() && one.weights == table.weights() && one.optimizer == table.optimizer().kind();
    });
    if (known || calibration.rows.size() == kKindsMax) continue;
    Say(absl::StrCat("measuring rows of ", table.dim(), " weights"));
    const uint64_t row_bytes = RowBytesOf(table);
    const std::string own = JoinPath(folder->path(), absl::StrCat(calibration.rows.size()));
    HEARTH_RETURN_IF_ERROR(MakeDirectories(own));
    HEARTH_ASSIGN_OR_RETURN(RowRates rates, MeasureRows(table, kTableBytes / row_bytes, own));
    calibration.rows.push_back(rates);
  }
  Say("measuring messages between two ranks");
  if (const absl::Status wire = MeasureWire(options, &calibration); !wire.ok()) {
    calibration.faults.push_back(absl::StrCat("messages: ", std::string(wire.message())));
  }
  if (options.job != nullptr) {
    Say("measuring the dense step: some steps of the job");
    if (const absl::Status dense = MeasureDense(options, folder->path(), &calibration); !dense.ok()) {
      calibration.faults.push_back(absl::StrCat("dense step: ", std::string(dense.message())));
    }
  }
  return calibration;
}

std::string PrintCalibration(const Calibration& calibration) {
  Json json = {{"schema", 1}, {"host", calibration.host}, {"when", calibration.when}, {"cores", calibration.cores}};
  json["rows"] = Json::array();
  for (const RowRates& rates : calibration.rows) {
    json["rows"].push_back({{"dim", rates.dim},
                            {"weights", Table::Weights_Name(rates.weights)},
                            {"optimizer", Optimizer::Kind_Name(rates.optimizer)},
                            {"pull_ns", rates.pull_ns},
                            {"push_ns", rates.push_ns},
                            {"insert_ns", rates.insert_ns},
                            {"miss_ns", rates.miss_ns}});
  }
  json["bytes_per_s"] = calibration.bytes_per_s;
  json["latency_us"] = calibration.latency_us;
  json["dense_records_per_s"] = calibration.dense_records_per_s;
  json["dense_parameters"] = calibration.dense_parameters;
  json["faults"] = calibration.faults;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

absl::StatusOr<Calibration> ReadCalibration(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const Json json, ReadJson(path));
  const auto rows = json.find("rows");
  if (NumberOf(json, "schema") != 1 || rows == json.end() || !rows->is_array()) {
    return absl::DataLossError(absl::StrCat(path, ": is no calibration; make one: hearth plan --calibrate --out FILE"));
  }
  Calibration calibration;
  calibration.host = json.value("host", std::string());
  calibration.when = json.value("when", std::string());
  calibration.cores = static_cast<uint32_t>(NumberOf(json, "cores"));
  for (const Json& one : *rows) {
    RowRates rates;
    if (!one.is_object() || NumberOf(one, "dim") < 1 || NumberOf(one, "pull_ns") <= 0 ||
        !Optimizer::Kind_Parse(one.value("optimizer", std::string()), &rates.optimizer) ||
        !Table::Weights_Parse(one.value("weights", std::string("FLOAT32")), &rates.weights)) {
      return absl::DataLossError(absl::StrCat(path,
                                              ": rows: an entry has no dim, optimizer or pull_ns, or other weights "
                                              "than there are"));
    }
    rates.dim = static_cast<uint32_t>(NumberOf(one, "dim"));
    rates.pull_ns = NumberOf(one, "pull_ns");
    rates.push_ns = NumberOf(one, "push_ns");
    rates.insert_ns = NumberOf(one, "insert_ns");
    rates.miss_ns = NumberOf(one, "miss_ns");
    calibration.rows.push_back(rates);
  }
  calibration.bytes_per_s = NumberOf(json, "bytes_per_s");
  calibration.latency_us = NumberOf(json, "latency_us");
  calibration.dense_records_per_s = NumberOf(json, "dense_records_per_s");
  calibration.dense_parameters = static_cast<uint64_t>(NumberOf(json, "dense_parameters"));
  return calibration;
}

void ApplyCalibration(const Calibration& calibration, uint64_t dense_parameters, PlanRates* rates) {
  const std::string measured = absl::StrCat("measured on ", calibration.host, ", ", calibration.when);
  if (!calibration.rows.empty()) {
    rates->rows = calibration.rows;
    rates->rows_from = measured;
  }
  if (calibration.bytes_per_s > 0) {
    rates->bytes_per_s = calibration.bytes_per_s;
    rates->latency_us = calibration.latency_us;
    rates->wire_from = measured;
  }
  rates->cores = calibration.cores;
  if (calibration.dense_records_per_s <= 0 || dense_parameters == 0) return;
  const double parameters = static_cast<double>(calibration.dense_parameters);
  rates->dense_records_per_s = calibration.dense_records_per_s * parameters / static_cast<double>(dense_parameters);
  rates->dense_from = measured;
  if (calibration.dense_parameters != dense_parameters) {
    absl::StrAppend(&rates->dense_from, ", of a model of ", calibration.dense_parameters,
                    " parameters, in the proportion of the parameters");
  }
}

absl::StatusOr<MeasuredRun> ReadMeasuredRun(const std::string& folder) {
  const std::string path = JoinPath(folder, "run.json");
  HEARTH_ASSIGN_OR_RETURN(const Json json, ReadJson(path));
  const auto object = [&](const char* key) {
    const auto found = json.find(key);
    return found != json.end() && found->is_object() ? *found : Json::object();
  };
  MeasuredRun run;
  const double share = NumberOf(object("time_share"), "forward_backward");
  const double workers = NumberOf(object("ranks"), "worker");
  if (NumberOf(json, "samples_per_s") <= 0 || share <= 0 || workers <= 0) {
    return absl::DataLossError(absl::StrCat(path, ": says nothing of samples a second; name a run that has trained"));
  }
  run.dense_records_per_s = NumberOf(json, "samples_per_s") / workers / share;
  run.dense_parameters = static_cast<uint64_t>(NumberOf(json, "dense_parameters"));
  const Json tables = object("tables");
  for (const auto& [name, table] : tables.items()) run.rows.emplace_back(name, NumberOf(table, "rows"));
  return run;
}

}  // namespace hearth
