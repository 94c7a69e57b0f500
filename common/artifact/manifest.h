// Committed snapshots: DIR/snapshots/<step>/MANIFEST and what it lists (docs/FORMATS.md). A folder without a valid
// MANIFEST does not exist.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// MANIFEST is the text format of `Manifest` followed by a last line "# xxh3 <16 hex digits>" over all bytes before that
// line.
std::string SerializeManifest(const Manifest& manifest);
absl::StatusOr<Manifest> ParseManifest(const std::string& text, const std::string& path_for_errors);

// Reads and checks folder/MANIFEST, and that each listed file exists with its length (under a second). DataLoss names
// the file.
absl::StatusOr<Manifest> ReadManifest(const std::string& folder);
// That its counts are ones that a run can have: whoever starts from it, or allocates by it, asks first. DataLoss.
absl::Status CheckCounts(const Manifest& manifest, const std::string& folder);
// Files of rows are by far the most bytes. RocksDB checks each of their blocks when it is read, and a server that goes
// on with them reads them once more beside its work.
enum class FileCheck { kAll, kAllButRows };
bool HoldsRows(absl::string_view path);
// The listed files' checksums too. kAll reads the whole snapshot.
absl::Status VerifyFiles(const std::string& folder, const Manifest& manifest, FileCheck check = FileCheck::kAll,
                         const GiveUp& give_up = {});

// A server met rows that are not what was written: until the newest snapshot that is whole has been found by reading
// every file, none is taken on trust. A file of that meaning beside the snapshots.
absl::Status MarkSuspect(const std::string& snapshots_folder);
bool IsSuspect(const std::string& snapshots_folder);
absl::Status ClearSuspect(const std::string& snapshots_folder);
// Writes folder/MANIFEST: one rename commits the snapshot. REQUIRES: the files it lists are on the disk, as they are
// once DescribeFiles has returned, on whatever host.
absl::Status CommitManifest(const std::string& folder, const Manifest& manifest);
// Length and checksum of folder/name for each name (recursing into folders), to be listed in a MANIFEST, once they and
// their folders up to `folder` are on the disk: who wrote a file syncs it, before it is promised to anybody.
absl::StatusOr<std::vector<FileEntry>> DescribeFiles(const std::string& folder, const std::vector<std::string>& names);

struct SnapshotChoice {
  std::string folder;  // empty: none
  Manifest manifest;
  std::vector<std::string> passed_over;  // one line for each newer folder that does not verify, and why
};
// The newest valid snapshot under `snapshots_folder`: ReadManifest and VerifyFiles, of all files where the folder is
// suspect and else of all but the rows. For the run itself; who reads beside it takes HoldNewestSnapshot
// (snapshot_hold.h).
absl::StatusOr<SnapshotChoice> FindNewestSnapshot(const std::string& snapshots_folder, const GiveUp& give_up = {});
// Steps of the committed snapshots, ascending.
absl::StatusOr<std::vector<uint64_t>> CommittedSnapshots(const std::string& snapshots_folder);
// The snapshot of that step alone. NotFound, with the steps that are there, where it is not; DataLoss where it is not
// whole.
absl::StatusOr<SnapshotChoice> FindSnapshotOf(const std::string& snapshots_folder, uint64_t step,
                                              const GiveUp& give_up = {});

// The end that `job` sets, in epochs and steps, is not before what the snapshot has trained. FailedPrecondition.
absl::Status CheckEndIsAhead(const Job& job, const Manifest& manifest);

// XXH3-64 of the two sums' 16 bytes, little-endian.
uint64_t ModelHash(uint64_t rows_hash, uint64_t dense_hash);

}  // namespace hearth
