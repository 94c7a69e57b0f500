#include "worker/bundle/export_bundle.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/artifact/bundle.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "model/batch/batch.h"
#include "model/export/export_manifest.h"
#include "worker/bundle/golden_records.h"
#include "worker/bundle/score.h"
#include "worker/dense/dense_replica.h"
#include "worker/log/delimited.h"
#include "worker/log/json_lines.h"
#include "worker/log/log_reader.h"
#include "worker/log/record_plan.h"
#ifdef HEARTH_ONNX
#include "model/export/onnx_run.h"
#endif

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kSampledRecordsMax = 200'000;  // the head of the log that golden records and int8's AUC come from
constexpr double kParityMax = 1e-6;               // of a probability, bundle against snapshot
constexpr double kGraphParityMax = 1e-5;          // likewise, the graph: BatchNorm is folded, sums have another order
constexpr size_t kGraphRowsMax = 256;             // run at once

// The columns of the samples' records, as text; samples of one file, in its order.
absl::Status ReadRaw(const Job& job, const Log& log, const std::string& path, absl::Span<GoldenRecord*> samples) {
  RecordSplitter::Options options;
  HEARTH_ASSIGN_OR_RETURN(options.delimiter, DelimiterOf(log.delimiter(), "log"));
  options.multiline = log.multiline_records();
  options.record_bytes_max = job.limits().record_bytes_max();
  HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<TextSource> source, OpenTextSource(path));
  RecordSplitter splitter(std::move(source), 0, options);
  const bool json = log.format() == Log::JSON_LINES;
  std::vector<std::string> columns(log.column().begin(), log.column().end());
  const std::vector<JsonFields::Column> read = RecordPlan::JsonColumns(job, log, "");
  const JsonFields json_fields(read);
  JsonParser parser;
  if (json) {
    columns.clear();
    for (const JsonFields::Column& column : read) columns.push_back(column.path);
  }
  bool in_header = !json && log.header();
  std::string text, scratch;
  std::vector<absl::string_view> fields;
  for (size_t next = 0; next < samples.size();) {
    text.clear();
    RecordText record;
    HEARTH_ASSIGN_OR_RETURN(const bool more, splitter.Next(&text, &record));
    if (!more) return absl::DataLossError(absl::StrCat(path, ": changed while it was read"));
    if (!in_header && record.offset != samples[next]->offset) continue;
    const absl::string_view bare = record.offset == 0 ? StripByteOrderMark(text) : absl::string_view(text);
    if (json) {
      static_cast<void>(json_fields.Split(bare, &parser, &fields, &scratch));
    } else {
      SplitFields(bare, options.delimiter, &fields, &scratch);
    }
    if (in_header) {
      columns.clear();
      for (const absl::string_view field : fields) columns.emplace_back(field);
      in_header = false;
      continue;
    }
    for (size_t i = 0; i < columns.size() && i < fields.size(); ++i) {
      samples[next]->raw.emplace_back(columns[i], fields[i]);
    }
    ++next;
  }
  return absl::OkStatus();
}

absl::Status ReadRaw(const Job& job, const Log& log, std::vector<GoldenRecord>* samples) {
  for (size_t begin = 0; begin < samples->size();) {
    const uint32_t file = (*samples)[begin].file;
    std::vector<GoldenRecord*> of_file;
    for (; begin < samples->size() && (*samples)[begin].file == file; ++begin) of_file.push_back(&(*samples)[begin]);
    const std::string path = ResolvePath(job, log.path(static_cast<int>(file)));
    HEARTH_RETURN_IF_ERROR(ReadRaw(job, log, path, absl::MakeSpan(of_file)));
  }
  return absl::OkStatus();
}

// The graph's input for one record: rows pooled slot by slot, then the dense features.
std::vector<float> InputOf(const Job& job, const FeatureLayout& layout, const GoldenRecord& sample,
                           const ExportedRows& rows) {
  std::vector<float> input(static_cast<size_t>(layout.width), 0.0f);
  for (size_t slot = 0; slot < sample.signs.size(); ++slot) {
    const FeatureLayout::SlotPlace& place = layout.slots[slot];
    float* const out = input.data() + place.offset;
    for (const uint64_t sign : sample.signs[slot]) {
      const auto found = rows.find(sign);
      for (int d = 0; found != rows.end() && d < place.dim; ++d) out[d] += found->second[static_cast<size_t>(d)];
    }
    if (job.slot(static_cast<int>(slot)).pooling() != Slot::MEAN || sample.signs[slot].empty()) continue;
    for (int d = 0; d < place.dim; ++d) out[d] *= 1.0f / static_cast<float>(sample.signs[slot].size());
  }
  std::copy(sample.dense.begin(), sample.dense.end(), input.begin() + layout.dense_offset);
  return input;
}

// Logits of the samples by the trainer itself, from the snapshot.
absl::StatusOr<std::vector<float>> PredictFromSnapshot(const ExportSource& source,
                                                       const std::vector<GoldenRecord>& samples,
                                                       const ExportedRows& rows) {
  const std::vector<double> base_rates(static_cast<size_t>(source.job.task_size()), 0.5);  // overwritten by Restore
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<DenseReplica> replica, DenseReplica::Create(source.job, base_rates));
  HEARTH_RETURN_IF_ERROR(replica->Restore(JoinPath(source.folder, "dense.safetensors")));
  const std::unique_ptr<Batch> batch = BatchOf(source.job, samples);
  for (RowGroup& group : batch->groups) {
    group.rows.assign(group.unique.size() * group.dim, 0.0f);
    for (size_t i = 0; i < group.unique.size(); ++i) {
      const auto found = rows.find(group.unique[i]);
      if (found != rows.end())
        std::copy(found->second.begin(), found->second.end(), group.rows.begin() + i * group.dim);
    }
  }
  return replica->Predict(*batch);
}

absl::Status WriteGolden(const std::string& path, const Job& job, const std::vector<GoldenRecord>& samples,
                         const ExportedRows& rows, const std::vector<float>& logits) {
  const FeatureLayout layout = MakeFeatureLayout(job);
  std::string lines;
  for (size_t i = 0; i < samples.size(); ++i) {
    Json line;
    line["raw"] = Json::object();
    for (const auto& [column, text] : samples[i].raw) {
      line["raw"][column] = text;
      const Json exact = {TextJson(column), TextJson(text)};
      if (!exact[0].is_string() || !exact[1].is_string()) line["raw_bytes"].push_back(exact);
    }
    line["signs"] = Json::object();
    for (int slot = 0; slot < job.slot_size(); ++slot) line["signs"][job.slot(slot).name()] = samples[i].signs[slot];
    line["input"] = InputOf(job, layout, samples[i], rows);
    line["p"] = Json::object();
    for (int t = 0; t < job.task_size(); ++t) {
      line["p"][job.task(t).name()] = ProbabilityOf(logits[i * job.task_size() + t]);
    }
    // In `raw` a byte that is no UTF-8 becomes U+FFFD, for people; `raw_bytes` has it as it is.
    absl::StrAppend(&lines, line.dump(-1, ' ', false, Json::error_handler_t::replace), "\n");
  }
  return WriteFileAtomically(path, lines);
}

// The bundle's own predictions against the snapshot's, over the golden records.
absl::StatusOr<Json> CompareWithBundle(const std::string& folder, const Job& job,
                                       const std::vector<GoldenRecord>& samples, const std::vector<float>& logits) {
  HEARTH_ASSIGN_OR_RETURN(const auto scorer, BundleScorer::Open(folder, BundleScorer::Rows::kFloat));
  const std::unique_ptr<Batch> batch = BatchOf(job, samples);
  HEARTH_ASSIGN_OR_RETURN(const std::vector<float> again, scorer->Predict(batch.get()));
  double difference_max = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double difference = std::fabs(ProbabilityOf(logits[i]) - ProbabilityOf(again[i]));
    if (!(difference <= kParityMax)) {
      return absl::InternalError(absl::StrCat("the bundle read back predicts ", ProbabilityOf(again[i]),
                                              " where the snapshot predicts ", ProbabilityOf(logits[i]),
                                              "; nothing was exported"));
    }
    difference_max = std::max(difference_max, difference);
  }
  return Json{{"records", samples.size()}, {"difference_max", difference_max}, {"bound", kParityMax}};
}

#ifdef HEARTH_ONNX
// The graph's probabilities, run from the file that will be served, against the trainer's.
absl::StatusOr<Json> CompareWithGraph(const std::string& path, const Job& job, const std::vector<GoldenRecord>& samples,
                                      const ExportedRows& rows, const std::vector<float>& logits) {
  HEARTH_ASSIGN_OR_RETURN(const std::string graph, ReadFile(path));
  const FeatureLayout layout = MakeFeatureLayout(job);
  double difference_max = 0;
  for (size_t begin = 0; begin < samples.size(); begin += kGraphRowsMax) {
    const size_t count = std::min(kGraphRowsMax, samples.size() - begin);
    std::vector<float> features;
    for (size_t i = begin; i < begin + count; ++i) {
      const std::vector<float> input = InputOf(job, layout, samples[i], rows);
      features.insert(features.end(), input.begin(), input.end());
    }
    HEARTH_ASSIGN_OR_RETURN(const auto outputs, RunOnnxModel(graph, features, static_cast<int64_t>(count)));
    for (int t = 0; t < job.task_size(); ++t) {
      const auto found = outputs.find("p_" + job.task(t).name());
      if (found == outputs.end()) {
        return absl::InternalError(absl::StrCat("the graph has no output for task ", job.task(t).name()));
      }
      for (size_t i = 0; i < count; ++i) {
        const double own =
            ProbabilityOf(logits[(begin + i) * static_cast<size_t>(job.task_size()) + static_cast<size_t>(t)]);
        const double difference = std::fabs(own - static_cast<double>(found->second[i]));
        if (!(difference <= kGraphParityMax)) {
          return absl::InternalError(absl::StrCat("the graph computes ", found->second[i], " for task ",
                                                  job.task(t).name(), " of golden record ", begin + i,
                                                  " where the trainer predicts ", own, "; nothing was exported"));
        }
        difference_max = std::max(difference_max, difference);
      }
    }
  }
  return Json{{"records", samples.size()}, {"difference_max", difference_max}, {"bound", kGraphParityMax}};
}
#endif

// AUC by task with float rows and with int8 rows, over the log's head.
absl::StatusOr<Json> MeasureInt8(const std::string& folder, const ScoredLog& scored) {
  std::vector<Evaluation> evaluations;
  for (const BundleScorer::Rows form : {BundleScorer::Rows::kFloat, BundleScorer::Rows::kInt8}) {
    HEARTH_ASSIGN_OR_RETURN(const auto scorer, BundleScorer::Open(folder, form));
    std::vector<std::string> tasks;
    for (const Task& task : scorer->job().task()) tasks.push_back(task.name());
    HEARTH_ASSIGN_OR_RETURN(const PredictionRows rows,
                            ScoreLog(scorer.get(), scored, /*keep_user_text=*/false, kSampledRecordsMax));
    evaluations.push_back(ScorePredictions(rows, tasks, scored.name, 0));
  }
  Json tasks = Json::object();
  for (int t = 0; t < evaluations[0].task_size(); ++t) {
    const Evaluation::Task& with_float = evaluations[0].task(t);
    const Evaluation::Task& with_int8 = evaluations[1].task(t);
    const bool known = with_float.has_auc() && with_int8.has_auc();
    tasks[with_float.name()] = {{"samples", with_float.samples()},
                                {"auc_float32", known ? Json(with_float.auc()) : Json(nullptr)},
                                {"auc_int8", known ? Json(with_int8.auc()) : Json(nullptr)},
                                {"auc_loss", known ? Json(with_float.auc() - with_int8.auc()) : Json(nullptr)}};
  }
  return Json{{"log", scored.name}, {"tasks", tasks}};
}

// Everything but the last rename, in `folder`.
absl::StatusOr<std::string> Fill(const ExportSource& source, const ExportOptions& options, const std::string& folder) {
  const Job& job = source.job;
  std::vector<GoldenRecord> samples;
  ExportedRows rows;
  ScoredLog scored;
  if (options.golden > 0) {
    HEARTH_ASSIGN_OR_RETURN(scored, ChooseLog(job, options.log, {}));
    for (std::string& path : *scored.log.mutable_path()) path = ResolvePath(job, path);
    auto sampled = SampleRecords(job, scored, static_cast<size_t>(options.golden), kSampledRecordsMax);
    if (!sampled.ok()) {
      return Annotate(sampled.status(),
                      "golden records (--golden 0 does without, --data-dir says where the files are)");
    }
    samples = *std::move(sampled);
    if (samples.empty()) {
      return absl::NotFoundError(absl::StrCat("log \"", scored.name,
                                              "\" has no valid record for --golden; name another with "
                                              "--log, or give --golden 0"));
    }
    HEARTH_RETURN_IF_ERROR(ReadRaw(job, scored.log, &samples));
    for (const GoldenRecord& sample : samples) {
      for (const std::vector<uint64_t>& signs : sample.signs) {
        for (const uint64_t sign : signs) rows[sign];
      }
    }
  }
  HEARTH_RETURN_IF_ERROR(ExportFeatures(source, folder));
  HEARTH_RETURN_IF_ERROR(ExportSideTables(source, folder));
  HEARTH_RETURN_IF_ERROR(ExportDense(source, options.formats, folder));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<ExportedTable> tables,
                          ExportTables(source, options.formats, folder, &rows));

  Json json = ExportManifest(source, options.formats, tables);
  json["parity"] = nullptr;
  json["graph_parity"] = nullptr;
  if (!samples.empty()) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<float> logits, PredictFromSnapshot(source, samples, rows));
    HEARTH_RETURN_IF_ERROR(WriteGolden(JoinPath(folder, "golden.jsonl"), job, samples, rows, logits));
#ifdef HEARTH_ONNX
    if (options.formats.onnx) {
      HEARTH_ASSIGN_OR_RETURN(json["graph_parity"],
                              CompareWithGraph(OnnxPath(source, folder), job, samples, rows, logits));
    }
#endif
    const bool whole = options.formats.safetensors && (options.formats.hps || options.formats.npy);
    if (whole) {
      HEARTH_ASSIGN_OR_RETURN(json["parity"], CompareWithBundle(folder, job, samples, logits));
    }
    if (whole && options.formats.int8) {
      HEARTH_ASSIGN_OR_RETURN(json["int8"], MeasureInt8(folder, scored));
    }
  }
  HEARTH_ASSIGN_OR_RETURN(const size_t files, FinishExport(std::move(json), folder));
  uint64_t row_count = 0;
  for (const ExportedTable& table : tables) row_count += table.rows;
  return absl::StrCat("step ", source.manifest.step(), ", ", row_count, " rows, ", samples.size(), " golden records, ",
                      files, " files\n");
}

}  // namespace

absl::StatusOr<std::string> ExportBundle(const ExportOptions& options) {
  HEARTH_ASSIGN_OR_RETURN(const ExportSource source,
                          OpenExportSource(options.snapshot, options.data_dir, options.best));
  if (const absl::Status valid = ValidateJob(source.job); !valid.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat(JoinPath(source.folder, "MANIFEST"), ": this build refuses its job: ", valid.message(),
                     "; export it with the Hearth that wrote it, commit ", source.manifest.commit()));
  }
  std::string report;
  HEARTH_RETURN_IF_ERROR(PublishFolder(options.out, [&](const std::string& folder) -> absl::Status {
    absl::StatusOr<std::string> filled = Fill(source, options, folder);
    if (!filled.ok()) return source.hold.Explain(filled.status());
    report = *std::move(filled);
    return absl::OkStatus();
  }));
  return absl::StrCat(options.out, ": ", report);
}

}  // namespace hearth
