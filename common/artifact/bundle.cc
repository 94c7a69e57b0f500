#include "common/artifact/bundle.h"

#include <openssl/evp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr uint64_t kManifestBytesMax = uint64_t{1} << 28;
constexpr const char* kPartial = ".partial-";

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

// Every folder's list of names, the deepest first. The files themselves are synced where they are described.
absl::Status SyncFolders(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  for (const std::string& name : names) {
    const std::string path = JoinPath(folder, name);
    std::error_code error;
    if (std::filesystem::is_directory(std::filesystem::symlink_status(path, error))) {
      HEARTH_RETURN_IF_ERROR(SyncFolders(path));
    }
  }
  return FsyncPath(folder);
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
  const OwnedFile file(std::fopen(path.c_str(), "rb"));
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

absl::StatusOr<std::vector<BundleFile>> ListedFiles(const std::string& folder, const std::string& text) {
  const nlohmann::json manifest = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!manifest.is_object() || !manifest.contains("files") || !manifest["files"].is_array()) {
    return Lost(folder, kBundleManifest, "lists no files");
  }
  std::vector<BundleFile> files;
  for (const nlohmann::json& entry : manifest["files"]) {
    if (!entry.is_object() || !entry.value("path", nlohmann::json()).is_string() ||
        !entry.value("bytes", nlohmann::json()).is_number_unsigned() ||
        !entry.value("sha256", nlohmann::json()).is_string()) {
      return Lost(folder, kBundleManifest, "an entry of files lacks path, bytes or sha256");
    }
    files.push_back(
        {entry["path"].get<std::string>(), entry["bytes"].get<uint64_t>(), entry["sha256"].get<std::string>()});
  }
  return files;
}

absl::Status CheckBundleFile(const std::string& folder, const BundleFile& file) {
  const std::string path = JoinPath(folder, file.path);
  if (!PathExists(path)) return Lost(folder, file.path, "is missing");
  HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(path));
  if (bytes != file.bytes)
    return Lost(folder, file.path, absl::StrCat("has ", bytes, " bytes instead of ", file.bytes));
  HEARTH_ASSIGN_OR_RETURN(const std::string sum, Sha256OfFile(path));
  if (sum != file.sha256) return Lost(folder, file.path, "does not have the manifest's SHA-256");
  return absl::OkStatus();
}

absl::StatusOr<std::string> VerifyBundle(const std::string& folder) {
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadBundleManifest(folder));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleFile> files, ListedFiles(folder, text));
  HEARTH_ASSIGN_OR_RETURN(std::vector<std::string> paths, FilesUnder(folder));
  uint64_t bytes_all = 0;
  for (const BundleFile& file : files) {
    const auto found = std::lower_bound(paths.begin(), paths.end(), file.path);
    if (found == paths.end() || *found != file.path) return Lost(folder, file.path, "is missing");
    HEARTH_RETURN_IF_ERROR(CheckBundleFile(folder, file));
    bytes_all += file.bytes;
    paths.erase(found);
  }
  for (const std::string& path : paths) {
    if (path != kBundleManifest && path != kBundleManifestSum) return Lost(folder, path, "is not in manifest.json");
  }
  return absl::StrCat(folder, ": whole: bundle, ", files.size(), " files, ", bytes_all, " bytes\n");
}

absl::Status PublishFolder(const std::string& out, const std::function<absl::Status(const std::string& folder)>& fill) {
  std::error_code error;
  std::string path = std::filesystem::absolute(out, error).lexically_normal().string();
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (PathExists(path) && !std::filesystem::is_empty(path, error)) {
    return absl::FailedPreconditionError(absl::StrCat(out, ": exists and is not empty; give a new folder"));
  }
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  std::vector<std::string> made;  // folders above, whose names must last too
  for (std::filesystem::path at = parent; !PathExists(at.string()); at = at.parent_path()) {
    made.push_back(at.parent_path().string());
  }
  HEARTH_RETURN_IF_ERROR(MakeDirectories(parent.string()));
  HEARTH_RETURN_IF_ERROR(RemoveAbandoned(parent.string(), std::filesystem::path(path).filename().string() + kPartial));
  // The same file system as `out`, so that a rename is all that is left to do.
  const std::string aside = absl::StrCat(path, kPartial, getpid());
  HEARTH_RETURN_IF_ERROR(RemoveTree(aside));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(aside));
  absl::Status status = fill(aside);
  if (status.ok()) status = SyncFolders(aside);
  for (const std::string& folder : made) {
    if (status.ok()) status = FsyncPath(folder);
  }
  if (status.ok()) status = RenamePath(aside, path);
  if (!status.ok()) static_cast<void>(RemoveTree(aside));  // the first error is the one to tell
  return status;
}

absl::Status CopyIntoBundle(const std::string& from, const std::string& to) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(std::filesystem::path(to).parent_path().string()));
  const OwnedFile in(std::fopen(from.c_str(), "rb"));
  if (in == nullptr) return ErrorOf(errno, "cannot open", from);
  const auto unwritten = [&] { return ErrorOf(errno, "cannot write", to); };
  HEARTH_ASSIGN_OR_RETURN(OwnedFile out, OpenForWriting(to, Writing::kReplace));
  const auto chunk = std::make_unique<char[]>(kChunkBytes);
  while (const size_t got = std::fread(chunk.get(), 1, kChunkBytes, in.get())) {
    if (std::fwrite(chunk.get(), 1, got, out.get()) != got) return unwritten();
  }
  if (std::ferror(in.get()) != 0) return absl::UnavailableError(absl::StrCat(from, ": cannot be read"));
  return std::fclose(out.release()) == 0 ? absl::OkStatus() : unwritten();
}

absl::Status RemoveAbandoned(const std::string& folder, absl::string_view prefix) {
  if (!PathExists(folder)) return absl::OkStatus();
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  for (const std::string& name : names) {
    const size_t at = name.rfind(kPartial);
    int process = 0;
    if (at == std::string::npos || !absl::StartsWith(name, prefix) ||
        !absl::SimpleAtoi(absl::string_view(name).substr(at + std::strlen(kPartial)), &process) ||
        PathExists(absl::StrCat("/proc/", process))) {
      continue;
    }
    HEARTH_RETURN_IF_ERROR(RemoveTree(JoinPath(folder, name)));
  }
  return absl::OkStatus();
}

}  // namespace hearth
