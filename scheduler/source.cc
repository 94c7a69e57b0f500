#include "scheduler/source.h"

#include <algorithm>
#include <filesystem>
#include <map>

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

bool IsShuffled(const Log& log) { return log.shuffle().pieces() || log.shuffle().window_records_max() > 0; }

// How far the lanes are with one file in the epoch that they are in.
struct Places {
  bool untouched = true;  // no lane has taken anything of it
  bool passed = true;     // every lane has all of its part
  bool parted = false;    // some lane has all of its part
  bool done = false;      // passed, and no epoch is to come
  bool digests = true;    // every lane that is in it knows what it has read
};

// What a MANIFEST says.
struct Before {
  const Job& job;
  const std::vector<LogFile>& listed;
  const std::vector<LaneState>& lanes;

  const Log& LogOf(const LogFile& file) const { return job.log(static_cast<int>(file.log())); }

  // A shuffled log is read in any order: a lane that is in it is in each of its files.
  Places PlacesOf(const LogFile& file) const {
    uint32_t epoch = 0;
    for (const LaneState& lane : lanes) epoch = std::max(epoch, lane.cursor().epoch());
    const bool shuffled = IsShuffled(LogOf(file));
    Places places;
    for (const LaneState& lane : lanes) {
      const Cursor& cursor = lane.cursor();
      int64_t way = int64_t{cursor.file()} - int64_t{file.number()};
      if (shuffled && cursor.file() < listed.size()) way = int64_t{listed[cursor.file()].log()} - int64_t{file.log()};
      if (way == 0 && !shuffled && cursor.file_ended()) way = 1;
      if (cursor.record() == 0 && cursor.window() == 0) way = -1;  // at the beginning
      if (cursor.end_of_epoch()) way = cursor.epoch() == epoch ? 1 : -1;
      places.untouched = places.untouched && way < 0;
      places.passed = places.passed && way > 0;
      places.parted = places.parted || way > 0;
      if (way == 0) places.digests = places.digests && cursor.has_text_digest();
    }
    places.passed = places.passed && !lanes.empty();
    places.done = places.passed && epoch + 1 >= job.training().epochs();
    return places;
  }
};

// The name of a file of which nothing was read is free again.
void TakeOff(const Before& before, absl::string_view cause, LogFile* file) {
  const bool untouched = before.PlacesOf(*file).untouched;
  spdlog::warn("event=file_taken_off number={} path={} cause={} then={}", file->number(), Quoted(file->path()),
               Quoted(cause),
               Quoted(untouched ? "nothing of it was trained" : "what was trained of it stays, the rest is left out"));
  file->set_taken_off(true);
  if (untouched) file->clear_name();
}

// The entry that takes the place of `listed`, whose file is looked for at `path`.
absl::StatusOr<LogFile> Amended(const Before& before, const LogFile& listed, const std::string& path) {
  const bool grows = !before.LogOf(listed).directory().empty();
  const Places places = before.PlacesOf(listed);
  LogFile same = listed;
  same.set_path(path);
  same.clear_amended();
  absl::StatusOr<LogFile> now = Describe(path, listed.log());
  if (absl::IsNotFound(now.status())) {
    if (places.done) {
      spdlog::info("event=file_gone path={} cause=\"every lane has passed it\"", Quoted(path));
      return same;
    }
    if (places.untouched && grows) {
      TakeOff(before, "it is no longer in its directory", &same);
      return same;
    }
    return absl::NotFoundError(
        absl::StrCat(path,
                     ": is in the job's list of files and no longer there, and some of it may still be to be read; put "
                     "it back, then resume",
                     grows ? "" : ", or take it off log.path"));
  }
  if (!now.ok()) return now.status();
  if ((now->bytes() == listed.bytes() && now->digest() == listed.digest()) || places.done) return same;
  if (places.untouched || places.passed) {
    spdlog::warn(
        "event=file_listed_anew path={} bytes={} bytes_before={} cause=\"nothing of it is trained in this epoch\"",
        Quoted(path), now->bytes(), listed.bytes());
    return now;
  }
  if (!places.parted && places.digests && !IsShuffled(before.LogOf(listed))) {
    spdlog::warn(
        "event=file_amended path={} bytes={} bytes_before={} then=\"what was trained of it must still be in it\"",
        Quoted(path), now->bytes(), listed.bytes());
    now->set_amended(true);
    return now;
  }
  const std::string cause =
      now->bytes() != listed.bytes()
          ? absl::StrCat("has ", now->bytes(), " bytes, had ", listed.bytes(), " when it was listed")
          : absl::StrCat("has ", now->bytes(), " bytes as when it was listed, but others");
  return absl::DataLossError(absl::StrCat(path, ": ", cause,
                                          ", and records of it are trained; put the old file back, or train with "
                                          "--fresh into an empty folder"));
}

// The listed files that the job still names, by number: the first ones of log.path; names behind them are new.
// FailedPrecondition where a new name stands before a listed one.
using PathMatch = std::map<uint32_t, std::string>;
absl::StatusOr<PathMatch> MatchPaths(const Log& log, uint32_t number, const std::vector<LogFile>& listed) {
  PathMatch match;
  int next = 0;
  for (const LogFile& file : listed) {
    if (file.log() != number || file.taken_off() || log.path_size() == 0) continue;
    // Lists made before names were kept: by position.
    const std::string name = file.has_name() ? file.name() : next < log.path_size() ? log.path(next) : "";
    if (next < log.path_size() && log.path(next) == name) {
      match[file.number()] = name;
      ++next;
      continue;
    }
    for (int later = next + 1; later < log.path_size(); ++later) {
      if (log.path(later) != name) continue;
      return absl::FailedPreconditionError(absl::StrCat("log[", number, "].path: ", log.path(next),
                                                        " is new and stands before ", name,
                                                        ", which is listed; name new files behind the listed ones"));
    }
  }
  return match;
}

std::string BaseName(const std::string& path) { return std::filesystem::path(path).filename().string(); }

absl::StatusOr<LogFile> RestoreFile(const Before& before, const LogFile& listed, const PathMatch& match) {
  if (listed.taken_off()) return listed;
  const Log& log = before.LogOf(listed);
  const auto named = match.find(listed.number());
  if (!log.directory().empty() || named != match.end()) {
    const std::string name = log.directory().empty() ? named->second : BaseName(listed.path());
    const std::string folder =
        log.directory().empty() ? before.job.data_dir() : ResolvePath(before.job, log.directory());
    HEARTH_ASSIGN_OR_RETURN(LogFile file, Amended(before, listed, JoinPath(folder, name)));
    if (!file.taken_off()) file.set_name(name);
    return file;
  }
  const Places places = before.PlacesOf(listed);
  if (IsShuffled(log) && !places.untouched && !places.passed) {
    return absl::FailedPreconditionError(absl::StrCat("log[", listed.log(), "].path: ", listed.path(),
                                                      " is no longer named, and the log is shuffled as one whole, of "
                                                      "which records are trained; name it again"));
  }
  LogFile file = listed;
  TakeOff(before, "the job no longer names it", &file);
  return file;
}

bool IsRegularFile(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Source>> Source::Open(const Job& job, const std::vector<LogFile>& listed, bool closed,
                                                     const std::vector<LaneState>& lanes, int64_t now_us) {
  std::unique_ptr<Source> source(new Source(job));
  bool appended = false;
  HEARTH_RETURN_IF_ERROR(source->Restore(listed, lanes, &appended));
  if (closed && !appended) {
    source->closed_ = true;
    source->next_poll_us_ = kNever;
  } else {
    HEARTH_RETURN_IF_ERROR(source->Poll(now_us).status());
  }
  return source;
}

absl::Status Source::CheckNoNewPaths(const Job& job, const std::vector<LogFile>& listed) {
  for (int i = 0; i < job.log_size(); ++i) {
    HEARTH_ASSIGN_OR_RETURN(const PathMatch match, MatchPaths(job.log(i), static_cast<uint32_t>(i), listed));
    if (match.size() < static_cast<size_t>(job.log(i).path_size())) {
      return absl::FailedPreconditionError(absl::StrCat(
          "log[", i, "].path: ", job.log(i).path(static_cast<int>(match.size())),
          " is new, and the job is finished: it would not be read; train it in another folder, or take it off"));
    }
  }
  return absl::OkStatus();
}

absl::Status Source::Restore(const std::vector<LogFile>& listed, const std::vector<LaneState>& lanes, bool* appended) {
  const Before before = {job_, listed, lanes};
  const uint32_t logs = static_cast<uint32_t>(job_.log_size());
  for (size_t i = 0; i < listed.size(); ++i) {
    const bool in_place =
        listed[i].number() == i && listed[i].log() < logs && (i == 0 || listed[i - 1].log() <= listed[i].log());
    if (in_place) continue;
    return absl::DataLossError(absl::StrCat("list of files in MANIFEST: entry ", i, " (", listed[i].path(),
                                            ") is out of place; start from another snapshot"));
  }
  for (size_t begin = 0, end = 0; begin < listed.size(); begin = end) {
    log_ = listed[begin].log();
    seen_.clear();
    const Log& log = job_.log(static_cast<int>(log_));
    const std::string where = absl::StrCat("log[", log_, "].path: ");
    HEARTH_ASSIGN_OR_RETURN(const PathMatch match, MatchPaths(log, log_, listed));
    for (; end < listed.size() && listed[end].log() == log_; ++end) {
      HEARTH_ASSIGN_OR_RETURN(LogFile file, RestoreFile(before, listed[end], match));
      if (file.has_name() && !log.directory().empty()) seen_.insert(file.name());
      file.set_number(static_cast<uint32_t>(end));
      files_.push_back(std::move(file));
    }
    if (match.size() == static_cast<size_t>(log.path_size())) continue;
    // New paths behind the listed ones.
    *appended = true;
    const bool whole = IsShuffled(log) && !before.PlacesOf(listed[begin]).untouched;
    const bool over = std::any_of(lanes.begin(), lanes.end(), [&](const LaneState& lane) {
      return lane.cursor().end_of_epoch() || (lane.cursor().record() > 0 && lane.cursor().file() >= end);
    });
    if (end == listed.size() && !whole && !over) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        where, log.path(static_cast<int>(match.size())), " is new, and ",
        whole ? "the log is shuffled as one whole and begun" : "lanes, or the list of files, are past the log's end",
        "; take it off, or train it in another folder"));
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
      for (const LogFile& file : files_) listed += file.log() == log && !file.taken_off();
      for (int i = listed; i < job_.log(log).path_size(); ++i) {
        const std::string& name = job_.log(log).path(i);
        HEARTH_RETURN_IF_ERROR(Append(ResolvePath(job_, name), name, log));
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
      spdlog::warn("event=late_file path={} after={} cause=\"its name sorts before one that is listed\"",
                   Quoted(JoinPath(folder, name)), Quoted(*seen_.rbegin()));
    }
    HEARTH_RETURN_IF_ERROR(Append(JoinPath(folder, name), name, log_));
    seen_.insert(name);
    newest_us_ = now_us;
  }
  const bool idle =
      log.idle_seconds_max() > 0 && static_cast<double>(now_us - newest_us_) >= log.idle_seconds_max() * 1e6;
  if (ended || idle) {
    spdlog::info("event=log_closed log={} files={} cause={}", Quoted(log.name()), seen_.size(),
                 ended ? "marker" : "idle");
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

absl::Status Source::Append(const std::string& path, const std::string& name, uint32_t log) {
  if (files_.size() >= kLogFilesMax) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": the list already has ", kLogFilesMax,
                                                   " files, the most there may be; use fewer, larger files"));
  }
  absl::StatusOr<LogFile> file = Describe(path, log);
  if (!file.ok()) {
    return Annotate(file.status(), absl::StrCat("log[", log, "] \"", job_.log(log).name(), "\": cannot list its file"));
  }
  file->set_number(static_cast<uint32_t>(files_.size()));
  file->set_name(name);
  files_.push_back(*std::move(file));
  return absl::OkStatus();
}

// --- side tables ---

namespace {

bool Joins(const Log& log, const std::string& side_table) {
  return std::find(log.join().begin(), log.join().end(), side_table) != log.join().end();
}

bool TrainingJoins(const Job& job, const std::string& side_table) {
  return std::any_of(job.log().begin(), job.log().end(), [&](const Log& log) { return Joins(log, side_table); });
}

}  // namespace

absl::StatusOr<std::vector<SideTableFile>> DescribeSideTables(const Job& job) {
  std::vector<SideTableFile> files;
  for (const SideTable& table : job.side_table()) {
    const bool split_joins = std::any_of(job.split().begin(), job.split().end(),
                                         [&](const Split& split) { return Joins(split.log(), table.name()); });
    if (!split_joins && !TrainingJoins(job, table.name())) continue;
    const std::string path = ResolvePath(job, table.path());
    const std::string where = absl::StrCat("side_table \"", table.name(), "\"");
    SideTableFile file;
    file.set_name(table.name());
    const absl::StatusOr<uint64_t> bytes = FileBytes(path);
    if (!bytes.ok()) return Annotate(bytes.status(), where);
    file.set_bytes(*bytes);
    const absl::StatusOr<uint64_t> digest = HashFile(path);
    if (!digest.ok()) return Annotate(digest.status(), where);
    file.set_xxh3(*digest);
    files.push_back(std::move(file));
  }
  return files;
}

std::vector<SideTableFile> JoinedInTraining(const Job& job, const std::vector<SideTableFile>& files) {
  std::vector<SideTableFile> joined;
  for (const SideTableFile& file : files) {
    if (TrainingJoins(job, file.name())) joined.push_back(file);
  }
  return joined;
}

absl::Status CheckSideTables(const std::vector<SideTableFile>& before, const std::vector<SideTableFile>& now) {
  for (const SideTableFile& old : before) {
    for (const SideTableFile& file : now) {
      if (file.name() != old.name() || (file.bytes() == old.bytes() && file.xxh3() == old.xxh3())) continue;
      return absl::DataLossError(absl::StrCat(
          "side_table \"", file.name(), "\": is another file (", file.bytes(), " bytes) than the one that ",
          "the run was trained with (", old.bytes(),
          " bytes), and it decides what records are and mean; put the old file back, or train with --fresh "
          "into an empty folder"));
    }
  }
  return absl::OkStatus();
}

}  // namespace hearth
