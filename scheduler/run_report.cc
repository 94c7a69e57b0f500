#include "scheduler/run_report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "common/artifact/reading.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/rows.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/schedule.h"
#include "scheduler/lease_table.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kRunJsonBytesMax = 16 << 20;
constexpr size_t kPullSampleMax = 4096;
constexpr int64_t kRedrawUs = 250'000;
constexpr size_t kColumnsUnknown = 80;

Json OrNull(std::optional<double> value) {
  if (!value.has_value() || !std::isfinite(*value)) return nullptr;
  return *value;
}

Json OrNull(bool defined, double value) { return defined ? OrNull(value) : Json(nullptr); }

std::optional<double> Ratio(double part, double whole) {
  if (!(whole > 0)) return std::nullopt;
  return part / whole;
}

// Nearest rank. Nothing without values.
std::optional<double> Quantile(std::vector<double> values, double q) {
  if (values.empty()) return std::nullopt;
  const size_t rank = std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())));
  std::nth_element(values.begin(), values.begin() + rank, values.end());
  return values[rank];
}

// Of that step, by the job's schedules; a group's factor is not in it.
Json LearningRatesJson(const Job& job, uint64_t step) {
  Json json;
  json["dense"] = RateOf(job.training().dense_optimizer(), step);
  json["tables"] = Json::object();
  for (const Table& table : job.table()) json["tables"][table.name()] = RateOf(table.optimizer(), step);
  return json;
}

Json TableJson(const TableStats& table) {
  Json json;
  json["rows"] = table.rows();
  json["rows_in_memory"] = table.rows_in_memory();
  json["rows_spilled"] = table.rows_spilled();
  json["rows_expired"] = table.rows_expired();
  if (table.has_clock()) json["log_time_s"] = table.clock().time_s();
  json["memory_hit_ratio"] =
      OrNull(Ratio(table.memory_hits(), static_cast<double>(table.memory_hits() + table.memory_misses())));
  // Of the rows that were not in memory before: in memory when their pull came.
  json["cold_hit_ratio"] =
      OrNull(Ratio(table.prefetch_hits(), static_cast<double>(table.prefetch_hits() + table.memory_misses())));
  json["bytes_memory"] = table.bytes_memory();
  json["bytes_disk"] = table.bytes_disk();
  return json;
}

// What was read, and what of it could not be used as it was meant.
void AddReading(const Job& job, const Reading& reading, Json* json) {
  (*json)["labels"] = Json::object();
  for (int t = 0; t < std::min(job.task_size(), reading.task_size()); ++t) {
    const Reading::Task& task = reading.task(t);
    (*json)["labels"][job.task(t).name()] = {
        {"positives", task.positives()}, {"negatives", task.negatives()}, {"masked", task.masked()}};
  }
  (*json)["columns"] = Json::object();
  for (const Reading::Column& column : reading.column()) {
    (*json)["columns"][column.name()] = {{"unreadable", column.unreadable()}, {"example", column.example()}};
  }
  (*json)["side_tables"] = Json::object();
  for (const Reading::Join& join : reading.join()) {
    (*json)["side_tables"][join.side_table()] = {
        {"matched", join.matched()},
        {"unmatched", join.unmatched()},
        {"without_key", join.without_key()},
        {"example", join.has_example() ? Json(join.example()) : Json(nullptr)}};
  }
}

// Where the workers' time goes, as they last told.
void AddTimes(const std::vector<Progress>& workers, const std::vector<double>& pull_seconds, Json* json) {
  TimeShare time;
  uint32_t staleness_max_seen = 0;
  for (const Progress& worker : workers) {
    time.set_wait_input(time.wait_input() + worker.time().wait_input());
    time.set_wait_pull(time.wait_pull() + worker.time().wait_pull());
    time.set_forward_backward(time.forward_backward() + worker.time().forward_backward());
    time.set_reduce(time.reduce() + worker.time().reduce());
    time.set_push(time.push() + worker.time().push());
    time.set_total(time.total() + worker.time().total());
    staleness_max_seen = std::max(staleness_max_seen, worker.staleness_max_seen());
  }
  (*json)["time_share"] = {{"wait_input", OrNull(Ratio(time.wait_input(), time.total()))},
                           {"wait_pull", OrNull(Ratio(time.wait_pull(), time.total()))},
                           {"forward_backward", OrNull(Ratio(time.forward_backward(), time.total()))},
                           {"reduce", OrNull(Ratio(time.reduce(), time.total()))},
                           {"push", OrNull(Ratio(time.push(), time.total()))}};
  (*json)["pull_seconds"] = {{"p50", OrNull(Quantile(pull_seconds, 0.5))},
                             {"p99", OrNull(Quantile(pull_seconds, 0.99))}};
  (*json)["staleness_max_seen"] = staleness_max_seen;
}

Json PublicationJson(const PublicationFigures& figures) {
  return {{"base", figures.base},         {"seq", figures.seq},
          {"step", figures.step},         {"published", figures.published},
          {"failures", figures.failures}, {"left_out", figures.left_out},
          {"withheld", figures.withheld}, {"withheld_reason", figures.withheld_reason},
          {"waiting", figures.waiting},   {"seconds", figures.seconds},
          {"reason", figures.reason}};
}

Json BestJson(const BestSnapshot& best) {
  return {{"step", best.step()}, {"of", best.of()}, {"value", best.value()}, {"without_gain", best.without_gain()}};
}

// The newest window of progressive validation.
Json WindowJson(const Job& job, const ValidationWindow& window) {
  Json json = {{"first_step", window.first_step()}, {"last_step", window.last_step()}, {"tasks", Json::object()}};
  for (int t = 0; t < std::min(job.task_size(), window.task_size()); ++t) {
    const TaskMetric& metric = window.task(t);
    json["tasks"][job.task(t).name()] = {{"labelled", metric.labelled()},
                                         {"auc", OrNull(StreamingAuc(metric))},
                                         {"log_loss", OrNull(MeanLoss({metric}))},
                                         {"calibration", OrNull(CalibrationOf(metric))}};
  }
  return json;
}

Json TaskJson(const Evaluation::Task& task) {
  Json json;
  json["samples"] = task.samples();
  json["positives"] = task.positives();
  json["auc"] = OrNull(task.has_auc(), task.auc());
  json["gauc"] = OrNull(task.has_gauc(), task.gauc());
  json["gauc_users"] = task.gauc_users();
  json["log_loss"] = OrNull(task.has_log_loss(), task.log_loss());
  json["calibration"] = OrNull(task.has_calibration(), task.calibration());
  return json;
}

Json DiagnosticsJson(const Evaluation& evaluation) {
  const Evaluation::Diagnostics& from = evaluation.diagnostics();
  Json json;
  json["split"] = evaluation.split();
  json["step"] = evaluation.step();
  json["records"] = from.records();
  for (const char* kind : {"experts", "gates", "shared_experts", "tasks"}) json[kind] = Json::object();
  for (const auto& expert : from.expert()) {
    json["experts"][expert.name()] = {{"zero_rate", OrNull(expert.has_zero_rate(), expert.zero_rate())},
                                      {"mean", OrNull(expert.has_mean(), expert.mean())},
                                      {"deviation", OrNull(expert.has_deviation(), expert.deviation())}};
  }
  for (const auto& gate : from.gate()) {
    json["gates"][gate.name()] = {
        {"weight_max", OrNull(gate.has_weight_max(), gate.weight_max())},
        {"entropy_of_mean", OrNull(gate.has_entropy_of_mean(), gate.entropy_of_mean())},
        {"mean_entropy", OrNull(gate.has_mean_entropy(), gate.mean_entropy())},
        {"deviation_max_ratio", OrNull(gate.has_deviation_max_ratio(), gate.deviation_max_ratio())}};
  }
  for (const auto& shared : from.shared()) {
    json["shared_experts"][shared.name()] = {{"occupancy", OrNull(shared.has_occupancy(), shared.occupancy())},
                                             {"tasks_using", shared.tasks_using()}};
  }
  for (const auto& task : from.task()) {
    json["tasks"][task.name()] = {
        {"positive_rate", OrNull(task.has_positive_rate(), task.positive_rate())},
        {"own_weight", OrNull(task.has_own_weight(), task.own_weight())},
        {"own_weight_uniform", OrNull(task.has_own_weight_uniform(), task.own_weight_uniform())},
        {"own_gradient_ratio", OrNull(task.has_own_gradient_ratio(), task.own_gradient_ratio())}};
  }
  return json;
}

std::string Cell(bool defined, double value) {
  return defined && std::isfinite(value) ? absl::StrFormat("%.4f", value) : "-";
}

std::string LedgerLine(const Ledger& ledger) {
  return absl::StrCat("read ", ledger.read(), " = trained ", ledger.trained(), " + rejected ", ledger.rejected(),
                      " + filtered ", ledger.filtered());
}

}  // namespace

void SetTerminal(const char* told, std::optional<size_t> own, const char* no_colour, RunOutput* output) {
  uint32_t columns = 0;
  if (told != nullptr && absl::SimpleAtoi(told, &columns)) own = columns;
  output->is_terminal = own.has_value();
  output->columns = own == size_t{0} ? kColumnsUnknown : own.value_or(0);
  output->colour = output->is_terminal && (no_colour == nullptr || no_colour[0] == '\0');
}

RunReport::RunReport(Options options)
    : options_(std::move(options)),
      workers_(options_.workers),
      server_rss_(options_.servers, 0),
      random_(SeedOf(options_.job.seed(), "pull_sample")),
      windows_(options_.workers) {}

void RunReport::Resume(const Manifest& manifest) {
  manifest_ = manifest;
  has_snapshot_ = true;
  SetLanes({manifest.lane().begin(), manifest.lane().end()});
  evaluations_.assign(manifest.evaluation().begin(), manifest.evaluation().end());
  dense_parameters_ = manifest.dense_parameters();

  const std::string path = JoinPath(options_.dir, "run.json");
  snapshots_ = 1;  // at least; the count of snapshots is all that is taken from run.json
  const absl::StatusOr<std::string> text = ReadFile(path, kRunJsonBytesMax);
  if (!text.ok()) return;
  const nlohmann::json before = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!before.is_object() || !before.contains("snapshots") || !before["snapshots"].is_number_unsigned()) {
    spdlog::warn("event=run_json_not_readable path={}", Quoted(path));
    return;
  }
  snapshots_ = before["snapshots"].get<uint64_t>();
  // Killed between a commit and the rewriting of run.json: that one commit is not in it yet.
  const bool has_step = before.contains("steps") && before["steps"].is_number_unsigned();
  if (has_step && (before["steps"].get<uint64_t>() < manifest.step() || snapshots_ == 0)) ++snapshots_;
  says_finished_ = before.value("status", nlohmann::json()) == "finished" &&
                   before.value("model_hash", nlohmann::json()) == absl::StrFormat("%016x", manifest.model_hash());
}

void RunReport::Start(const std::vector<Ledger>& ledgers, int64_t now_us) {
  HEARTH_CHECK(ledgers.size() == workers_.size());
  for (size_t w = 0; w < ledgers.size(); ++w) {
    *workers_[w].mutable_ledger() = ledgers[w];
    workers_[w].set_step(manifest_.step());
  }
  started_ = true;
  start_us_ = now_us;
  trained_at_start_ = LiveLedger().trained();
  previous_ = current_ = {0, trained_at_start_};
  const double seconds = std::max(0.1, options_.job.metrics().progress_seconds());
  next_turn_us_ = now_us + static_cast<int64_t>(seconds * 1e6);
  next_show_us_ = options_.output.is_terminal ? now_us + kRedrawUs : next_turn_us_;
}

absl::Status RunReport::OnProgress(uint32_t worker, const Progress& progress, int64_t now_us) {
  HEARTH_CHECK(worker < workers_.size());
  for (const ValidationWindow& part : progress.window()) {
    HEARTH_ASSIGN_OR_RETURN(std::vector<ValidationWindow> whole, windows_.Add(part));
    for (ValidationWindow& window : whole) {
      if (curves_ != nullptr) HEARTH_RETURN_IF_ERROR(curves_->OnWindow(window));
      newest_window_ = std::move(window);
    }
  }
  for (const double seconds : progress.pull_seconds()) {
    ++pulls_;
    if (pull_seconds_.size() < kPullSampleMax) {
      pull_seconds_.push_back(seconds);
    } else if (const uint64_t place = random_.Below(pulls_); place < kPullSampleMax) {
      pull_seconds_[place] = seconds;
    }
  }
  told_ |= started_;
  Progress* const known = &workers_[worker];
  const uint32_t staleness = std::max(known->staleness_max_seen(), progress.staleness_max_seen());
  const uint64_t rss = std::max(known->peak_rss_bytes(), progress.peak_rss_bytes());
  // What a message leaves out stays as it was known.
  if (progress.has_reading()) known->clear_reading();
  known->MergeFrom(progress);
  known->clear_task();
  known->clear_window();
  known->clear_pull_seconds();
  known->set_staleness_max_seen(staleness);
  known->set_peak_rss_bytes(rss);
  if (progress.has_reading()) {
    Reading sum;
    for (const Progress& one : workers_) MergeReading(one.reading(), &sum);
    Warn(WarningsSoFar(sum));
  }
  if (progress.has_log_fraction() && !first_fraction_.has_value()) {
    first_fraction_ = progress.log_fraction();
    first_fraction_seconds_ = TrainingSeconds(now_us);
  }
  return absl::OkStatus();
}

void RunReport::OnServer(const ServerAtCut& part, uint32_t server) {
  server_rss_[server] = std::max(server_rss_[server], part.peak_rss_bytes());
}

double RunReport::TrainingSeconds(int64_t now_us) const {
  if (!started_) return 0;
  const int64_t until_us = evaluating_since_us_ >= 0 ? evaluating_since_us_ : now_us;
  return static_cast<double>(until_us - start_us_ - evaluated_us_) * 1e-6;
}

void RunReport::CutReached(uint64_t step, int64_t now_us) { seconds_at_[step] = TrainingSeconds(now_us); }

void RunReport::SetEvaluating(bool evaluating, int64_t now_us) {
  if (evaluating && evaluating_since_us_ < 0) {
    evaluating_since_us_ = now_us;
  } else if (!evaluating && evaluating_since_us_ >= 0) {
    evaluated_us_ += now_us - evaluating_since_us_;
    evaluating_since_us_ = -1;
  }
}

Ledger RunReport::LiveLedger() const {
  Ledger sum;
  for (const Progress& worker : workers_) AddLedger(worker.ledger(), &sum);
  return sum;
}

absl::Status RunReport::Committed(const Manifest& manifest, int64_t now_us) {
  const std::vector<LaneState> lanes(manifest.lane().begin(), manifest.lane().end());
  HEARTH_RETURN_IF_ERROR(CheckLedger(SumOfLedgers(lanes)));
  SetLanes(lanes);
  manifest_ = manifest;
  manifest_.clear_log_file();
  manifest_.clear_lane();
  manifest_.clear_task_metric();
  manifest_.clear_file();
  has_snapshot_ = true;
  evaluations_.assign(manifest.evaluation().begin(), manifest.evaluation().end());
  dense_parameters_ = manifest.dense_parameters();
  ++snapshots_;
  if (const auto found = seconds_at_.find(manifest.step()); found != seconds_at_.end()) seconds_ = found->second;
  seconds_at_.erase(seconds_at_.begin(), seconds_at_.upper_bound(manifest.step()));
  Warn(WarningsSoFar(reading_));
  for (const Evaluation& evaluation : evaluations_) Warn(WarningsOfEvaluation(evaluation));
  const bool epoch_is_over =
      std::all_of(lanes_.begin(), lanes_.end(), [](const LaneState& lane) { return lane.cursor().end_of_epoch(); });
  if (manifest.job_finished() || epoch_is_over) Warn(WarningsAtEnd(options_.job, lanes_));
  if (curves_ != nullptr) {
    curves_->OnSnapshot();
    if (told_) HEARTH_RETURN_IF_ERROR(curves_->OnTraining(Figures(now_us), LiveLedger()));
    std::vector<Evaluation> news;
    for (const Evaluation& evaluation : evaluations_) {
      if (evaluation.step() == manifest.step()) news.push_back(evaluation);
    }
    HEARTH_RETURN_IF_ERROR(curves_->OnEvaluations(news));
  }
  return Write("running", 0, "");
}

absl::Status RunReport::Evaluated(const std::vector<Evaluation>& evaluations) {
  evaluations_ = evaluations;
  for (const Evaluation& evaluation : evaluations_) Warn(WarningsOfEvaluation(evaluation));
  if (curves_ != nullptr) HEARTH_RETURN_IF_ERROR(curves_->OnEvaluations(evaluations_));
  return Write("running", 0, "");
}

void RunReport::SetLanes(const std::vector<LaneState>& lanes) {
  lanes_ = lanes;
  ledger_ = SumOfLedgers(lanes);
  reading_ = SumOfReadings(lanes);
}

void RunReport::Warn(const std::vector<Warning>& warnings) {
  for (const Warning& warning : warnings) {
    const bool told = std::any_of(warnings_.begin(), warnings_.end(),
                                  [&](const Warning& known) { return known.subject == warning.subject; });
    if (told) continue;
    warnings_.push_back(warning);
    spdlog::info("event=warning text={}", Quoted(warning.line));  // what the log warns of goes to standard error too
    if (options_.output.progress == nullptr) continue;
    *options_.output.progress << (drawing_ ? "\r\x1b[K" : "") << "hearth: warning: " << warning.line << std::endl;
    drawing_ = false;
  }
}

absl::Status RunReport::Write(const std::string& status, int code, const std::string& reason) {
  absl::Status written = WriteFileAtomically(JoinPath(options_.dir, "run.json"), ToJson(status, code, reason));
  if (!options_.history || status == "running") return written;
  HistoryEntry end = EntryOf(HistoryEntry::Kind::kEnd);
  end.status = status;
  end.code = code;
  end.reason = reason;
  written.Update(AppendHistory(options_.dir, std::move(end)));
  return written;
}

absl::Status RunReport::TellStart(const std::vector<std::string>& changes) {
  if (!options_.history) return absl::OkStatus();
  HistoryEntry start = EntryOf(HistoryEntry::Kind::kStart);
  start.servers = options_.servers;
  start.workers = options_.workers;
  start.restarts = options_.restarts;
  start.changes = changes;
  return AppendHistory(options_.dir, std::move(start));
}

// With what is known at the newest snapshot.
HistoryEntry RunReport::EntryOf(HistoryEntry::Kind kind) const {
  HistoryEntry entry;
  entry.kind = kind;
  entry.state = StateOf(manifest_.step(), ledger_.trained(), evaluations_);
  if (!publication_.has_value()) return entry;
  entry.state->published_step = publication_->step;
  entry.state->published_base = publication_->base;
  entry.state->published_seq = publication_->seq;
  return entry;
}

std::string RunReport::ToJson(const std::string& status, int code, const std::string& reason) const {
  const Job& job = options_.job;
  Json json;
  json["schema"] = 1;
  json["job"] = job.name();
  json["status"] = status;
  json["exit"] = {{"code", code}, {"reason", reason}};
  json["commit"] = BuildCommit();
  json["seed"] = job.seed();
  json["ranks"] = {{"ps", options_.servers}, {"worker", options_.workers}};
  json["lanes"] = options_.lanes;
  json["staleness"] = job.training().staleness();
  json["device"] = device_;
  json["steps"] = manifest_.step();
  json["learning_rate"] = LearningRatesJson(job, std::max<uint64_t>(manifest_.step(), 1));
  json["seconds"] = seconds_;
  json["samples_per_s"] =
      OrNull(Ratio(static_cast<double>(ledger_.trained() - std::min(ledger_.trained(), trained_at_start_)), seconds_));
  json["restarts"] = options_.restarts;
  json["snapshots"] = snapshots_;
  json["model_hash"] = has_snapshot_ ? Json(absl::StrFormat("%016x", manifest_.model_hash())) : Json(nullptr);
  json["samples"] = {{"read", ledger_.read()},
                     {"trained", ledger_.trained()},
                     {"rejected", ledger_.rejected()},
                     {"filtered", ledger_.filtered()}};

  AddReading(job, reading_, &json);
  json["warnings"] = Json::array();
  for (const Warning& warning : warnings_) json["warnings"].push_back(warning.line);

  AddTimes(workers_, pull_seconds_, &json);
  json["tables"] = Json::object();
  for (const TableStats& table : manifest_.table()) json["tables"][table.name()] = TableJson(table);
  Json worker_rss = Json::array();
  for (const Progress& worker : workers_) worker_rss.push_back(worker.peak_rss_bytes());
  json["peak_rss_bytes"] = {{"scheduler", Json::array({PeakRssBytes()})}, {"ps", server_rss_}, {"worker", worker_rss}};
  json["dense_parameters"] = dense_parameters_;
  if (publication_.has_value()) json["export"] = PublicationJson(*publication_);
  json["tasks"] = Json::object();
  for (const Task& task : job.task()) json["tasks"][task.name()] = Json::object();
  for (const Evaluation& evaluation : evaluations_) {
    for (const Evaluation::Task& task : evaluation.task())
      json["tasks"][task.name()][evaluation.split()] = TaskJson(task);
  }
  json["best"] = manifest_.has_best() ? BestJson(manifest_.best()) : Json(nullptr);
  json["progressive"] = newest_window_.has_value() ? WindowJson(job, *newest_window_) : Json(nullptr);
  json["diagnostics"] = nullptr;
  for (const Evaluation& evaluation : evaluations_) {
    if (evaluation.has_diagnostics()) json["diagnostics"] = DiagnosticsJson(evaluation);
  }
  return json.dump(1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace) + "\n";
}

ProgressFigures RunReport::Figures(int64_t now_us) const {
  ProgressFigures figures;
  double fractions = 0;
  int told = 0;
  for (const Progress& worker : workers_) {
    figures.step = std::max(figures.step, worker.step());
    if (!worker.has_log_fraction()) continue;
    fractions += worker.log_fraction();
    ++told;
  }
  const Ledger ledger = LiveLedger();
  const double seconds = TrainingSeconds(now_us);
  if (told > 0) {
    figures.fraction = fractions / told;
    const double gained = *figures.fraction - *first_fraction_;
    const double taken = seconds - first_fraction_seconds_;
    if (gained > 0) figures.remaining_s = taken * std::max(0.0, 1 - *figures.fraction) / gained;
  }
  figures.samples_per_s = Ratio(static_cast<double>(ledger.trained() - std::min(ledger.trained(), previous_.trained)),
                                seconds - previous_.seconds)
                              .value_or(0);
  const std::vector<TaskMetric> metrics = MetricsOfWindow();
  figures.loss = MeanLoss(metrics);
  for (size_t t = 0; t < metrics.size() && t < static_cast<size_t>(options_.job.task_size()); ++t) {
    figures.auc.emplace_back(options_.job.task(static_cast<int>(t)).name(), StreamingAuc(metrics[t]));
  }
  double hits = 0;
  double reads = 0;
  for (const TableStats& table : manifest_.table()) {
    hits += static_cast<double>(table.memory_hits());
    reads += static_cast<double>(table.memory_hits() + table.memory_misses());
  }
  figures.hit_ratio = Ratio(hits, reads);
  if (options_.tails) figures.files_behind = files_behind_;
  figures.bad_records = ledger.rejected();
  figures.evaluating = evaluating_since_us_ >= 0;
  return figures;
}

std::vector<TaskMetric> RunReport::MetricsOfWindow() const {
  if (!newest_window_.has_value()) return {};
  return {newest_window_->task().begin(), newest_window_->task().end()};
}

absl::Status RunReport::Show(int64_t now_us) {
  if (now_us < next_show_us_) return absl::OkStatus();
  const RunOutput& output = options_.output;
  if (output.progress != nullptr) {
    const std::string line =
        FormatProgress(Figures(now_us), output.is_terminal, output.is_terminal ? output.columns : 0);
    if (!output.is_terminal) {
      *output.progress << line << std::endl;
    } else {
      *output.progress << '\r' << (output.colour ? "\x1b[36m" : "") << line << (output.colour ? "\x1b[0m" : "")
                       << "\x1b[K" << std::flush;
      drawing_ = true;
    }
  }
  if (now_us >= next_turn_us_) {
    // Before a worker has told of a step there is nothing to draw: 0 samples a second at an old step is no figure.
    if (curves_ != nullptr && told_) HEARTH_RETURN_IF_ERROR(curves_->OnTraining(Figures(now_us), LiveLedger()));
    TurnRate(now_us);
  }
  next_show_us_ = output.is_terminal ? std::min(now_us + kRedrawUs, next_turn_us_) : next_turn_us_;
  return absl::OkStatus();
}

void RunReport::TurnRate(int64_t now_us) {
  previous_ = current_;
  current_ = {TrainingSeconds(now_us), LiveLedger().trained()};
  next_turn_us_ = now_us + static_cast<int64_t>(std::max(0.1, options_.job.metrics().progress_seconds()) * 1e6);
}

void RunReport::EndLine() {
  if (!drawing_) return;
  *options_.output.progress << std::endl;
  drawing_ = false;
  next_show_us_ = kNever;
}

void RunReport::PrintTable() {
  EndLine();
  if (options_.output.table == nullptr) return;
  std::ostream& out = *options_.output.table;
  out << FormatTable(evaluations_);
  for (const Evaluation& evaluation : evaluations_) out << FormatDiagnostics(evaluation);
  if (manifest_.has_best()) {
    out << absl::StrFormat("best: step %d, %s %.6f\n", manifest_.best().step(), manifest_.best().of(),
                           manifest_.best().value());
  }
  out << LedgerLine(ledger_) << "\n" << FormatReading(reading_);
  out << "step " << manifest_.step() << "  model hash " << absl::StrFormat("%016x", manifest_.model_hash());
  if (seconds_ > 0) {
    const double trained = static_cast<double>(ledger_.trained() - std::min(ledger_.trained(), trained_at_start_));
    out << "  " << FormatCount(trained / seconds_) << " samples/s over " << FormatDuration(seconds_);
  }
  out << "  snapshots " << snapshots_ << "  restarts " << options_.restarts << std::endl;
}

std::string FormatTable(const std::vector<Evaluation>& evaluations) {
  std::vector<std::vector<std::string>> rows = {
      {"task", "split", "samples", "positives", "AUC", "GAUC", "log loss", "calibration"}};
  for (const Evaluation& evaluation : evaluations) {
    for (const Evaluation::Task& task : evaluation.task()) {
      rows.push_back({task.name(), evaluation.split(), absl::StrCat(task.samples()), absl::StrCat(task.positives()),
                      Cell(task.has_auc(), task.auc()), Cell(task.has_gauc(), task.gauc()),
                      Cell(task.has_log_loss(), task.log_loss()), Cell(task.has_calibration(), task.calibration())});
    }
  }
  return rows.size() == 1 ? "" : FormatRows(rows, {0, 1});
}

std::string FormatReading(const Reading& reading) {
  std::string text;
  std::vector<std::vector<std::string>> columns = {{"column", "unreadable", "example"}};
  for (const Reading::Column& column : reading.column()) {
    columns.push_back({column.name(), absl::StrCat(column.unreadable()), Quoted(column.example())});
  }
  if (columns.size() > 1) text += FormatRows(columns, {0, 2});
  std::vector<std::vector<std::string>> joins = {{"side table", "matched", "unmatched", "without key", "example"}};
  for (const Reading::Join& join : reading.join()) {
    joins.push_back({join.side_table(), absl::StrCat(join.matched()), absl::StrCat(join.unmatched()),
                     absl::StrCat(join.without_key()), join.has_example() ? Quoted(join.example()) : "-"});
  }
  if (joins.size() > 1) text += FormatRows(joins, {0, 4});
  return text;
}

std::string FormatDiagnostics(const Evaluation& evaluation) {
  struct Worst {
    std::optional<double> value;
    std::string where;
    // `badness`: how bad the value is; the first of equals stays.
    void See(bool defined, double seen, double badness, const std::string& at) {
      if (!defined || (value.has_value() && badness <= badness_)) return;
      value = seen;
      badness_ = badness;
      where = at;
    }
    double badness_ = 0;
  };
  Worst zeros, spread, weight, occupancy, own, gradient;
  const Evaluation::Diagnostics& from = evaluation.diagnostics();
  for (const auto& expert : from.expert())
    zeros.See(expert.has_zero_rate(), expert.zero_rate(), expert.zero_rate(), expert.name());
  for (const auto& gate : from.gate()) {
    spread.See(gate.has_deviation_max_ratio(), gate.deviation_max_ratio(), gate.deviation_max_ratio(), gate.name());
    weight.See(gate.has_weight_max(), gate.weight_max(), gate.weight_max(), gate.name());
  }
  for (const auto& shared : from.shared()) {
    occupancy.See(shared.has_occupancy(), shared.occupancy(), shared.occupancy(),
                  absl::StrCat(shared.name(), " (tasks using it: ", shared.tasks_using(), ")"));
  }
  for (const auto& task : from.task()) {
    const double share = task.own_weight_uniform() > 0 ? task.own_weight() / task.own_weight_uniform() : 0;
    own.See(task.has_own_weight() && task.own_weight_uniform() > 0, share, -share, task.name());
    gradient.See(task.has_own_gradient_ratio(), task.own_gradient_ratio(), -task.own_gradient_ratio(), task.name());
  }
  std::vector<std::vector<std::string>> rows = {{"anomaly", "figure", "worst", "of"}};
  const auto add = [&rows](const char* anomaly, const char* figure, const Worst& worst) {
    if (worst.value) rows.push_back({anomaly, figure, Cell(true, *worst.value), worst.where});
  };
  add("collapse", "zero rate", zeros);
  add("collapse", "deviation / median", spread);
  add("collapse", "mean gate weight", weight);
  add("degradation", "occupancy", occupancy);
  add("underfitting", "own weight / uniform", own);
  add("underfitting", "own gradient / shared", gradient);
  if (rows.size() == 1) return "";
  rows[0][3] =
      absl::StrCat("of (", from.records(), " records of ", evaluation.split(), ", step ", evaluation.step(), ")");
  return FormatRows(rows, {0, 1, 3});
}

}  // namespace hearth
