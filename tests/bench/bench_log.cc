// Writes the log of scripts/bench's jobs to standard output, as CSV: slots s0 … with ids of their own and labels t0 ….
//   bench_log RECORDS TASKS zipf|uniform
#include <cstdint>
#include <cstdio>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "tests/bench/bench_data.h"

namespace hearth {
namespace {

int Main(int argc, char** argv) {
  uint64_t records = 0;
  uint32_t tasks = 0;
  const std::string ids = argc == 4 ? argv[3] : "";
  if (argc != 4 || !absl::SimpleAtoi(argv[1], &records) || !absl::SimpleAtoi(argv[2], &tasks) ||
      (ids != "zipf" && ids != "uniform")) {
    fprintf(stderr, "usage: bench_log RECORDS TASKS zipf|uniform\n");
    return kExitUsage;
  }
  const Zipf distribution(kIdsOfSlot, kZipfExponent);
  Random random(5);
  std::string text;
  for (uint32_t s = 0; s < kSlots; ++s) absl::StrAppend(&text, s == 0 ? "s" : ",s", s);
  for (uint32_t t = 0; t < tasks; ++t) absl::StrAppend(&text, ",t", t);
  text += '\n';
  for (uint64_t r = 0; r < records; ++r) {
    uint64_t taste = 0;  // of the record, from its first ids: something to learn
    for (uint32_t s = 0; s < kSlots; ++s) {
      const uint64_t id = ids == "zipf" ? distribution.Draw(&random) : random.Below(kIdsOfSlot);
      if (s < 4) taste += Mix64(id * kSlots + s) % 64;
      absl::StrAppend(&text, s == 0 ? "" : ",", id);
    }
    for (uint32_t t = 0; t < tasks; ++t) text += random.Below(512 << t % 4) < taste ? ",1" : ",0";
    text += '\n';
    if (text.size() < (1 << 20) && r + 1 < records) continue;
    if (fwrite(text.data(), 1, text.size(), stdout) != text.size()) return kExitIo;
    text.clear();
  }
  return fflush(stdout) == 0 ? kExitOk : kExitIo;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
