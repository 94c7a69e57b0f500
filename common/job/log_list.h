// The list of a job's log files as pure data: segments, and how far lanes are with a file (docs/PROTOCOL.md §1).
#pragma once

#include <cstdint>
#include <vector>

#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

bool IsShuffled(const Log& log);

// The segment of a listed file. Files of one segment lie together; at its end is a cut.
uint32_t SegmentOf(const LogFile& file);
// Whether a file of log number `number`, `log`, that is listed behind `last` begins a segment: it is of another log, or
// the log is cut after each file.
bool BeginsSegment(const LogFile& last, uint32_t number, const Log& log);
// The entry of that number; null where it is not listed (any more).
const LogFile* FindFile(const std::vector<LogFile>& listed, uint32_t number);

// hash64 of length and digest, by which a file is known again under another name.
uint64_t IdentityOf(const LogFile& file, uint64_t seed = 0);
constexpr int kConsumedKnownMax = 4096;  // of them a MANIFEST keeps the newest

// The newest epoch that a lane is in.
uint32_t NewestEpoch(const std::vector<LaneState>& lanes);

// How far the lanes are with one file in the epoch that they are in.
struct Places {
  bool untouched = true;  // no lane has taken anything of it
  bool passed = true;     // every lane has all of its part
  bool parted = false;    // some lane has all of its part
  bool done = false;      // passed, and no epoch is to come
  bool digests = true;    // every lane that is in it knows what it has read
};
// A shuffled segment is read in any order: a lane that is in it is in each of its files. `listed`: the list that `file`
// is of, and that the lanes' cursors point into.
Places PlacesOf(const Job& job, const std::vector<LogFile>& listed, const std::vector<LaneState>& lanes,
                const LogFile& file);

// Whether all lanes, as they are after `step`, are at the end of the same segment, or of the same epoch, and that end's
// cut is not still to come.
bool AtSegmentEnd(const std::vector<LaneState>& lanes, uint64_t step);
bool AtEpochEnd(const std::vector<LaneState>& lanes, uint64_t step);

// The number behind the list of a MANIFEST.
uint32_t FilesEnd(const Manifest& manifest);
// A MANIFEST's lanes; what a version without segments has saved in the form of this one.
std::vector<LaneState> LanesOf(const Manifest& manifest);

// The states of as many lanes at the end of a segment, where no lane has a part of a log that another number of lanes
// would not have: the first ones go on with their own, more begin where the others stand, and what lanes that are no
// more have counted is the first one's. As they are where the number is theirs.
std::vector<LaneState> DealtAnew(const std::vector<LaneState>& lanes, uint32_t count);

// A job whose logs name only what lanes may still read: without the paths of files that `lanes`, all of a run's or
// those of one worker, have passed for good. They need not be there any more.
Job WithoutReadPaths(const Job& job, const std::vector<LogFile>& listed, const std::vector<LaneState>& lanes);

}  // namespace hearth
