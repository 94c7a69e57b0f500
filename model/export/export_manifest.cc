#include "model/export/export_manifest.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/artifact/bundle.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::pair<const char*, bool ExportFormats::*> kFormatNames[] = {
    {"onnx", &ExportFormats::onnx}, {"triton", &ExportFormats::triton},           {"hps", &ExportFormats::hps},
    {"npy", &ExportFormats::npy},   {"safetensors", &ExportFormats::safetensors}, {"int8", &ExportFormats::int8}};

Json FormatNames(const ExportFormats& formats) {
  Json names = Json::array();
  for (const auto& [name, field] : kFormatNames) {
    if (formats.*field) names.push_back(name);
  }
  return names;
}

}  // namespace

Json TextJson(absl::string_view text) {
  const Json json = std::string(text);
  const std::string written = json.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
  if (Json::parse(written, nullptr, /*allow_exceptions=*/false) == json) return json;
  return {{"base64", absl::Base64Escape(text)}};
}

std::string DumpJson(const Json& json) {
  return json.dump(1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

Json ExportManifest(const ExportSource& source, const ExportFormats& formats,
                    const std::vector<ExportedTable>& tables) {
  const Manifest& manifest = source.manifest;
  uint64_t trained = 0;
  Json offsets = Json::array();
  for (const LaneState& lane : manifest.lane()) {
    const Cursor& at = lane.cursor();
    trained += lane.ledger().trained();
    offsets.push_back({{"lane", at.lane()},
                       {"epoch", at.epoch()},
                       {"window", at.window()},
                       {"record", at.record()},
                       {"file", at.file()},
                       {"block", at.block()},
                       {"end_of_epoch", at.end_of_epoch()}});
  }
  Json files = Json::array();
  for (const LogFile& file : manifest.log_file()) {
    files.push_back({{"number", file.number()}, {"path", file.path()}, {"bytes", file.bytes()}});
  }
  Json json;
  json["schema"] = 1;
  json["model"] = ExportModelName(source.job);
  json["version"] = manifest.step();
  json["base_version"] = nullptr;
  json["train_step"] = manifest.step();
  json["samples"] = trained;
  json["log_offsets"] = {{"files", files}, {"lanes", offsets}};
  json["config_hash"] = absl::StrFormat("%016x", JobHash(source.job));
  json["model_hash"] = absl::StrFormat("%016x", manifest.model_hash());
  json["commit"] = manifest.commit();
  json["formats"] = FormatNames(formats);
  json["tables"] = Json::array();
  for (const ExportedTable& table : tables) {
    json["tables"].push_back({{"name", table.name},
                              {"folder", "embeddings/" + ExportTableFolder(table.name)},
                              {"dim", table.dim},
                              {"dtype", "float32"},
                              {"rows", table.rows},
                              {"weights_hash", absl::StrFormat("%016x", table.weights_hash)}});
  }
  json["metrics"] = Json::object();
  for (const Evaluation& evaluation : manifest.evaluation()) {
    for (const Evaluation::Task& task : evaluation.task()) {
      const auto figure = [](bool has, double value) { return has ? Json(value) : Json(nullptr); };
      json["metrics"][task.name()][evaluation.split()] = {{"step", evaluation.step()},
                                                          {"samples", task.samples()},
                                                          {"positives", task.positives()},
                                                          {"auc", figure(task.has_auc(), task.auc())},
                                                          {"gauc", figure(task.has_gauc(), task.gauc())},
                                                          {"log_loss", figure(task.has_log_loss(), task.log_loss())}};
    }
  }
  return json;
}

absl::StatusOr<Json> ReadExportManifest(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadBundleManifest(folder));
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_object()) return json;
  return absl::DataLossError(absl::StrCat(JoinPath(folder, kBundleManifest), ": is no JSON object; export it again"));
}

absl::StatusOr<ExportFormats> FormatsOf(const Json& manifest, const std::string& folder) {
  ExportFormats formats;
  const Json names = manifest.value("formats", Json());
  if (!names.is_array()) {
    return absl::FailedPreconditionError(absl::StrCat(
        JoinPath(folder, kBundleManifest), ": does not say its formats: an older build wrote it; export it again"));
  }
  for (const auto& [name, field] : kFormatNames) {
    for (const Json& one : names) formats.*field |= one == name;
  }
  return formats;
}

absl::StatusOr<size_t> FinishExport(Json manifest, const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleFile> files, DescribeBundle(folder));
  manifest["files"] = Json::array();
  for (const BundleFile& file : files) {
    manifest["files"].push_back({{"path", file.path}, {"bytes", file.bytes}, {"sha256", file.sha256}});
  }
  HEARTH_RETURN_IF_ERROR(WriteBundleManifest(folder, DumpJson(manifest) + "\n"));
  HEARTH_RETURN_IF_ERROR(VerifyBundle(folder).status());
  return files.size();
}

}  // namespace hearth
