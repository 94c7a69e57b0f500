// One suite for KvStore over all its implementations.
#include "embedding/kv_store.h"

#include <unistd.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "embedding/rocksdb_store.h"
#include "gtest/gtest.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

struct Implementation {
  const char* name;
  std::unique_ptr<KvStore> (*make)(const std::string& path);
  absl::StatusOr<std::unique_ptr<KvStore>> (*open_checkpoint)(const std::string& path);
};

std::unique_ptr<KvStore> MakeRocksDb(const std::string& path) {
  auto store = OpenRocksDbStore(path, RocksDbOptions());
  EXPECT_TRUE(store.ok()) << store.status();
  return std::move(*store);
}
std::unique_ptr<KvStore> MakeMap(const std::string&) { return MakeMapStore(); }

class KvStoreSuite : public testing::TestWithParam<Implementation> {
 protected:
  void SetUp() override {
    ASSERT_TRUE(RemoveTree(folder_).ok());
    ASSERT_TRUE(MakeDirectories(folder_).ok());
    store_ = GetParam().make(JoinPath(folder_, "live"));
  }
  void TearDown() override {
    store_.reset();
    EXPECT_TRUE(RemoveTree(folder_).ok());
  }

  void Put(KvKey key, absl::string_view value) { ASSERT_TRUE(store_->Write({KvWrite{key, value, false}}).ok()); }
  static std::vector<std::pair<KvKey, std::string>> All(KvStore* store, KvKey first, KvKey last) {
    std::vector<std::pair<KvKey, std::string>> all;
    EXPECT_TRUE(store
                    ->Scan(first, last,
                           [&](KvKey key, absl::string_view value) {
                             all.emplace_back(key, std::string(value));
                             return true;
                           })
                    .ok());
    return all;
  }

  const std::string folder_ = JoinPath(testing::TempDir(), absl::StrCat("hearth-kv-store-", getpid()));
  std::unique_ptr<KvStore> store_;
};

constexpr KvKey kFirst{0, 0};
constexpr KvKey kLast{0xffffffff, 0xffffffffffffffff};

TEST_P(KvStoreSuite, EqualsAMapUnderRandomWork) {
  Random random(3);
  std::map<KvKey, std::string> map;
  const auto draw_key = [&] {
    // Neighbours and both ends of each half: big-endian order is what is at stake.
    const uint64_t signs[] = {0, 1, 255, 256, uint64_t{1} << 52, ~uint64_t{0}};
    return KvKey{static_cast<uint32_t>(random.Below(3) * 0x7fffffff), signs[random.Below(6)] ^ random.Below(4)};
  };
  for (int round = 0; round < 300; ++round) {
    std::map<KvKey, std::string> batch;  // one write a key and batch
    for (uint64_t i = 0; i < random.Below(8); ++i) batch[draw_key()] = std::string(random.Below(40), 'a' + round % 26);
    std::vector<KvWrite> writes;
    for (const auto& [key, value] : batch) {
      const bool remove = random.Below(4) == 0;
      writes.push_back({key, value, remove});
      if (remove) {
        map.erase(key);
      } else {
        map[key] = value;
      }
    }
    ASSERT_TRUE(store_->Write(writes).ok());
    std::vector<KvKey> keys;
    for (uint64_t i = 0; i < random.Below(9); ++i) keys.push_back(draw_key());
    KvValues values;
    ASSERT_TRUE(store_->MultiGet(keys, &values).ok());
    ASSERT_EQ(values.size(), keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto it = map.find(keys[i]);
      ASSERT_EQ(values.found(i), it != map.end());
      if (it == map.end()) continue;
      ASSERT_EQ(values[i], it->second);
    }
    KvKey first = draw_key(), last = draw_key();
    if (last < first) std::swap(first, last);
    const std::vector<std::pair<KvKey, std::string>> expected(map.lower_bound(first), map.lower_bound(last));
    ASSERT_EQ(All(store_.get(), first, last), expected);
  }
}

TEST_P(KvStoreSuite, HoldsBinaryAndEmptyValues) {
  const std::string binary("\0\xff\n\0", 4);
  Put({1, 1}, binary);
  Put({1, 2}, "");
  KvValues values;
  values.Reset(7);
  values.Set(1, "left over");
  ASSERT_TRUE(store_->MultiGet({KvKey{1, 2}, KvKey{1, 3}, KvKey{1, 1}, KvKey{1, 1}}, &values).ok());
  EXPECT_TRUE(values.found(0));
  EXPECT_FALSE(values.found(1));
  EXPECT_TRUE(values.found(2) && values.found(3));
  EXPECT_EQ(values[0], "");
  EXPECT_EQ(values[2], binary);
  EXPECT_EQ(values[3], binary);
}

TEST_P(KvStoreSuite, TakesEmptyBatchesAndReads) {
  KvValues values;
  EXPECT_TRUE(store_->Write({}).ok());
  EXPECT_TRUE(store_->MultiGet({}, &values).ok());
  EXPECT_EQ(values.size(), 0u);
  EXPECT_TRUE(All(store_.get(), kFirst, kLast).empty());
  EXPECT_TRUE(store_->Write({KvWrite{{5, 5}, {}, true}}).ok());  // removing what is not there
}

TEST_P(KvStoreSuite, TheLastWriteOfAKeyWins) {
  ASSERT_TRUE(store_
                  ->Write({KvWrite{{1, 1}, "a", false}, KvWrite{{1, 1}, "b", false}, KvWrite{{1, 2}, "c", false},
                           KvWrite{{1, 2}, {}, true}})
                  .ok());
  const std::vector<std::pair<KvKey, std::string>> expected = {{{1, 1}, "b"}};
  EXPECT_EQ(All(store_.get(), kFirst, kLast), expected);
}

TEST_P(KvStoreSuite, ScansInOrderAndStopsWhenTold) {
  for (const uint32_t shard : {2u, 1u, 256u}) {
    for (uint64_t sign : {uint64_t{7}, uint64_t{1} << 60, uint64_t{3}}) Put({shard, sign}, "x");
  }
  std::vector<KvKey> seen;
  ASSERT_TRUE(store_
                  ->Scan({1, 4}, {256, 8},
                         [&](KvKey key, absl::string_view) {
                           seen.push_back(key);
                           return seen.size() < 5;
                         })
                  .ok());
  const std::vector<KvKey> expected = {{1, 7}, {1, uint64_t{1} << 60}, {2, 3}, {2, 7}, {2, uint64_t{1} << 60}};
  EXPECT_EQ(seen, expected);
  EXPECT_TRUE(All(store_.get(), {2, 5}, {2, 5}).empty());
}

TEST_P(KvStoreSuite, AScanDoesNotSeeWhatIsWrittenMeanwhile) {
  for (uint64_t sign = 0; sign < 100; ++sign) Put({1, 2 * sign}, "old");
  int seen = 0;
  ASSERT_TRUE(store_
                  ->Scan({1, 0}, {2, 0},
                         [&](KvKey key, absl::string_view value) {
                           EXPECT_EQ(value, "old");
                           EXPECT_TRUE(store_
                                           ->Write({KvWrite{{1, key.sign + 1}, "new", false},
                                                    KvWrite{{1, key.sign + 2}, "new", false}, KvWrite{key, {}, true}})
                                           .ok());
                           ++seen;
                           return true;
                         })
                  .ok());
  EXPECT_EQ(seen, 100);
}

TEST_P(KvStoreSuite, ACheckpointIsACopyOfItsMoment) {
  std::vector<std::string> values;
  for (uint64_t sign = 0; sign < 3000; ++sign) values.push_back(absl::StrCat("value ", sign));
  std::vector<KvWrite> writes;
  for (uint64_t sign = 0; sign < 3000; ++sign) writes.push_back({{3, sign}, values[sign], false});
  ASSERT_TRUE(store_->Write(writes).ok());
  const auto then = All(store_.get(), kFirst, kLast);
  const std::string path = JoinPath(folder_, "checkpoint");
  ASSERT_TRUE(store_->Checkpoint(path).ok());
  EXPECT_FALSE(store_->Checkpoint(path).ok()) << "a checkpoint never overwrites";
  Put({3, 5}, "later");
  ASSERT_TRUE(store_->Write({KvWrite{{3, 6}, {}, true}}).ok());
  store_.reset();  // the copy stands alone
  auto copy = GetParam().open_checkpoint(path);
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_EQ(All(copy->get(), kFirst, kLast), then);
}

TEST_P(KvStoreSuite, ACheckpointOfNothingIsEmpty) {
  const std::string path = JoinPath(folder_, "checkpoint");
  ASSERT_TRUE(store_->Checkpoint(path).ok());
  auto copy = GetParam().open_checkpoint(path);
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_TRUE(All(copy->get(), kFirst, kLast).empty());
}

INSTANTIATE_TEST_SUITE_P(All, KvStoreSuite,
                         testing::Values(Implementation{"MapStore", MakeMap, OpenMapStore},
                                         Implementation{"RocksDbStore", MakeRocksDb, OpenRocksDbStoreReadOnly}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace hearth
