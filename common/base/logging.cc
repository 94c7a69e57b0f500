#include "common/base/logging.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <memory>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "common/base/status.h"

namespace hearth {

absl::Status StartLogging(const std::string& who, const std::string& file) {
  auto to_stderr = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  std::vector<spdlog::sink_ptr> sinks = {to_stderr};
  if (!file.empty()) {
    to_stderr->set_level(spdlog::level::warn);
    try {  // spdlog reports by exception
      sinks.push_back(std::make_shared<spdlog::sinks::basic_file_sink_mt>(file));
    } catch (const spdlog::spdlog_ex& error) {
      return absl::UnavailableError(absl::StrCat(file, ": cannot open the log file: ", error.what()));
    }
  }
  // A logger without a name is spdlog's own first one (CheckFailed tells them apart by it).
  auto logger = std::make_shared<spdlog::logger>(who.empty() ? "hearth" : who, sinks.begin(), sinks.end());
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %l %n %v");
  logger->flush_on(spdlog::level::info);  // events are few, and a process may be killed at any moment
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

std::string Quoted(absl::string_view text) {
  return absl::StrCat("\"", absl::StrReplaceAll(absl::Utf8SafeCHexEscape(text), {{"\\'", "'"}}), "\"");
}

void FlushLogging() { spdlog::default_logger_raw()->flush(); }

}  // namespace hearth
