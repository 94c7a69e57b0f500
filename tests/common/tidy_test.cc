// Reads the tree and holds it to the table of docs/ARCHITECTURE.md: who includes whom, where third parties may be
// named, and what only common/ may call.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <map>
#include <regex>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/file.h"
#include "common/status.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Room → what it may include: rooms, or single headers.
const std::map<std::string, std::set<std::string>>& Arrows() {
  static const auto* const arrows = new std::map<std::string, std::set<std::string>>{
      {"common", {"common"}},
      {"embedding", {"common", "embedding"}},
      {"ps", {"common", "embedding", "ps"}},
      {"model", {"common", "model"}},
      {"scheduler", {"common", "scheduler"}},
      {"worker", {"common", "model", "worker", "embedding/sign.h", "ps/ps_client.h", "ps/shard_map.h"}},
      {"scripts", {"common", "embedding", "scripts"}},
  };
  return *arrows;
}

// Third party → files that may include it, as a pattern over the path. Tests of a fenced file are fenced like it.
struct Fence {
  const char* header;
  const char* files;
};
constexpr Fence kFences[] = {
    {"^(torch|ATen|c10|caffe2)/",
     "^model/|^worker/(trainer|dense_(model|reducer|step)|device_(collective|step)|evaluator|worker)[a-z_]*\\.(cc|h)$|"
     "^worker/nccl_collective\\.cc$|"
     "^tests/(golden|model|bench)/|"
     "^tests/worker/(trainer|dense_cases|device_(collective|step)|evaluator|worker)[a-z_]*(_test)?\\.(cc|h)$|^tests/"
     "conformance/device_"},
    {"^rocksdb/", "^embedding/rocksdb_store\\.cc$"},
    {"^mpi\\.h$", "^common/mpi_runtime\\.cc$"},
    {"^nccl\\.h$|^cuda|^(ATen|c10)/cuda/", "^worker/nccl_collective\\.cc$"},
};

// Time, waiting, threads and randomness come from common/env.h.
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

std::vector<std::string> IncludeFaults(const std::string& path, const std::string& header, bool quoted) {
  std::vector<std::string> faults;
  for (const Fence& fence : kFences) {
    if (std::regex_search(header, std::regex(fence.header)) && !std::regex_search(path, std::regex(fence.files))) {
      faults.push_back(absl::StrCat("includes ", header, ", which is fenced to ", fence.files));
    }
  }
  const bool of_a_room = Arrows().count(RoomOf(header)) > 0;
  static const std::regex exporter("^model/export[a-z_]*\\.cc$");
  if (RoomOf(header) == "embedding" && std::regex_match(path, exporter)) return faults;  // the export reads snapshots
  const auto arrows = Arrows().find(RoomOf(path));
  if (arrows == Arrows().end()) return faults;  // tests may include everything
  if (of_a_room && arrows->second.count(RoomOf(header)) == 0 && arrows->second.count(header) == 0) {
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
        found.push_back(absl::StrCat("calls ", match.str(), "; use common/env.h"));
      }
    }
    if (std::regex_search(line, match, stray_note)) found.push_back(absl::StrCat("has a stray note ", match.str()));
    for (const std::string& fault : found) faults.push_back(absl::StrCat(path, ":", number, ": ", fault));
  }
  return faults;
}

TEST(Tidy, ARoomMayNotIncludeAgainstTheTable) {
  EXPECT_THAT(FaultsOf("embedding/sign.cc", "// x\n#include \"ps/shard.h\"\n"),
              ElementsAre("embedding/sign.cc:2: embedding may not include ps/shard.h"));
  EXPECT_THAT(FaultsOf("common/env.h", "#include \"model/batch.h\""), ElementsAre(HasSubstr("common may not")));
  EXPECT_THAT(FaultsOf("scheduler/a.cc", "#include \"embedding/sign.h\""), ElementsAre(HasSubstr("scheduler may not")));
  EXPECT_THAT(FaultsOf("worker/a.cc", "#include \"ps/shard.h\""), ElementsAre(HasSubstr("worker may not")));
  EXPECT_THAT(FaultsOf("worker/a.cc", "#include \"embedding/embedding_table.h\""), ElementsAre(HasSubstr("may not")));
  EXPECT_THAT(FaultsOf("model/batch.cc", "#include \"embedding/sign.h\""), ElementsAre(HasSubstr("model may not")));
  EXPECT_THAT(FaultsOf("model/export.h", "#include \"embedding/sign.h\""), ElementsAre(HasSubstr("model may not")));
  EXPECT_THAT(FaultsOf("model/export_rows.cc", "#include \"embedding/snapshot_reader.h\""), IsEmpty());
  EXPECT_THAT(FaultsOf("model/export_rows.cc", "#include \"worker/score.h\""), ElementsAre(HasSubstr("may not")));
  EXPECT_THAT(FaultsOf("scripts/hearth/a.cc", "  # include <scheduler/source.h>"), ElementsAre(HasSubstr("may not")));
  EXPECT_THAT(FaultsOf("ps/shard.cc", "#include \"shard.h\""), ElementsAre(HasSubstr("written from the root")));
  EXPECT_THAT(FaultsOf("worker/a.cc",
                       "#include \"ps/ps_client.h\"\n#include \"embedding/sign.h\"\n#include <vector>\n"
                       "#include \"absl/status/status.h\"\n#include \"model/batch.h\""),
              IsEmpty());
  EXPECT_THAT(FaultsOf("tests/ps/a_test.cc", "#include \"worker/pipeline.h\""), IsEmpty());
}

TEST(Tidy, AThirdPartyStaysBehindItsFence) {
  const std::array<std::pair<const char*, std::vector<const char*>>, 5> cases = {{
      {"torch/torch.h", {"model/home.cc", "worker/trainer.cc", "worker/worker_main.cc", "tests/golden/golden.h"}},
      {"rocksdb/db.h", {"embedding/rocksdb_store.cc"}},
      {"mpi.h", {"common/mpi_runtime.cc"}},
      {"nccl.h", {"worker/nccl_collective.cc"}},
      {"cuda_runtime.h", {"worker/nccl_collective.cc"}},
  }};
  for (const auto& [header, allowed] : cases) {
    const std::string text = absl::StrCat("#include <", header, ">");
    for (const char* path : {"common/env.cc", "ps/shard.cc", "worker/pipeline.cc", "embedding/rocksdb_store.h",
                             "scheduler/source.cc", "scripts/hearth/launch.cc", "tests/conformance/mpi_main.cc"}) {
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
    EXPECT_THAT(FaultsOf("ps/shard.cc", line), ElementsAre(HasSubstr("use common/env.h"))) << line;
    EXPECT_THAT(FaultsOf("scripts/hearth/launch.cc", line), ElementsAre(HasSubstr("use common/env.h"))) << line;
    EXPECT_THAT(FaultsOf("common/env.cc", line), IsEmpty()) << line;
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

TEST(Tidy, TheTreeIsTidy) {
  const std::filesystem::path root = HEARTH_SOURCE_DIR;
  const std::set<std::string> extensions = {".h", ".cc", ".cu", ".proto"};
  std::map<std::string, int> files_of;
  std::vector<std::string> faults;
  for (const char* room : {"common", "embedding", "ps", "model", "scheduler", "worker", "scripts", "tests"}) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / room)) {
      if (!entry.is_regular_file() || extensions.count(entry.path().extension().string()) == 0) continue;
      const std::string path = entry.path().lexically_relative(root).generic_string();
      ++files_of[room];
      const std::vector<std::string> found = FaultsOf(path, ReadFile(entry.path().string()).value());
      faults.insert(faults.end(), found.begin(), found.end());
    }
  }
  EXPECT_THAT(faults, IsEmpty());
  for (const auto& [room, arrows] : Arrows()) EXPECT_GT(files_of[room], 3) << "is " << room << " where it was?";
  EXPECT_GT(files_of["tests"], 3);
}

}  // namespace
}  // namespace hearth
