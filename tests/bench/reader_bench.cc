// LaneReader over the records of scripts/bench's jobs, written as delimited text and as JSON lines: records a second of
// one thread, from a file in the page cache to batches. `scripts/bench` builds and runs it.
//   --records=N (200 k). --dir=PATH: where the logs lie; the folder for temporary files if it is not given.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/file_list.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "tests/bench/bench_data.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

constexpr uint32_t kTasks = 6;

uint64_t records_in_log = 200'000;
std::string dir;

// Ids by Zipf, labels at random, as bench_log writes them.
std::string LogOf(bool json) {
  const Zipf distribution(kIdsOfSlot, kZipfExponent);
  Random random(5);
  std::string text;
  const auto field = [&](bool first, char kind, uint32_t index, uint64_t value) {
    if (json) {
      absl::StrAppend(&text, first ? "{\"" : ", \"", std::string(1, kind), index, "\": ", value);
    } else {
      absl::StrAppend(&text, first ? "" : ",", value);
    }
  };
  if (!json) {
    for (uint32_t s = 0; s < kSlots; ++s) absl::StrAppend(&text, s == 0 ? "s" : ",s", s);
    for (uint32_t t = 0; t < kTasks; ++t) absl::StrAppend(&text, ",t", t);
    text += '\n';
  }
  for (uint64_t r = 0; r < records_in_log; ++r) {
    for (uint32_t s = 0; s < kSlots; ++s) field(s == 0, 's', s, distribution.Draw(&random));
    for (uint32_t t = 0; t < kTasks; ++t) field(false, 't', t, random.Below(8) == 0);
    text += json ? "}\n" : "\n";
  }
  return text;
}

void Read(benchmark::State& state, bool json) {
  const std::string path = JoinPath(dir, json ? "log.jsonl" : "log.csv");
  const std::string text = LogOf(json);
  Check(WriteFileAtomically(path, text));
  std::string config = absl::StrCat("name: \"bench\" log { name: \"log\" path: \"", path, "\" ",
                                    json ? "format: JSON_LINES" : "", " } table { name: \"id\" dim: 16 } ",
                                    "model { kind: SHARED_BOTTOM } training { batch_size: ", kBatchRecords, " } ");
  for (uint32_t s = 0; s < kSlots; ++s) absl::StrAppend(&config, "slot { name: \"s", s, "\" table: \"id\" } ");
  for (uint32_t t = 0; t < kTasks; ++t) {
    absl::StrAppend(&config, "task { name: \"t", t, "\" category: \"c\" label: \"t", t, "\" } ");
  }
  auto job = ParseJob(config, "bench");
  Check(job.status());
  LaneReaderOptions options;
  options.job = *job;
  options.logs.assign(job->log().begin(), job->log().end());
  options.env = Env::Real();
  auto files = ListLogFiles(*job, options.logs);
  Check(files.status());
  FileList list(Env::Real());
  list.Append(*files, true);
  options.files = &list;
  for (auto _ : state) {
    auto reader = LaneReader::Open(options);
    Check(reader.status());
    uint64_t records = 0;
    while (true) {
      auto batch = (*reader)->Next();
      Check(batch.status());
      if (*batch == nullptr) break;
      records += static_cast<uint64_t>((*batch)->records);
    }
    HEARTH_CHECK(records == records_in_log, "", records, " records of ", records_in_log);
  }
  state.counters["records/s"] =
      benchmark::Counter(static_cast<double>(records_in_log), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bytes/record"] = static_cast<double>(text.size()) / static_cast<double>(records_in_log);
}

int Main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::string parent = std::filesystem::temp_directory_path().string();
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (absl::ConsumePrefix(&argument, "--records=")) {
      HEARTH_CHECK(absl::SimpleAtoi(argument, &records_in_log) && records_in_log > 0, "", argv[i]);
    } else if (absl::ConsumePrefix(&argument, "--dir=")) {
      parent = std::string(argument);
    } else {
      fprintf(stderr, "reader_bench: %s: there is no such option\n", argv[i]);
      return kExitUsage;
    }
  }
  dir = JoinPath(parent, "reader-XXXXXX");
  HEARTH_CHECK(mkdtemp(dir.data()) != nullptr, "", dir);
  benchmark::RegisterBenchmark("read/delimited", Read, false)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("read/json_lines", Read, true)->Unit(benchmark::kMillisecond);
  benchmark::RunSpecifiedBenchmarks();
  std::error_code ignored;
  std::filesystem::remove_all(dir, ignored);
  return kExitOk;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
