#include "common/base/logging.h"

#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// spdlog's own opens by name, and would follow a link.
class FileSink : public spdlog::sinks::base_sink<std::mutex> {
 public:
  explicit FileSink(OwnedFile file) : file_(std::move(file)) {}

 protected:
  // What cannot be written to the log, on a full disk say, has no better place to be told.
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    std::fwrite(line.data(), 1, line.size(), file_.get());
  }
  void flush_() override { std::fflush(file_.get()); }

 private:
  const OwnedFile file_;
};

}  // namespace

absl::Status StartLogging(const std::string& who, const std::string& file) {
  auto to_stderr = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  std::vector<spdlog::sink_ptr> sinks = {to_stderr};
  if (!file.empty()) {
    to_stderr->set_level(spdlog::level::warn);
    HEARTH_ASSIGN_OR_RETURN(OwnedFile opened, OpenForWriting(file, Writing::kAppend));
    sinks.push_back(std::make_shared<FileSink>(std::move(opened)));
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
