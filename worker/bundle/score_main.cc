// hearth-score BUNDLE --logs FILE…: scores raw logs from an export bundle alone. Started by `hearth score`.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <limits>
#include <string>

#include "absl/strings/str_format.h"
#include "common/artifact/bundle.h"
#include "common/artifact/bundle_chain.h"
#include "common/base/command_line.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "worker/bundle/score.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

struct Arguments {
  std::string bundle;
  std::vector<std::string> logs;
  std::string log;
  std::string predictions;
  bool int8 = false;
};

std::string Figure(bool has, double value) { return has ? absl::StrFormat("%.6f", value) : std::string("-"); }

absl::StatusOr<std::string> Score(const Arguments& arguments) {
  if (!arguments.predictions.empty()) HEARTH_RETURN_IF_ERROR(OutputFile::Check(arguments.predictions));
  HEARTH_RETURN_IF_ERROR(VerifyBundle(arguments.bundle).status());
  HEARTH_ASSIGN_OR_RETURN(const BundleLink link, ReadBundleLink(arguments.bundle));
  if (link.is_delta) {
    return absl::FailedPreconditionError(absl::StrCat(
        arguments.bundle, ": is a delta; merge it with its base first: hearth export --apply BASE DELTA --out BUNDLE"));
  }
  const auto form = arguments.int8 ? BundleScorer::Rows::kInt8 : BundleScorer::Rows::kFloat;
  HEARTH_ASSIGN_OR_RETURN(const auto scorer, BundleScorer::Open(arguments.bundle, form));
  HEARTH_ASSIGN_OR_RETURN(const ScoredLog scored, ChooseLog(scorer->job(), arguments.log, arguments.logs));
  const int64_t start_us = Env::Real()->NowUs();
  HEARTH_ASSIGN_OR_RETURN(PredictionRows rows,
                          ScoreLog(scorer.get(), scored, !arguments.predictions.empty(), scored.records_max + 1));
  HEARTH_RETURN_IF_ERROR(CheckRecordCount(scored.records_max, rows));
  HEARTH_RETURN_IF_ERROR(CheckRejected(scorer->job().limits(), rows));
  const double seconds = static_cast<double>(Env::Real()->NowUs() - start_us) / 1e6;
  std::vector<std::string> tasks;
  for (const Task& task : scorer->job().task()) tasks.push_back(task.name());
  const Evaluation evaluation = ScorePredictions(rows, tasks, scored.name, 0);
  if (!arguments.predictions.empty()) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<LogFile> files, ListLogFiles(scorer->job(), {scored.log}));
    HEARTH_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(arguments.predictions));
    HEARTH_RETURN_IF_ERROR(WritePredictions(file.get(), rows, tasks, files));
  }
  std::string text =
      absl::StrFormat("%d records, %.0f records/s\nread %d = scored %d + rejected %d + filtered %d\n", rows.records(),
                      static_cast<double>(rows.records()) / std::max(seconds, 1e-6), rows.read, rows.records(),
                      rows.rejected, rows.read - rows.rejected - rows.records());
  if (rows.rejected > 0) absl::StrAppend(&text, "rejected, for example: ", rows.bad_record, "\n");
  absl::StrAppendFormat(&text, "%-20s %10s %10s %10s %10s\n", "task", "samples", "positives", "AUC", "GAUC");
  for (const Evaluation::Task& task : evaluation.task()) {
    absl::StrAppendFormat(&text, "%-20s %10d %10d %10s %10s\n", task.name(), task.samples(), task.positives(),
                          Figure(task.has_auc(), task.auc()), Figure(task.has_gauc(), task.gauc()));
  }
  return text;
}

int Main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Scores raw logs from an export bundle alone, and prints AUC by task.", "hearth score");
  app.set_version_flag("--version", BuildCommit());
  app.add_option("BUNDLE", arguments.bundle, "The bundle's folder")->required();
  app.add_option("--logs", arguments.logs, "Log files")->required();
  app.add_option("--log", arguments.log, "Split or log whose schema they have; default: the first split");
  app.add_option("--predictions", arguments.predictions, "Write predictions there; zstd where the name ends in .zst");
  app.add_flag("--int8", arguments.int8, "Use the int8 rows");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  const absl::StatusOr<std::string> report = Score(arguments);
  const int code = Finish("hearth score", report);
  if (code == kExitOk) SayNext("hearth train with more data or epochs, then hearth export RUN --since STEP --out OUT");
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::HoldStandardDescriptors();
  return hearth::Main(argc, argv);
}
