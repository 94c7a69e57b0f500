#include "common/artifact/manifest.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/artifact/numbered_folder.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr char kSuspectName[] = "SUSPECT";
constexpr uint32_t kSchema = 1;
constexpr uint64_t kManifestBytesMax = uint64_t{1} << 30;
constexpr uint32_t kLanesMax = 4096;      // as a job may have
constexpr uint32_t kShardsMax = 1 << 20;  // likewise
constexpr uint32_t kServersMax = 4096;    // as `hearth` starts
constexpr char kManifestName[] = "MANIFEST";
constexpr absl::string_view kChecksumMark = "# xxh3 ";

std::string ChecksumLine(absl::string_view text) {
  return absl::StrFormat("%s%016x\n", kChecksumMark, XXH3_64bits(text.data(), text.size()));
}

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    if (text_.empty()) text_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// A listed path stays inside its snapshot.
bool IsInside(const std::string& path) {
  if (path.empty() || path[0] == '/') return false;
  for (absl::string_view part : absl::StrSplit(path, '/')) {
    if (part == ".." || part.empty()) return false;
  }
  return true;
}

absl::Status DescribeInto(const std::string& folder, const std::string& name, std::vector<FileEntry>* entries) {
  const std::string path = JoinPath(folder, name);
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> children, ListDirectory(path));
    for (const std::string& child : children)
      HEARTH_RETURN_IF_ERROR(DescribeInto(folder, JoinPath(name, child), entries));
    return FsyncPath(path);
  }
  HEARTH_RETURN_IF_ERROR(FsyncPath(path));
  FileEntry entry;
  entry.set_path(name);
  HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(path));
  entry.set_bytes(bytes);
  HEARTH_ASSIGN_OR_RETURN(const uint64_t hash, HashFile(path));
  entry.set_xxh3(hash);
  entries->push_back(entry);
  return absl::OkStatus();
}

absl::StatusOr<Manifest> ReadAndVerify(const std::string& folder, uint64_t step, FileCheck check,
                                       const GiveUp& give_up) {
  HEARTH_ASSIGN_OR_RETURN(Manifest manifest, ReadManifest(folder));
  if (manifest.step() != step) {
    return absl::DataLossError(absl::StrCat(folder, "/", kManifestName, ": is of step ", manifest.step()));
  }
  HEARTH_RETURN_IF_ERROR(CheckCounts(manifest, folder));
  HEARTH_RETURN_IF_ERROR(VerifyFiles(folder, manifest, check, give_up));
  return manifest;
}

}  // namespace

std::string SerializeManifest(const Manifest& manifest) {
  std::string text;
  HEARTH_CHECK(google::protobuf::TextFormat::PrintToString(manifest, &text));
  return absl::StrCat(text, ChecksumLine(text));
}

absl::StatusOr<Manifest> ParseManifest(const std::string& text, const std::string& path_for_errors) {
  const size_t mark = text.rfind(kChecksumMark.data(), std::string::npos, kChecksumMark.size());
  if (mark == std::string::npos || (mark > 0 && text[mark - 1] != '\n')) {
    return absl::DataLossError(absl::StrCat(path_for_errors, ": truncated: has no last line with a checksum"));
  }
  const std::string body = text.substr(0, mark);
  if (text.substr(mark) != ChecksumLine(body)) {
    return absl::DataLossError(absl::StrCat(path_for_errors, ": checksum of its last line does not match its text"));
  }
  Manifest manifest;
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.AllowUnknownField(false);
  // The schema is looked at even where later fields are not known: a newer Hearth's MANIFEST is not a corrupt one.
  const bool parsed = parser.ParseFromString(body, &manifest);
  if (manifest.has_schema() && manifest.schema() > kSchema) {
    return absl::FailedPreconditionError(absl::StrCat(path_for_errors, ": schema ", manifest.schema(),
                                                      " is newer than this build's ", kSchema, "; use a newer Hearth"));
  }
  if (!parsed) return absl::DataLossError(absl::StrCat(path_for_errors, ": ", error.text()));
  if (manifest.schema() != kSchema) {
    return absl::DataLossError(absl::StrCat(path_for_errors, ": schema ", manifest.schema(), " is not known"));
  }
  return manifest;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& folder) {
  const std::string path = JoinPath(folder, kManifestName);
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kManifestBytesMax));
  HEARTH_ASSIGN_OR_RETURN(Manifest manifest, ParseManifest(text, path));
  for (const FileEntry& file : manifest.file()) {
    if (!IsInside(file.path())) {
      return absl::DataLossError(absl::StrCat(path, ": lists \"", file.path(), "\", which is not inside the snapshot"));
    }
    const std::string file_path = JoinPath(folder, file.path());
    absl::StatusOr<uint64_t> bytes = FileBytes(file_path);
    if (absl::IsNotFound(bytes.status())) {
      return absl::DataLossError(absl::StrCat(file_path, ": is listed in MANIFEST and does not exist"));
    }
    if (!bytes.ok()) return bytes.status();
    if (*bytes != file.bytes()) {
      return absl::DataLossError(absl::StrCat(file_path, ": has ", *bytes, " bytes, MANIFEST says ", file.bytes()));
    }
  }
  return manifest;
}

absl::Status CheckCounts(const Manifest& manifest, const std::string& folder) {
  const auto lost = [&](const std::string& fault) {
    return absl::DataLossError(absl::StrCat(JoinPath(folder, kManifestName), ": ", fault, "; use another snapshot"));
  };
  const auto in_range = [](uint64_t value, uint64_t most) { return value >= 1 && value <= most; };
  if (!in_range(manifest.lanes(), kLanesMax)) return lost(absl::StrCat("names ", manifest.lanes(), " lanes"));
  if (!in_range(manifest.servers(), kServersMax)) return lost(absl::StrCat("names ", manifest.servers(), " servers"));
  if (!in_range(manifest.shards(), kShardsMax)) return lost(absl::StrCat("names ", manifest.shards(), " shards"));
  if (manifest.lane_size() != static_cast<int>(manifest.lanes())) {
    return lost(absl::StrCat("has the state of ", manifest.lane_size(), " lanes of ", manifest.lanes()));
  }
  for (int i = 0; i < manifest.log_file_size(); ++i) {
    if (manifest.log_file(i).number() != manifest.consumed().files() + static_cast<uint32_t>(i)) {
      return lost(absl::StrCat("log file ", i, " has the number ", manifest.log_file(i).number()));
    }
  }
  const uint64_t files = uint64_t{manifest.consumed().files()} + static_cast<uint64_t>(manifest.log_file_size());
  for (const LaneState& lane : manifest.lane()) {
    if (lane.cursor().file() > files) {  // it may wait for the next one
      return lost(absl::StrCat("the cursor of lane ", lane.cursor().lane(), " is in file ", lane.cursor().file(),
                               " of ", files));
    }
  }
  return absl::OkStatus();
}

bool HoldsRows(absl::string_view path) { return absl::EndsWith(path, ".sst"); }

absl::Status VerifyFiles(const std::string& folder, const Manifest& manifest, FileCheck check, const GiveUp& give_up) {
  for (const FileEntry& file : manifest.file()) {
    if (check == FileCheck::kAllButRows && HoldsRows(file.path())) continue;
    const std::string path = JoinPath(folder, file.path());
    HEARTH_ASSIGN_OR_RETURN(const uint64_t hash, HashFile(path, give_up));
    if (hash != file.xxh3()) {
      return absl::DataLossError(
          absl::StrFormat("%s: checksum is %016x, MANIFEST says %016x", path, hash, file.xxh3()));
    }
  }
  return absl::OkStatus();
}

absl::Status MarkSuspect(const std::string& snapshots_folder) {
  return WriteFileAtomically(JoinPath(snapshots_folder, kSuspectName),
                             "a server met rows that are not what was written: the next start reads every file\n");
}

bool IsSuspect(const std::string& snapshots_folder) { return PathExists(JoinPath(snapshots_folder, kSuspectName)); }

absl::Status ClearSuspect(const std::string& snapshots_folder) {
  return RemoveTree(JoinPath(snapshots_folder, kSuspectName));
}

absl::Status CommitManifest(const std::string& folder, const Manifest& manifest) {
  for (const FileEntry& file : manifest.file()) HEARTH_CHECK(IsInside(file.path()), "listed path ", file.path());
  for (const std::string& path : {folder, JoinPath(folder, "..")}) HEARTH_RETURN_IF_ERROR(FsyncPath(path));
  return WriteFileAtomically(JoinPath(folder, kManifestName), SerializeManifest(manifest));
}

absl::StatusOr<std::vector<FileEntry>> DescribeFiles(const std::string& folder, const std::vector<std::string>& names) {
  std::vector<FileEntry> entries;
  std::set<std::string> folders;
  for (const std::string& name : names) {
    HEARTH_RETURN_IF_ERROR(DescribeInto(folder, name, &entries));
    for (size_t slash = name.find('/'); slash != std::string::npos; slash = name.find('/', slash + 1)) {
      folders.insert(JoinPath(folder, name.substr(0, slash)));
    }
  }
  folders.insert(folder);
  for (const std::string& path : folders) HEARTH_RETURN_IF_ERROR(FsyncPath(path));
  return entries;
}

absl::StatusOr<SnapshotChoice> FindNewestSnapshot(const std::string& snapshots_folder, const GiveUp& give_up) {
  SnapshotChoice choice;
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, NumbersIn(snapshots_folder));
  const FileCheck check = IsSuspect(snapshots_folder) ? FileCheck::kAll : FileCheck::kAllButRows;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const std::string folder = JoinPath(snapshots_folder, absl::StrCat(*step));
    absl::StatusOr<Manifest> manifest = ReadAndVerify(folder, *step, check, give_up);
    if (manifest.ok()) {
      choice.folder = folder;
      choice.manifest = *std::move(manifest);
      return choice;
    }
    // Only a snapshot that is not there or not whole is passed over. What may be whole (a newer schema, a disk that
    // does not answer) is not: whoever falls back removes newer folders.
    if (!absl::IsDataLoss(manifest.status()) && !absl::IsNotFound(manifest.status())) return manifest.status();
    choice.passed_over.push_back(absl::StrCat(folder, ": ", manifest.status().message()));
  }
  return choice;
}

absl::StatusOr<std::vector<uint64_t>> CommittedSnapshots(const std::string& snapshots_folder) {
  HEARTH_ASSIGN_OR_RETURN(std::vector<uint64_t> steps, NumbersIn(snapshots_folder));
  const auto uncommitted = [&](uint64_t step) {
    return !PathExists(JoinPath(snapshots_folder, absl::StrCat(step, "/", kManifestName)));
  };
  steps.erase(std::remove_if(steps.begin(), steps.end(), uncommitted), steps.end());
  return steps;
}

absl::StatusOr<SnapshotChoice> FindSnapshotOf(const std::string& snapshots_folder, uint64_t step,
                                              const GiveUp& give_up) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, CommittedSnapshots(snapshots_folder));
  if (std::find(steps.begin(), steps.end(), step) == steps.end()) {
    return absl::NotFoundError(
        absl::StrCat(snapshots_folder, ": no snapshot of step ", step, " is kept; ",
                     steps.empty() ? "none is: leave --from out"
                                   : absl::StrCat("give --from one of those that are: ", absl::StrJoin(steps, ", "))));
  }
  SnapshotChoice choice;
  choice.folder = JoinPath(snapshots_folder, absl::StrCat(step));
  HEARTH_ASSIGN_OR_RETURN(choice.manifest, ReadAndVerify(choice.folder, step, FileCheck::kAll, give_up));
  return choice;
}

absl::Status CheckEndIsAhead(const Job& job, const Manifest& manifest) {
  const auto refuse = [](const char* field, uint64_t is, const std::string& trained, uint64_t least) {
    return absl::FailedPreconditionError(absl::StrCat("training.", field, ": is ", is, ", and ", trained,
                                                      "; give at least ", least, ", or train into another --out"));
  };
  uint64_t epochs = 0;  // begun
  for (const LaneState& lane : manifest.lane())
    epochs = std::max<uint64_t>(epochs, lane.cursor().epoch() + uint64_t{1});
  if (job.training().epochs() < epochs) {
    return refuse("epochs", job.training().epochs(), absl::StrCat("the snapshot is in epoch ", epochs), epochs);
  }
  const uint64_t steps_max = job.training().steps_max();
  if (steps_max > 0 && steps_max < manifest.step()) {
    return refuse("steps_max", steps_max, absl::StrCat("the snapshot is of step ", manifest.step()), manifest.step());
  }
  return absl::OkStatus();
}

uint64_t ModelHash(uint64_t rows_hash, uint64_t dense_hash) {
  const uint64_t sums[2] = {rows_hash, dense_hash};
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  return XXH3_64bits(sums, sizeof(sums));
}

}  // namespace hearth
