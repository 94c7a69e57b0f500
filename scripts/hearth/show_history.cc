#include "scripts/hearth/show_history.h"

#include <algorithm>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/base/rows.h"
#include "common/base/status.h"
#include "scripts/hearth/run_json.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;
using Kind = HistoryEntry::Kind;

// Steps that were trained with one job, one after the other.
struct Era {
  uint64_t from_step = 1;
  std::optional<uint64_t> to_step;  // none: not known
  int64_t begun_s = 0;              // 0: not known
  int64_t ended_s = 0;
  uint64_t records_before = 0;
  std::optional<HistoryEntry::State> state;  // at its end
  int starts = 0;
  int restarts = 0;  // of those, by the command or batch job itself, after dead ranks or a time limit
  std::vector<std::string> changes;
  const HistoryEntry* fork = nullptr;  // it begins with one
  uint64_t set_aside_from = 0;         // a later fork left its steps from here on; 0: none did
  const HistoryEntry* end = nullptr;   // its newest
};

class Eras {
 public:
  // `newest`: the run's newest MANIFEST. Eras of before the run had a history are known from it alone.
  Eras(const History& history, const Manifest* newest, std::vector<JobEra> saved)
      : saved_(std::move(saved)), first_step_(newest != nullptr ? newest->adoption().first_step() : 0) {
    for (const HistoryEntry& entry : history.entries) {
      if (entry.kind == Kind::kStart) Start(entry);
      if (entry.kind == Kind::kEnd) End(entry);
      if (entry.kind == Kind::kFork) Fork(entry);
    }
    if (newest == nullptr) return;
    if (eras_.empty()) BeginSaved(newest->step());
    HistoryEntry::State state = StateOf(*newest);
    if (const auto& known = eras_.back().state; known.has_value() && known->published_step > 0) {
      state.published_step = known->published_step;
      state.published_base = known->published_base;
      state.published_seq = known->published_seq;
    }
    if (state.step + 1 >= eras_.back().from_step) Close(state);
  }
  std::vector<Era>& list() { return eras_; }

 private:
  // Up to the first start that was written down, at `step`.
  void BeginSaved(uint64_t step) {
    eras_.emplace_back();
    eras_.back().from_step = first_step_ + 1;
    for (const JobEra& era : saved_) {
      if (era.from_step() > step) break;
      eras_.back().to_step = era.from_step() - 1;
      eras_.emplace_back();
      eras_.back().from_step = era.from_step();
      eras_.back().changes.assign(era.change().begin(), era.change().end());
    }
  }

  void Close(const HistoryEntry::State& state) {
    Era& era = eras_.back();
    era.state = state;
    era.to_step = state.step;
  }

  void Start(const HistoryEntry& entry) {
    const HistoryEntry::State state = entry.state.value_or(HistoryEntry::State());
    if (eras_.empty()) BeginSaved(state.step);
    // An era that holds no snapshot yet begins again.
    const bool goes_on = entry.changes.empty() || state.step + 1 == eras_.back().from_step;
    if (eras_.back().fork == nullptr || eras_.back().starts > 0 || state.step + 1 != eras_.back().from_step)
      Close(state);
    if (!goes_on) {
      eras_.emplace_back();
      eras_.back().from_step = state.step + 1;
    }
    Era& era = eras_.back();
    if (!entry.changes.empty()) era.changes = entry.changes;
    if (era.starts == 0) {
      era.begun_s = entry.time_s;
      if (era.from_step == state.step + 1) era.records_before = state.records;
    }
    ++era.starts;
    if (entry.restarts > 0) ++era.restarts;
    era.ended_s = 0;
    era.end = nullptr;
  }

  void End(const HistoryEntry& entry) {
    if (eras_.empty()) return;
    if (entry.state.has_value() && entry.state->step + 1 >= eras_.back().from_step) Close(*entry.state);
    eras_.back().end = &entry;
    eras_.back().ended_s = entry.time_s;
  }

  void Fork(const HistoryEntry& entry) {
    if (eras_.empty()) BeginSaved(entry.state.has_value() ? entry.state->step : entry.back_to);
    if (entry.state.has_value() && entry.state->step + 1 >= eras_.back().from_step) {
      HistoryEntry::State state = *entry.state;
      Close(state);
    }
    if (eras_.back().ended_s == 0) eras_.back().ended_s = entry.time_s;
    for (Era& era : eras_) {
      if (!era.to_step.has_value() || *era.to_step <= entry.back_to) continue;
      const uint64_t from = std::max(era.from_step, entry.back_to + 1);
      if (era.set_aside_from == 0 || from < era.set_aside_from) era.set_aside_from = from;
    }
    eras_.emplace_back();
    eras_.back().from_step = entry.back_to + 1;
    eras_.back().begun_s = entry.time_s;
    eras_.back().fork = &entry;
  }

  const std::vector<JobEra> saved_;
  const uint64_t first_step_;  // of the run's first snapshot
  std::vector<Era> eras_;
};

std::string TimeText(int64_t seconds) {
  if (seconds <= 0) return "-";
  const std::time_t time = static_cast<std::time_t>(seconds);
  std::tm utc;
  if (gmtime_r(&time, &utc) == nullptr) return "-";
  return absl::StrFormat("%04d-%02d-%02d %02d:%02d", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour,
                         utc.tm_min);
}

std::string StepsText(const Era& era) {
  if (era.to_step.has_value() && *era.to_step < era.from_step) return absl::StrCat("after ", era.from_step - 1);
  return absl::StrCat(era.from_step, "-", era.to_step.has_value() ? absl::StrCat(*era.to_step) : "");
}

// Without what was known before the era: no evaluation since.
std::vector<HistoryEntry::Figure> FiguresOf(const Era& era) {
  std::vector<HistoryEntry::Figure> figures;
  if (!era.state.has_value()) return figures;
  for (const HistoryEntry::Figure& figure : era.state->figures) {
    if (figure.step >= era.from_step) figures.push_back(figure);
  }
  return figures;
}

std::string FiguresText(const Era& era) {
  const std::vector<HistoryEntry::Figure> figures = FiguresOf(era);
  std::vector<std::string> words;
  std::string split;
  for (const HistoryEntry::Figure& figure : figures) {
    if (words.empty() || figure.split != split) {
      words.push_back(absl::StrCat(figure.split, " at ", figure.step, ":"));
      split = figure.split;
    }
    const auto& value = figure.auc.has_value() ? figure.auc : figure.log_loss;
    if (!value.has_value()) continue;
    words.push_back(absl::StrFormat("%s %s %.4f", figure.task, figure.auc.has_value() ? "AUC" : "log loss", *value));
  }
  return words.empty() ? "-" : absl::StrJoin(words, " ");
}

bool Published(const Era& era) { return era.state.has_value() && era.state->published_step >= era.from_step; }

std::string PublishedText(const Era& era) {
  if (!Published(era)) return "-";
  const HistoryEntry::State& state = *era.state;
  if (state.published_seq == 0) return absl::StrCat(state.published_step);
  return absl::StrCat(state.published_step, " (", state.published_base, " + ", state.published_seq, ")");
}

uint64_t RecordsOf(const Era& era) {
  return era.state.has_value() ? era.state->records - std::min(era.state->records, era.records_before) : 0;
}

// Why it began, and what became of it.
std::string WhatText(const Era& era, bool first, const Manifest* newest) {
  std::vector<std::string> parts;
  if (era.fork != nullptr)
    parts.push_back(absl::StrCat("back to ", era.fork->back_to, " (fork ", era.fork->number, ")"));
  if (!era.changes.empty()) parts.push_back(absl::StrCat("changed ", absl::StrJoin(era.changes, ", ")));
  if (first && newest != nullptr && newest->has_adoption()) {
    parts.push_back(absl::StrFormat("adopted from step %d of model %016x", newest->adoption().step(),
                                    newest->adoption().model_hash()));
  }
  if (first && parts.empty()) parts.push_back("begun");
  if (era.set_aside_from > 0) parts.push_back(absl::StrCat("set aside from step ", era.set_aside_from, " on"));
  if (era.end != nullptr) {
    if (era.end->status == "failed") {
      parts.push_back(absl::StrCat("failed with ", era.end->code, ": ", era.end->reason));
    } else if (era.end->status == "finished" && !era.end->reason.empty()) {
      parts.push_back(absl::StrCat("finished: ", era.end->reason));
    } else {
      parts.push_back(era.end->status);
    }
  }
  std::string text = absl::StrJoin(parts, "; ");
  for (char& c : text) c = absl::ascii_iscntrl(static_cast<unsigned char>(c)) ? ' ' : c;  // one line
  return text;
}

std::string AsText(const std::vector<Era>& eras, uint64_t left_out, const Manifest* newest) {
  std::vector<std::vector<std::string>> rows = {
      {"era", "steps", "begun (UTC)", "ended", "records", "starts", "restarts", "published", "evaluation", "what"}};
  for (size_t i = 0; i < eras.size(); ++i) {
    const Era& era = eras[i];
    rows.push_back({absl::StrCat(i + 1), StepsText(era), TimeText(era.begun_s), TimeText(era.ended_s),
                    absl::StrCat(RecordsOf(era)), era.starts > 0 ? absl::StrCat(era.starts) : "-",
                    absl::StrCat(era.restarts), PublishedText(era), FiguresText(era), WhatText(era, i == 0, newest)});
  }
  std::string text = FormatRows(rows, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  if (left_out > 0) absl::StrAppend(&text, left_out, " older entries had to go: history.jsonl is bounded\n");
  return text;
}

Json TimeJson(int64_t seconds) { return seconds > 0 ? Json(seconds) : Json(nullptr); }

Json AsJson(const Era& era) {
  const auto or_null = [](const std::optional<double>& value) {
    return value.has_value() ? Json(*value) : Json(nullptr);
  };
  Json json = {
      {"from_step", era.from_step},     {"to_step", era.to_step.has_value() ? Json(*era.to_step) : Json(nullptr)},
      {"begun", TimeJson(era.begun_s)}, {"ended", TimeJson(era.ended_s)},
      {"records", RecordsOf(era)},      {"starts", era.starts},
      {"restarts", era.restarts},       {"changes", era.changes}};
  json["evaluation"] = Json::array();
  for (const HistoryEntry::Figure& figure : FiguresOf(era)) {
    json["evaluation"].push_back({{"split", figure.split},
                                  {"task", figure.task},
                                  {"step", figure.step},
                                  {"auc", or_null(figure.auc)},
                                  {"log_loss", or_null(figure.log_loss)}});
  }
  json["published"] = nullptr;
  if (Published(era)) {
    json["published"] = {
        {"step", era.state->published_step}, {"base", era.state->published_base}, {"seq", era.state->published_seq}};
  }
  json["fork"] = nullptr;
  if (era.fork != nullptr) json["fork"] = {{"number", era.fork->number}, {"back_to", era.fork->back_to}};
  json["set_aside_from"] = era.set_aside_from > 0 ? Json(era.set_aside_from) : Json(nullptr);
  json["end"] = nullptr;
  if (era.end != nullptr)
    json["end"] = {{"status", era.end->status}, {"code", era.end->code}, {"reason", era.end->reason}};
  return json;
}

}  // namespace

absl::StatusOr<std::string> ShowHistory(const std::string& dir, bool json) {
  if (!PathExists(JoinPath(dir, "snapshots")) && !PathExists(JoinPath(dir, "history.jsonl"))) {
    return absl::NotFoundError(absl::StrCat(dir,
                                            ": is no run's folder: it has neither snapshots nor history.jsonl; "
                                            "give the folder that --out named"));
  }
  HEARTH_ASSIGN_OR_RETURN(const History history, ReadHistory(dir));
  // A run may have no snapshot yet, or none that reads: what it has been through is known all the same.
  const absl::StatusOr<HeldSnapshot> newest = HoldNewestSnapshot(JoinPath(dir, "snapshots"), SnapshotCheck::kLengths);
  const Manifest* const manifest = newest.ok() ? &newest->manifest : nullptr;
  std::vector<JobEra> saved;
  if (manifest != nullptr) saved.assign(manifest->era().begin(), manifest->era().end());
  Eras eras(history, manifest, std::move(saved));
  // What is published of the newest era now no entry says before the next start or the end.
  if (!eras.list().empty() && eras.list().back().state.has_value()) AddPublished(dir, &*eras.list().back().state);
  if (!json)
    return eras.list().empty() ? absl::StrCat(dir, ": has trained nothing yet\n")
                               : AsText(eras.list(), history.left_out, manifest);
  Json all = {{"schema", 1}, {"run", dir}, {"status", ReadRunState(dir).status}, {"left_out", history.left_out}};
  all["adopted"] = nullptr;
  if (manifest != nullptr && manifest->has_adoption()) {
    all["adopted"] = {{"step", manifest->adoption().step()},
                      {"model_hash", absl::StrFormat("%016x", manifest->adoption().model_hash())},
                      {"first_step", manifest->adoption().first_step()}};
  }
  all["eras"] = Json::array();
  for (const Era& era : eras.list()) all["eras"].push_back(AsJson(era));
  return all.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace hearth
