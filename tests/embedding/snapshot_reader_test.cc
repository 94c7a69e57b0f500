#include "embedding/snapshot_reader.h"

#include <fstream>
#include <set>

#include "common/job/config.h"
#include "embedding/rocksdb_store.h"
#include "tests/embedding/failing_disk.h"
#include "tests/embedding/map_store.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

constexpr uint32_t kShards = 6;  // fewer than servers at most: some have none
constexpr uint32_t kServers = 2;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint32_t kServersMost = 3;
#else
constexpr uint32_t kServersMost = 8;
#endif
constexpr uint64_t kIds = 200;
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

// The steps that `table` has trained, one lane each.
std::vector<Part> StepsOf(const Job& job, TableNumber table) {
  std::vector<Part> steps;
  Random random(table * 10);
  const uint32_t dim = job.table(static_cast<int>(table) - 1).dim();
  for (uint64_t step = 1; step <= kStep; ++step) steps.push_back(RandomPart(&random, table, kIds, 90, dim));
  return steps;
}

// What of `all` is in the logical shards of one of `servers` servers.
Part ShareOf(const Part& all, uint32_t dim, uint32_t server, uint32_t servers) {
  Part share;
  for (size_t i = 0; i < all.signs.size(); ++i) {
    if (LogicalShardOf(all.signs[i], kShards) % servers != server) continue;
    share.signs.push_back(all.signs[i]);
    share.occurrences.push_back(all.occurrences[i]);
    share.gradients.insert(share.gradients.end(), all.gradients.begin() + i * dim,
                           all.gradients.begin() + (i + 1) * dim);
  }
  return share;
}

// Trains two tables on `servers` servers and commits them in the new folder `folder`.
Manifest Save(const Job& job, uint32_t servers, uint64_t memory_rows_max, const std::string& folder) {
  Manifest manifest;
  manifest.set_schema(1);
  manifest.set_step(kStep);
  manifest.set_job(PrintJob(job));
  manifest.set_shards(kShards);
  manifest.set_servers(servers);
  std::vector<std::string> names;
  uint64_t hash = 0;
  const std::string live = NewTestFolder();
  const FailingDisk live_disk(live), saved_disk(folder);  // that do not fail, and wait for no sync
  for (uint32_t server = 0; server < servers; ++server) {
    names.push_back(absl::StrCat("ps-", server));
    auto store = OpenRocksDbStore(JoinPath(live, names.back()), RocksDbOptions());
    EXPECT_TRUE(store.ok()) << store.status();
    for (TableNumber table = 1; table <= 2; ++table) {
      auto opened = EmbeddingTable::Open(OptionsOf(job, table, memory_rows_max), store->get());
      EXPECT_TRUE(opened.ok()) << opened.status();
      uint64_t step = 0;
      for (const Part& all : StepsOf(job, table)) {
        const Part share = ShareOf(all, job.table(static_cast<int>(table) - 1).dim(), server, servers);
        EXPECT_TRUE((*opened)->Push(++step, 4, {share.span()}).ok());
      }
      hash += *(*opened)->Snapshot(kStep);
    }
    const absl::Status status = (*store)->Checkpoint(JoinPath(folder, names.back()));
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_TRUE(RemoveTree(live).ok());
  manifest.set_rows_hash(hash);
  const auto files = DescribeFiles(folder, names);
  EXPECT_TRUE(files.ok()) << files.status();
  for (const FileEntry& file : *files) *manifest.add_file() = file;
  EXPECT_TRUE(CommitManifest(folder, manifest).ok());
  return manifest;
}

// A committed snapshot of two tables on two servers, and what is in it.
class SnapshotReaderTest : public testing::Test {
 protected:
  SnapshotReaderTest() {
    for (TableNumber table = 1; table <= 2; ++table) {
      references_.emplace_back(OptionsOf(job_, table, 1));
      uint64_t step = 0;
      for (const Part& part : StepsOf(job_, table)) references_.back().Push(++step, 4, {part});
    }
    EXPECT_EQ(manifest_.rows_hash(), Hash());
  }

  uint64_t Hash() const { return references_[0].Hash(kStep) + references_[1].Hash(kStep); }
  uint64_t Rows() const { return references_[0].RowsAt(kStep) + references_[1].RowsAt(kStep); }

  const Job job_ = TwoTables();
  const std::string folder_ = NewTestFolder();
  Manifest manifest_ = Save(job_, kServers, 20, folder_);
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

TEST_F(SnapshotReaderTest, RestoresFromAnyNumberOfServersOntoAnyOther) {
  std::vector<Sign> signs[2];
  for (uint64_t id = 0; id < kIds; ++id) {
    for (TableNumber table = 1; table <= 2; ++table) signs[table - 1].push_back(MakeSign(table, id));
  }
  for (const uint64_t memory_rows_max : {2u, 1000u}) {
    for (uint32_t before = 1; before <= kServersMost; ++before) {
      const std::string folder = NewTestFolder();
      const Manifest manifest = Save(job_, before, memory_rows_max, folder);
      ASSERT_EQ(manifest.rows_hash(), Hash()) << before << " servers";
      for (uint32_t after = 1; after <= kServersMost; ++after) {
        SCOPED_TRACE(absl::StrCat(before, " servers, then ", after, ", rows in memory ", memory_rows_max));
        uint64_t hash = 0, rows = 0, compared = 0;
        for (uint32_t server = 0; server < after; ++server) {
          const auto owns = [&](uint32_t shard) { return shard % after == server; };
          auto store = MakeMapStore();
          const absl::Status status = RestoreShards(folder, manifest, owns, store.get());
          ASSERT_TRUE(status.ok()) << status;
          for (TableNumber table = 1; table <= 2; ++table) {
            auto opened = EmbeddingTable::Open(OptionsOf(job_, table, memory_rows_max), store.get());
            ASSERT_TRUE(opened.ok()) << opened.status();
            rows += (*opened)->stats().rows;
            for (const Sign sign : signs[table - 1]) {
              if (!owns(LogicalShardOf(sign, kShards))) continue;
              std::vector<float> row(job_.table(static_cast<int>(table) - 1).dim(), -1);
              ASSERT_TRUE((*opened)->Pull(kStep, {sign}, {}, row.data()).ok());
              ASSERT_EQ(row, references_[table - 1].Pull(kStep, sign, 0)) << "table " << table << ", id " << IdOf(sign);
              ++compared;
            }
            hash += *(*opened)->Snapshot(kStep);
          }
        }
        EXPECT_EQ(hash, manifest.rows_hash());
        EXPECT_EQ(rows, Rows());
        EXPECT_EQ(compared, 2 * kIds) << "each sign has one owner";
      }
      EXPECT_TRUE(RemoveTree(folder).ok());
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
