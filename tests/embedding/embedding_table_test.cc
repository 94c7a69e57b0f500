#include "embedding/embedding_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <set>

#include "embedding/expiry.h"
#include "embedding/rocksdb_store.h"
#include "embedding/row_record.h"
#include "embedding/store_io.h"
#include "tests/embedding/map_store.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

constexpr TableNumber kTable = 3;

// A table of random settings under random upkeep, beside the reference.
struct RandomJob {
  TableOptions options;
  uint64_t ids = 40;
  size_t batch = 12;
  uint32_t lanes = 1;
};

// Settings of the kind, and of all kinds.
void DrawOptimizer(Random* random, Optimizer* optimizer) {
  optimizer->set_initial_accumulator(random->Below(2) * 0.1);
  if (random->Below(2) == 0) optimizer->set_clip_norm(0.4);
  const bool more = random->Below(2) == 0;
  switch (optimizer->kind()) {
    case Optimizer::MOMENTUM:
      optimizer->set_nesterov(more);
      break;
    case Optimizer::ADAGRAD:
    case Optimizer::ROWWISE_ADAGRAD:
      if (more) optimizer->set_accumulator_decay(0.9);
      break;
    case Optimizer::FTRL:
      optimizer->set_l1(more ? 0.05 : 0);
      optimizer->set_l2(more ? 0.1 : 0);
      optimizer->set_beta(more ? 1 : 0);
      return;
    default:
      break;
  }
  if (random->Below(2) == 0) optimizer->set_weight_decay(0.1);
}

void DrawHours(Random* random, Table* config) {
  config->clear_expire_after_steps();
  config->set_expire_after_hours(1 + static_cast<uint32_t>(random->Below(3)));
}

// A row cannot expire within 16 steps by time.
uint64_t StepsFor(const RandomJob& job, uint64_t steps) {
  return job.options.config.expire_after_hours() > 0 ? 4 * steps : steps;
}

RandomJob DrawJob(uint64_t seed) {
  Random random(seed);
  RandomJob job;
  Table& config = job.options.config;
  config.set_name("t");
  config.set_dim(1 + static_cast<uint32_t>(random.Below(6)));
  config.mutable_optimizer()->set_kind(static_cast<Optimizer::Kind>(seed % Optimizer::Kind_ARRAYSIZE));
  DrawOptimizer(&random, config.mutable_optimizer());
  config.set_weights(static_cast<Table::Weights>(random.Below(3)));
  config.mutable_admission()->set_count_min(1 + static_cast<uint32_t>(random.Below(3)));
  config.set_expire_after_steps(static_cast<uint32_t>(random.Below(4)));
  if (seed % 3 == 1) DrawHours(&random, &config);
  if (random.Below(2) == 0) {
    config.mutable_admission()->set_counter(Admission::BLOOM);
    config.mutable_admission()->set_bloom_counters(64);  // few: signs do collide
  }
  config.set_score(static_cast<Table::Score>(random.Below(3)));
  const uint64_t memory_rows[] = {1, 2, 7, 1000};
  job.options.memory_rows_max = memory_rows[seed / 4 % 4];
  job.options.number = kTable;
  job.options.seed = seed;
  job.options.shards = 1 + static_cast<uint32_t>(random.Below(5));
  job.lanes = 1 + static_cast<uint32_t>(random.Below(4));
  if (job.options.memory_rows_max == 1000) {
    job.ids = 2500;
    job.batch = 400;
  }
  return job;
}

class Runner {
 public:
  Runner(const RandomJob& job, bool rocksdb, size_t read_threads = 0)
      : job_(job),
        rocksdb_(rocksdb),
        read_threads_(read_threads),
        random_(job.options.seed + 77),
        reference_(job.options),
        cut_reference_(job.options),
        expiry_(ExpiryRule::Of(job.options.config)),
        folder_(NewTestFolder()) {
    OpenAt(JoinPath(folder_, "live"), true);
  }
  ~Runner() {
    Close();
    EXPECT_TRUE(RemoveTree(folder_).ok());
  }

  void Run(uint64_t steps) {
    for (uint64_t step = 1; step <= steps && !testing::Test::HasFatalFailure(); ++step) {
      applied_ = step - 1;
      Upkeep();
      // Pulls of this and, at staleness, of later steps see the tables as they are now.
      for (uint64_t ahead = 0; ahead < 1 + random_.Below(3); ++ahead) ComparePull(step + ahead, false);
      ComparePull(applied_, true);
      Upkeep();
      const std::vector<Part> parts = DrawStep();
      const uint64_t n = 1 + random_.Below(9);
      ASSERT_TRUE(table_->Push(step, n, SpansOf(parts)).ok());
      reference_.Push(step, n, parts);
      Tick(step);
      applied_ = step;
      rows_in_memory_most_ = std::max(rows_in_memory_most_, table_->stats().rows_in_memory);
    }
    SnapshotAndReopen();
    const uint64_t steps_end = applied_;
    std::vector<Sign> all;
    for (uint64_t id = 0; id < job_.ids; ++id) all.push_back(MakeSign(kTable, id));
    Compare(steps_end, all, {});
  }
  uint64_t rows_in_memory_most() const { return rows_in_memory_most_; }

 private:
  // Mostly some minutes later; now and then none, an earlier one, or one that lies far ahead.
  void Tick(uint64_t step) {
    log_time_s_ += static_cast<uint32_t>(random_.Below(900));
    const uint32_t draw = static_cast<uint32_t>(random_.Below(12));
    const uint32_t time_s = draw == 0 ? 0 : draw == 1 ? log_time_s_ - 5000 : draw == 2 ? 4'000'000'000u : log_time_s_;
    table_->Tick(step, time_s);
    reference_.Tick(step, time_s);
    expiry_.Tick(step, time_s);
  }

  void OpenAt(const std::string& path, bool fresh) {
    if (rocksdb_) {
      auto store = OpenRocksDbStore(path, RocksDbOptions());
      ASSERT_TRUE(store.ok()) << store.status();
      store_ = std::move(*store);
    } else if (fresh) {
      store_ = MakeMapStore();
    } else {
      auto store = OpenMapStore(path);
      ASSERT_TRUE(store.ok()) << store.status();
      store_ = std::move(*store);
    }
    io_ = std::make_unique<StoreIo>(Env::Real(), store_.get(), read_threads_);
    job_.options.step = applied_;
    auto table = EmbeddingTable::Open(job_.options, io_.get());
    ASSERT_TRUE(table.ok()) << table.status();
    table_ = std::move(*table);
  }
  void Close() {
    table_.reset();
    io_.reset();
    store_.reset();
  }

  // Less room or more, and some memory given back: rows change their slots.
  void ChangeBound() {
    if (cutting_ || random_.Below(4) != 0) return;
    table_->SetMemoryRowsMax(1 + random_.Below(job_.options.memory_rows_max));
    ASSERT_TRUE(table_->GiveBackMemory(random_.Below(64)).ok());
  }
  // A cut goes on over some steps; the rows of its moment are what it must come to.
  void BeginCut() {
    ASSERT_TRUE(table_->BeginCut(applied_).ok());
    cutting_ = true;
    cut_step_ = applied_;
    cut_reference_ = reference_;
    cut_clock_ = expiry_.clock();
  }
  void ContinueCut(uint64_t rows_max) {
    const auto more = table_->ContinueCut(rows_max);
    ASSERT_TRUE(more.ok()) << more.status();
    if (*more) return;
    cutting_ = false;
    const std::string path = JoinPath(folder_, absl::StrCat("cut-", ++checkpoints_));
    const std::unique_ptr<Event> copied = Env::Real()->NewEvent();
    absl::Status status;
    io_->Then([&](const absl::Status& written) {
      status = written.ok() ? store_->Checkpoint(path) : written;
      copied->Notify();
    });
    const TableCut cut = table_->EndCut();
    copied->WaitUntil(kNever);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_EQ(cut.step, cut_step_);
    ASSERT_EQ(cut.hash, cut_reference_.Hash(cut_step_));
    ASSERT_EQ(cut.rows, cut_reference_.RowsAt(cut_step_));
    auto store = rocksdb_ ? OpenRocksDbStore(path, RocksDbOptions()) : OpenMapStore(path);
    ASSERT_TRUE(store.ok()) << store.status();
    TableOptions options = job_.options;
    options.step = cut_step_;
    options.clock = cut.clock;
    ASSERT_EQ(cut.clock.SerializeAsString(), cut_clock_.SerializeAsString());
    auto table = EmbeddingTable::Open(options, store->get());
    ASSERT_TRUE(table.ok()) << table.status();
    const uint32_t dim = job_.options.config.dim();
    for (uint64_t id = 0; id < job_.ids; ++id) {
      std::vector<float> row(dim, -1);
      const Sign sign = MakeSign(kTable, id);
      ASSERT_TRUE((*table)->Pull(cut_step_, {sign}, {}, row.data()).ok());
      ASSERT_EQ(row, cut_reference_.Pull(cut_step_, sign, 0)) << "id " << id << " of the cut of " << cut_step_;
      const uint32_t occurrences = 1 + static_cast<uint32_t>(id % 2);
      ASSERT_TRUE((*table)->Pull(cut_step_ + 1, {sign}, {occurrences}, row.data()).ok());
      ASSERT_EQ(row, cut_reference_.Pull(cut_step_ + 1, sign, occurrences)) << "id " << id;
    }
  }

  std::vector<Part> DrawStep() {
    std::vector<Part> parts;
    for (uint32_t lane = 0; lane < job_.lanes; ++lane) {
      const size_t count = random_.Below(6) == 0 ? 0 : job_.batch;
      parts.push_back(RandomPart(&random_, kTable, job_.ids, count, job_.options.config.dim()));
    }
    return parts;
  }

  void Upkeep() {
    if (cutting_) {
      ContinueCut(1 + random_.Below(6));
    } else if (random_.Below(4) == 0) {
      BeginCut();
    }
    switch (random_.Below(8)) {
      case 0:
      case 1: {
        ChangeBound();
        const auto more = table_->Maintain(applied_, 1 + random_.Below(50));
        ASSERT_TRUE(more.ok()) << more.status();
        return;
      }
      case 2:
      case 3:
        ASSERT_TRUE(table_->Prefetch(applied_ + 1, RandomPart(&random_, kTable, job_.ids, job_.batch, 1).signs).ok());
        return;
      case 4:
        if (random_.Below(3) == 0) SnapshotAndReopen();
        return;
      default:
        return;
    }
  }

  void SnapshotAndReopen() {
    while (cutting_ && !testing::Test::HasFatalFailure()) ContinueCut(1000);
    const auto hash = table_->Snapshot(applied_);
    ASSERT_TRUE(hash.ok()) << hash.status();
    ASSERT_EQ(*hash, reference_.Hash(applied_));
    ASSERT_EQ(table_->stats().rows, reference_.RowsAt(applied_));
    if (random_.Below(3) == 0) return;  // goes on with the same table
    const std::string path = JoinPath(folder_, absl::StrCat("checkpoint-", ++checkpoints_));
    ASSERT_TRUE(store_->Checkpoint(path).ok());
    Close();
    job_.options.clock = expiry_.clock();
    const bool changes = random_.Below(3) == 0;
    if (changes) {
      Table* const config = &job_.options.config;
      config->clear_expire_after_hours();
      config->set_expire_after_steps(static_cast<uint32_t>(random_.Below(5)));
      if (random_.Below(2) == 0) DrawHours(&random_, config);
      reference_.ChangeExpiry(applied_, config->expire_after_steps(), config->expire_after_hours());
      expiry_ = Expiry(ExpiryRule::Of(*config), expiry_.clock());
    }
    OpenAt(path, false);
    if (changes) return;  // an upper bound until the next cut
    ASSERT_EQ(table_->stats().rows, reference_.RowsAt(applied_));
  }

  void ComparePull(uint64_t step, bool read_only) {
    const Part part = RandomPart(&random_, kTable, job_.ids, job_.batch, 1);
    Compare(step, part.signs, read_only ? std::vector<uint32_t>() : part.occurrences);
  }

  void Compare(uint64_t step, const std::vector<Sign>& signs, const std::vector<uint32_t>& occurrences) {
    const uint32_t dim = job_.options.config.dim();
    std::vector<float> rows(signs.size() * dim, -1);
    const absl::Status status = table_->Pull(step, signs, occurrences, rows.data());
    ASSERT_TRUE(status.ok()) << status;
    for (size_t i = 0; i < signs.size(); ++i) {
      const std::vector<float> got(rows.begin() + i * dim, rows.begin() + (i + 1) * dim);
      ASSERT_EQ(got, reference_.Pull(step, signs[i], occurrences.empty() ? 0 : occurrences[i]))
          << job_.options.config.ShortDebugString() << " job " << job_.options.seed << " step " << step << " id "
          << IdOf(signs[i]);
    }
  }

  RandomJob job_;
  const bool rocksdb_;
  const size_t read_threads_;
  Random random_;
  ReferenceTable reference_;
  ReferenceTable cut_reference_;  // as of the cut
  Expiry expiry_;
  LogClock cut_clock_;
  uint32_t log_time_s_ = 1'700'000'000;
  bool cutting_ = false;
  uint64_t cut_step_ = 0;
  const std::string folder_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<StoreIo> io_;
  std::unique_ptr<EmbeddingTable> table_;
  uint64_t applied_ = 0;
  int checkpoints_ = 0;
  uint64_t rows_in_memory_most_ = 0;
};

void RunOf(uint64_t seed, bool rocksdb, size_t read_threads, uint64_t steps) {
  const RandomJob job = DrawJob(seed);
  Runner(job, rocksdb, read_threads).Run(StepsFor(job, steps));
}

TableOptions PlainOptions(uint32_t dim, uint64_t memory_rows_max) {
  TableOptions options;
  options.config.set_name("plain");
  options.config.set_dim(dim);
  options.number = kTable;
  options.shards = 4;
  options.memory_rows_max = memory_rows_max;
  return options;
}

std::unique_ptr<EmbeddingTable> OpenTable(const TableOptions& options, KvStore* store) {
  auto table = EmbeddingTable::Open(options, store);
  EXPECT_TRUE(table.ok()) << table.status();
  return std::move(*table);
}

std::vector<float> PullOne(EmbeddingTable* table, uint64_t step, Sign sign, uint32_t dim) {
  std::vector<float> row(dim, -1);
  EXPECT_TRUE(table->Pull(step, {sign}, {}, row.data()).ok());
  return row;
}

TEST(EmbeddingTable, EqualsTheReferenceBitForBitOverAMap) {
  for (uint64_t seed = 0; seed < 160 && !HasFatalFailure(); ++seed) RunOf(seed, false, 0, 14);
}

TEST(EmbeddingTable, EqualsTheReferenceBitForBitOverRocksDb) {
  for (uint64_t seed = 1000; seed < 1016 && !HasFatalFailure(); ++seed) RunOf(seed, true, 0, 10);
}

TEST(EmbeddingTable, EqualsTheReferenceWithReadsAndWritesOnOtherThreads) {
  for (uint64_t seed = 0; seed < 96 && !HasFatalFailure(); ++seed) RunOf(seed, false, 1 + seed % 3, 14);
  for (uint64_t seed = 1000; seed < 1016 && !HasFatalFailure(); ++seed) RunOf(seed, true, 2, 10);
}

TEST(EmbeddingTable, EqualsTheReferenceWhenEvictionChoosesBySample) {
  for (uint64_t seed = 0; seed < 6 && !HasFatalFailure(); ++seed) {
    RandomJob job = DrawJob(seed);
    job.options.config.clear_admission();
    job.options.config.clear_expire_after_steps();
    job.options.config.clear_expire_after_hours();
    job.options.memory_rows_max = 6000;  // more slots than eviction looks at one by one
    job.ids = 30000;
    job.batch = 2500;
    Runner runner(job, false);
    runner.Run(12);
    EXPECT_GT(runner.rows_in_memory_most(), 4096u);
  }
}

TEST(EmbeddingTable, HashesTheSameOnOneTwoAndThreeServers) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    RandomJob job = DrawJob(seed);
    job.options.shards = 7;
    std::set<uint64_t> sums;
    for (uint32_t servers = 1; servers <= 3; ++servers) {
      Random random(seed);
      std::vector<std::unique_ptr<KvStore>> stores;
      std::vector<std::unique_ptr<EmbeddingTable>> tables;
      for (uint32_t server = 0; server < servers; ++server) {
        stores.push_back(MakeMapStore());
        tables.push_back(OpenTable(job.options, stores.back().get()));
      }
      for (uint64_t step = 1; step <= 8; ++step) {
        std::vector<std::vector<Part>> shares(servers, std::vector<Part>(job.lanes));
        for (uint32_t lane = 0; lane < job.lanes; ++lane) {
          const uint32_t dim = job.options.config.dim();
          const Part part = RandomPart(&random, kTable, job.ids, job.batch, dim);
          for (size_t i = 0; i < part.signs.size(); ++i) {
            Part& share = shares[LogicalShardOf(part.signs[i], job.options.shards) % servers][lane];
            share.signs.push_back(part.signs[i]);
            share.occurrences.push_back(part.occurrences[i]);
            share.gradients.insert(share.gradients.end(), part.gradients.begin() + i * dim,
                                   part.gradients.begin() + (i + 1) * dim);
          }
        }
        for (uint32_t server = 0; server < servers; ++server) {
          ASSERT_TRUE(tables[server]->Push(step, 5, SpansOf(shares[server])).ok());
        }
      }
      uint64_t sum = 0;
      for (auto& table : tables) {
        const auto hash = table->Snapshot(8);
        ASSERT_TRUE(hash.ok()) << hash.status();
        sum += *hash;
      }
      sums.insert(sum);
    }
    EXPECT_EQ(sums.size(), 1u) << "job " << seed;
  }
}

TEST(EmbeddingTable, GoesOnFromACheckpointAsIfItHadNeverStoppedWithEveryOptimizer) {
  for (int kind = 0; kind < Optimizer::Kind_ARRAYSIZE; ++kind) {
    TableOptions options = PlainOptions(5, 10);
    options.config.mutable_optimizer()->set_kind(static_cast<Optimizer::Kind>(kind));
    const std::string path = JoinPath(NewTestFolder(), "checkpoint");
    uint64_t hashes[2];
    for (const bool stops : {false, true}) {
      auto store = MakeMapStore();
      auto table = OpenTable(options, store.get());
      Random random(9);
      for (uint64_t step = 1; step <= 8; ++step) {
        ASSERT_TRUE(table->Push(step, 3, {RandomPart(&random, kTable, 30, 20, 5).span()}).ok());
        if (!stops || step != 4) continue;
        ASSERT_TRUE(table->Snapshot(step).ok());
        ASSERT_TRUE(store->Checkpoint(path).ok());
        table.reset();
        store = OpenMapStore(path).value();
        table = OpenTable(options, store.get());
      }
      hashes[stops] = table->Snapshot(8).value();
    }
    EXPECT_EQ(hashes[0], hashes[1]) << Optimizer::Kind_Name(static_cast<Optimizer::Kind>(kind));
  }
}

TEST(EmbeddingTable, APullChangesNothing) {
  TableOptions options = PlainOptions(4, 100);
  options.config.mutable_admission()->set_count_min(3);
  options.config.set_expire_after_steps(2);
  for (const bool pull : {false, true}) {
    auto store = MakeMapStore();
    auto table = OpenTable(options, store.get());
    Random random(5), pulls(6);
    uint64_t hash = 0;
    for (uint64_t step = 1; step <= 6; ++step) {
      for (int i = 0; pull && i < 3; ++i) {
        const Part part = RandomPart(&pulls, kTable, 50, 30, 1);
        std::vector<float> rows(part.signs.size() * 4);
        ASSERT_TRUE(table->Pull(step + i, part.signs, part.occurrences, rows.data()).ok());
      }
      ASSERT_TRUE(table->Push(step, 3, {RandomPart(&random, kTable, 50, 20, 4).span()}).ok());
    }
    hash = *table->Snapshot(6);
    static uint64_t without = 0;
    if (!pull) without = hash;
    EXPECT_EQ(hash, without);
  }
}

TEST(EmbeddingTable, AReadOnlyPullLeavesEachRowInItsTier) {
  const TableOptions options = PlainOptions(2, 4);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  Random random(1);
  for (uint64_t step = 1; step <= 20; ++step) {
    ASSERT_TRUE(table->Push(step, 1, {RandomPart(&random, kTable, 30, 3, 2).span()}).ok());
  }
  std::vector<Sign> all;
  for (uint64_t id = 0; id < 30; ++id) all.push_back(MakeSign(kTable, id));
  std::vector<float> rows(all.size() * 2);
  const EmbeddingTableStats before = table->stats();
  ASSERT_GT(before.rows_spilled, 0u);
  ASSERT_TRUE(table->Pull(20, all, {}, rows.data()).ok());
  ASSERT_TRUE(table->Pull(20, all, {}, rows.data()).ok());
  const EmbeddingTableStats after = table->stats();
  EXPECT_EQ(after.rows_spilled, before.rows_spilled);
  EXPECT_EQ(after.rows_in_memory, before.rows_in_memory);
  EXPECT_EQ(after.memory_hits, before.memory_hits) << "an evaluation says nothing about training's working set";
  EXPECT_EQ(after.memory_misses, before.memory_misses);
}

TEST(EmbeddingTable, CountsATrainingPullOfARowInMemoryAsAHitFromTheStoreAsAMissAndOfAnUnseenSignAsNeither) {
  const TableOptions options = PlainOptions(1, 32);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  uint64_t step = 0;
  for (uint64_t id = 0; id < 64; ++id) {
    ASSERT_TRUE(table->Push(++step, 1, {Part{{MakeSign(kTable, id)}, {1}, {1.0f}}.span()}).ok());
  }
  const std::vector<Sign> signs = {MakeSign(kTable, 0), MakeSign(kTable, 1), MakeSign(kTable, 63),
                                   MakeSign(kTable, 1000), MakeSign(kTable, 1001)};
  std::vector<float> rows(signs.size());
  ASSERT_TRUE(table->Pull(step + 1, signs, std::vector<uint32_t>(signs.size(), 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, 1u);
  EXPECT_EQ(table->stats().memory_misses, 2u);
}

TEST(EmbeddingTable, KeepsARowWhoseUpdateWouldNotBeFinite) {
  TableOptions options = PlainOptions(2, 10);
  options.config.mutable_optimizer()->set_kind(Optimizer::ADAGRAD);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  const Sign sign = MakeSign(kTable, 9);
  const float huge = 1e30f;  // finite, and its square is not
  const Part good{{sign}, {1}, {0.5f, -0.5f}}, bad{{sign}, {2}, {huge, 0.0f}};
  ASSERT_TRUE(table->Push(1, 1, {good.span()}).ok());
  const std::vector<float> before = PullOne(table.get(), 2, sign, 2);
  ASSERT_TRUE(table->Push(2, 1, {bad.span()}).ok());
  EXPECT_EQ(PullOne(table.get(), 3, sign, 2), before);
  EXPECT_EQ(table->stats().rows_non_finite, 1u);
  // Count and last_step moved, updates did not.
  ReferenceTable reference(options);
  reference.Push(1, 1, {good});
  ReferenceTable::Row row = reference.rows().at(sign);
  row.meta.count = 3;
  row.meta.last_step = 2;
  ASSERT_EQ(row.meta.updates, 1u);
  EXPECT_EQ(*table->Snapshot(2), RowHash(kTable, sign, row.meta, row.floats));
}

TEST(EmbeddingTable, BearsARowWithItsInitialWeightsWhenItsFirstUpdateIsNotFinite) {
  TableOptions options = PlainOptions(1, 10);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  const Sign sign = MakeSign(kTable, 1);
  ASSERT_TRUE(table->Push(1, 1, {Part{{sign}, {1}, {std::numeric_limits<float>::quiet_NaN()}}.span()}).ok());
  EXPECT_EQ(PullOne(table.get(), 2, sign, 1)[0], InitialWeight(1, sign, 0, options.config.init_uniform()));
}

TEST(EmbeddingTable, LetsTheLeastRecentRowsLeaveFirst) {
  TableOptions options = PlainOptions(1, 64);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  // Ids are seen one a step; the last ones need room, and with them one eighth of memory becomes free.
  uint64_t step = 0;
  for (uint64_t id = 0; id < 68; ++id) {
    ASSERT_TRUE(table->Push(++step, 1, {Part{{MakeSign(kTable, id)}, {1}, {1.0f}}.span()}).ok());
  }
  std::vector<Sign> old, recent;
  for (uint64_t id = 0; id < 4; ++id) old.push_back(MakeSign(kTable, id));
  for (uint64_t id = 12; id < 68; ++id) recent.push_back(MakeSign(kTable, id));
  std::vector<float> rows(68);
  ASSERT_TRUE(table->Pull(step, recent, std::vector<uint32_t>(recent.size(), 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, recent.size());
  ASSERT_TRUE(table->Pull(step, old, std::vector<uint32_t>(old.size(), 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, recent.size());
}

TEST(EmbeddingTable, LetsTheLeastFrequentRowsLeaveFirst) {
  TableOptions options = PlainOptions(1, 64);
  options.config.set_score(Table::LFU);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  uint64_t step = 0;
  for (uint64_t id = 0; id < 68; ++id) {  // the oldest are the most frequent
    ASSERT_TRUE(
        table->Push(++step, 1, {Part{{MakeSign(kTable, id)}, {static_cast<uint32_t>(100 - id)}, {1.0f}}.span()}).ok());
  }
  std::vector<Sign> frequent;
  for (uint64_t id = 0; id < 50; ++id) frequent.push_back(MakeSign(kTable, id));
  std::vector<float> rows(68);
  ASSERT_TRUE(table->Pull(step, frequent, std::vector<uint32_t>(frequent.size(), 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, frequent.size());
}

TEST(EmbeddingTable, PrefetchBringsSpilledRowsIntoMemoryAndDrivesOutNoneJustUsed) {
  TableOptions options = PlainOptions(1, 32);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  uint64_t step = 0;
  for (uint64_t id = 0; id < 64; ++id) {
    ASSERT_TRUE(table->Push(++step, 1, {Part{{MakeSign(kTable, id)}, {1}, {1.0f}}.span()}).ok());
  }
  std::vector<Sign> old;
  for (uint64_t id = 0; id < 16; ++id) old.push_back(MakeSign(kTable, id));
  std::vector<float> rows(16);
  ASSERT_TRUE(table->Prefetch(step + 1, old).ok());
  ASSERT_TRUE(table->Pull(step + 1, old, std::vector<uint32_t>(16, 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, 16u);
  EXPECT_EQ(table->stats().rows_prefetched, 16u);
  const std::vector<Sign> last = {MakeSign(kTable, 62), MakeSign(kTable, 63)};
  std::vector<Sign> many;
  for (uint64_t id = 16; id < 62; ++id) many.push_back(MakeSign(kTable, id));
  ASSERT_TRUE(table->Prefetch(step + 1, many).ok());
  ASSERT_TRUE(table->Pull(step + 1, last, std::vector<uint32_t>(2, 1), rows.data()).ok());
  EXPECT_EQ(table->stats().memory_hits, 18u);
}

TEST(EmbeddingTable, MaintainMakesRoomBeforeAPushNeedsIt) {
  TableOptions options = PlainOptions(1, 160);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  Part part;
  for (uint64_t id = 0; id < 160; ++id) {
    part.signs.push_back(MakeSign(kTable, id));
    part.occurrences.push_back(1);
    part.gradients.push_back(1.0f);
  }
  ASSERT_TRUE(table->Push(1, 1, {part.span()}).ok());
  EXPECT_EQ(table->stats().rows_in_memory, 160u) << "a step's rows stay while they are in use";
  float row = 0;
  ASSERT_TRUE(table->Pull(4, {MakeSign(kTable, 0)}, {1u}, &row).ok());
  int slices = 0;
  while (*table->Maintain(1, 5)) ++slices;
  EXPECT_GE(slices, 3);  // bounded: 20 rows in slices of 5
  EXPECT_EQ(table->stats().rows_in_memory, 140u);
  EXPECT_EQ(table->stats().rows_spilled, 20u);
}

TEST(EmbeddingTable, MaintainGivesTheSpaceOfExpiredRowsBack) {
  TableOptions options = PlainOptions(1, 1000);
  options.config.set_expire_after_steps(3);
  auto store = MakeMapStore();
  auto table = OpenTable(options, store.get());
  Random random(2);
  const Part part = RandomPart(&random, kTable, 500, 200, 1);
  ASSERT_TRUE(table->Push(1, 1, {part.span()}).ok());
  for (uint64_t step = 2; step <= 4; ++step) ASSERT_TRUE(table->Push(step, 1, {}).ok());
  while (*table->Maintain(4, 50)) {
  }
  EXPECT_EQ(table->stats().rows_in_memory, part.signs.size());  // 1 + 3 is not before 4
  ASSERT_TRUE(table->Push(5, 1, {}).ok());
  while (*table->Maintain(5, 50)) {
  }
  EXPECT_EQ(table->stats().rows_in_memory, 0u);
  EXPECT_EQ(table->stats().rows_expired, part.signs.size());
  EXPECT_EQ(*table->Snapshot(5), 0u);
}

TEST(EmbeddingTable, NeverAsksTheStoreForSignsThatItCannotHold) {
  // A store that fails on any look-up stands for the cost of one.
  class Deaf final : public KvStore {
   public:
    absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override {
      if (keys.size() == 1 && keys[0] == SumsKey(kTable)) return map_->MultiGet(keys, values);
      return absl::InternalError("asked");
    }
    absl::Status Write(absl::Span<const KvWrite> writes) override { return map_->Write(writes); }
    absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override {
      return map_->Scan(first, last, visit);
    }
    absl::Status Checkpoint(const std::string& path) override { return map_->Checkpoint(path); }
    uint64_t DiskBytes() override { return 0; }

   private:
    std::unique_ptr<KvStore> map_ = MakeMapStore();
  } store;
  auto table = OpenTable(PlainOptions(2, 1000), &store);
  Random random(3);
  for (uint64_t step = 1; step <= 5; ++step) {
    const Part part = RandomPart(&random, kTable, 400, 100, 2);
    std::vector<float> rows(part.signs.size() * 2);
    ASSERT_TRUE(table->Prefetch(step, part.signs).ok());
    ASSERT_TRUE(table->Pull(step, part.signs, part.occurrences, rows.data()).ok());
    ASSERT_TRUE(table->Push(step, 4, {part.span()}).ok());
    ASSERT_TRUE(table->Snapshot(step).ok());
  }
  table = OpenTable(PlainOptions(2, 1000), &store);
  while (*table->Maintain(5, 100)) {  // all of it comes into memory
  }
  const Part part = RandomPart(&random, kTable, 4000, 300, 2);
  ASSERT_TRUE(table->Push(6, 1, {part.span()}).ok());
}

TEST(EmbeddingTable, RowsThatAreLeavingWhenMemoryIsFilledAreLookedUpInTheStoreAfterwards) {
  // The writer is held up, so that rows are under way out of memory while a restored table goes through its store.
  class HeldStore final : public KvStore {
   public:
    absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override {
      return map_->MultiGet(keys, values);
    }
    absl::Status Write(absl::Span<const KvWrite> writes) override {
      if (held) go->WaitUntil(kNever);
      return map_->Write(writes);
    }
    absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override {
      return map_->Scan(first, last, visit);
    }
    absl::Status Checkpoint(const std::string& path) override { return map_->Checkpoint(path); }
    uint64_t DiskBytes() override { return 0; }

    std::atomic<bool> held = false;
    const std::unique_ptr<Event> go = Env::Real()->NewEvent();

   private:
    std::unique_ptr<KvStore> map_ = MakeMapStore();
  } store;
  const TableOptions options = PlainOptions(1, 1000);
  ReferenceTable reference(options);
  const auto part = [](uint64_t begin, uint64_t end) {
    Part made;
    for (uint64_t id = begin; id < end; ++id) {
      made.signs.push_back(MakeSign(kTable, id));
      made.occurrences.push_back(1);
      made.gradients.push_back(0.5f);
    }
    return made;
  };
  const auto push = [&](EmbeddingTable* table, uint64_t step, const Part& made) {
    ASSERT_TRUE(table->Push(step, 1, {made.span()}).ok());
    reference.Push(step, 1, {made});
  };
  {
    auto table = OpenTable(options, &store);
    push(table.get(), 1, part(0, 200));
    ASSERT_TRUE(table->Snapshot(1).ok());
  }
  StoreIo io(Env::Real(), &store, 1);
  auto opened = EmbeddingTable::Open(options, &io);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EmbeddingTable* const table = opened->get();
  push(table, 2, part(0, 200));
  store.held = true;
  uint64_t step = 2;
  for (uint64_t begin = 200; begin < 980; begin += 60) push(table, ++step, part(begin, begin + 60));
  while (*table->Maintain(step, 100000)) {
  }
  store.held = false;
  store.go->Notify();
  for (int i = 0; i < 50; ++i) {  // until what was under way has landed
    ASSERT_TRUE(table->Maintain(step, 100).ok());
    Env::Real()->NewEvent()->WaitUntil(Env::Real()->NowUs() + 2000);
  }
  EXPECT_GT(table->stats().rows_spilled, 0u);
  for (uint64_t id = 0; id < 980; ++id) {
    ASSERT_EQ(PullOne(table, step, MakeSign(kTable, id), 1), reference.Pull(step, MakeSign(kTable, id), 0)) << id;
  }
  push(table, step + 1, part(0, 980));
  EXPECT_EQ(*table->Snapshot(step + 1), reference.Hash(step + 1));
}

TEST(EmbeddingTable, RefusesARecordThatIsNotThisJobs) {
  auto store = MakeMapStore();
  Random random(4);
  auto table = OpenTable(PlainOptions(4, 10), store.get());
  ASSERT_TRUE(table->Push(1, 1, {RandomPart(&random, kTable, 400, 20, 4).span()}).ok());
  ASSERT_TRUE(table->Snapshot(1).ok());
  EXPECT_EQ(EmbeddingTable::Open(PlainOptions(5, 10), store.get()).status().code(), absl::StatusCode::kDataLoss);
}

TEST(EmbeddingTable, TakesTheMemoryThatAPlanIsTold) {
  for (const auto& [dim, rows] : std::vector<std::pair<uint32_t, uint64_t>>{{8, 20000}, {8, 150000}, {256, 40000}}) {
    auto store = MakeMapStore();
    const TableOptions options = PlainOptions(dim, 200000);
    auto table = OpenTable(options, store.get());
    uint64_t step = 0;
    for (uint64_t begin = 0; begin < rows; begin += 5000) {
      std::vector<Sign> signs;
      for (uint64_t id = begin; id < std::min(rows, begin + 5000); ++id) signs.push_back(MakeSign(kTable, id + 1));
      const std::vector<uint32_t> ones(signs.size(), 1);
      const std::vector<float> gradients(signs.size() * dim, 0.5f);
      const PushPart part = {signs, ones, gradients};
      ASSERT_TRUE(table->Push(++step, 1, absl::MakeConstSpan(&part, 1)).ok());
      if (begin > 0) continue;
      ASSERT_TRUE(table->Snapshot(step).ok());
    }
    ASSERT_TRUE(table->Snapshot(step).ok());
    const TableMemory planned = EmbeddingTable::MemoryFor(options, rows, rows, options.shards);
    EXPECT_EQ(planned.rows_in_memory, rows);
    EXPECT_NEAR(static_cast<double>(planned.bytes) / static_cast<double>(table->stats().bytes_memory), 1, 0.15)
        << rows << " rows, planned " << planned.bytes << ", taken " << table->stats().bytes_memory;
  }
}

TEST(EmbeddingTable, RefusesOptionsThatNoTableHas) {
  auto store = MakeMapStore();
  TableOptions options = PlainOptions(4, 10);
  options.config.mutable_admission()->set_counter(Admission::BLOOM);
  options.config.mutable_admission()->set_bloom_hashes(17);
  EXPECT_EQ(EmbeddingTable::Open(options, store.get()).status().code(), absl::StatusCode::kInvalidArgument);
  options = PlainOptions(4, 0);
  EXPECT_EQ(EmbeddingTable::Open(options, store.get()).status().code(), absl::StatusCode::kInvalidArgument);
  options = PlainOptions(0, 10);
  EXPECT_EQ(EmbeddingTable::Open(options, store.get()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(EmbeddingTable, SharesAStoreWithOtherTables) {
  auto store = MakeMapStore();
  std::vector<uint64_t> hashes;
  TableOptions options = PlainOptions(2, 3);
  options.config.mutable_admission()->set_counter(Admission::BLOOM);
  options.config.mutable_admission()->set_count_min(2);
  options.config.mutable_admission()->set_bloom_counters(200000);  // more than a chunk
  for (const TableNumber number : {1u, 2u, 4095u}) {
    options.number = number;
    auto table = OpenTable(options, store.get());
    EXPECT_EQ(table->stats().rows, 0u);
    Random random(number);
    ReferenceTable reference(options);
    for (uint64_t step = 1; step <= 4; ++step) {
      const std::vector<Part> parts = {RandomPart(&random, number, 50, 30, 2)};
      ASSERT_TRUE(table->Push(step, 2, SpansOf(parts)).ok());
      reference.Push(step, 2, parts);
    }
    EXPECT_EQ(*table->Snapshot(4), reference.Hash(4));
    hashes.push_back(reference.Hash(4));
  }
  for (const TableNumber number : {1u, 2u, 4095u}) {
    options.number = number;
    EXPECT_EQ(*OpenTable(options, store.get())->Snapshot(4), hashes[number == 4095 ? 2 : number - 1]);
  }
}

TEST(EmbeddingTable, KeepsTheKnownAnswersThatSnapshotsDependOn) {
  const Sign sign = MakeSign(2, 12345);
  const float floats[] = {1.0f, -2.5f, 0.125f};
  EXPECT_EQ(RowHash(2, sign, RowMeta{7, 42, kRowAdmitted, 5}, floats), 17558561768569169080u);
  EXPECT_EQ(InitialWeight(1, sign, 0, 0.05), -0x1.34d1f4p-7f);
  EXPECT_EQ(InitialWeight(1, sign, 1, 0.05), -0x1.bee4ccp-11f);
  float least = 1, most = -1;
  for (uint32_t i = 0; i < 100000; ++i) {
    const float weight = InitialWeight(1, sign, i, 0.05);
    least = std::min(least, weight);
    most = std::max(most, weight);
  }
  EXPECT_GE(least, -0.05f);
  EXPECT_LT(most, 0.05f);
  EXPECT_LT(least, -0.0499f);
  EXPECT_GT(most, 0.0499f);
}

}  // namespace
}  // namespace hearth
