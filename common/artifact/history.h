// DIR/history.jsonl: what a run has been through, one JSON object a line (docs/FORMATS.md, "history.jsonl"). Appended
// to by the scheduler (starts, ends) and by the front command (forks, ends that the scheduler did not see), one at a
// time; anybody may read. Nothing that trains depends on it: what a MANIFEST holds decides.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/proto/control.pb.h"

namespace hearth {

constexpr uint64_t kHistoryBytesMax = uint64_t{1} << 22;  // past it the older half goes, but the newest fork

struct HistoryEntry {
  enum class Kind {
    kStart,   // ranks begin to train, from the snapshot of `step`
    kEnd,     // they have ended, or never began
    kFork,    // --from: snapshots beyond `back_to` are about to be set aside
    kForked,  // they are
  };
  // The model at a snapshot: what is known of it without its MANIFEST.
  struct Figure {
    std::string split;
    std::string task;
    uint64_t step = 0;
    std::optional<double> auc, log_loss;
  };
  struct State {
    uint64_t step = 0;
    uint64_t records = 0;  // trained since the first start
    std::vector<Figure> figures;
    uint64_t published_step = 0;  // 0: nothing was; else the newest link of the newest chain: its step,
    uint64_t published_base = 0;  // the step of its full export,
    uint64_t published_seq = 0;   // and its place behind that
  };
  Kind kind = Kind::kEnd;
  int64_t time_s = 0;  // since 1970; 0: AppendHistory takes the clock's
  // A start's and an end's: the newest snapshot; a fork's: the newest of those that it sets aside. None: not known.
  std::optional<State> state;
  uint32_t servers = 0, workers = 0, restarts = 0;  // of a start; restarts: by the command or batch job that made it
  std::vector<std::string> changes;                 // of the job, at this start: "training.clip_norm: 0 -> 5"
  std::string status, reason;                       // of an end, as run.json has them
  int code = 0;
  uint64_t back_to = 0;  // of a fork
  uint64_t number = 0;   // of a fork, from 1: what it sets aside is called <name>.aside-<number>
};

HistoryEntry::State StateOf(uint64_t step, uint64_t records, const std::vector<Evaluation>& evaluations);
HistoryEntry::State StateOf(const Manifest& manifest);
// What lies in dir/export now; as it is where that is nothing, or does not read.
void AddPublished(const std::string& dir, HistoryEntry::State* state);

struct History {
  std::vector<HistoryEntry> entries;
  uint64_t left_out = 0;    // older lines that had to go
  uint64_t unreadable = 0;  // a kill may have torn a line; a newer Hearth may know more kinds
  const HistoryEntry* newest_fork() const;
  // The newest fork, where it was begun and not ended.
  const HistoryEntry* unfinished_fork() const;
};
// Of a run's folder; empty where it has no history.
absl::StatusOr<History> ReadHistory(const std::string& dir);

// On the disk when it returns. Long lists and texts are cut.
absl::Status AppendHistory(const std::string& dir, HistoryEntry entry);

}  // namespace hearth
