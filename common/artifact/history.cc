#include "common/artifact/history.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/artifact/bundle_chain.h"
#include "common/artifact/reading.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;
using Kind = HistoryEntry::Kind;

constexpr size_t kChangesMax = 64;
constexpr size_t kFiguresMax = 128;
constexpr size_t kTextBytesMax = 512;
constexpr int kDepthMax = 8;  // ours has 4
// An append may go past kHistoryBytesMax by a line.
constexpr uint64_t kReadBytesMax = kHistoryBytesMax * 2;

constexpr std::pair<Kind, const char*> kNames[] = {
    {Kind::kStart, "start"}, {Kind::kEnd, "end"}, {Kind::kFork, "fork"}, {Kind::kForked, "forked"}};

const char* NameOf(Kind kind) {
  for (const auto& [one, name] : kNames) {
    if (one == kind) return name;
  }
  return "";
}

std::string HistoryPath(const std::string& dir) { return JoinPath(dir, "history.jsonl"); }

// --- writing ---

std::string Cut(const std::string& text) { return text.substr(0, kTextBytesMax); }

Json OrNull(const std::optional<double>& value) {
  return value.has_value() && std::isfinite(*value) ? Json(*value) : Json(nullptr);
}

void AddState(const HistoryEntry::State& state, Json* json) {
  (*json)["step"] = state.step;
  (*json)["records"] = state.records;
  Json figures = Json::array();
  for (size_t i = 0; i < std::min(state.figures.size(), kFiguresMax); ++i) {
    const HistoryEntry::Figure& figure = state.figures[i];
    figures.push_back({{"split", Cut(figure.split)},
                       {"task", Cut(figure.task)},
                       {"step", figure.step},
                       {"auc", OrNull(figure.auc)},
                       {"log_loss", OrNull(figure.log_loss)}});
  }
  if (!figures.empty()) (*json)["evaluation"] = std::move(figures);
  if (state.published_step == 0) return;
  (*json)["published"] = {{"step", state.published_step}, {"base", state.published_base}, {"seq", state.published_seq}};
}

std::string LineOf(const HistoryEntry& entry) {
  Json json = {{"event", NameOf(entry.kind)}, {"time", entry.time_s}};
  if (entry.state.has_value()) AddState(*entry.state, &json);
  if (entry.kind == Kind::kStart) {
    json["ps"] = entry.servers;
    json["worker"] = entry.workers;
    json["restarts"] = entry.restarts;
    json["changes"] = Json::array();
    for (size_t i = 0; i < std::min(entry.changes.size(), kChangesMax); ++i)
      json["changes"].push_back(Cut(entry.changes[i]));
  } else if (entry.kind == Kind::kEnd) {
    json["status"] = entry.status;
    json["code"] = entry.code;
    json["reason"] = Cut(entry.reason);
  } else {
    json["number"] = entry.number;
    json["back_to"] = entry.back_to;
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string LineOfLeftOut(uint64_t lines) { return Json({{"event", "left_out"}, {"lines", lines}}).dump() + "\n"; }

// --- reading: whatever a line holds, it ends well ---

uint64_t NumberIn(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_number_unsigned() ? found->get<uint64_t>() : 0;
}

std::string TextIn(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>() : "";
}

std::optional<double> FigureIn(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_number() ? std::make_optional(found->get<double>()) : std::nullopt;
}

const Json& ListIn(const Json& json, const char* key) {
  static const Json none = Json::array();
  const auto found = json.find(key);
  return found != json.end() && found->is_array() ? *found : none;
}

std::optional<HistoryEntry::State> StateIn(const Json& json) {
  if (!json.contains("step")) return std::nullopt;
  HistoryEntry::State state;
  state.step = NumberIn(json, "step");
  state.records = NumberIn(json, "records");
  for (const Json& one : ListIn(json, "evaluation")) {
    if (!one.is_object()) continue;
    state.figures.push_back({TextIn(one, "split"), TextIn(one, "task"), NumberIn(one, "step"), FigureIn(one, "auc"),
                             FigureIn(one, "log_loss")});
  }
  const auto published = json.find("published");
  if (published == json.end() || !published->is_object()) return state;
  state.published_step = NumberIn(*published, "step");
  state.published_base = NumberIn(*published, "base");
  state.published_seq = NumberIn(*published, "seq");
  return state;
}

Json ParseLine(absl::string_view line) {
  return Json::parse(
      line.begin(), line.end(), [](int depth, Json::parse_event_t, const Json&) { return depth <= kDepthMax; }, false);
}

std::optional<HistoryEntry> EntryOf(const Json& json) {
  HistoryEntry entry;
  const std::string event = TextIn(json, "event");
  const auto named =
      std::find_if(std::begin(kNames), std::end(kNames), [&](const auto& one) { return event == one.second; });
  if (named == std::end(kNames)) return std::nullopt;
  entry.kind = named->first;
  entry.time_s = static_cast<int64_t>(NumberIn(json, "time"));
  entry.state = StateIn(json);
  entry.servers = static_cast<uint32_t>(NumberIn(json, "ps"));
  entry.workers = static_cast<uint32_t>(NumberIn(json, "worker"));
  entry.restarts = static_cast<uint32_t>(NumberIn(json, "restarts"));
  for (const Json& change : ListIn(json, "changes")) {
    if (change.is_string()) entry.changes.push_back(change.get<std::string>());
  }
  entry.status = TextIn(json, "status");
  entry.reason = TextIn(json, "reason");
  entry.code = static_cast<int>(NumberIn(json, "code") & 0xff);
  entry.back_to = NumberIn(json, "back_to");
  entry.number = NumberIn(json, "number");
  return entry;
}

absl::StatusOr<std::string> ReadText(const std::string& dir) {
  absl::StatusOr<std::string> text = ReadFile(HistoryPath(dir), kReadBytesMax);
  return absl::IsNotFound(text.status()) ? std::string() : text;
}

// The younger half of a file that has grown too long; forks are few and decide what is published.
std::string Shortened(const std::string& text) {
  const std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipEmpty());
  std::vector<std::string> kept;
  uint64_t bytes = 0, left_out = 0;
  bool has_fork = false;
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    const Json json = ParseLine(*line);
    const bool fork = json.is_object() && absl::StartsWith(TextIn(json, "event"), "fork");
    bytes += line->size() + 1;
    if (bytes <= kHistoryBytesMax / 2 || (fork && !has_fork)) {
      kept.push_back(*line);
      has_fork = has_fork || (fork && TextIn(json, "event") == "fork");
    } else {
      left_out += json.is_object() ? std::max<uint64_t>(1, NumberIn(json, "lines")) : 1;
    }
  }
  std::reverse(kept.begin(), kept.end());
  return LineOfLeftOut(left_out) + absl::StrJoin(kept, "\n") + "\n";
}

absl::Status AppendDurably(const std::string& path, absl::string_view text) {
  const bool is_new = !PathExists(path);
  HEARTH_ASSIGN_OR_RETURN(const OwnedFile file, OpenForWriting(path, Writing::kAppend));
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size() || std::fflush(file.get()) != 0 ||
      fsync(fileno(file.get())) != 0) {
    return ErrorOf(errno, "cannot write", path);
  }
  return is_new ? FsyncPath(path.substr(0, path.rfind('/'))) : absl::OkStatus();
}

}  // namespace

HistoryEntry::State StateOf(uint64_t step, uint64_t records, const std::vector<Evaluation>& evaluations) {
  HistoryEntry::State state;
  state.step = step;
  state.records = records;
  for (const Evaluation& evaluation : evaluations) {
    for (const Evaluation::Task& task : evaluation.task()) {
      HistoryEntry::Figure figure = {evaluation.split(), task.name(), evaluation.step(), {}, {}};
      if (task.has_auc()) figure.auc = task.auc();
      if (task.has_log_loss()) figure.log_loss = task.log_loss();
      state.figures.push_back(std::move(figure));
    }
  }
  return state;
}

HistoryEntry::State StateOf(const Manifest& manifest) {
  Ledger sum;
  for (const LaneState& lane : manifest.lane()) AddLedger(lane.ledger(), &sum);
  return StateOf(manifest.step(), sum.trained(), {manifest.evaluation().begin(), manifest.evaluation().end()});
}

void AddPublished(const std::string& dir, HistoryEntry::State* state) {
  const absl::StatusOr<std::vector<BundleLink>> chain = ReadNewestChain(JoinPath(dir, "export"));
  if (!chain.ok() || chain->empty()) return;
  state->published_step = chain->back().step;
  state->published_base = chain->back().base;
  state->published_seq = chain->back().seq;
}

const HistoryEntry* History::newest_fork() const {
  const auto found =
      std::find_if(entries.rbegin(), entries.rend(), [](const auto& entry) { return entry.kind == Kind::kFork; });
  return found == entries.rend() ? nullptr : &*found;
}

const HistoryEntry* History::unfinished_fork() const {
  const HistoryEntry* const fork = newest_fork();
  if (fork == nullptr) return nullptr;
  const bool done = std::any_of(entries.begin(), entries.end(), [&](const auto& entry) {
    return entry.kind == Kind::kForked && entry.number == fork->number;
  });
  return done ? nullptr : fork;
}

absl::StatusOr<History> ReadHistory(const std::string& dir) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadText(dir));
  History history;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    const Json json = ParseLine(line);
    if (json.is_object() && TextIn(json, "event") == "left_out") {
      history.left_out += NumberIn(json, "lines");
      continue;
    }
    std::optional<HistoryEntry> entry = json.is_object() ? EntryOf(json) : std::nullopt;
    if (entry.has_value()) {
      history.entries.push_back(*std::move(entry));
    } else {
      ++history.unreadable;
    }
  }
  return history;
}

absl::Status AppendHistory(const std::string& dir, HistoryEntry entry) {
  if (entry.time_s == 0) entry.time_s = Env::Real()->WallUs() / 1000000;
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadText(dir));
  const std::string line = LineOf(entry);
  if (text.size() + line.size() > kHistoryBytesMax) {
    return WriteFileAtomically(HistoryPath(dir), Shortened(text) + line);
  }
  // Behind a line that a kill has torn a new one begins.
  return AppendDurably(HistoryPath(dir), (text.empty() || text.back() == '\n' ? "" : "\n") + line);
}

}  // namespace hearth
