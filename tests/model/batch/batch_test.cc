#include "model/batch/batch.h"

#include <map>
#include <set>

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

// Tables of dims 16, 4, 16; slots a→0, b→1, c→2, d→0 (shares a's table), e→1; two dense features and two tasks.
Job SmallJob() {
  Job job;
  for (const auto& [name, dim] : std::vector<std::pair<std::string, uint32_t>>{{"t0", 16}, {"t1", 4}, {"t2", 16}}) {
    Table* table = job.add_table();
    table->set_name(name);
    table->set_dim(dim);
  }
  for (const auto& [name, table] : std::vector<std::pair<std::string, std::string>>{
           {"a", "t0"}, {"b", "t1"}, {"c", "t2"}, {"d", "t0"}, {"e", "t1"}}) {
    Slot* slot = job.add_slot();
    slot->set_name(name);
    slot->set_table(table);
  }
  job.add_dense()->set_name("x");
  job.add_dense()->set_name("y");
  job.add_task()->set_name("click");
  job.add_task()->set_name("like");
  return job;
}

TEST(FeatureLayout, PutsNarrowGroupsFirstSlotsInJobOrderAndDenseLast) {
  const FeatureLayout layout = MakeFeatureLayout(SmallJob());
  ASSERT_EQ(layout.groups.size(), 2u);
  EXPECT_EQ(layout.groups[0].dim, 4u);
  EXPECT_EQ(layout.groups[0].slots, (std::vector<int>{1, 4}));
  EXPECT_EQ(layout.groups[0].offset, 0);
  EXPECT_EQ(layout.groups[1].dim, 16u);
  EXPECT_EQ(layout.groups[1].slots, (std::vector<int>{0, 2, 3}));
  EXPECT_EQ(layout.groups[1].offset, 8);
  EXPECT_EQ(layout.dense_offset, 56);
  EXPECT_EQ(layout.width, 58);
  const auto& d = layout.slots[3];
  EXPECT_EQ(d.slot, 3);
  EXPECT_EQ(d.table, 0);
  EXPECT_EQ(d.group, 1);
  EXPECT_EQ(d.bag, 2);
  EXPECT_EQ(d.offset, 40);
  EXPECT_EQ(d.dim, 16);
  EXPECT_EQ(layout.slots[4].offset, 4);
}

TEST(FeatureLayout, CoversEveryColumnExactlyOnce) {
  const FeatureLayout layout = MakeFeatureLayout(SmallJob());
  std::multiset<int> columns;
  for (const auto& place : layout.slots) {
    for (int i = 0; i < place.dim; ++i) columns.insert(place.offset + i);
  }
  for (int i = layout.dense_offset; i < layout.width; ++i) columns.insert(i);
  ASSERT_EQ(columns.size(), static_cast<size_t>(layout.width));
  EXPECT_EQ(*columns.rbegin(), layout.width - 1);
  EXPECT_EQ(std::set<int>(columns.begin(), columns.end()).size(), columns.size());
}

// records × slots → signs, and the same through the builder.
using Values = std::vector<std::vector<std::vector<uint64_t>>>;

Values RandomValues(Random* random, int records, int slots, uint64_t ids) {
  Values values(records, std::vector<std::vector<uint64_t>>(slots));
  for (auto& record : values) {
    for (int slot = 0; slot < slots; ++slot) {
      const uint64_t count = random->Below(4);
      const uint64_t table = slot == 0 || slot == 3 ? 1 : slot == 2 ? 3 : 2;
      for (uint64_t i = 0; i < count; ++i) {
        record[slot].push_back((table << 52) |
                               (random->Below(2) ? random->Below(ids) : Mix64(random->Below(ids)) >> 12));
      }
    }
  }
  return values;
}

std::unique_ptr<Batch> BuildFrom(BatchBuilder* builder, const Values& values, Random* random) {
  for (size_t record = 0; record < values.size(); ++record) {
    const size_t slots = values[record].size();
    const size_t first = random->Below(slots);  // any order of slots
    for (size_t i = 0; i < slots; ++i) {
      const size_t slot = (first + i) % slots;
      for (uint64_t sign : values[record][slot]) builder->AddSign(static_cast<int>(slot), sign);
    }
    builder->AddDense({static_cast<float>(record), 0.5f});
    builder->AddLabels({1.0f, 1.0f}, {1.0f, record % 2 == 0 ? 1.0f : 0.0f});
    builder->EndRecord(static_cast<uint32_t>(7 + record / 3), 100 * record);
  }
  return builder->Build();
}

TEST(BatchBuilder, EqualsTheMapOfSetsReferenceOnRandomRecords) {
  const Job job = SmallJob();
  const FeatureLayout layout = MakeFeatureLayout(job);
  BatchBuilder builder(job);
  for (uint64_t seed = 1; seed <= 40; ++seed) {  // the same builder: nothing may be left from the batch before
    Random random(seed);
    const Values values = RandomValues(&random, static_cast<int>(random.Below(60)), 5, 1 + random.Below(50));
    const std::unique_ptr<Batch> batch = BuildFrom(&builder, values, &random);
    ASSERT_EQ(batch->records, static_cast<int64_t>(values.size()));
    ASSERT_EQ(batch->groups.size(), layout.groups.size());
    for (size_t g = 0; g < layout.groups.size(); ++g) {
      std::map<uint64_t, uint32_t> count;
      std::vector<uint64_t> flat;
      std::vector<int64_t> offsets = {0};
      for (int slot : layout.groups[g].slots) {
        for (const auto& record : values) {
          for (uint64_t sign : record[slot]) ++count[sign], flat.push_back(sign);
          offsets.push_back(static_cast<int64_t>(flat.size()));
        }
      }
      const RowGroup& group = batch->groups[g];
      EXPECT_EQ(group.dim, layout.groups[g].dim);
      EXPECT_EQ(group.offsets, offsets);
      std::vector<uint64_t> unique;
      std::vector<uint32_t> occurrences;
      for (const auto& [sign, times] : count) unique.push_back(sign), occurrences.push_back(times);
      EXPECT_EQ(group.unique, unique) << "seed " << seed;
      EXPECT_EQ(group.occurrences, occurrences);
      ASSERT_EQ(group.row_of.size(), flat.size());
      for (size_t i = 0; i < flat.size(); ++i) EXPECT_EQ(unique[group.row_of[i]], flat[i]);
      EXPECT_TRUE(group.rows.empty());
      EXPECT_TRUE(group.gradients.empty());
    }
  }
}

TEST(BatchBuilder, KeepsPlacesLabelsAndDenseAndZeroesMaskedLabels) {
  BatchBuilder builder(SmallJob());
  Random random(5);
  const auto batch = BuildFrom(&builder, RandomValues(&random, 5, 5, 9), &random);
  EXPECT_EQ(batch->kind, Batch::Kind::kRecords);
  EXPECT_EQ(batch->file_of, (std::vector<uint32_t>{7, 7, 7, 8, 8}));
  EXPECT_EQ(batch->offset, (std::vector<uint64_t>{0, 100, 200, 300, 400}));
  EXPECT_EQ(batch->labels, (std::vector<float>{1, 1, 1, 0, 1, 1, 1, 0, 1, 1}));
  EXPECT_EQ(batch->mask, (std::vector<float>{1, 1, 1, 0, 1, 1, 1, 0, 1, 1}));
  EXPECT_EQ(batch->dense, (std::vector<float>{0, .5f, 1, .5f, 2, .5f, 3, .5f, 4, .5f}));
  EXPECT_EQ(builder.records(), 0);
}

TEST(BatchBuilder, GivesEveryGroupToAnEmptyBatch) {
  BatchBuilder builder(SmallJob());
  const auto batch = builder.Build();
  ASSERT_EQ(batch->groups.size(), 2u);
  EXPECT_EQ(batch->groups[1].dim, 16u);
  EXPECT_EQ(batch->groups[1].offsets, std::vector<int64_t>{0});
  EXPECT_TRUE(batch->groups[1].unique.empty());
}

TEST(BatchBuilderDeathTest, RefusesARecordWithoutLabels) {
  BatchBuilder builder(SmallJob());
  builder.AddDense({1.0f, 2.0f});
  EXPECT_DEATH(builder.EndRecord(0, 0), "AddLabels once a record");
  EXPECT_DEATH(builder.AddDense({1.0f}), "the job has 2");
}

}  // namespace
}  // namespace hearth
