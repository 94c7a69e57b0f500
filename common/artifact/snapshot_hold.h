// Reading snapshots beside the run that writes and removes them (docs/OPERATIONS.md, "Reading beside a run"). A reader
// *holds* the snapshot that it reads; the scheduler removes a held one later.
//
// A hold is a shared flock on the snapshot's MANIFEST; who removes takes it exclusively, and does not wait. So a hold
// needs the right to read and no more, leaves nothing in the folder, and ends with its process however that ends. Over
// NFS Linux makes byte-range locks of it, which hold between hosts; where a file system has no locks (NFS mounted with
// `nolock` has them on each host alone) a snapshot may still go under its reader, who then says so (Explain).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

// Until it is destroyed. Threads may share it. Not inherited by programs that are started meanwhile.
class SnapshotHold {
 public:
  // NotFound where the folder has no MANIFEST, or is being removed.
  static absl::StatusOr<SnapshotHold> Take(const std::string& folder);
  SnapshotHold() = default;  // holds nothing
  SnapshotHold(SnapshotHold&& other) noexcept;
  SnapshotHold& operator=(SnapshotHold&& other) noexcept;
  ~SnapshotHold();

  // What a reader's `status` means: itself, but NotFound where the snapshot is not there any more: it was removed under
  // the reader, not damaged.
  absl::Status Explain(const absl::Status& status) const;

 private:
  SnapshotHold(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  bool Gone() const;

  std::string path_;  // of the MANIFEST
  int fd_ = -1;
};

// Removes a snapshot, its MANIFEST first: a folder that is half removed does not look like one. False, and nothing is
// changed, where a reader holds it; `force`: also then. A folder that is not there is fine.
absl::StatusOr<bool> RemoveSnapshot(const std::string& folder, bool force);

// The committed snapshots that `path` means, newest first, at least one, not read: the one in it, or those of a run's
// folder (or of its `snapshots`). NotFound: there is none; DataLoss: `path` is named like a snapshot and has no
// MANIFEST.
absl::StatusOr<std::vector<std::string>> SnapshotsAt(const std::string& path);

enum class SnapshotCheck { kLengths, kChecksums };  // ReadManifest's and CheckCounts's, or VerifyFiles's too

struct HeldSnapshot {
  std::string folder;
  Manifest manifest;
  SnapshotHold hold;
  std::vector<std::string> passed_over;  // one line for each newer snapshot that is not whole
};
// The newest snapshot of those that `path` means that passes `check`, held. One that is removed meanwhile counts for
// nothing: the newest is looked for again. NotFound: none; DataLoss: none is whole. What may be whole (a newer schema,
// a disk that does not answer) is not passed over: its error is returned.
absl::StatusOr<HeldSnapshot> HoldNewestSnapshot(const std::string& path, SnapshotCheck check);

// The folder of the run's best snapshot (the job's snapshot.best), as its newest one names it. NotFound: the job asks
// for none, nothing was evaluated yet, or it is not there any more.
absl::StatusOr<std::string> FindBestSnapshot(const std::string& run);
// That one, held; looked for again where a better one has taken its place meanwhile.
absl::StatusOr<HeldSnapshot> HoldBestSnapshot(const std::string& run, SnapshotCheck check);

// Whether `status` says that a snapshot was removed: Take's and Explain's NotFound.
bool IsRemoved(const absl::Status& status);

// Calls `read` again where a snapshot was removed under it, but no more than a few times: a run may commit and remove
// faster than `read` gets to hold one.
template <typename Read>
auto AgainIfRemoved(const Read& read) {
  constexpr int kTriesMax = 16;
  for (int tries = 1;; ++tries) {
    auto result = read();
    if (!IsRemoved(result.status()) || tries == kTriesMax) return result;
  }
}

}  // namespace hearth
