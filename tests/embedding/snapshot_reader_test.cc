#include "embedding/snapshot_reader.h"

#include <filesystem>
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
constexpr TableNumber kTables = 3;
constexpr uint64_t kIds = 200;
constexpr uint64_t kStep = 6;

Job ThreeTables() {
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
  Table* third = job.add_table();
  *third = *second;
  third->set_name("third");
  third->set_expire_after_steps(2);
  return job;
}

TableOptions OptionsOf(const Job& job, TableNumber table, uint64_t memory_rows_max, uint64_t step = 0) {
  TableOptions options;
  options.config = job.table(static_cast<int>(table) - 1);
  options.number = table;
  options.seed = job.seed();
  options.shards = kShards;
  options.memory_rows_max = memory_rows_max;
  options.step = step;
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

// Trains three tables on `servers` servers and commits them in the new folder `folder`.
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
    for (TableNumber table = 1; table <= kTables; ++table) {
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

// A committed snapshot of three tables on two servers, and what is in it.
class SnapshotReaderTest : public testing::Test {
 protected:
  SnapshotReaderTest() {
    for (TableNumber table = 1; table <= kTables; ++table) {
      references_.emplace_back(OptionsOf(job_, table, 1));
      uint64_t step = 0;
      for (const Part& part : StepsOf(job_, table)) references_.back().Push(++step, 4, {part});
    }
    EXPECT_EQ(manifest_.rows_hash(), Hash());
  }

  uint64_t Hash() const {
    uint64_t hash = 0;
    for (const ReferenceTable& reference : references_) hash += reference.Hash(kStep);
    return hash;
  }
  uint64_t Rows() const {
    uint64_t rows = 0;
    for (const ReferenceTable& reference : references_) rows += reference.RowsAt(kStep);
    return rows;
  }

  const Job job_ = ThreeTables();
  const std::string folder_ = NewTestFolder();
  Manifest manifest_ = Save(job_, kServers, 20, folder_);
  std::vector<ReferenceTable> references_;
};

TEST_F(SnapshotReaderTest, VisitsEachLiveRowOnceInAnOrderThatDoesNotDependOnServers) {
  uint64_t rows_hash = 0;
  for (TableNumber table = 1; table <= kTables; ++table) {
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
  std::vector<Sign> signs[kTables];
  for (uint64_t id = 0; id < kIds; ++id) {
    for (TableNumber table = 1; table <= kTables; ++table) signs[table - 1].push_back(MakeSign(table, id));
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
          for (TableNumber table = 1; table <= kTables; ++table) {
            auto opened = EmbeddingTable::Open(OptionsOf(job_, table, memory_rows_max, kStep), store.get());
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
        EXPECT_EQ(compared, kTables * kIds) << "each sign has one owner";
      }
      EXPECT_TRUE(RemoveTree(folder).ok());
    }
  }
}

TEST_F(SnapshotReaderTest, AnotherExpiryGoesOnToTheSameRowsOnAnyNumberOfServersDealtAnewOrNot) {
  const auto dim = [&](TableNumber table) { return job_.table(static_cast<int>(table) - 1).dim(); };
  const auto part = [&](TableNumber table, uint64_t step) {
    Random random(table * 1000 + step);
    return RandomPart(&random, table, kIds, 90, dim(table));
  };
  const auto time_s = [](uint64_t step) { return 1'700'000'000 + static_cast<uint32_t>(step) * 300; };
  for (const auto& [expire_after_steps, hours] :
       std::vector<std::pair<uint32_t, uint32_t>>{{0, 0}, {1, 0}, {2, 0}, {5, 0}, {100, 0}, {0, 1}}) {
    const uint64_t last_step = kStep + (hours > 0 ? 22 : 4);  // by time no row expires within 16
    Job job = job_;
    for (Table& table : *job.mutable_table()) {
      table.set_expire_after_steps(expire_after_steps);
      table.set_expire_after_hours(hours);
    }
    std::vector<uint64_t> truth;
    for (TableNumber table = 1; table <= kTables; ++table) {
      ReferenceTable reference = references_[table - 1];
      reference.ChangeExpiry(kStep, expire_after_steps, hours);
      for (uint64_t step = kStep + 1; step <= last_step; ++step) {
        reference.Push(step, 4, {part(table, step)});
        reference.Tick(step, time_s(step));
        truth.push_back(reference.Hash(step));
      }
    }
    for (const uint32_t servers : {0u, 1u, 2u, 3u}) {  // 0: as many as there were, each with a copy of its store
      std::vector<uint64_t> hashes(truth.size());
      const uint32_t dealt = servers > 0 ? servers : kServers;
      for (uint32_t server = 0; server < dealt; ++server) {
        const std::string copy = JoinPath(NewTestFolder(), "copy");
        std::unique_ptr<KvStore> store = MakeMapStore();
        if (servers > 0) {
          const auto owns = [&](uint32_t shard) { return shard % servers == server; };
          ASSERT_TRUE(RestoreShards(folder_, manifest_, owns, store.get()).ok());
        } else {
          std::filesystem::copy(JoinPath(folder_, absl::StrCat("ps-", server)), copy);
          auto opened = OpenRocksDbStore(copy, RocksDbOptions());
          ASSERT_TRUE(opened.ok()) << opened.status();
          store = *std::move(opened);
        }
        size_t next = 0;
        for (TableNumber table = 1; table <= kTables; ++table) {
          auto opened = EmbeddingTable::Open(OptionsOf(job, table, 20, kStep), store.get());
          ASSERT_TRUE(opened.ok()) << opened.status();
          for (uint64_t step = kStep + 1; step <= last_step; ++step) {
            const Part share = ShareOf(part(table, step), dim(table), server, dealt);
            ASSERT_TRUE((*opened)->Push(step, 4, {share.span()}).ok());
            (*opened)->Tick(step, time_s(step));
            hashes[next++] += *(*opened)->Snapshot(step);
          }
        }
      }
      EXPECT_EQ(hashes, truth) << servers << " servers, expire_after_steps " << expire_after_steps << ", hours "
                               << hours;
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
