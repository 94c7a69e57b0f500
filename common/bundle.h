// An export bundle as a folder of files (docs/FORMATS.md, "Export bundle"): manifest.json lists every other file with
// length and SHA-256, and manifest.json.sha256 covers manifest.json itself. What the files mean is model/export.h's
// business.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

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

// Writes manifest.json and its sum.
absl::Status WriteBundleManifest(const std::string& folder, const std::string& text);

}  // namespace hearth
