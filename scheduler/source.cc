#include "scheduler/source.h"

#include <filesystem>

#include "absl/strings/match.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/job/config.h"

namespace hearth {
namespace {

absl::StatusOr<LogFile> Describe(const std::string& path, uint32_t log) {
  LogFile file;
  file.set_path(path);
  file.set_log(log);
  HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(path));
  file.set_bytes(bytes);
  HEARTH_ASSIGN_OR_RETURN(const uint64_t digest, HashFileHead(path, kDigestBytes));
  file.set_digest(digest);
  return file;
}

std::string BaseName(const std::string& path) { return std::filesystem::path(path).filename().string(); }

bool IsRegularFile(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Source>> Source::Open(const Job& job, const std::vector<LogFile>& listed, bool closed,
                                                     int64_t now_us) {
  std::unique_ptr<Source> source(new Source(job));
  HEARTH_RETURN_IF_ERROR(source->Restore(listed));
  if (closed) {
    source->closed_ = true;
    source->next_poll_us_ = kNever;
  } else {
    HEARTH_RETURN_IF_ERROR(source->Poll(now_us).status());
  }
  return source;
}

absl::Status Source::Restore(const std::vector<LogFile>& listed) {
  std::vector<int> files_of_log(job_.log_size(), 0);
  for (const LogFile& before : listed) {
    if (before.number() != files_.size() || before.log() >= files_of_log.size() || before.log() < log_) {
      return absl::DataLossError(absl::StrCat("list of files in MANIFEST: entry ", files_.size(), " (", before.path(),
                                              ") is out of place; start from another snapshot"));
    }
    if (before.log() != log_) seen_.clear();
    log_ = before.log();
    const Log& log = job_.log(log_);
    const int position = files_of_log[log_]++;
    std::string path;
    if (!log.directory().empty()) {
      const std::string name = BaseName(before.path());
      path = JoinPath(ResolvePath(job_, log.directory()), name);
      seen_.insert(name);
    } else if (position < log.path_size()) {
      path = ResolvePath(job_, log.path(position));
    } else {
      return absl::FailedPreconditionError(absl::StrCat("log[", log_, "].path: ", before.path(),
                                                        " was trained on and is no longer named; name it again"));
    }
    absl::StatusOr<LogFile> now = Describe(path, log_);
    if (absl::IsNotFound(now.status())) {
      return absl::NotFoundError(
          absl::StrCat(path, ": is in the job's list of files and no longer there; put it back, then resume"));
    }
    if (!now.ok()) return now.status();
    if (now->bytes() != before.bytes() || now->digest() != before.digest()) {
      const std::string cause =
          now->bytes() != before.bytes()
              ? absl::StrCat("has ", now->bytes(), " bytes, had ", before.bytes(), " when it was listed")
              : absl::StrCat("has ", now->bytes(), " bytes as when it was listed, but others");
      return absl::DataLossError(
          absl::StrCat(path, ": ", cause, "; put the old file back, or train with --fresh into an empty folder"));
    }
    now->set_number(before.number());
    files_.push_back(*std::move(now));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<LogFile>> Source::Poll(int64_t now_us) {
  const size_t before = files_.size();
  while (!closed_) {
    const uint32_t log = log_;
    if (log >= static_cast<uint32_t>(job_.log_size())) {
      closed_ = true;
    } else if (!job_.log(log).directory().empty()) {
      HEARTH_RETURN_IF_ERROR(PollDirectory(job_.log(log), now_us));
      if (log_ == log) break;  // it may still grow
    } else {
      int listed = 0;
      for (const LogFile& file : files_) listed += file.log() == log;
      for (int i = listed; i < job_.log(log).path_size(); ++i) {
        HEARTH_RETURN_IF_ERROR(Append(ResolvePath(job_, job_.log(log).path(i)), log));
      }
      ++log_;
    }
  }
  next_poll_us_ = closed_ ? kNever : now_us + kSourcePollUs;
  return std::vector<LogFile>(files_.begin() + before, files_.end());
}

absl::Status Source::PollDirectory(const Log& log, int64_t now_us) {
  const std::string folder = ResolvePath(job_, log.directory());
  if (newest_us_ < 0) newest_us_ = now_us;
  bool ended = false;
  HEARTH_ASSIGN_OR_RETURN(std::vector<std::string> names, NewNames(folder, log, &ended));
  if (ended) {
    // A listing is not one moment: a file renamed before the marker was may be missing in the listing that shows the
    // marker.
    HEARTH_ASSIGN_OR_RETURN(names, NewNames(folder, log, &ended));
  }
  for (const std::string& name : names) {
    if (!seen_.empty() && name < *seen_.rbegin()) {
      spdlog::warn("late_file path={} after={}: its name sorts before one that is listed; it is trained after it",
                   JoinPath(folder, name), *seen_.rbegin());
    }
    HEARTH_RETURN_IF_ERROR(Append(JoinPath(folder, name), log_));
    seen_.insert(name);
    newest_us_ = now_us;
  }
  const bool idle =
      log.idle_seconds_max() > 0 && static_cast<double>(now_us - newest_us_) >= log.idle_seconds_max() * 1e6;
  if (ended || idle) {
    spdlog::info("log_closed log={} files={} cause={}", log.name(), seen_.size(), ended ? "marker" : "idle");
    ++log_;
    seen_.clear();
    newest_us_ = -1;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> Source::NewNames(const std::string& folder, const Log& log,
                                                          bool* ended) const {
  absl::StatusOr<std::vector<std::string>> listed = ListDirectory(folder);
  if (!listed.ok()) {
    return Annotate(listed.status(),
                    absl::StrCat("log \"", log.name(), "\": its directory must exist; make it, or correct log[", log_,
                                 "].directory"));
  }
  std::vector<std::string> names;
  for (const std::string& name : *listed) {
    if (!log.end_marker().empty() && name == log.end_marker()) {
      *ended = true;
    } else if (name[0] != '.' && !absl::EndsWith(name, ".tmp") && seen_.count(name) == 0 &&
               IsRegularFile(JoinPath(folder, name))) {
      names.push_back(name);
    }
  }
  return names;
}

absl::Status Source::Append(const std::string& path, uint32_t log) {
  if (files_.size() >= kLogFilesMax) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": the list already has ", kLogFilesMax,
                                                   " files, the most there may be; use fewer, larger files"));
  }
  absl::StatusOr<LogFile> file = Describe(path, log);
  if (!file.ok()) {
    return Annotate(file.status(), absl::StrCat("log[", log, "] \"", job_.log(log).name(), "\": cannot list its file"));
  }
  file->set_number(static_cast<uint32_t>(files_.size()));
  files_.push_back(*std::move(file));
  return absl::OkStatus();
}

}  // namespace hearth
