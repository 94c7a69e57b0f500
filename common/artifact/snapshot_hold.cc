#include "common/artifact/snapshot_hold.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/manifest.h"
#include "common/artifact/numbered_folder.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr const char* kRemoved = "hearth/snapshot_removed";  // key of a payload
constexpr int kListingsMax = 16;

absl::Status Removed(const std::string& manifest_path) {
  absl::Status status = absl::NotFoundError(
      absl::StrCat(std::filesystem::path(manifest_path).parent_path().string(),
                   ": this snapshot was removed while it was read; read a newer one, or raise snapshot.keep"));
  status.SetPayload(kRemoved, absl::Cord());
  return status;
}

// False: somebody else has it. A file system without locks says yes.
bool Lock(int fd, int how) {
  while (flock(fd, how | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    return errno != EWOULDBLOCK;
  }
  return true;
}

// Whether `path` names the file behind `fd`.
bool Names(const std::string& path, int fd) {
  struct stat named, open;
  return stat(path.c_str(), &named) == 0 && fstat(fd, &open) == 0 && named.st_dev == open.st_dev &&
         named.st_ino == open.st_ino;
}

// Reads and checks one snapshot that is held. `of_run`: its folder's name must be its step.
absl::StatusOr<Manifest> ReadHeld(const std::string& folder, bool of_run, SnapshotCheck check) {
  HEARTH_ASSIGN_OR_RETURN(Manifest manifest, ReadManifest(folder));
  if (of_run && NumberOfName(std::filesystem::path(folder).filename().string()) != manifest.step()) {
    return absl::DataLossError(absl::StrCat(JoinPath(folder, "MANIFEST"), ": is of step ", manifest.step()));
  }
  HEARTH_RETURN_IF_ERROR(CheckCounts(manifest, folder));
  if (check == SnapshotCheck::kChecksums) HEARTH_RETURN_IF_ERROR(VerifyFiles(folder, manifest));
  return manifest;
}

}  // namespace

absl::StatusOr<SnapshotHold> SnapshotHold::Take(const std::string& folder) {
  const std::string path = JoinPath(folder, "MANIFEST");
  int fd;
  do {
    fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0 && errno == ENOENT) return Removed(path);
  if (fd < 0) return absl::UnavailableError(absl::StrCat(path, ": cannot open: ", std::strerror(errno)));
  SnapshotHold hold(path, fd);
  // Whoever removes may have been faster, and be done with it.
  if (!Lock(fd, LOCK_SH) || hold.Gone()) return Removed(path);
  return hold;
}

SnapshotHold::SnapshotHold(SnapshotHold&& other) noexcept { *this = std::move(other); }

SnapshotHold& SnapshotHold::operator=(SnapshotHold&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

SnapshotHold::~SnapshotHold() {
  if (fd_ >= 0) close(fd_);
}

bool SnapshotHold::Gone() const { return fd_ >= 0 && !Names(path_, fd_); }

absl::Status SnapshotHold::Explain(const absl::Status& status) const {
  return !status.ok() && Gone() ? Removed(path_) : status;
}

absl::StatusOr<bool> RemoveSnapshot(const std::string& folder, bool force) {
  const std::string path = JoinPath(folder, "MANIFEST");
  // For writing: over NFS an exclusive lock needs that. What cannot be opened at all has no reader to ask.
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  absl::Status status;
  const bool remove = fd < 0 || Lock(fd, LOCK_EX) || force;
  if (remove) status = RemoveTree(path);
  if (remove && status.ok()) status = RemoveTree(folder);
  if (fd >= 0) close(fd);
  HEARTH_RETURN_IF_ERROR(status);
  return remove;
}

absl::StatusOr<std::vector<std::string>> SnapshotsAt(const std::string& path) {
  std::error_code error;
  const std::string folder = std::filesystem::canonical(path, error).string();
  if (error) {
    return absl::NotFoundError(absl::StrCat(path, ": ", error.message(), "; give a snapshot's or a run's folder"));
  }
  if (PathExists(JoinPath(folder, "MANIFEST"))) return std::vector<std::string>{folder};
  const std::string snapshots = PathExists(JoinPath(folder, "snapshots")) ? JoinPath(folder, "snapshots") : folder;
  // Once more where none is committed: between two looks the newest may be committed and the one before it removed.
  for (int listing = 0; listing < kListingsMax; ++listing) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, NumbersIn(snapshots));
    std::vector<std::string> folders;
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      std::string one = JoinPath(snapshots, absl::StrCat(*step));
      if (PathExists(JoinPath(one, "MANIFEST"))) folders.push_back(std::move(one));
    }
    if (!folders.empty()) return folders;
  }
  if (NumberOfName(std::filesystem::path(folder).filename().string()).has_value()) {
    return absl::DataLossError(
        absl::StrCat(JoinPath(folder, "MANIFEST"), ": is missing: this snapshot was never committed, or lost it"));
  }
  return absl::NotFoundError(
      absl::StrCat(path, ": holds no committed snapshot; give a folder DIR or DIR/snapshots/STEP"));
}

absl::StatusOr<std::string> FindBestSnapshot(const std::string& run) {
  if (PathExists(JoinPath(run, "MANIFEST"))) {
    return absl::NotFoundError(absl::StrCat(run, ": is one snapshot; give the run's folder, or leave --best out"));
  }
  HEARTH_ASSIGN_OR_RETURN(const HeldSnapshot newest, HoldNewestSnapshot(run, SnapshotCheck::kLengths));
  if (!newest.manifest.has_best()) {
    return absl::NotFoundError(absl::StrCat(newest.folder,
                                            ": knows no best snapshot: the job has no snapshot.best, or its split was "
                                            "not evaluated yet; set snapshot.best.split and the split's every_steps, "
                                            "or leave --best out for the newest"));
  }
  const BestSnapshot& best = newest.manifest.best();
  const std::string folder =
      JoinPath(std::filesystem::path(newest.folder).parent_path().string(), absl::StrCat(best.step()));
  if (PathExists(JoinPath(folder, "MANIFEST"))) return folder;
  HEARTH_ASSIGN_OR_RETURN(const HeldSnapshot now, HoldNewestSnapshot(run, SnapshotCheck::kLengths));
  if (now.manifest.best().step() != best.step()) return Removed(JoinPath(folder, "MANIFEST"));
  return absl::NotFoundError(absl::StrCat(folder, ": was the best snapshot (", best.of(), " ", best.value(),
                                          ") and is not there any more; it may have been removed, or set aside by "
                                          "--from; leave --best out for the newest"));
}

absl::StatusOr<HeldSnapshot> HoldBestSnapshot(const std::string& run, SnapshotCheck check) {
  return AgainIfRemoved([&]() -> absl::StatusOr<HeldSnapshot> {
    HeldSnapshot held;
    HEARTH_ASSIGN_OR_RETURN(held.folder, FindBestSnapshot(run));
    HEARTH_ASSIGN_OR_RETURN(held.hold, SnapshotHold::Take(held.folder));
    absl::StatusOr<Manifest> manifest = ReadHeld(held.folder, /*of_run=*/true, check);
    if (!manifest.ok()) return held.hold.Explain(manifest.status());
    held.manifest = *std::move(manifest);
    return held;
  });
}

bool IsRemoved(const absl::Status& status) { return status.GetPayload(kRemoved).has_value(); }

absl::StatusOr<HeldSnapshot> HoldNewestSnapshot(const std::string& path, SnapshotCheck check) {
  return AgainIfRemoved([&]() -> absl::StatusOr<HeldSnapshot> {
    const bool of_run = !PathExists(JoinPath(path, "MANIFEST"));
    HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> folders, SnapshotsAt(path));
    HeldSnapshot held;
    absl::Status newest;
    for (const std::string& folder : folders) {
      HEARTH_ASSIGN_OR_RETURN(held.hold, SnapshotHold::Take(folder));
      absl::StatusOr<Manifest> manifest = ReadHeld(folder, of_run, check);
      if (manifest.ok()) {
        held.folder = folder;
        held.manifest = *std::move(manifest);
        return held;
      }
      const absl::Status status = held.hold.Explain(manifest.status());
      if (!absl::IsDataLoss(status)) return status;
      if (newest.ok()) newest = status;
      held.passed_over.push_back(std::string(status.message()));
    }
    return newest;
  });
}

}  // namespace hearth
