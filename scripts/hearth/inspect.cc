#include "scripts/hearth/inspect.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/artifact/manifest.h"
#include "common/artifact/reading.h"
#include "common/artifact/safetensors.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/snapshot_reader.h"
#include "scripts/hearth/prepare.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

Ledger Total(const Manifest& manifest) {
  Ledger total;
  for (const LaneState& lane : manifest.lane()) AddLedger(lane.ledger(), &total);
  return total;
}

Json AsJson(const Ledger& ledger) {
  return {{"read", ledger.read()},
          {"trained", ledger.trained()},
          {"rejected", ledger.rejected()},
          {"filtered", ledger.filtered()}};
}

Json AsJson(const TableStats& table) {
  Json json = {{"rows", table.rows()},
               {"rows_in_memory", table.rows_in_memory()},
               {"rows_spilled", table.rows_spilled()},
               {"rows_expired", table.rows_expired()},
               {"rows_admitted", table.rows_admitted()},
               {"gradients_dropped", table.gradients_dropped()},
               {"bytes_memory", table.bytes_memory()},
               {"bytes_disk", table.bytes_disk()}};
  if (table.has_clock()) json["log_time_s"] = table.clock().time_s();
  return json;
}

Json AsJson(const LaneState& lane) {
  const Cursor& cursor = lane.cursor();
  return {{"lane", cursor.lane()},
          {"epoch", cursor.epoch()},
          {"window", cursor.window()},
          {"record", cursor.record()},
          {"file", cursor.file()},
          {"block", cursor.block()},
          {"end_of_segment", cursor.end_of_segment()},
          {"end_of_epoch", cursor.end_of_epoch()},
          {"ledger", AsJson(lane.ledger())}};
}

Json AsJson(const Evaluation::Task& task) {
  const auto number = [](bool has, double value) { return has ? Json(value) : Json(nullptr); };
  return {{"samples", task.samples()},
          {"positives", task.positives()},
          {"auc", number(task.has_auc(), task.auc())},
          {"gauc", number(task.has_gauc(), task.gauc())},
          {"gauc_users", task.gauc_users()},
          {"log_loss", number(task.has_log_loss(), task.log_loss())},
          {"calibration", number(task.has_calibration(), task.calibration())}};
}

Json AsJson(const Adoption& adoption) {
  return {{"step", adoption.step()},
          {"model_hash", absl::StrFormat("%016x", adoption.model_hash())},
          {"first_step", adoption.first_step()}};
}

Json AsJson(const std::string& folder, const Manifest& manifest, const std::string& job_name) {
  uint64_t bytes = 0;
  for (const FileEntry& file : manifest.file()) bytes += file.bytes();
  Json json;
  json["schema"] = 1;
  json["snapshot"] = folder;
  json["step"] = manifest.step();
  json["job"] = job_name;
  json["job_finished"] = manifest.job_finished();
  json["commit"] = manifest.commit();
  json["lanes"] = manifest.lanes();
  json["shards"] = manifest.shards();
  json["servers"] = manifest.servers();
  json["model_hash"] = absl::StrFormat("%016x", manifest.model_hash());
  json["rows_hash"] = absl::StrFormat("%016x", manifest.rows_hash());
  json["dense_hash"] = absl::StrFormat("%016x", manifest.dense_hash());
  json["dense_parameters"] = manifest.dense_parameters();
  json["files"] = manifest.file_size();
  json["bytes"] = bytes;
  json["samples"] = AsJson(Total(manifest));
  json["tables"] = Json::object();
  for (const TableStats& table : manifest.table()) json["tables"][table.name()] = AsJson(table);
  json["lane_states"] = Json::array();
  for (const LaneState& lane : manifest.lane()) json["lane_states"].push_back(AsJson(lane));
  json["adoption"] = manifest.has_adoption() ? AsJson(manifest.adoption()) : Json(nullptr);
  json["eras"] = Json::array();
  for (const JobEra& era : manifest.era()) {
    json["eras"].push_back({{"from_step", era.from_step()},
                            {"changes", std::vector<std::string>(era.change().begin(), era.change().end())}});
  }
  json["consumed"] = {{"files", manifest.consumed().files()}, {"bytes", manifest.consumed().bytes()}};
  json["log_files"] = Json::array();
  for (const LogFile& file : manifest.log_file()) {
    json["log_files"].push_back({{"number", file.number()}, {"path", file.path()}, {"bytes", file.bytes()}});
  }
  json["best"] = nullptr;
  if (manifest.has_best()) {
    const BestSnapshot& best = manifest.best();
    json["best"] = {
        {"step", best.step()}, {"of", best.of()}, {"value", best.value()}, {"without_gain", best.without_gain()}};
  }
  json["evaluations"] = Json::object();
  for (const Evaluation& evaluation : manifest.evaluation()) {
    Json split = {{"step", evaluation.step()},
                  {"read", evaluation.read()},
                  {"rejected", evaluation.rejected()},
                  {"tasks", Json::object()}};
    for (const Evaluation::Task& task : evaluation.task()) split["tasks"][task.name()] = AsJson(task);
    json["evaluations"][evaluation.split()] = split;
  }
  return json;
}

std::string Figure(bool has, double value) { return has ? absl::StrFormat("%.5f", value) : std::string("-"); }

std::string AsText(const std::string& folder, const Manifest& manifest, const std::string& job_name) {
  const Ledger total = Total(manifest);
  std::string text;
  absl::StrAppendFormat(&text, "snapshot    %s\nstep        %d%s\njob         %s (commit %s)\nmodel hash  %016x\n",
                        folder, manifest.step(), manifest.job_finished() ? " (job finished)" : "", job_name,
                        manifest.commit(), manifest.model_hash());
  absl::StrAppendFormat(&text, "lanes       %d; shards %d on %d servers; dense parameters %d\n", manifest.lanes(),
                        manifest.shards(), manifest.servers(), manifest.dense_parameters());
  if (manifest.has_adoption()) {
    absl::StrAppendFormat(&text, "adopted     from step %d of model %016x, as step %d\n", manifest.adoption().step(),
                          manifest.adoption().model_hash(), manifest.adoption().first_step());
  }
  for (const JobEra& era : manifest.era()) {
    for (const std::string& change : era.change()) {
      absl::StrAppendFormat(&text, "changed     from step %d on: %s\n", era.from_step(), change);
    }
  }
  if (manifest.has_best()) {
    absl::StrAppendFormat(&text, "best        step %d, %s %.6f; %d evaluations since\n", manifest.best().step(),
                          manifest.best().of(), manifest.best().value(), manifest.best().without_gain());
  }
  absl::StrAppendFormat(&text, "samples     read %d = trained %d + rejected %d + filtered %d\n", total.read(),
                        total.trained(), total.rejected(), total.filtered());
  absl::StrAppendFormat(&text, "\n%-20s %12s %12s %12s %14s %14s\n", "table", "rows", "in memory", "spilled",
                        "bytes memory", "bytes disk");
  for (const TableStats& table : manifest.table()) {
    absl::StrAppendFormat(&text, "%-20s %12d %12d %12d %14d %14d\n", table.name(), table.rows(), table.rows_in_memory(),
                          table.rows_spilled(), table.bytes_memory(), table.bytes_disk());
  }
  absl::StrAppendFormat(&text, "\n%-6s %6s %8s %10s %6s %8s %12s\n", "lane", "epoch", "window", "record", "file",
                        "block", "read");
  for (const LaneState& lane : manifest.lane()) {
    const Cursor& cursor = lane.cursor();
    absl::StrAppendFormat(&text, "%-6d %6d %8d %10d %6d %8d %12d%s\n", cursor.lane(), cursor.epoch(), cursor.window(),
                          cursor.record(), cursor.file(), cursor.block(), lane.ledger().read(),
                          cursor.end_of_epoch()     ? "  end of epoch"
                          : cursor.end_of_segment() ? "  end of segment"
                                                    : "");
  }
  for (const Evaluation& evaluation : manifest.evaluation()) {
    absl::StrAppendFormat(&text, "\n%-20s %10s %10s %9s %9s %9s %11s   (split %s at step %d)\n", "task", "samples",
                          "positives", "AUC", "GAUC", "log loss", "calibration", evaluation.split(), evaluation.step());
    for (const Evaluation::Task& task : evaluation.task()) {
      absl::StrAppendFormat(&text, "%-20s %10d %10d %9s %9s %9s %11s\n", task.name(), task.samples(), task.positives(),
                            Figure(task.has_auc(), task.auc()), Figure(task.has_gauc(), task.gauc()),
                            Figure(task.has_log_loss(), task.log_loss()),
                            Figure(task.has_calibration(), task.calibration()));
    }
  }
  return text;
}

absl::Status Differs(const std::string& path, const char* hash, uint64_t is, uint64_t manifest) {
  return absl::DataLossError(
      absl::StrFormat("%s: its %s is %016x, MANIFEST says %016x; use an older snapshot", path, hash, is, manifest));
}

// Of one snapshot, with a line for people.
absl::StatusOr<std::string> VerifyFolder(const std::string& folder) {
  HEARTH_RETURN_IF_ERROR(VerifySnapshot(folder));
  HEARTH_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(folder));
  const std::string dense_path = JoinPath(folder, "dense.safetensors");
  HEARTH_ASSIGN_OR_RETURN(const SafetensorsFile dense, ReadSafetensors(dense_path));
  if (const uint64_t hash = HashTensors(dense.tensors); hash != manifest.dense_hash())
    return Differs(dense_path, "dense_hash", hash, manifest.dense_hash());
  if (const uint64_t hash = ModelHash(manifest.rows_hash(), manifest.dense_hash()); hash != manifest.model_hash())
    return Differs(JoinPath(folder, "MANIFEST"), "model_hash", hash, manifest.model_hash());
  uint64_t bytes = 0, rows = 0;
  for (const FileEntry& file : manifest.file()) bytes += file.bytes();
  for (const TableStats& table : manifest.table()) rows += table.rows();
  return absl::StrFormat("%s: whole: step %d, %d files, %d bytes, %d rows, model hash %016x\n", folder, manifest.step(),
                         manifest.file_size(), bytes, rows, manifest.model_hash());
}

}  // namespace

absl::StatusOr<HeldSnapshot> HoldSnapshotAt(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(HeldSnapshot held, HoldNewestSnapshot(path, SnapshotCheck::kLengths));
  for (const std::string& line : held.passed_over) Say(absl::StrCat("passed over: ", line));
  return held;
}

absl::StatusOr<std::string> InspectSnapshot(const std::string& path, bool json) {
  HEARTH_ASSIGN_OR_RETURN(const HeldSnapshot held, HoldSnapshotAt(path));
  HEARTH_ASSIGN_OR_RETURN(const Job job, ParseJob(held.manifest.job(), JoinPath(held.folder, "MANIFEST")));
  if (!json) return AsText(held.folder, held.manifest, job.name());
  return AsJson(held.folder, held.manifest, job.name()).dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

absl::StatusOr<std::string> VerifySnapshotAt(const std::string& path) {
  return AgainIfRemoved([&]() -> absl::StatusOr<std::string> {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> folders, SnapshotsAt(path));
    absl::Status newest;
    std::vector<std::string> lines;
    for (const std::string& folder : folders) {
      HEARTH_ASSIGN_OR_RETURN(const SnapshotHold hold, SnapshotHold::Take(folder));
      const absl::StatusOr<std::string> whole = VerifyFolder(folder);
      if (whole.ok() && newest.ok()) return whole;
      const absl::Status status = hold.Explain(whole.status());
      if (IsRemoved(status)) return status;
      if (newest.ok()) newest = status;
      lines.push_back(whole.ok()
                          ? absl::StrCat("the newest that is whole is ", absl::StripTrailingAsciiWhitespace(*whole))
                          : std::string(status.message()));
      if (whole.ok()) break;
    }
    return absl::Status(newest.code(), absl::StrJoin(lines, "\n"));
  });
}

}  // namespace hearth
