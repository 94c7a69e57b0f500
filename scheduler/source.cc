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
#include "common/job/log_list.h"

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

// What a MANIFEST says.
struct Before {
  const Job& job;
  const std::vector<LogFile>& listed;
  const std::vector<LaneState>& lanes;

  const Log& LogOf(const LogFile& file) const { return job.log(static_cast<int>(file.log())); }

  Places PlacesOf(const LogFile& file) const { return hearth::PlacesOf(job, listed, lanes, file); }
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
      spdlog::info("event=file_gone number={} path={} cause=\"every lane has passed it\"", same.number(), Quoted(path));
      same.set_taken_off(grows);  // a path stays in the list for as long as the job names it
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

absl::StatusOr<std::unique_ptr<Source>> Source::Open(const Job& job, const Listed& before, int64_t now_us) {
  std::unique_ptr<Source> source(new Source(job, before));
  HEARTH_RETURN_IF_ERROR(source->Restore(before));
  HEARTH_RETURN_IF_ERROR(source->Poll(now_us).status());
  return source;
}

absl::Status Source::Restore(const Listed& was) {
  const Before before = {job_, was.files, was.lanes};
  const uint32_t logs = static_cast<uint32_t>(job_.log_size());
  for (size_t i = 0; i < was.files.size(); ++i) {
    if (was.files[i].number() == was.consumed.files() + i && was.files[i].log() < logs) continue;
    return absl::DataLossError(absl::StrCat("list of files in MANIFEST: entry ", i, " (", was.files[i].path(),
                                            ") is out of place; start from another snapshot"));
  }
  std::vector<PathMatch> matches;
  for (uint32_t log = 0; log < logs; ++log) {
    HEARTH_ASSIGN_OR_RETURN(PathMatch match, MatchPaths(job_.log(static_cast<int>(log)), log, was.files));
    matches.push_back(std::move(match));
  }
  uint32_t newest_log = 0;
  for (const LogFile& listed : was.files) {
    OfLog& log = logs_[listed.log()];
    HEARTH_ASSIGN_OR_RETURN(LogFile file, RestoreFile(before, listed, matches[listed.log()]));
    if (file.has_name() && !job_.log(static_cast<int>(listed.log())).directory().empty()) log.seen.insert(file.name());
    file.set_number(listed.number());
    file.set_segment(SegmentOf(listed));
    files_.push_back(std::move(file));
    newest_log = std::max(newest_log, listed.log());
  }
  for (uint32_t log = 0; log < logs; ++log) {
    logs_[log].paths = static_cast<int>(matches[log].size());
    // Logs are listed one after the other: one that others are listed behind was closed.
    logs_[log].closed_before = log < newest_log || (was.closed && log < was.logs);
  }
  if (!files_.empty()) {
    const uint32_t end = files_.back().number() + 1;
    const bool begun = !before.PlacesOf(was.files.back()).untouched;
    last_is_whole_ = (begun && IsShuffled(before.LogOf(was.files.back()))) ||
                     std::any_of(was.lanes.begin(), was.lanes.end(), [&](const LaneState& lane) {
                       return lane.cursor().end_of_epoch() || lane.cursor().file() >= end;
                     });
  }
  ForgetConsumed(was);
  return absl::OkStatus();
}

// What every lane has read, and nobody can name any more, leaves the list: from its beginning, up to the first file
// that a cursor names, and never all of it.
void Source::ForgetConsumed(const Listed& was) {
  const Before before = {job_, was.files, was.lanes};
  uint32_t reached = files_.empty() ? 0 : files_.back().number();
  for (const LaneState& lane : before.lanes) reached = std::min(reached, lane.cursor().file());
  size_t gone = 0;
  for (; gone < files_.size() && files_[gone].number() < reached; ++gone) {
    const LogFile& file = files_[gone];
    if (!file.taken_off() || !before.PlacesOf(before.listed[gone]).done) break;
    consumed_.set_files(file.number() + 1);
    consumed_.set_bytes(consumed_.bytes() + file.bytes());
    consumed_.set_digest(IdentityOf(file, consumed_.digest()));
    consumed_.add_newest(IdentityOf(file));
  }
  files_.erase(files_.begin(), files_.begin() + static_cast<std::ptrdiff_t>(gone));
  known_files_ = files_.size();
  const int more = consumed_.newest_size() - kConsumedKnownMax;
  if (more > 0) consumed_.mutable_newest()->erase(consumed_.newest().begin(), consumed_.newest().begin() + more);
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
      for (int i = logs_[log].paths; i < job_.log(log).path_size(); ++i) {
        const std::string& name = job_.log(log).path(i);
        const std::string path = ResolvePath(job_, name);
        HEARTH_RETURN_IF_ERROR(Append(path, name, log));
        HEARTH_RETURN_IF_ERROR(CheckNew(i));
      }
      ++log_;
    }
  }
  next_poll_us_ = closed_ ? kNever : now_us + kSourcePollUs;
  return std::vector<LogFile>(files_.begin() + before, files_.end());
}

// A day's file that was sent twice is trained once. `path`: the place in its log of the file that was appended last.
absl::Status Source::CheckNew(int path) const {
  const LogFile& file = files_.back();
  if (again_ || file.bytes() == 0 || (known_files_ == 0 && consumed_.newest().empty())) return absl::OkStatus();
  std::string trained;
  if (std::find(consumed_.newest().begin(), consumed_.newest().end(), IdentityOf(file)) != consumed_.newest().end()) {
    trained = consumed_.files() > 0 ? "a file that was trained and has left the list"
                                    : "a file that the model was trained on before it was taken over";
  }
  for (size_t i = 0; i < known_files_ && i < files_.size(); ++i) {
    // Two logs of a job may name one file: each takes other records of it by its `where`.
    if (files_[i].path() == file.path() && files_[i].log() != file.log()) continue;
    if (files_[i].bytes() == file.bytes() && files_[i].digest() == file.digest() && !files_[i].taken_off())
      trained = files_[i].path();
  }
  if (trained.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("log[", file.log(), "].path[", path, "]: ", file.path(), " has the length and the head of ", trained,
                   ", which is in the run already; take it off, or train it once more with --again"));
}

absl::Status Source::PollDirectory(const Log& log, int64_t now_us) {
  const std::string folder = ResolvePath(job_, log.directory());
  OfLog& state = logs_[log_];
  if (newest_us_ < 0) newest_us_ = now_us;
  bool ended = false;
  HEARTH_ASSIGN_OR_RETURN(std::vector<std::string> names, NewNames(folder, log, &ended));
  if (ended) {
    // A listing is not one moment: a file renamed before the marker was may be missing in the listing that shows the
    // marker.
    HEARTH_ASSIGN_OR_RETURN(names, NewNames(folder, log, &ended));
  }
  for (const std::string& name : names) {
    if (!state.seen.empty() && name < *state.seen.rbegin()) {
      spdlog::warn("event=late_file path={} after={} cause=\"its name sorts before one that is listed\"",
                   Quoted(JoinPath(folder, name)), Quoted(*state.seen.rbegin()));
    }
    HEARTH_RETURN_IF_ERROR(Append(JoinPath(folder, name), name, log_));
    state.seen.insert(name);
    newest_us_ = now_us;
  }
  // A log that had ended goes on where something has come since; else it is over as it was.
  const bool over = state.closed_before && names.empty();
  state.closed_before = false;
  const bool idle =
      log.idle_seconds_max() > 0 && static_cast<double>(now_us - newest_us_) >= log.idle_seconds_max() * 1e6;
  if (over || ended || idle) {
    if (!over) {
      spdlog::info("event=log_closed log={} files={} cause={}", Quoted(log.name()), state.seen.size(),
                   ended ? "marker" : "idle");
    }
    ++log_;
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
    } else if (name[0] != '.' && !absl::EndsWith(name, ".tmp") && logs_[log_].seen.count(name) == 0 &&
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
  const LogFile* const last = files_.empty() ? nullptr : &files_.back();
  const bool begins = last != nullptr && (last_is_whole_ || BeginsSegment(*last, log, job_.log(static_cast<int>(log))));
  file->set_number(last == nullptr ? 0 : last->number() + 1);
  file->set_segment(last == nullptr ? 0 : last->segment() + (begins ? 1 : 0));
  file->set_name(name);
  last_is_whole_ = false;
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
