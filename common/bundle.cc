#include "common/bundle.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/file.h"
#include "common/status.h"

namespace hearth {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr uint64_t kManifestBytesMax = uint64_t{1} << 28;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    HEARTH_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  void Add(const char* bytes, size_t size) { HEARTH_CHECK(EVP_DigestUpdate(context_.get(), bytes, size) == 1); }
  std::string Hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    HEARTH_CHECK(EVP_DigestFinal_ex(context_.get(), digest, &size) == 1);
    return absl::BytesToHexString(absl::string_view(reinterpret_cast<char*>(digest), size));
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

absl::Status Lost(const std::string& folder, absl::string_view name, absl::string_view cause) {
  return absl::DataLossError(absl::StrCat(JoinPath(folder, name), ": ", cause, "; export the snapshot again"));
}

// Relative paths of all files, sorted.
absl::StatusOr<std::vector<std::string>> FilesUnder(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  std::filesystem::recursive_directory_iterator at(folder, error);
  for (; !error && at != std::filesystem::recursive_directory_iterator(); at.increment(error)) {
    const bool is_folder = at->is_directory(error);
    if (!error && !is_folder) paths.push_back(at->path().lexically_relative(folder).generic_string());
  }
  if (error) return absl::UnavailableError(absl::StrCat(folder, ": ", error.message()));
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::string SumLine(absl::string_view text) {
  Sha256 sum;
  sum.Add(text.data(), text.size());
  return absl::StrCat(sum.Hex(), "  ", kBundleManifest, "\n");
}

}  // namespace

bool IsBundle(const std::string& folder) {
  return PathExists(JoinPath(folder, kBundleManifest)) || PathExists(JoinPath(folder, kBundleManifestSum));
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  Sha256 sum;
  const auto chunk = std::make_unique<char[]>(kChunkBytes);
  while (const size_t got = std::fread(chunk.get(), 1, kChunkBytes, file.get())) sum.Add(chunk.get(), got);
  if (std::ferror(file.get()) != 0) return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  return sum.Hex();
}

absl::StatusOr<std::vector<BundleFile>> DescribeBundle(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> paths, FilesUnder(folder));
  std::vector<BundleFile> files;
  for (const std::string& path : paths) {
    if (path == kBundleManifest || path == kBundleManifestSum) continue;
    BundleFile file;
    file.path = path;
    const std::string whole = JoinPath(folder, path);
    HEARTH_RETURN_IF_ERROR(FsyncPath(whole));
    HEARTH_ASSIGN_OR_RETURN(file.bytes, FileBytes(whole));
    HEARTH_ASSIGN_OR_RETURN(file.sha256, Sha256OfFile(whole));
    files.push_back(std::move(file));
  }
  return files;
}

absl::StatusOr<std::string> ReadBundleManifest(const std::string& folder) {
  for (const char* name : {kBundleManifest, kBundleManifestSum}) {
    if (!PathExists(JoinPath(folder, name))) return Lost(folder, name, "is missing");
  }
  HEARTH_ASSIGN_OR_RETURN(std::string text, ReadFile(JoinPath(folder, kBundleManifest), kManifestBytesMax));
  HEARTH_ASSIGN_OR_RETURN(const std::string sum, ReadFile(JoinPath(folder, kBundleManifestSum), kManifestBytesMax));
  if (sum != SumLine(text)) return Lost(folder, kBundleManifest, "does not have the sum in manifest.json.sha256");
  return text;
}

absl::Status WriteBundleManifest(const std::string& folder, const std::string& text) {
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder, kBundleManifest), text));
  return WriteFileAtomically(JoinPath(folder, kBundleManifestSum), SumLine(text));
}

absl::StatusOr<std::string> VerifyBundle(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadBundleManifest(folder));
  const nlohmann::json manifest = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!manifest.is_object() || !manifest.contains("files") || !manifest["files"].is_array()) {
    return Lost(folder, kBundleManifest, "lists no files");
  }
  HEARTH_ASSIGN_OR_RETURN(std::vector<std::string> paths, FilesUnder(folder));
  uint64_t bytes_all = 0;
  for (const nlohmann::json& entry : manifest["files"]) {
    if (!entry.is_object() || !entry.value("path", nlohmann::json()).is_string() ||
        !entry.value("bytes", nlohmann::json()).is_number_unsigned() ||
        !entry.value("sha256", nlohmann::json()).is_string()) {
      return Lost(folder, kBundleManifest, "an entry of files lacks path, bytes or sha256");
    }
    const std::string path = entry["path"].get<std::string>();
    const auto found = std::lower_bound(paths.begin(), paths.end(), path);
    if (found == paths.end() || *found != path) return Lost(folder, path, "is missing");
    HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(JoinPath(folder, path)));
    const uint64_t expected = entry["bytes"].get<uint64_t>();
    if (bytes != expected) return Lost(folder, path, absl::StrCat("has ", bytes, " bytes instead of ", expected));
    HEARTH_ASSIGN_OR_RETURN(const std::string sum, Sha256OfFile(JoinPath(folder, path)));
    if (sum != entry["sha256"].get<std::string>()) return Lost(folder, path, "does not have the manifest's SHA-256");
    bytes_all += bytes;
    paths.erase(found);
  }
  for (const std::string& path : paths) {
    if (path != kBundleManifest && path != kBundleManifestSum) return Lost(folder, path, "is not in manifest.json");
  }
  return absl::StrCat(folder, ": whole: bundle, ", manifest["files"].size(), " files, ", bytes_all, " bytes\n");
}

}  // namespace hearth
