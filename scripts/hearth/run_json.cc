#include "scripts/hearth/run_json.h"

#include <nlohmann/json.hpp>

#include "common/artifact/history.h"
#include "common/base/file.h"

namespace hearth {

namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kRunJsonBytesMax = 64u << 20;
constexpr int kDepthMax = 32;  // ours has 5; writing it again takes a stack as deep

Json ReadRunJson(const std::string& folder) {
  const absl::StatusOr<std::string> text = ReadFile(JoinPath(folder, "run.json"), kRunJsonBytesMax);
  if (!text.ok()) return Json::object();
  const Json run = Json::parse(
      *text, [](int depth, Json::parse_event_t, const Json&) { return depth <= kDepthMax; }, false);
  return run.is_object() ? run : Json::object();
}

std::string TextOf(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

RunState ReadRunState(const std::string& folder) {
  const Json run = ReadRunJson(folder);
  RunState state;
  state.status = TextOf(run, "status");
  const auto exit = run.find("exit");
  if (exit == run.end() || !exit->is_object()) return state;
  state.reason = TextOf(*exit, "reason");
  const auto code = exit->find("code");
  if (code == exit->end() || !code->is_number_integer()) return state;
  const int64_t value = code->get<int64_t>();
  if (value < 0 || value > 255) return state;
  state.ended = true;
  state.code = static_cast<int>(value);
  return state;
}

absl::Status WriteRunEnd(const std::string& folder, const std::string& job_name, const std::string& status, int code,
                         const std::string& reason) {
  Json run = ReadRunJson(folder);
  if (run.empty()) run = {{"schema", 1}, {"job", job_name}};
  run["status"] = status;
  run["exit"] = {{"code", code}, {"reason", reason}};
  return WriteFileAtomically(JoinPath(folder, "run.json"),
                             run.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

absl::Status AppendEnd(const std::string& folder, const std::string& status, int code, const std::string& reason) {
  HistoryEntry end;
  end.status = status;
  end.code = code;
  end.reason = reason;
  return AppendHistory(folder, end);
}

}  // namespace hearth
