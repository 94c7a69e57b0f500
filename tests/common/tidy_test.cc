// Reads the tree and holds it to the table of docs/ARCHITECTURE.md: who includes whom, where third parties may be
// named, and what only common/ may call.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <map>
#include <regex>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Folder → what it may include: folders (never those below them), or single headers. docs/ARCHITECTURE.md says why.
const std::map<std::string, std::set<std::string>>& Arrows() {
  static const auto* const arrows = new std::map<std::string, std::set<std::string>>{
      {"common/proto", {}},
      {"common/base", {"common/proto"}},
      {"common/net", {"common/proto", "common/base"}},
      {"common/artifact", {"common/proto", "common/base"}},
      {"common/job", {"common/proto", "common/base", "common/artifact"}},
      {"embedding", {"common/*"}},
      {"ps", {"common/*", "embedding"}},
      {"model/batch", {"common/proto", "common/base"}},
      {"model", {"common/proto", "common/base", "model/batch"}},
      {"model/export", {"common/*", "embedding", "model/batch"}},
      {"model/adopt", {"common/*", "embedding", "model/batch"}},
      {"scheduler", {"common/*"}},
      {"worker/log", {"common/*", "embedding/sign.h", "model/batch"}},
      {"worker/collective", {"common/*"}},
      {"worker/step", {"common/*", "embedding/sign.h", "model/batch", "ps/ps_client.h", "worker/log"}},
      {"worker/evaluation", {"common/*", "model/batch"}},
      {"worker/device", {"common/*", "worker/collective"}},
      {"worker/dense", {"common/*", "model", "model/batch", "worker/collective", "worker/device", "worker/step"}},
      {"worker/bundle",
       {"common/*", "embedding/sign.h", "model", "model/batch", "model/export", "worker/dense", "worker/evaluation",
        "worker/log"}},
      {"worker/adopt",
       {"common/*", "embedding", "model/adopt", "model/batch", "worker/bundle", "worker/dense", "worker/log"}},
      {"worker",
       {"common/*", "model/batch", "ps/ps_client.h", "ps/shard_map.h", "worker/log", "worker/collective", "worker/step",
        "worker/evaluation", "worker/device", "worker/dense"}},
      {"scripts/hearth",
       {"common/*", "embedding", "model/adopt/parameter_shapes.h", "model/batch", "ps/shard_map.h",
        "worker/collective/lane_sum.h", "worker/log", "worker/step/step_verdict.h"}},
  };
  return *arrows;
}

// Third party → folders and files that may include it. Tests of a fenced folder are fenced like it.
struct Fence {
  std::set<std::string> headers;  // the first folder of the name, or all of it
  std::set<std::string> places;
};
const std::vector<Fence>& Fences() {
  static const auto* const fences = new std::vector<Fence>{
      {{"torch", "ATen", "c10", "caffe2"},
       {"model", "worker", "worker/device", "worker/dense", "worker/bundle", "tests/model", "tests/worker",
        "tests/worker/device", "tests/worker/dense", "tests/golden", "tests/conformance/device_world.h"}},
      {{"rocksdb"}, {"embedding/rocksdb_store.cc"}},
      {{"simdjson.h"}, {"worker/log/json_lines.cc"}},
      {{"mpi.h"}, {"common/net/mpi_runtime.cc", "tests/bench/wire_bench.cc"}},
      {{"nccl.h", "cuda_runtime.h", "cuda_runtime_api.h", "cuda.h", "ATen/cuda", "c10/cuda"},
       {"worker/device/nccl_collective.cc"}},
  };
  return *fences;
}

// Time, waiting, threads and randomness come from common/base/env.h.
constexpr const char* kBannedCalls[] = {
    "\\bstd::(this_)?thread\\b",
    "\\bstd::async\\b",
    "\\bstd::(mutex|shared_mutex|recursive_mutex)\\b",
    "\\bcondition_variable\\b",
    "\\bsleep_(for|until)\\b",
    "\\bu?sleep\\s*\\(",
    "\\bnanosleep\\b",
    "\\brandom_device\\b",
    "(^|[^\\w.>])s?rand\\s*\\(",
    "(^|[^\\w.>])time\\s*\\(",
    "\\bsystem_clock\\b",
    "\\bsteady_clock\\b",
    "\\bhigh_resolution_clock\\b",
    "\\bgettimeofday\\b",
    "\\bclock_gettime\\b",
};
constexpr const char* kBannedInTests[] = {"\\bsleep_(for|until)\\b", "\\bu?sleep\\s*\\(", "\\bnanosleep\\b"};

// What a line must contain for any of these, or an include, or a stray note, to be in it: std::regex is slow.
bool MayHaveFault(absl::string_view line) {
  for (absl::string_view word :
       {"#", "thread", "async", "mutex", "condition", "sleep", "random_device", "rand", "time", "clock",
        "TO"
        "DO",
        "FIX"
        "ME",
        "XX"
        "X"}) {
    if (absl::StrContains(line, word)) return true;
  }
  return false;
}

// One pattern for all of a list.
template <size_t N>
std::regex AnyOf(const char* const (&patterns)[N]) {
  std::string all;
  for (const char* pattern : patterns) absl::StrAppend(&all, all.empty() ? "" : "|", "(?:", pattern, ")");
  return std::regex(all, std::regex::optimize);
}

std::string RoomOf(const std::string& path) { return path.substr(0, path.find('/')); }
std::string FolderOf(const std::string& path) {
  return path.find('/') == std::string::npos ? "" : path.substr(0, path.rfind('/'));
}

// The line without comments and the contents of string literals. A raw string or a block comment over several lines is
// read as code: none of ours names a banned call.
std::string CodeOf(absl::string_view line) {
  std::string code;
  char quote = '\0';
  for (size_t i = 0; i < line.size(); ++i) {
    if (quote != '\0') {
      if (line[i] == '\\')
        ++i;
      else if (line[i] == quote)
        quote = '\0';
      continue;
    }
    if (line[i] == '/' && i + 1 < line.size() && (line[i + 1] == '/' || line[i + 1] == '*')) break;
    const bool digit_separator = line[i] == '\'' && i > 0 && std::isxdigit(static_cast<unsigned char>(line[i - 1]));
    if (line[i] == '"' || (line[i] == '\'' && !digit_separator)) quote = line[i];
    code += line[i];
  }
  return code;
}

// "common/*" of a list: every folder of that room.
bool Allows(const std::set<std::string>& places, const std::string& path) {
  const std::string folder = FolderOf(path);
  return places.count(path) > 0 || places.count(folder) > 0 || places.count(absl::StrCat(RoomOf(folder), "/*")) > 0;
}

std::vector<std::string> IncludeFaults(const std::string& path, const std::string& header, bool quoted) {
  std::vector<std::string> faults;
  for (const Fence& fence : Fences()) {
    const bool fenced = absl::c_any_of(fence.headers, [&](const std::string& name) {
      return header == name || absl::StartsWith(header, absl::StrCat(name, "/"));
    });
    if (fenced && !Allows(fence.places, path)) {
      faults.push_back(absl::StrCat("includes ", header, ", which is fenced to ", absl::StrJoin(fence.places, ", ")));
    }
  }
  const auto arrows = Arrows().find(FolderOf(path));
  if (arrows == Arrows().end()) {  // tests may include everything
    if (RoomOf(path) != "tests") faults.push_back(absl::StrCat("is in ", FolderOf(path), ", a folder without arrows"));
    return faults;
  }
  const bool of_ours =
      absl::c_any_of(Arrows(), [&](const auto& folder) { return RoomOf(folder.first) == RoomOf(header) && quoted; });
  if (of_ours && FolderOf(header) != arrows->first && !Allows(arrows->second, header)) {
    faults.push_back(absl::StrCat(arrows->first, " may not include ", header));
  }
  if (quoted && (header.find('/') == std::string::npos || absl::StartsWith(header, "."))) {
    faults.push_back(absl::StrCat("includes \"", header, "\"; includes are written from the root"));
  }
  return faults;
}

// Everything wrong with a source file of this path in the tree, one line each.
std::vector<std::string> FaultsOf(const std::string& path, const std::string& text) {
  static const std::regex include("^\\s*#\\s*include\\s*([<\"])([^>\"]+)[>\"]");
  static const std::regex banned = AnyOf(kBannedCalls);
  static const std::regex banned_in_tests = AnyOf(kBannedInTests);
  static const std::regex stray_note(
      "\\b(TO"
      "DO|FIX"
      "ME|XX"
      "X)\\b");
  const bool is_test = RoomOf(path) == "tests";
  std::vector<std::string> faults;
  int number = 0;
  for (absl::string_view view : absl::StrSplit(text, '\n')) {
    ++number;
    if (!MayHaveFault(view)) continue;
    const std::string line(view);
    std::vector<std::string> found;
    std::smatch match;
    if (std::regex_search(line, match, include)) {
      found = IncludeFaults(path, match[2], match[1] == "\"");
    } else if (RoomOf(path) != "common") {
      const std::string code = CodeOf(line);
      if (std::regex_search(code, match, is_test ? banned_in_tests : banned)) {
        found.push_back(absl::StrCat("calls ", match.str(), "; use common/base/env.h"));
      }
    }
    if (std::regex_search(line, match, stray_note)) found.push_back(absl::StrCat("has a stray note ", match.str()));
    for (const std::string& fault : found) faults.push_back(absl::StrCat(path, ":", number, ": ", fault));
  }
  return faults;
}

TEST(Tidy, AFolderMayNotIncludeAgainstTheTable) {
  const auto faults = [](const char* path, const char* header) {
    return FaultsOf(path, absl::StrCat("// x\n#include \"", header, "\"\n"));
  };
  EXPECT_THAT(faults("embedding/sign.cc", "ps/shard.h"),
              ElementsAre("embedding/sign.cc:2: embedding may not include ps/shard.h"));
  for (const auto& [path, header] :
       std::vector<std::pair<const char*, const char*>>{{"common/base/env.h", "model/batch/batch.h"},
                                                        {"common/base/env.h", "common/net/wire.h"},
                                                        {"common/net/wire.h", "common/job/config.h"},
                                                        {"scheduler/a.cc", "embedding/sign.h"},
                                                        {"worker/a.cc", "ps/shard.h"},
                                                        {"worker/a.cc", "worker/bundle/score.h"},
                                                        {"worker/log/a.cc", "embedding/embedding_table.h"},
                                                        {"worker/log/a.cc", "worker/step/pipeline.h"},
                                                        {"worker/step/a.cc", "worker/dense/dense_replica.h"},
                                                        {"worker/collective/a.cc", "worker/device/device_collective.h"},
                                                        {"model/batch/batch.cc", "embedding/sign.h"},
                                                        {"model/batch/batch.cc", "model/home.h"},
                                                        {"model/home.cc", "model/export/export.h"},
                                                        {"model/export/export_rows.cc", "worker/bundle/score.h"},
                                                        {"model/export/export_rows.cc", "model/home.h"},
                                                        {"scripts/hearth/a.cc", "scheduler/source.h"},
                                                        {"scripts/hearth/a.cc", "worker/step/pipeline.h"},
                                                        {"worker/a.cc", "worker/nowhere/a.h"}}) {
    EXPECT_THAT(faults(path, header), ElementsAre(HasSubstr("may not include"))) << path << " " << header;
  }
  for (const auto& [path, header] :
       std::vector<std::pair<const char*, const char*>>{{"model/export/export_rows.cc", "embedding/snapshot_reader.h"},
                                                        {"worker/a.cc", "ps/ps_client.h"},
                                                        {"worker/log/a.cc", "embedding/sign.h"},
                                                        {"scripts/hearth/a.cc", "worker/log/log_reader.h"},
                                                        {"worker/a.cc", "absl/status/status.h"},
                                                        {"worker/dense/a.cc", "model/home.h"},
                                                        {"worker/dense/a.cc", "worker/dense/dense_replica.h"},
                                                        {"tests/ps/a_test.cc", "worker/step/pipeline.h"}}) {
    EXPECT_THAT(faults(path, header), IsEmpty()) << path << " " << header;
  }
  EXPECT_THAT(faults("ps/shard.cc", "shard.h"), ElementsAre(HasSubstr("written from the root")));
  EXPECT_THAT(faults("worker/attic/a.cc", "common/base/env.h"), ElementsAre(HasSubstr("a folder without arrows")));
}

TEST(Tidy, AThirdPartyStaysBehindItsFence) {
  const std::array<std::pair<const char*, std::vector<const char*>>, 5> cases = {{
      {"torch/torch.h",
       {"model/home.cc", "worker/dense/dense_replica.cc", "worker/worker_main.cc", "tests/golden/golden.h"}},
      {"rocksdb/db.h", {"embedding/rocksdb_store.cc"}},
      {"mpi.h", {"common/net/mpi_runtime.cc"}},
      {"nccl.h", {"worker/device/nccl_collective.cc"}},
      {"cuda_runtime.h", {"worker/device/nccl_collective.cc"}},
  }};
  for (const auto& [header, allowed] : cases) {
    const std::string text = absl::StrCat("#include <", header, ">");
    for (const char* path :
         {"common/base/env.cc", "ps/shard.cc", "worker/step/pipeline.cc", "embedding/rocksdb_store.h",
          "scheduler/source.cc", "scripts/hearth/launch.cc", "model/batch/batch.cc", "tests/conformance/mpi_main.cc"}) {
      EXPECT_THAT(FaultsOf(path, text), ElementsAre(HasSubstr("fenced"))) << header;
    }
    for (const char* path : allowed) EXPECT_THAT(FaultsOf(path, text), IsEmpty()) << header;
  }
}

TEST(Tidy, TimeThreadsAndRandomnessComeFromCommon) {
  for (const char* line :
       {"std::thread t;", "std::this_thread::yield();", "  sleep_for(x);", "usleep(3);", "sleep (1);", "std::mutex m;",
        "std::random_device d;", "int x = rand();", "srand(1);", "std::time(nullptr);", "x = time(0);",
        "std::chrono::system_clock::now();", "steady_clock::now()", "std::condition_variable c;"}) {
    EXPECT_THAT(FaultsOf("ps/shard.cc", line), ElementsAre(HasSubstr("use common/base/env.h"))) << line;
    EXPECT_THAT(FaultsOf("scripts/hearth/launch.cc", line), ElementsAre(HasSubstr("use common/base/env.h"))) << line;
    EXPECT_THAT(FaultsOf("common/base/env.cc", line), IsEmpty()) << line;
  }
  EXPECT_THAT(FaultsOf("tests/ps/a_test.cc", "std::this_thread::sleep_for(x);"), ElementsAre(HasSubstr("sleep_for")));
  for (const char* line :
       {"progress.time();", "p->time()", "wait_time(3)", "operand(1)", "// std::thread", "Log(\"usleep(3)\");",
        "const char c = '\"';  // std::mutex", "n = 1'000; m = 'x';", "std::thread_local_x"}) {
    EXPECT_THAT(FaultsOf("ps/shard.cc", line), IsEmpty()) << line;
  }
}

TEST(Tidy, NoStrayNotes) {
  EXPECT_THAT(FaultsOf("ps/shard.cc",
                       "// TO"
                       "DO: later"),
              ElementsAre(HasSubstr("stray note")));
  EXPECT_THAT(FaultsOf("tests/ps/a_test.cc",
                       "// FIX"
                       "ME"),
              ElementsAre(HasSubstr("stray note")));
  EXPECT_THAT(FaultsOf("ps/shard.cc", "mkstemp(\"x-XXXXXX\")"), IsEmpty());
}

TEST(Tidy, TheTestsThatTheSecurityPageNamesAreThere) {
  const std::filesystem::path root = HEARTH_SOURCE_DIR;
  std::string tests;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root / "tests")) {
    if (entry.path().extension() == ".cc") tests += ReadFile(entry.path().string()).value();
  }
  const std::string page = ReadFile((root / "docs/SECURITY.md").string()).value();
  static const std::regex name("`(\\w+)\\.([A-Z]\\w+)`");
  int named = 0;
  for (std::sregex_iterator match(page.begin(), page.end(), name), end; match != end; ++match, ++named)
    EXPECT_TRUE(absl::StrContains(tests, absl::StrCat("(", match->str(1), ", ", match->str(2), ")"))) << match->str();
  EXPECT_GT(named, 20);
}

TEST(Tidy, TheTreeIsTidy) {
  const std::filesystem::path root = HEARTH_SOURCE_DIR;
  const std::set<std::string> extensions = {".h", ".cc", ".cu", ".proto"};
  std::map<std::string, int> files_of;
  std::vector<std::string> faults;
  for (const char* room : {"common", "embedding", "ps", "model", "scheduler", "worker", "scripts", "tests"}) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / room)) {
      if (!entry.is_regular_file() || extensions.count(entry.path().extension().string()) == 0) continue;
      const std::string path = entry.path().lexically_relative(root).generic_string();
      ++files_of[FolderOf(path)];
      if (RoomOf(path) == "tests") ++files_of["tests"];
      const std::vector<std::string> found = FaultsOf(path, ReadFile(entry.path().string()).value());
      faults.insert(faults.end(), found.begin(), found.end());
    }
  }
  EXPECT_THAT(faults, IsEmpty());
  for (const auto& [folder, arrows] : Arrows()) EXPECT_GT(files_of[folder], 0) << "is " << folder << " where it was?";
  EXPECT_GT(files_of["tests"], 3);
}

}  // namespace
}  // namespace hearth
