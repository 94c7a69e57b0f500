// What a run leaves for people and tools: DIR/run.json (formats of docs/FORMATS.md), progress while it trains, the
// table at its end. Knows nothing of how a run goes on; time is given, never asked for.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/artifact/history.h"
#include "common/base/env.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "scheduler/curves.h"
#include "scheduler/progress.h"
#include "scheduler/publisher.h"
#include "scheduler/reading_report.h"

namespace hearth {

struct RunOutput {
  std::ostream* table = nullptr;     // the final table; standard output
  std::ostream* progress = nullptr;  // standard error
  bool is_terminal = false;          // progress is one line that is drawn again and again
  bool colour = false;
  size_t columns = 0;  // of the terminal; 0: no bound
};
// How progress is drawn. `told`: HEARTH_TERMINAL_COLUMNS, the front command's word on the terminal behind the pipe that
// mpirun makes of our stderr (null: none); `own`: columns of the terminal that our stderr is itself (none: it is none);
// `no_colour`: NO_COLOR. A terminal that does not know its width, 0, gets 80 columns.
void SetTerminal(const char* told, std::optional<size_t> own, const char* no_colour, RunOutput* output);

// One thread.
class RunReport {
 public:
  struct Options {
    Job job;  // effective
    std::string dir;
    uint32_t servers = 1;
    uint32_t workers = 1;
    uint32_t lanes = 1;
    uint32_t restarts = 0;
    bool tails = false;    // progress shows the lag
    bool history = false;  // starts and ends go into DIR/history.jsonl
    RunOutput output;
  };
  explicit RunReport(Options options);

  // Goes on from a snapshot, and from what DIR/run.json says of earlier attempts. Before anything else, if at all.
  void Resume(const Manifest& manifest);
  // Whether run.json, as Resume found it, says that the job is finished with that snapshot's model.
  bool says_finished() const { return says_finished_; }
  // Training begins: `ledgers` holds each worker's totals.
  void Start(const std::vector<Ledger>& ledgers, int64_t now_us);
  // Writes down that a start of the run begins to train, of a job that was another one before it in `changes`.
  absl::Status TellStart(const std::vector<std::string>& changes);

  void set_curves(Curves* curves) { curves_ = curves; }  // outlive the report
  void set_dense_parameters(uint64_t count) { dense_parameters_ = count; }
  void set_device(std::string device) { device_ = std::move(device); }
  void set_files_behind(uint64_t count) { files_behind_ = count; }
  void set_publication(PublicationFigures figures) { publication_ = std::move(figures); }
  absl::Status OnProgress(uint32_t worker, const Progress& progress, int64_t now_us);
  void OnServer(const ServerAtCut& part, uint32_t server);
  // All lanes are at the cut of `step`. Seconds and samples per second are those of training up to a committed cut.
  void CutReached(uint64_t step, int64_t now_us);
  // Evaluation is no training: its time counts for nothing.
  void SetEvaluating(bool evaluating, int64_t now_us);
  // Totals of all lanes as the workers last told.
  Ledger LiveLedger() const;

  // A snapshot was committed (or, in an evaluation of a snapshot, its splits were evaluated): rewrites run.json.
  absl::Status Committed(const Manifest& manifest, int64_t now_us);
  absl::Status Evaluated(const std::vector<Evaluation>& evaluations);
  // Rewrites run.json. `status`: running, finished, saved, failed; all but the first are ends.
  absl::Status Write(const std::string& status, int code, const std::string& reason);

  // Shows progress when that is due.
  absl::Status Show(int64_t now_us);
  int64_t next_show_us() const { return next_show_us_; }
  // Ends the line that is being drawn, and prints the table: figures of each task and split, the ledger, the model.
  void PrintTable();
  void EndLine();
  // Tells each of them that was not told before: on standard error, in the log and in run.json.
  void Warn(const std::vector<Warning>& warnings);
  // What the end's cut holds, where it can not be committed: for run.json.
  void SetLanes(const std::vector<LaneState>& lanes);

 private:
  double TrainingSeconds(int64_t now_us) const;
  HistoryEntry EntryOf(HistoryEntry::Kind kind) const;
  ProgressFigures Figures(int64_t now_us) const;
  void TurnRate(int64_t now_us);
  std::vector<TaskMetric> MetricsOfWindow() const;
  std::string ToJson(const std::string& status, int code, const std::string& reason) const;

  const Options options_;
  Curves* curves_ = nullptr;  // none: no curves

  // As of the last committed snapshot.
  Manifest manifest_;  // without log files, lanes and metrics
  bool has_snapshot_ = false;
  std::vector<LaneState> lanes_;
  Ledger ledger_;  // sums over lanes_
  Reading reading_;
  std::vector<Evaluation> evaluations_;  // newest of each split
  double seconds_ = 0;                   // of this attempt's training
  uint64_t trained_at_start_ = 0;
  uint64_t snapshots_ = 0;
  bool says_finished_ = false;
  uint64_t dense_parameters_ = 0;
  std::string device_ = "cpu";             // where the workers compute
  std::map<uint64_t, double> seconds_at_;  // cuts reached and not committed: training seconds

  // As last told.
  std::vector<Progress> workers_;  // without metrics and pull times
  std::vector<uint64_t> server_rss_;
  std::vector<double> pull_seconds_;  // a uniform sample of this attempt's pulls
  uint64_t pulls_ = 0;
  Random random_;
  std::optional<uint64_t> files_behind_;
  std::optional<PublicationFigures> publication_;  // of a job that publishes

  // Progress.
  bool started_ = false;
  bool told_ = false;  // a worker has told of a step of this start
  int64_t start_us_ = 0;
  int64_t evaluating_since_us_ = -1;  // -1: not evaluating
  int64_t evaluated_us_ = 0;
  std::optional<double> first_fraction_;  // the first that was told, and when
  double first_fraction_seconds_ = 0;
  ValidationWindows windows_;
  std::optional<ValidationWindow> newest_window_;
  struct Mark {
    double seconds = 0;
    uint64_t trained = 0;
  };
  Mark previous_;  // begin of the window before
  Mark current_;   // begin of this window
  int64_t next_show_us_ = kNever;
  int64_t next_turn_us_ = kNever;
  std::vector<Warning> warnings_;
  bool drawing_ = false;  // the terminal's cursor stands behind a progress line
};

// The table alone, as PrintTable prints it.
std::string FormatTable(const std::vector<Evaluation>& evaluations);
// Columns that hold no numbers and what side tables were joined to; empty without either.
std::string FormatReading(const Reading& reading);
// The worst of each anomaly's figures, and where it is; empty without figures.
std::string FormatDiagnostics(const Evaluation& evaluation);

}  // namespace hearth
