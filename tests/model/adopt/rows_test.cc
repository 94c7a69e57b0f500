#include "model/adopt/rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/half.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/rocksdb_store.h"
#include "embedding/snapshot_reader.h"
#include "embedding/sparse_optimizer.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kStep = 40;
constexpr char kRest[] = R"(
  task { name: "click" category: "watch" label: "c" } log { name: "log" path: "log.csv" }
  model { kind: SHARED_BOTTOM hidden_1: 2 width_1: 2 tower_hidden: 2 } )";

Job JobOf(const std::string& text) {
  Job job = ParseJob(absl::StrCat(text, kRest), "job").value();
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  return job;
}

constexpr char kOld[] = R"(
  training { shards: 4 lanes: 1 }
  table { name: "users" dim: 3 optimizer { kind: ADAM } expire_after_steps: 30 admission { count_min: 2 } }
  table { name: "videos" dim: 2 optimizer { initial_accumulator: 0.5 } expire_after_steps: 30
          admission { count_min: 2 counter: BLOOM bloom_counters: 1000 } }
  slot { name: "user" table: "users" } slot { name: "video" table: "videos" } )";

struct Row {
  RowMeta meta;
  std::vector<float> floats;
};
using Rows = std::map<uint64_t, Row>;  // by id

class AdoptRowsTest : public testing::Test {
 protected:
  AdoptRowsTest()
      : dir_(absl::StrCat(testing::TempDir(), "adopt_rows_", getpid(), "_",
                          testing::UnitTest::GetInstance()->current_test_info()->name())),
        old_(JobOf(kOld)) {
    std::filesystem::remove_all(dir_);
    MakeSnapshot();
  }
  ~AdoptRowsTest() override { std::filesystem::remove_all(dir_); }

  // Two servers' worth of trained tables, as servers save them.
  void MakeSnapshot() {
    Manifest& manifest = before_.manifest;
    manifest.set_step(kStep);
    manifest.set_shards(old_.training().shards());
    manifest.set_servers(2);
    before_.folder = dir_ + "/old";
    uint64_t hash = 0;
    for (uint32_t server = 0; server < 2; ++server) {
      const std::string live = absl::StrCat(dir_, "/live-", server);
      EXPECT_TRUE(MakeDirectories(live).ok());
      EXPECT_TRUE(MakeDirectories(before_.folder).ok());
      std::unique_ptr<KvStore> store = OpenRocksDbStore(live, {}).value();
      for (TableNumber table = 1; table <= 2; ++table) hash += Train(table, server, store.get());
      EXPECT_TRUE(store->Checkpoint(absl::StrCat(before_.folder, "/ps-", server)).ok());
      manifest.add_file();
    }
    manifest.set_rows_hash(hash);
  }

  uint64_t Train(TableNumber number, uint32_t server, KvStore* store) {
    TableOptions options = {old_.table(static_cast<int>(number) - 1), number, 7, 4, 1000, 0, {}};
    std::unique_ptr<EmbeddingTable> table = EmbeddingTable::Open(options, store).value();
    for (uint64_t step = 1; step <= kStep; ++step) {
      std::vector<Sign> signs;
      for (uint64_t id = 1; id <= 200; ++id) {
        const Sign sign = MakeSign(number, id);
        // Ids below 20 come in the first steps alone and expire; those above 190 once.
        const bool now = id < 20 ? step < 3 : id > 190 ? step == 35 : Mix64(id * 100 + step) % 3 == 0;
        if (LogicalShardOf(sign, 4) % 2 == server && now) signs.push_back(sign);
      }
      const std::vector<uint32_t> occurrences(signs.size(), 1);
      std::vector<float> gradients;
      for (size_t i = 0; i < signs.size() * options.config.dim(); ++i)
        gradients.push_back(static_cast<float>(Mix64(step * 1000 + i) % 100) / 100 - 0.4f);
      EXPECT_TRUE(table->Push(step, 4, {PushPart{signs, occurrences, gradients}}).ok());
    }
    return table->Snapshot(kStep).value();
  }

  static Rows RowsOf(const std::string& folder, const Manifest& manifest, const Job& job, TableNumber table) {
    Rows rows;
    uint64_t hash = 0;
    EXPECT_TRUE(VisitRows(
                    folder, manifest, job, table,
                    [&](Sign sign, const RowMeta& meta, absl::Span<const float> floats) {
                      EXPECT_EQ(TableOf(sign), table);
                      rows[IdOf(sign)] = {meta, {floats.begin(), floats.end()}};
                      return absl::OkStatus();
                    },
                    &hash)
                    .ok());
    return rows;
  }

  // Takes the rows over into a snapshot of one server; its manifest has the step and the hash.
  absl::StatusOr<AdoptedRows> TakeOver(const Job& now, const AdoptionRules& rules = {}, bool restart = false) {
    const absl::StatusOr<AdoptionPlan> plan = PlanAdoption(old_, now, rules);
    EXPECT_TRUE(plan.ok()) << plan.status();
    std::filesystem::remove_all(dir_ + "/new");
    std::filesystem::remove_all(dir_ + "/live-new");
    EXPECT_TRUE(MakeDirectories(dir_ + "/new").ok());
    EXPECT_TRUE(MakeDirectories(dir_ + "/live-new").ok());
    std::unique_ptr<KvStore> store = OpenRocksDbStore(dir_ + "/live-new", {}).value();
    absl::StatusOr<AdoptedRows> adopted = TakeOverRows(before_, old_, now, *plan, restart, store.get(), &wanted_);
    if (!adopted.ok()) return adopted;
    EXPECT_TRUE(store->Checkpoint(dir_ + "/new/ps-0").ok());
    after_ = Manifest();
    after_.set_step(restart ? 0 : kStep);
    after_.set_shards(now.training().shards());
    after_.set_servers(1);
    after_.add_file();
    after_.set_rows_hash(adopted->rows_hash);
    for (const AdoptedTable& table : adopted->tables) *after_.add_table()->mutable_clock() = table.clock;
    return adopted;
  }
  Rows Before(TableNumber table) { return RowsOf(before_.folder, before_.manifest, old_, table); }
  Rows After(const Job& now, TableNumber table) { return RowsOf(dir_ + "/new", after_, now, table); }

  // A server that restores the new snapshot sums the same rows.
  void ExpectAServerFindsIt(const Job& now) {
    uint64_t hash = 0;
    for (uint32_t server = 0; server < 3; ++server) {
      const std::unique_ptr<KvStore> store = MakeMapStore();
      ASSERT_TRUE(RestoreShards(
                      dir_ + "/new", after_, [&](uint32_t shard) { return shard % 3 == server; }, store.get())
                      .ok());
      for (int i = 0; i < now.table_size(); ++i) {
        TableOptions options = {now.table(i),
                                static_cast<TableNumber>(i) + 1,
                                7,
                                now.training().shards(),
                                1000,
                                0,
                                ClockOf(after_.table(), i)};
        hash += EmbeddingTable::Open(options, store.get()).value()->Snapshot(after_.step()).value();
      }
    }
    EXPECT_EQ(hash, after_.rows_hash());
  }

  const std::string dir_;
  const Job old_;
  HeldSnapshot before_;
  Manifest after_;
  WantedRows wanted_;
};

TEST_F(AdoptRowsTest, TablesThatAreReorderedAndRenamedOnOtherShardsKeepTheirRows) {
  const Job now = JobOf(R"(
    training { shards: 7 lanes: 1 }
    table { name: "films" was: "videos" dim: 2 optimizer { initial_accumulator: 0.5 } }
    table { name: "tags" dim: 4 }
    table { name: "users" dim: 3 optimizer { kind: ADAM } expire_after_steps: 30 admission { count_min: 2 } }
    slot { name: "user" table: "users" } slot { name: "video" table: "films" } slot { name: "tag" table: "tags" } )");
  const auto adopted = TakeOver(now);
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  for (const auto& [was, is] : {std::make_pair(2, 1), std::make_pair(1, 3)}) {
    const Rows before = Before(static_cast<TableNumber>(was)), after = After(now, static_cast<TableNumber>(is));
    ASSERT_GT(before.size(), 150u);
    EXPECT_EQ(adopted->tables[static_cast<size_t>(is) - 1].rows, before.size());
    ASSERT_EQ(after.size(), before.size());
    for (const auto& [id, row] : before) {
      ASSERT_EQ(after.count(id), 1u);
      const Row& now_row = after.at(id);
      EXPECT_EQ(now_row.floats, row.floats);
      EXPECT_EQ(now_row.meta.count, row.meta.count);
      EXPECT_EQ(now_row.meta.last_step, row.meta.last_step);
      EXPECT_EQ(now_row.meta.updates, row.meta.updates);
    }
  }
  EXPECT_EQ(Before(1).count(5), 0u) << "what had expired is not carried";
  EXPECT_GT(adopted->tables[2].counters, 0u) << "signs that were seen once go on being counted";
  ExpectAServerFindsIt(now);
}

TEST_F(AdoptRowsTest, AWiderTablesNewColumnsAreZeroAndItsStateBeginsAnew) {
  Job now = old_;
  now.mutable_table(0)->set_dim(5);
  now.mutable_table(1)->set_dim(3);
  ASSERT_TRUE(TakeOver(now).ok());
  const Rows users = Before(1), wide_users = After(now, 1);
  ASSERT_EQ(users.size(), wide_users.size());
  for (const auto& [id, row] : wide_users) {
    std::vector<float> expected(users.at(id).floats.begin(), users.at(id).floats.begin() + 3);
    expected.resize(5 + 2 * 5, 0.0f);
    EXPECT_EQ(row.floats, expected);
    EXPECT_EQ(row.meta.updates, 0u) << "Adam's own count, with its moments";
    EXPECT_EQ(row.meta.count, users.at(id).meta.count);
  }
  for (const auto& [id, row] : After(now, 2)) {
    EXPECT_EQ(row.floats[2], 0.0f);
    EXPECT_EQ(row.floats[3], 0.5f) << "initial_accumulator";
  }
  ExpectAServerFindsIt(now);
}

TEST_F(AdoptRowsTest, ANarrowerTableKeepsItsFirstColumnsAndAnotherOptimizerItsWeights) {
  Job now = old_;
  now.mutable_table(0)->set_dim(2);
  now.mutable_table(1)->mutable_optimizer()->set_kind(Optimizer::SGD);
  AdoptionRules truncate;
  truncate.truncate = true;
  ASSERT_TRUE(TakeOver(now, truncate).ok());
  const Rows users = Before(1), videos = Before(2);
  for (const auto& [id, row] : After(now, 1)) {
    EXPECT_EQ(row.floats[0], users.at(id).floats[0]);
    EXPECT_EQ(row.floats[1], users.at(id).floats[1]);
    EXPECT_EQ(row.floats[2], 0.0f) << "a moment";
  }
  for (const auto& [id, row] : After(now, 2))
    EXPECT_EQ(row.floats, std::vector<float>(videos.at(id).floats.begin(), videos.at(id).floats.begin() + 2));
  ExpectAServerFindsIt(now);
}

TEST_F(AdoptRowsTest, AnotherKindOfOptimizerBeginsAsANewRowsDoes) {
  const std::pair<Optimizer::Kind, std::vector<float>> states[] = {
      {Optimizer::MOMENTUM, {0, 0}},
      {Optimizer::ROWWISE_ADAGRAD, {0.5f}},
      {Optimizer::ADAMW, {0, 0, 0, 0}},
      {Optimizer::FTRL, {0.5f, 0.5f, 0, 0}},
  };
  const Rows videos = Before(2);
  for (const auto& [kind, state] : states) {
    Job now = old_;
    now.mutable_table(1)->mutable_optimizer()->set_kind(kind);
    ASSERT_TRUE(TakeOver(now).ok());
    for (const auto& [id, row] : After(now, 2)) {
      std::vector<float> expected(videos.at(id).floats.begin(), videos.at(id).floats.begin() + 2);
      expected.insert(expected.end(), state.begin(), state.end());
      EXPECT_EQ(row.floats, expected) << Optimizer::Kind_Name(kind);
      EXPECT_EQ(row.meta.updates, 0u);
    }
    ExpectAServerFindsIt(now);
  }
}

TEST_F(AdoptRowsTest, WeightsOfFewerBitsAreRoundedToTheNearestAndStateIsCarried) {
  const Rows users = Before(1);
  for (const Table::Weights weights : {Table::FLOAT16, Table::BFLOAT16}) {
    Job now = old_;
    now.mutable_table(0)->set_weights(weights);
    ASSERT_TRUE(TakeOver(now).ok());
    const Rows after = After(now, 1);
    ASSERT_EQ(after.size(), users.size());
    for (const auto& [id, row] : after) {
      std::vector<float> expected = users.at(id).floats;
      for (size_t i = 0; i < 3; ++i) {
        expected[i] = weights == Table::FLOAT16 ? FromHalf(ToHalf(expected[i])) : FromBfloat(ToBfloat(expected[i]));
      }
      EXPECT_EQ(row.floats, expected);
      EXPECT_EQ(row.meta.updates, users.at(id).meta.updates);
    }
    ExpectAServerFindsIt(now);
  }
}

TEST_F(AdoptRowsTest, FromStepZeroOnNothingHasAgedAndAShorterLifeEndsOldRows) {
  ASSERT_TRUE(TakeOver(old_, {}, /*restart=*/true).ok());
  const Rows before = Before(1), after = After(old_, 1);
  ASSERT_EQ(after.size(), before.size());
  for (const auto& [id, row] : after) {
    EXPECT_EQ(row.meta.last_step, 0u);
    EXPECT_EQ(row.meta.updates, before.at(id).meta.updates);
  }
  ExpectAServerFindsIt(old_);
  Job shorter = old_;
  shorter.mutable_table(0)->set_expire_after_steps(3);
  const auto adopted = TakeOver(shorter);
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  EXPECT_GT(adopted->tables[0].expired, 0u);
  EXPECT_EQ(adopted->tables[0].rows + adopted->tables[0].expired, before.size());
  ExpectAServerFindsIt(shorter);
}

TEST_F(AdoptRowsTest, RowsThatExpireByTimeGoOnByTheOldTablesClock) {
  LogClock* const clock = before_.manifest.add_table()->mutable_clock();
  constexpr uint32_t kNoonS = 1'700'000'000;
  clock->set_first_time_s(kNoonS);
  clock->set_time_s(kNoonS + 3 * 3600);
  for (const uint32_t hour : {0u, 1u, 2u}) {
    LogClock::Mark* const mark = clock->add_mark();
    mark->set_before_step(15 + 21 * hour);  // 15, 36, 57
    mark->set_time_s(kNoonS + hour * 3600);
  }
  Job now = old_;
  now.mutable_table(0)->clear_expire_after_steps();
  now.mutable_table(0)->set_expire_after_hours(2);  // what was touched last before step 36 is expired
  const auto adopted = TakeOver(now);
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  Rows truth = Before(1);
  const size_t all = truth.size();
  for (auto row = truth.begin(); row != truth.end();) {
    row = row->second.meta.last_step < 36 ? truth.erase(row) : std::next(row);
  }
  EXPECT_GT(truth.size(), 0u);
  EXPECT_LT(truth.size(), all);
  EXPECT_EQ(adopted->tables[0].rows, truth.size());
  EXPECT_EQ(adopted->tables[0].expired, all - truth.size());
  EXPECT_EQ(adopted->tables[0].clock.horizon(), 36u);
  EXPECT_FALSE(adopted->tables[1].clock.has_time_s());
  const Rows after = After(now, 1);
  EXPECT_EQ(after.size(), truth.size());
  ExpectAServerFindsIt(now);
  EXPECT_EQ(TakeOver(now, {}, /*restart=*/true)->tables[0].clock.time_s(), 0u) << "a clock that has not begun";
}

TEST_F(AdoptRowsTest, CountersThatCannotGoOnAreCountedAndATableThatIsGoneToo) {
  Job now = JobOf(R"(
    training { shards: 4 lanes: 1 }
    table { name: "users" dim: 3 optimizer { kind: ADAM } expire_after_steps: 30 }
    slot { name: "user" table: "users" } )");
  const auto adopted = TakeOver(now);
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  EXPECT_EQ(adopted->tables[0].counters, 0u);
  EXPECT_GT(adopted->tables[0].counters_left, 0u);
  ASSERT_EQ(adopted->tables.size(), 2u);
  EXPECT_EQ(adopted->tables[1].rows, Before(2).size());
  ExpectAServerFindsIt(now);
}

TEST_F(AdoptRowsTest, GivesTheWeightsOfTheSignsThatAreAskedFor) {
  const Rows before = Before(1);
  const uint64_t id = before.begin()->first;
  wanted_[MakeSign(1, id)];
  wanted_[MakeSign(1, 5)];  // has expired
  ASSERT_TRUE(TakeOver(old_).ok());
  EXPECT_EQ(wanted_[MakeSign(1, id)],
            std::vector<float>(before.at(id).floats.begin(), before.at(id).floats.begin() + 3));
  EXPECT_TRUE(wanted_[MakeSign(1, 5)].empty());
}

TEST_F(AdoptRowsTest, ASnapshotWhoseRowsAreNotItsManifestsIsRefused) {
  before_.manifest.set_rows_hash(1);
  EXPECT_TRUE(absl::IsDataLoss(TakeOver(old_).status()));
}

TEST_F(AdoptRowsTest, AFullDiskIsTold) {
  RocksDbOptions full;
  full.disk_bytes_max = 1;
  ASSERT_TRUE(MakeDirectories(dir_ + "/full").ok());
  const std::unique_ptr<KvStore> store = OpenRocksDbStore(dir_ + "/full", full).value();
  const absl::Status status =
      TakeOverRows(before_, old_, old_, *PlanAdoption(old_, old_, {}), false, store.get(), &wanted_).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
}

}  // namespace
}  // namespace hearth
