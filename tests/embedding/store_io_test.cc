#include "embedding/store_io.h"

#include <deque>
#include <memory>

#include "gtest/gtest.h"
#include "tests/embedding/map_store.h"

namespace hearth {
namespace {

TEST(StoreIo, WhatIsWrittenLaterIsNewerAndACallBetweenSeesWhatWasBefore) {
  const auto store = MakeMapStore();
  std::vector<std::string> seen;
  {
    StoreIo io(Env::Real(), store.get(), 2);
    std::deque<StoreWrite> writes(50);
    for (size_t i = 0; i < writes.size(); ++i) {
      writes[i].Add({1, 7}, 0, absl::string_view("old"));
      writes[i].Add({1, 7}, 0, std::to_string(i));  // of a key that comes twice the later one holds
      io.Write(&writes[i]);
      io.Then([&](const absl::Status& written) {
        KvValues values;
        EXPECT_TRUE(written.ok() && store->MultiGet({KvKey{1, 7}}, &values).ok());
        seen.push_back(std::string(values[0]));
      });
    }
    for (StoreWrite& write : writes) io.WaitFor(write.done);
    for (const StoreWrite& write : writes) EXPECT_TRUE(write.status.ok());
  }
  ASSERT_EQ(seen.size(), 50u);
  for (size_t i = 0; i < seen.size(); ++i) EXPECT_EQ(seen[i], std::to_string(i));
}

TEST(StoreIo, ReadsComeBackWhicheverThreadMadeThem) {
  const auto store = MakeMapStore();
  for (const size_t threads : {size_t{0}, size_t{1}, size_t{3}}) {
    StoreIo io(Env::Real(), store.get(), threads);
    StoreWrite write;
    for (uint64_t sign = 0; sign < 100; ++sign) write.Add({0, sign}, 0, std::to_string(sign));
    io.Write(&write);
    io.WaitFor(write.done);
    std::deque<StoreRead> reads(40);
    for (size_t i = 0; i < reads.size(); ++i) {
      reads[i].keys = {{0, i}, {0, 1000 + i}};
      io.Read(&reads[i], i % 3 == 0);
    }
    for (size_t i = 0; i < reads.size(); ++i) {
      io.WaitFor(reads[i].done);
      ASSERT_TRUE(reads[i].status.ok());
      EXPECT_EQ(reads[i].values[0], std::to_string(i));
      EXPECT_FALSE(reads[i].values.found(1));
    }
  }
}

// A store whose disk is full from some write on.
class FullStore final : public KvStore {
 public:
  explicit FullStore(int writes) : writes_(writes) {}
  absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override {
    return map_->MultiGet(keys, values);
  }
  absl::Status Write(absl::Span<const KvWrite> writes) override {
    if (writes_-- <= 0) return absl::ResourceExhaustedError("full");
    return map_->Write(writes);
  }
  absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override {
    return map_->Scan(first, last, visit);
  }
  absl::Status Checkpoint(const std::string& path) override { return map_->Checkpoint(path); }
  uint64_t DiskBytes() override { return 0; }

 private:
  int writes_;
  std::unique_ptr<KvStore> map_ = MakeMapStore();
};

TEST(StoreIo, AfterAFailedWriteNothingIsWrittenAndWhoCopiesTheStoreHearsOfIt) {
  FullStore store(1);
  absl::Status told;
  {
    StoreIo io(Env::Real(), &store, 1);
    std::deque<StoreWrite> writes(3);
    for (StoreWrite& write : writes) {
      write.Add({0, 1}, 0, "x");
      io.Write(&write);
    }
    io.Then([&](const absl::Status& written) { told = written; });
    for (StoreWrite& write : writes) io.WaitFor(write.done);
    EXPECT_TRUE(writes[0].status.ok());
    EXPECT_EQ(writes[1].status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(writes[2].status.code(), absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(told.code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace hearth
