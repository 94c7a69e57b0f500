#include "embedding/rocksdb_store.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>

#include "common/base/status.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

using testing::Test;

constexpr uint32_t kShards = 8;
constexpr size_t kValueBytes = 100;

std::string ValueOf(uint64_t i) { return std::string(kValueBytes, static_cast<char>(Mix64(i))); }

absl::Status WriteRows(KvStore* store, uint64_t begin, uint64_t end) {
  std::vector<std::string> values;
  for (uint64_t i = begin; i < end; ++i) values.push_back(ValueOf(i));
  std::vector<KvWrite> writes;
  for (uint64_t i = begin; i < end; ++i) {
    writes.push_back({{static_cast<uint32_t>(i % kShards), MakeSign(1, i)}, values[i - begin], false});
  }
  return store->Write(writes);
}

uint64_t CountRows(KvStore* store) {
  uint64_t rows = 0;
  EXPECT_TRUE(store
                  ->Scan({0, 0}, {kShards, 0},
                         [&](KvKey key, absl::string_view value) {
                           EXPECT_EQ(value, ValueOf(IdOf(key.sign)));
                           ++rows;
                           return true;
                         })
                  .ok());
  return rows;
}

std::unique_ptr<KvStore> OpenStore(const std::string& path, const RocksDbOptions& options) {
  auto store = OpenRocksDbStore(path, options);
  EXPECT_TRUE(store.ok()) << store.status();
  return std::move(*store);
}

std::string AnySstOf(const std::string& folder) {
  const auto names = ListDirectory(folder);
  EXPECT_TRUE(names.ok());
  for (const std::string& name : *names) {
    if (name.size() > 4 && name.substr(name.size() - 4) == ".sst") return JoinPath(folder, name);
  }
  ADD_FAILURE() << "no .sst in " << folder;
  return "";
}

void FlipByte(const std::string& path, std::streamoff at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(at);
  const char byte = static_cast<char>(file.get());
  file.seekp(at);
  file.put(static_cast<char>(byte ^ 1));
  EXPECT_TRUE(file.good());
}

TEST(RocksDbStore, ReportsTheCapBeforeItIsExceededAndStaysReadable) {
  const std::string folder = NewTestFolder();
  RocksDbOptions options;
  options.disk_bytes_max = 3 << 20;
  options.write_buffer_bytes = 256 << 10;
  auto store = OpenStore(JoinPath(folder, "db"), options);
  absl::Status status;
  uint64_t written = 0;
  for (; status.ok() && written < 1000000; written += 1000) status = WriteRows(store.get(), written, written + 1000);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(status.message().find(JoinPath(folder, "db")), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("3145728 bytes"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("disk_bytes_max"), absl::string_view::npos) << status;
  EXPECT_GT(written, 10000u);
  EXPECT_GE(CountRows(store.get()), written - 1000);
  EXPECT_LE(store->DiskBytes(), options.disk_bytes_max);
}

TEST(RocksDbStore, TakesOnTheDiskWhatAPlanIsTold) {
  for (const uint64_t value_bytes : {80u, 144u, 528u}) {
    auto store = OpenStore(JoinPath(NewTestFolder(), absl::StrCat(value_bytes)), RocksDbOptions());
    constexpr uint64_t kRows = 40000;
    const std::string value(value_bytes, 'v');
    std::vector<KvWrite> writes;
    for (uint64_t id = 0; id < kRows; ++id) {
      const Sign sign = MakeSign(1, Mix64(id));
      writes.push_back({{LogicalShardOf(sign, kShards), sign}, value, false});
    }
    std::sort(writes.begin(), writes.end(), [](const KvWrite& a, const KvWrite& b) { return a.key < b.key; });
    ASSERT_TRUE(store->Write(writes).ok());
    EXPECT_NEAR(static_cast<double>(StoreBytesFor(kRows, value_bytes)) / static_cast<double>(store->DiskBytes()), 1,
                0.05)
        << value_bytes << ": " << store->DiskBytes();
  }
}

TEST(RocksDbStore, MayComeToItsCapAndToItsShareOfWhatIsFree) {
  RocksDbOptions options;
  EXPECT_EQ(DiskBytesAllowed(options, 5, 0), UINT64_MAX);
  options.disk_free_bytes_min = 100;
  EXPECT_EQ(DiskBytesAllowed(options, 5, 1100), 1005u);
  EXPECT_EQ(DiskBytesAllowed(options, 5, 99), 5u);
  options.disk_sharers = 4;
  EXPECT_EQ(DiskBytesAllowed(options, 5, 1100), 255u);
  options.disk_bytes_max = 200;
  EXPECT_EQ(DiskBytesAllowed(options, 5, 1100), 200u);
  EXPECT_EQ(DiskBytesAllowed(options, 5, 500), 105u);
  EXPECT_EQ(DiskBytesAllowed(options, 300, 1100), 200u);
  options.disk_free_bytes_min = 0;
  EXPECT_EQ(DiskBytesAllowed(options, 5, 0), 200u);
}

TEST(RocksDbStore, LosesNothingOfACheckpointWhenItsDiskIsFullAndItsCompactionsStayWithinTheCap) {
  const std::string folder = NewTestFolder();
  RocksDbOptions options;
  options.disk_bytes_max = 4 << 20;
  options.write_buffer_bytes = 256 << 10;
  const std::string copy = JoinPath(folder, "copy");
  {
    auto store = OpenStore(JoinPath(folder, "db"), options);
    ASSERT_TRUE(WriteRows(store.get(), 0, 10000).ok());
    ASSERT_TRUE(store->Checkpoint(copy).ok());
    absl::Status status;
    uint64_t bytes_most = 0;
    for (uint64_t round = 0; status.ok() && round < 1000; ++round) {  // half is written again, and must be compacted
      status = WriteRows(store.get(), 0, 1000);
      if (status.ok()) status = WriteRows(store.get(), 10000 + round * 1000, 11000 + round * 1000);
      bytes_most = std::max(bytes_most, store->DiskBytes());
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(ExitCodeOf(status), kExitIo);
    EXPECT_LE(bytes_most, options.disk_bytes_max);
    EXPECT_GE(CountRows(store.get()), 10000u);
  }
  EXPECT_TRUE(VerifyRocksDbStore(copy).ok());
  auto again = OpenRocksDbStoreReadOnly(copy);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(CountRows(again->get()), 10000u);
}

TEST(RocksDbStore, RefusesToWriteBelowTheFreeSpaceWatermark) {
  const std::string folder = NewTestFolder();
  RocksDbOptions options;
  options.disk_free_bytes_min = uint64_t{1} << 60;
  auto store = OpenStore(JoinPath(folder, "db"), options);
  const absl::Status write = WriteRows(store.get(), 0, 10);
  EXPECT_EQ(write.code(), absl::StatusCode::kResourceExhausted) << write;
  EXPECT_NE(write.message().find("bytes are free"), absl::string_view::npos) << write;
  EXPECT_NE(write.message().find("free disk space"), absl::string_view::npos) << write;
  EXPECT_EQ(store->Checkpoint(JoinPath(folder, "copy")).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(PathExists(JoinPath(folder, "copy")));
  EXPECT_EQ(CountRows(store.get()), 0u);
}

TEST(RocksDbStore, ReadsACheckpointWithoutLeavingAFileInIt) {
  const std::string folder = NewTestFolder();
  auto store = OpenStore(JoinPath(folder, "db"), RocksDbOptions());
  ASSERT_TRUE(WriteRows(store.get(), 0, 5000).ok());
  const std::string copy = JoinPath(folder, "copy");
  ASSERT_TRUE(store->Checkpoint(copy).ok());
  const auto before = ListDirectory(copy);
  {
    auto reader = OpenRocksDbStoreReadOnly(copy);
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_EQ(CountRows(reader->get()), 5000u);
    EXPECT_EQ(WriteRows(reader->get(), 0, 1).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ((*reader)->Checkpoint(JoinPath(folder, "other")).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_GT((*reader)->DiskBytes(), 0u);
    EXPECT_TRUE(VerifyRocksDbStore(copy).ok());
  }
  EXPECT_EQ(*ListDirectory(copy), *before);
}

TEST(RocksDbStore, FindsAFlippedByteAndAMissingFile) {
  const std::string folder = NewTestFolder();
  auto store = OpenStore(JoinPath(folder, "db"), RocksDbOptions());
  ASSERT_TRUE(WriteRows(store.get(), 0, 5000).ok());
  const std::string flipped = JoinPath(folder, "flipped"), missing = JoinPath(folder, "missing");
  ASSERT_TRUE(store->Checkpoint(flipped).ok());
  store.reset();
  ASSERT_TRUE(VerifyRocksDbStore(flipped).ok());
  FlipByte(AnySstOf(flipped), 20000);
  const absl::Status status = VerifyRocksDbStore(flipped);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_NE(status.message().find(flipped), absl::string_view::npos) << status;
  store = OpenStore(JoinPath(folder, "db2"), RocksDbOptions());
  ASSERT_TRUE(WriteRows(store.get(), 0, 5000).ok());
  ASSERT_TRUE(store->Checkpoint(missing).ok());
  ASSERT_TRUE(RemoveTree(AnySstOf(missing)).ok());
  EXPECT_EQ(VerifyRocksDbStore(missing).code(), absl::StatusCode::kDataLoss) << VerifyRocksDbStore(missing);
  EXPECT_EQ(OpenRocksDbStoreReadOnly(JoinPath(folder, "nowhere")).status().code(), absl::StatusCode::kDataLoss);
}

TEST(RocksDbStore, OpensNoFolderThatItMayNotWrite) {
  const std::string folder = NewTestFolder();
  std::ofstream(JoinPath(folder, "file")) << "not a folder";
  const auto store = OpenRocksDbStore(JoinPath(folder, "file"), RocksDbOptions());
  EXPECT_FALSE(store.ok());
  EXPECT_NE(store.status().message().find(JoinPath(folder, "file")), absl::string_view::npos) << store.status();
}

// The child of the test below, in a process of its own: writes, makes a checkpoint, says so, and writes on until it is
// killed.
TEST(RocksDbStore, DISABLED_ChildThatWritesUntilItIsKilled) {
  const char* folder = std::getenv("HEARTH_TEST_FOLDER");
  ASSERT_NE(folder, nullptr);
  RocksDbOptions options;
  options.write_buffer_bytes = 1 << 20;
  auto store = OpenStore(JoinPath(folder, "db"), options);
  ASSERT_TRUE(WriteRows(store.get(), 0, 20000).ok());
  ASSERT_TRUE(store->Checkpoint(JoinPath(folder, "copy")).ok());
  ASSERT_EQ(write(std::atoi(std::getenv("HEARTH_TEST_PIPE")), "c", 1), 1);
  for (uint64_t i = 20000;; i += 1000) ASSERT_TRUE(WriteRows(store.get(), i, i + 1000).ok());
}

TEST(RocksDbStore, KeepsACheckpointWholeWhenItsProcessIsKilled) {
  const std::string folder = NewTestFolder();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const std::string folder_variable = "HEARTH_TEST_FOLDER=" + folder;
  const std::string pipe_variable = absl::StrCat("HEARTH_TEST_PIPE=", ends[1]);
  std::string program = "/proc/self/exe",
              filter = "--gtest_filter=RocksDbStore.DISABLED_ChildThatWritesUntilItIsKilled",
              all = "--gtest_also_run_disabled_tests";
  char* arguments[] = {program.data(), filter.data(), all.data(), nullptr};
  std::vector<char*> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) variables.push_back(*variable);
  variables.push_back(const_cast<char*>(folder_variable.c_str()));
  variables.push_back(const_cast<char*>(pipe_variable.c_str()));
  variables.push_back(nullptr);
  // Not fork alone: a child of fork has none of the threads that RocksDB started in this process.
  pid_t child = 0;
  ASSERT_EQ(posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, arguments, variables.data()), 0);
  close(ends[1]);
  char byte = 0;
  const ssize_t got = read(ends[0], &byte, 1);  // 0: the child failed before its checkpoint
  kill(child, SIGKILL);
  int state = 0;
  ASSERT_EQ(waitpid(child, &state, 0), child);
  ASSERT_EQ(got, 1);
  EXPECT_TRUE(WIFSIGNALED(state));
  close(ends[0]);
  EXPECT_TRUE(VerifyRocksDbStore(JoinPath(folder, "copy")).ok());
  auto copy = OpenRocksDbStoreReadOnly(JoinPath(folder, "copy"));
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_EQ(CountRows(copy->get()), 20000u);
}

// Rows in the order of keys, enough of them for a sorted file.
absl::Status WriteFileOfRows(KvStore* store, uint64_t begin, absl::string_view value) {
  constexpr uint64_t kRows = 4000;
  std::vector<KvWrite> writes;
  for (uint64_t i = begin; i < begin + kRows; ++i) writes.push_back({{0, MakeSign(1, i)}, value, false});
  return store->Write(writes);
}

std::string ValueAt(KvStore* store, uint64_t id) {
  KvValues values;
  EXPECT_TRUE(store->MultiGet({KvKey{0, MakeSign(1, id)}}, &values).ok());
  return values.found(0) ? std::string(values[0]) : "none";
}

TEST(RocksDbStore, ASortedFileAndAWriteBesideItAreSeenInTheirOrder) {
  const std::string folder = NewTestFolder();
  const std::string copy = JoinPath(folder, "copy"), old(100, 'a'), now(100, 'b');
  auto store = OpenStore(JoinPath(folder, "db"), RocksDbOptions());
  ASSERT_TRUE(
      store->Write({KvWrite{{0, MakeSign(1, 5)}, old, false}, KvWrite{{0, MakeSign(1, 9000)}, old, false}}).ok());
  ASSERT_TRUE(WriteFileOfRows(store.get(), 0, now).ok());
  EXPECT_EQ(ValueAt(store.get(), 5), now) << "the file came later";
  EXPECT_EQ(ValueAt(store.get(), 9000), old);
  EXPECT_GT(store->DiskBytes(), 400000u) << "the file counts";
  ASSERT_TRUE(store->Write({KvWrite{{0, MakeSign(1, 6)}, old, false}}).ok());
  EXPECT_EQ(ValueAt(store.get(), 6), old) << "the write came later";
  ASSERT_TRUE(store->Checkpoint(copy).ok());
  ASSERT_TRUE(WriteFileOfRows(store.get(), 0, old).ok());
  store.reset();
  auto opened = OpenRocksDbStoreReadOnly(copy);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(ValueAt(opened->get(), 5), now);
  EXPECT_EQ(ValueAt(opened->get(), 6), old);
}

TEST(RocksDbStore, CompactionsLeaveOutWhatIsDead) {
  const std::string folder = NewTestFolder();
  std::atomic<bool> all_dead = false;
  RocksDbOptions options;
  options.dead = [&](KvKey, absl::string_view value) { return all_dead || value[0] == 'd'; };
  auto store = OpenStore(JoinPath(folder, "db"), options);
  const std::string dead(100, 'd'), alive(100, 'x');
  // Until files are merged; each comes over the one before, so that one of each pair is left at most.
  const auto event = Env::Real()->NewEvent();
  const int64_t deadline_us = Env::Real()->NowUs() + 60'000'000;
  uint64_t written = 0;
  while (ValueAt(store.get(), 0) != "none" || written == 0) {
    ASSERT_LT(Env::Real()->NowUs(), deadline_us) << "no compaction has left anything out";
    ASSERT_TRUE(WriteFileOfRows(store.get(), written == 0 ? 0 : 8000, written == 0 ? dead : alive).ok());
    ++written;
    event->WaitUntil(Env::Real()->NowUs() + 20'000);
  }
  EXPECT_EQ(ValueAt(store.get(), 8000), alive);
}

}  // namespace
}  // namespace hearth
