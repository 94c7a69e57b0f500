#include "embedding/snapshot_reader.h"

#include <fstream>
#include <set>

#include "common/job/config.h"
#include "embedding/rocksdb_store.h"
#include "tests/embedding/map_store.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

constexpr uint32_t kShards = 6;
constexpr uint32_t kServers = 2;
constexpr uint64_t kStep = 6;

Job TwoTables() {
  Job job;
  job.set_seed(9);
  job.mutable_training()->set_shards(kShards);
  Table* first = job.add_table();
  first->set_name("first");
  first->set_dim(3);
  first->mutable_optimizer()->set_kind(Optimizer::ADAM);
  first->set_expire_after_steps(3);
  first->mutable_admission()->set_count_min(2);
  Table* second = job.add_table();
  second->set_name("second");
  second->set_dim(2);
  second->mutable_admission()->set_count_min(2);
  second->mutable_admission()->set_counter(Admission::BLOOM);
  second->mutable_admission()->set_bloom_counters(1000);
  return job;
}

TableOptions OptionsOf(const Job& job, TableNumber table, uint64_t memory_rows_max) {
  TableOptions options;
  options.config = job.table(static_cast<int>(table) - 1);
  options.number = table;
  options.seed = job.seed();
  options.shards = kShards;
  options.memory_rows_max = memory_rows_max;
  return options;
}

// A committed snapshot of two tables on two servers, and what is in it.
class SnapshotReaderTest : public testing::Test {
 protected:
  void SetUp() override {
    manifest_.set_schema(1);
    manifest_.set_step(kStep);
    manifest_.set_job(PrintJob(job_));
    manifest_.set_shards(kShards);
    manifest_.set_servers(kServers);
    for (TableNumber table = 1; table <= 2; ++table) references_.emplace_back(OptionsOf(job_, table, 1));
    std::vector<std::string> folders;
    uint64_t hash = 0;
    for (uint32_t server = 0; server < kServers; ++server) {
      hash += FillServer(server, JoinPath(folder_, absl::StrCat("ps-", server)));
      folders.push_back(absl::StrCat("ps-", server));
    }
    EXPECT_EQ(hash, references_[0].Hash(kStep) + references_[1].Hash(kStep));
    manifest_.set_rows_hash(hash);
    const auto files = DescribeFiles(folder_, folders);
    ASSERT_TRUE(files.ok()) << files.status();
    for (const FileEntry& file : *files) *manifest_.add_file() = file;
    ASSERT_TRUE(CommitManifest(folder_, manifest_).ok());
  }

  uint64_t FillServer(uint32_t server, const std::string& checkpoint) {
    auto store = OpenRocksDbStore(JoinPath(live_, absl::StrCat(server)), RocksDbOptions());
    EXPECT_TRUE(store.ok()) << store.status();
    uint64_t hash = 0;
    for (TableNumber table = 1; table <= 2; ++table) {
      auto opened = EmbeddingTable::Open(OptionsOf(job_, table, 20), store->get());
      EXPECT_TRUE(opened.ok()) << opened.status();
      Random random(table * 10 + server);
      const uint32_t dim = job_.table(static_cast<int>(table) - 1).dim();
      for (uint64_t step = 1; step <= kStep; ++step) {
        const Part all = RandomPart(&random, table, 200, 60, dim);
        Part mine;
        for (size_t i = 0; i < all.signs.size(); ++i) {
          if (LogicalShardOf(all.signs[i], kShards) % kServers != server) continue;
          mine.signs.push_back(all.signs[i]);
          mine.occurrences.push_back(all.occurrences[i]);
          mine.gradients.insert(mine.gradients.end(), all.gradients.begin() + i * dim,
                                all.gradients.begin() + (i + 1) * dim);
        }
        EXPECT_TRUE((*opened)->Push(step, 4, {mine.span()}).ok());
        references_[table - 1].Push(step, 4, {mine});
      }
      hash += *(*opened)->Snapshot(kStep);
    }
    const absl::Status status = (*store)->Checkpoint(checkpoint);
    EXPECT_TRUE(status.ok()) << status;
    return hash;
  }

  const Job job_ = TwoTables();
  const std::string folder_ = NewTestFolder();
  const std::string live_ = NewTestFolder();
  Manifest manifest_;
  std::vector<ReferenceTable> references_;
};

TEST_F(SnapshotReaderTest, VisitsEachLiveRowOnceInAnOrderThatDoesNotDependOnServers) {
  uint64_t rows_hash = 0;
  for (TableNumber table = 1; table <= 2; ++table) {
    std::vector<KvKey> order;
    std::set<Sign> seen;
    const absl::Status status = VisitRows(
        folder_, manifest_, job_, table,
        [&](Sign sign, const RowMeta& meta, absl::Span<const float> floats) {
          const ReferenceTable::Row& row = references_[table - 1].rows().at(sign);
          EXPECT_EQ(RowHash(table, sign, meta, floats), RowHash(table, sign, row.meta, row.floats));
          order.push_back({LogicalShardOf(sign, kShards), sign});
          EXPECT_TRUE(seen.insert(sign).second);
          return absl::OkStatus();
        },
        &rows_hash);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
    EXPECT_EQ(seen.size(), references_[table - 1].RowsAt(kStep));
    EXPECT_GT(seen.size(), 20u);
  }
  EXPECT_TRUE(CheckRowsHash(folder_, manifest_, rows_hash).ok()) << "counters and filters in it";
  EXPECT_EQ(CheckRowsHash(folder_, manifest_, rows_hash + 1).code(), absl::StatusCode::kDataLoss);
}

TEST_F(SnapshotReaderTest, StopsAtTheVisitorsFirstError) {
  int visits = 0;
  uint64_t rows_hash = 0;
  const absl::Status status = VisitRows(
      folder_, manifest_, job_, 1,
      [&](Sign, const RowMeta&, absl::Span<const float>) {
        return ++visits == 3 ? absl::ResourceExhaustedError("full") : absl::OkStatus();
      },
      &rows_hash);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(visits, 3);
}

TEST_F(SnapshotReaderTest, RestoresOntoAnyNumberOfServers) {
  for (const uint32_t servers : {1u, 2u, 3u, 9u}) {
    for (const uint64_t memory_rows_max : {5u, 1000u}) {
      uint64_t hash = 0, rows = 0;
      for (uint32_t server = 0; server < servers; ++server) {
        auto store = MakeMapStore();
        const absl::Status status = RestoreShards(
            folder_, manifest_, [&](uint32_t shard) { return shard % servers == server; }, store.get());
        ASSERT_TRUE(status.ok()) << status;
        for (TableNumber table = 1; table <= 2; ++table) {
          auto opened = EmbeddingTable::Open(OptionsOf(job_, table, memory_rows_max), store.get());
          ASSERT_TRUE(opened.ok()) << opened.status();
          rows += (*opened)->stats().rows;
          hash += *(*opened)->Snapshot(kStep);
        }
      }
      EXPECT_EQ(hash, manifest_.rows_hash());
      EXPECT_EQ(rows, references_[0].RowsAt(kStep) + references_[1].RowsAt(kStep));
    }
  }
}

TEST_F(SnapshotReaderTest, VerifiesWhatIsWhole) {
  const absl::Status status = VerifySnapshot(folder_);
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(SnapshotReaderTest, NoticesAnotherRowsHash) {
  manifest_.set_rows_hash(manifest_.rows_hash() + 1);
  ASSERT_TRUE(CommitManifest(folder_, manifest_).ok());
  const absl::Status status = VerifySnapshot(folder_);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_NE(status.message().find("rows hash"), absl::string_view::npos) << status;
}

TEST_F(SnapshotReaderTest, NoticesAFlippedByteOfAnyFileAndNamesIt) {
  for (const FileEntry& entry : manifest_.file()) {
    if (entry.bytes() == 0) continue;
    const std::string path = JoinPath(folder_, entry.path());
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const auto at = static_cast<std::streamoff>(entry.bytes() / 2);
    file.seekg(at);
    const char byte = static_cast<char>(file.get());
    const auto put = [&](char value) {
      file.seekp(at);
      file.put(value);
      file.flush();
    };
    put(static_cast<char>(byte ^ 4));
    const absl::Status status = VerifySnapshot(folder_);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << entry.path() << ": " << status;
    EXPECT_NE(status.message().find(entry.path()), absl::string_view::npos) << status;
    put(byte);
  }
  EXPECT_TRUE(VerifySnapshot(folder_).ok());
}

TEST_F(SnapshotReaderTest, AManifestWhoseJobOrCountsNoRunHasIsRefusedAndNothingIsAllocatedByIt) {
  uint64_t hash = 0;
  const auto pass = [](Sign, const RowMeta&, absl::Span<const float>) { return absl::OkStatus(); };
  for (const uint32_t dim : {0u, 4097u, 4'000'000'000u}) {
    Job job = job_;
    job.mutable_table(0)->set_dim(dim);
    EXPECT_EQ(VisitRows(folder_, manifest_, job, 1, pass, &hash).code(), absl::StatusCode::kDataLoss) << dim;
    Manifest manifest = manifest_;
    manifest.set_job(PrintJob(job));
    ASSERT_TRUE(CommitManifest(folder_, manifest).ok());
    const absl::Status status = VerifySnapshot(folder_);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << dim;
    EXPECT_NE(status.message().find(absl::StrCat("of dim ", dim)), absl::string_view::npos) << status;
  }
  for (const uint32_t servers : {0u, 4'000'000'000u}) {
    Manifest manifest = manifest_;
    manifest.set_servers(servers);
    EXPECT_EQ(VisitRows(folder_, manifest, job_, 1, pass, &hash).code(), absl::StatusCode::kDataLoss) << servers;
  }
}

}  // namespace
}  // namespace hearth
