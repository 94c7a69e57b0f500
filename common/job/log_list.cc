#include "common/job/log_list.h"

#include <xxhash.h>

#include <algorithm>
#include <set>
#include <string>

#include "common/artifact/reading.h"

namespace hearth {

bool IsShuffled(const Log& log) { return log.shuffle().pieces() || log.shuffle().window_records_max() > 0; }

uint32_t SegmentOf(const LogFile& file) { return file.has_segment() ? file.segment() : file.log(); }

bool BeginsSegment(const LogFile& last, uint32_t number, const Log& log) {
  return last.log() != number || log.cut_after() == Log::FILE;
}

const LogFile* FindFile(const std::vector<LogFile>& listed, uint32_t number) {
  if (listed.empty() || number < listed.front().number()) return nullptr;
  const uint32_t at = number - listed.front().number();
  return at < listed.size() ? &listed[at] : nullptr;
}

uint64_t IdentityOf(const LogFile& file, uint64_t seed) {
  const uint64_t known[2] = {file.bytes(), file.digest()};
  return XXH3_64bits_withSeed(known, sizeof(known), seed);
}

uint32_t NewestEpoch(const std::vector<LaneState>& lanes) {
  uint32_t epoch = 0;
  for (const LaneState& lane : lanes) epoch = std::max(epoch, lane.cursor().epoch());
  return epoch;
}

Places PlacesOf(const Job& job, const std::vector<LogFile>& listed, const std::vector<LaneState>& lanes,
                const LogFile& file) {
  const uint32_t epoch = NewestEpoch(lanes);
  const bool shuffled = IsShuffled(job.log(static_cast<int>(file.log())));
  Places places;
  for (const LaneState& lane : lanes) {
    const Cursor& cursor = lane.cursor();
    int64_t way = int64_t{cursor.file()} - int64_t{file.number()};
    const bool inside = cursor.record() > 0;  // else at the beginning of cursor.file
    if (!inside && way <= 0) way = -1;
    const LogFile* const of_lane = inside && shuffled ? FindFile(listed, cursor.file()) : nullptr;
    if (of_lane != nullptr) way = int64_t{SegmentOf(*of_lane)} - int64_t{SegmentOf(file)};
    if (way == 0 && !shuffled && cursor.file_ended()) way = 1;
    if (cursor.epoch() < epoch) way = -1;
    places.untouched = places.untouched && way < 0;
    places.passed = places.passed && way > 0;
    places.parted = places.parted || way > 0;
    if (way == 0) places.digests = places.digests && cursor.has_text_digest();
  }
  places.passed = places.passed && !lanes.empty();
  places.done = places.passed && epoch + 1 >= job.training().epochs();
  return places;
}

bool AtSegmentEnd(const std::vector<LaneState>& lanes, uint64_t step) {
  return std::all_of(lanes.begin(), lanes.end(), [&](const LaneState& lane) {
    const Cursor& cursor = lane.cursor();
    return (cursor.end_of_segment() || cursor.end_of_epoch()) && cursor.epoch() == lanes[0].cursor().epoch() &&
           cursor.file() == lanes[0].cursor().file() && lane.segment_ends_at() <= step && lane.epoch_ends_at() <= step;
  });
}

bool AtEpochEnd(const std::vector<LaneState>& lanes, uint64_t step) {
  return AtSegmentEnd(lanes, step) &&
         std::all_of(lanes.begin(), lanes.end(), [](const LaneState& lane) { return lane.cursor().end_of_epoch(); });
}

uint32_t FilesEnd(const Manifest& manifest) {
  return manifest.consumed().files() + static_cast<uint32_t>(manifest.log_file_size());
}

std::vector<LaneState> LanesOf(const Manifest& manifest) {
  std::vector<LaneState> lanes(manifest.lane().begin(), manifest.lane().end());
  for (LaneState& lane : lanes) {
    if (!lane.has_segment_ends_at() && lane.epoch_ends_at() > 0) lane.set_segment_ends_at(lane.epoch_ends_at());
    Cursor* const cursor = lane.mutable_cursor();
    if (!cursor->end_of_epoch() || cursor->end_of_segment()) continue;
    cursor->set_end_of_segment(true);
    cursor->set_file(FilesEnd(manifest));
  }
  return lanes;
}

std::vector<LaneState> DealtAnew(const std::vector<LaneState>& lanes, uint32_t count) {
  if (lanes.empty() || lanes.size() == count) return lanes;
  std::vector<LaneState> dealt(lanes.begin(), lanes.begin() + std::min<size_t>(lanes.size(), count));
  for (size_t gone = count; gone < lanes.size(); ++gone) {
    AddLedger(lanes[gone].ledger(), dealt[0].mutable_ledger());
    MergeReading(lanes[gone].reading(), dealt[0].mutable_reading());
    dealt[0].set_non_finite(dealt[0].non_finite() + lanes[gone].non_finite());
  }
  for (uint32_t lane = static_cast<uint32_t>(lanes.size()); lane < count; ++lane) {
    LaneState state = lanes[0];
    state.mutable_cursor()->set_lane(lane);
    state.mutable_cursor()->set_window(0);
    state.mutable_ledger()->Clear();
    state.clear_reading();
    state.clear_non_finite();
    state.clear_dead_letter_bytes();
    dealt.push_back(std::move(state));
  }
  return dealt;
}

Job WithoutReadPaths(const Job& job, const std::vector<LogFile>& listed, const std::vector<LaneState>& lanes) {
  std::set<std::pair<uint32_t, std::string>> read, unread;
  for (const LogFile& file : listed) {
    if (file.log() >= static_cast<uint32_t>(job.log_size()) || !file.has_name()) continue;
    const bool over = file.taken_off() || PlacesOf(job, listed, lanes, file).done;
    (over ? read : unread).emplace(file.log(), file.name());
  }
  Job rest = job;
  for (int i = 0; i < rest.log_size(); ++i) {
    Log* const log = rest.mutable_log(i);
    log->clear_path();
    for (const std::string& path : job.log(i).path()) {
      const std::pair<uint32_t, std::string> name(i, path);
      if (read.count(name) == 0 || unread.count(name) > 0) log->add_path(path);
    }
  }
  return rest;
}

}  // namespace hearth
