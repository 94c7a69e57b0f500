#include "scripts/hearth/fork.h"

#include <algorithm>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/bundle_chain.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "scripts/hearth/prepare.h"

namespace hearth {
namespace {

constexpr absl::string_view kAside = ".aside-";

std::string SnapshotsOf(const std::string& dir) { return JoinPath(dir, "snapshots"); }

// Committed ones, ascending. What was never committed the scheduler removes.
absl::StatusOr<std::vector<uint64_t>> SnapshotsBeyond(const std::string& dir, uint64_t step) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, CommittedSnapshots(SnapshotsOf(dir)));
  return std::vector<uint64_t>(std::upper_bound(steps.begin(), steps.end(), step), steps.end());
}

// The highest number that a name in the folder was set aside under.
absl::StatusOr<uint64_t> NewestAsideIn(const std::string& folder) {
  uint64_t newest = 0;
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  for (const std::string& name : names) {
    const size_t mark = name.rfind(kAside.data(), std::string::npos, kAside.size());
    uint64_t number = 0;
    if (mark == std::string::npos || !absl::SimpleAtoi(name.substr(mark + kAside.size()), &number)) continue;
    newest = std::max(newest, number);
  }
  return newest;
}

// What is known of the line that is left, at its newest snapshot; nothing where that does not read.
std::optional<HistoryEntry::State> StateAt(const std::string& dir, uint64_t step) {
  const absl::StatusOr<Manifest> manifest = ReadManifest(JoinPath(SnapshotsOf(dir), absl::StrCat(step)));
  if (!manifest.ok()) return std::nullopt;
  HistoryEntry::State state = StateOf(*manifest);
  AddPublished(dir, &state);
  return state;
}

void TellAside(const std::string& from, const std::string& as) {
  Say(absl::StrCat("set aside: ", from, " is now ", as, " and stays until you remove it"));
}

absl::Status SetAside(const std::string& dir, const HistoryEntry& fork) {
  const std::string suffix = absl::StrCat(kAside, fork.number);
  // A publication that cannot be read keeps no run from going back: the next one is a full export.
  const absl::StatusOr<std::vector<std::string>> published =
      SetAsideLine(JoinPath(dir, "export"), fork.back_to, suffix);
  if (!published.ok()) Say(absl::StrCat("left as it is published: ", published.status().message()));
  if (published.ok()) {
    for (const std::string& as : *published) TellAside(as.substr(0, as.size() - suffix.size()), as);
  }
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> beyond, SnapshotsBeyond(dir, fork.back_to));
  for (auto step = beyond.rbegin(); step != beyond.rend(); ++step) {
    const std::string folder = JoinPath(SnapshotsOf(dir), absl::StrCat(*step));
    HEARTH_RETURN_IF_ERROR(RenamePath(folder, folder + suffix));
    TellAside(folder, folder + suffix);
  }
  // It counts by the newest snapshot, which is another one now (submit.h).
  HEARTH_RETURN_IF_ERROR(RemoveTree(JoinPath(dir, "requeues")));
  HistoryEntry forked;
  forked.kind = HistoryEntry::Kind::kForked;
  forked.number = fork.number;
  forked.back_to = fork.back_to;
  return AppendHistory(dir, forked);
}

}  // namespace

absl::Status ForkAt(const std::string& dir, uint64_t step) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> beyond, SnapshotsBeyond(dir, step));
  if (beyond.empty()) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(const History history, ReadHistory(dir));
  HEARTH_ASSIGN_OR_RETURN(const uint64_t aside, NewestAsideIn(SnapshotsOf(dir)));
  HistoryEntry fork;
  fork.kind = HistoryEntry::Kind::kFork;
  fork.back_to = step;
  fork.number = 1 + std::max(aside, history.newest_fork() != nullptr ? history.newest_fork()->number : 0);
  fork.state = StateAt(dir, beyond.back());
  HEARTH_RETURN_IF_ERROR(AppendHistory(dir, fork));
  return SetAside(dir, fork);
}

absl::Status FinishFork(const std::string& dir) {
  HEARTH_ASSIGN_OR_RETURN(const History history, ReadHistory(dir));
  const HistoryEntry* const fork = history.unfinished_fork();
  if (fork == nullptr) return absl::OkStatus();
  Say(absl::StrCat("going back to step ", fork->back_to, " was cut short; it is done now"));
  return SetAside(dir, *fork);
}

}  // namespace hearth
