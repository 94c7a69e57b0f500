// An export bundle as a folder of files (docs/FORMATS.md, "Export bundle"): manifest.json lists every other file with
// length and SHA-256, and manifest.json.sha256 covers manifest.json itself. What the files mean is
// model/export/export.h's business.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace hearth {

constexpr const char* kBundleManifest = "manifest.json";
constexpr const char* kBundleManifestSum = "manifest.json.sha256";  // as sha256sum writes it

struct BundleFile {
  std::string path;  // relative, '/' between folders
  uint64_t bytes = 0;
  std::string sha256;  // 64 hex digits
};

bool IsBundle(const std::string& folder);

// 64 hex digits over a whole file.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);

// Every file under the folder but the two above, in path order, fsynced.
absl::StatusOr<std::vector<BundleFile>> DescribeBundle(const std::string& folder);

// Reads back every file: lengths, sums, nothing missing, nothing besides. A line for people. DataLoss names the file.
absl::StatusOr<std::string> VerifyBundle(const std::string& folder);

// manifest.json's text after its own checksum was verified. DataLoss where that does not hold.
absl::StatusOr<std::string> ReadBundleManifest(const std::string& folder);

// What manifest.json lists, in its order; `text` is the manifest's. DataLoss where an entry is malformed.
absl::StatusOr<std::vector<BundleFile>> ListedFiles(const std::string& folder, const std::string& text);
// One listed file's length and sum.
absl::Status CheckBundleFile(const std::string& folder, const BundleFile& file);

// Writes manifest.json and its sum.
absl::Status WriteBundleManifest(const std::string& folder, const std::string& text);

// Makes the folder `out` by one rename of what `fill` wrote into a folder beside it, `out`.partial-<pid>, all of whose
// folders are synced before (its files by DescribeBundle); on an error nothing stays. What an earlier process that was
// killed has left of the same `out` is removed. FailedPrecondition where `out` exists and is not empty.
absl::Status PublishFolder(const std::string& out, const std::function<absl::Status(const std::string& folder)>& fill);
// NotFound, ResourceExhausted (the disk is full) and Unavailable name the file.
absl::Status CopyIntoBundle(const std::string& from, const std::string& to);
// Removes folders of the name <something that begins with `prefix`>.partial-<pid> whose process is gone.
absl::Status RemoveAbandoned(const std::string& folder, absl::string_view prefix);

}  // namespace hearth
