#include "worker/adopt/adopt.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/artifact/manifest.h"
#include "common/artifact/safetensors.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "model/adopt/parameter_shapes.h"
#include "model/adopt/parameters.h"
#include "model/batch/batch.h"
#include "worker/dense/dense_replica.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int kRecords = 40;
constexpr double kBound = 1e-6;

std::string Folder() {
  return absl::StrCat(testing::TempDir(), "adopt_", getpid(), "_",
                      testing::UnitTest::GetInstance()->current_test_info()->name());
}

Job JobOf(const std::string& text) {
  Job job = ParseJob(text, "job").value();
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  return job;
}

// Two widths, three categories; a list is pooled by its mean.
constexpr char kOld[] = R"(
  log { name: "log" path: "log.csv" }
  task { name: "click" category: "watch" label: "c" }
  task { name: "long.view" category: "watch" label: "v" }
  task { name: "like" category: "inter" label: "l" }
  task { name: "buy" category: "shop" label: "b" }
  slot { name: "user" table: "wide" }
  slot { name: "video" table: "narrow" }
  slot { name: "tags" table: "wide" kind: LIST pooling: MEAN }
  dense { name: "age" } dense { name: "hour" }
  table { name: "wide" dim: 5 } table { name: "narrow" dim: 3 }
  training { lanes: 1 dense_optimizer { ema_decay: 0.9 } } )";

std::vector<std::string> Models() {
  const std::string sizes =
      "hidden_1: 7 hidden_2: 6 width_1: 5 width_2: 4 gate_subspaces: 3 gate_rank_1: 4 "
      "gate_rank_2: 2 tower_hidden: 6 experts: 3 category_experts_1: 3";
  std::vector<std::string> models;
  for (const char* kind :
       {"kind: HOME", "kind: HOME shared_experts_1: 1 task_experts_2: 2", "kind: MMOE", "kind: MMOE home_expert: true",
        "kind: SHARED_BOTTOM", "kind: SHARED_BOTTOM home_expert: true"}) {
    models.push_back(absl::StrCat("model { ", sizes, " ", kind, " }"));
  }
  return models;
}
Job OldJob(const std::string& model) { return JobOf(absl::StrCat(kOld, model)); }

// ---- Models with a life behind them

float RandomValue(const std::string& name, uint64_t element) {
  return static_cast<float>(static_cast<double>(Mix64(SeedOf(3, name) + element) >> 11) * 0x1.0p-52 - 1);
}

// Every array is another one's neighbour in nothing: weights, means, moments, statistics.
void Live(DenseReplica* replica) {
  const absl::Status lived = replica->Overwrite(/*mean=*/true, [](const std::vector<NamedTensor>& places) {
    for (const NamedTensor& place : places) {
      char* const data = const_cast<char*>(place.data.data());
      if (place.dtype == "I64") {
        const int64_t updates = 77;
        std::memcpy(data, &updates, sizeof(updates));
        continue;
      }
      float* const values = reinterpret_cast<float*>(data);
      const bool positive =
          absl::StrContains(place.name, "second_moment") || absl::StrContains(place.name, "running_var");
      for (size_t i = 0; i < place.data.size() / sizeof(float); ++i) {
        values[i] = 0.6f * RandomValue(place.name, i);
        if (positive) values[i] = 0.2f + std::fabs(values[i]);
      }
    }
    return absl::OkStatus();
  });
  EXPECT_TRUE(lived.ok()) << lived;
}

std::unique_ptr<DenseReplica> NewReplica(const Job& job) {
  return DenseReplica::Create(job, std::vector<double>(static_cast<size_t>(job.task_size()), 0.2)).value();
}

using Arrays = std::map<std::string, std::vector<float>>;
Arrays ArraysOf(const SafetensorsFile& file) {
  Arrays arrays;
  for (const NamedTensor& tensor : file.tensors) {
    if (tensor.dtype != "F32") continue;
    std::vector<float>& values = arrays[tensor.name];
    values.resize(tensor.data.size() / sizeof(float));
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  }
  return arrays;
}

// The same records for each job: what a slot holds goes by its old name, and so does a row.
struct Names {
  std::map<std::string, std::string> slot_was, dense_was;
};
std::string WasOf(const std::map<std::string, std::string>& was, const std::string& name) {
  const auto found = was.find(name);
  return found == was.end() ? name : found->second;
}

std::unique_ptr<Batch> BatchFor(const Job& job, const Job& old, const Names& names) {
  BatchBuilder builder(job);
  std::map<uint64_t, std::string> row_of;
  for (uint64_t record = 0; record < kRecords; ++record) {
    for (int i = 0; i < job.slot_size(); ++i) {
      const std::string was = WasOf(names.slot_was, job.slot(i).name());
      const uint64_t values = job.slot(i).kind() == Slot::LIST ? 1 + record % 3 : 1;
      for (uint64_t value = 0; value < values; ++value) {
        const uint64_t id = Mix64(SeedOf(record % 9, was) + value) & 0xffffff;
        int table = 0;
        while (job.table(table).name() != job.slot(i).table()) ++table;
        const uint64_t sign = (static_cast<uint64_t>(table) + 1) << 52 | id;
        builder.AddSign(i, sign);
        row_of[sign] = absl::StrCat("row ", was, " ", id);
      }
    }
    std::vector<float> dense;
    for (const DenseFeature& feature : job.dense())
      dense.push_back(RandomValue(WasOf(names.dense_was, feature.name()), record));
    builder.AddDense(dense);
    builder.AddLabels(std::vector<float>(static_cast<size_t>(job.task_size()), 0),
                      std::vector<float>(static_cast<size_t>(job.task_size()), 1));
    builder.EndRecord(0, record);
  }
  std::unique_ptr<Batch> batch = builder.Build();
  for (RowGroup& group : batch->groups) {
    for (const uint64_t sign : group.unique) {
      // A table that has grown: zeros behind what its rows had.
      const std::string& table = job.table(static_cast<int>(sign >> 52) - 1).name();
      uint32_t known = group.dim;
      for (const Table& one : old.table()) {
        if (one.name() == table) known = std::min(known, one.dim());
      }
      for (uint32_t d = 0; d < group.dim; ++d) group.rows.push_back(d < known ? RandomValue(row_of[sign], d) : 0.0f);
    }
  }
  return batch;
}

struct Taken {
  AdoptionPlan plan;
  double difference = 0;  // the largest of a task that stays
  Arrays old, now;
  int64_t updates = 0;
};

Taken TakeOver(const Job& old, const Job& now, const Names& names = {}, double noise = kCopyNoise) {
  Taken taken;
  const absl::StatusOr<AdoptionPlan> plan = PlanAdoption(old, now, {});
  EXPECT_TRUE(plan.ok()) << plan.status();
  if (!plan.ok()) return taken;
  taken.plan = *plan;
  const std::string folder = Folder();
  EXPECT_TRUE(MakeDirectories(folder).ok());
  const auto before = NewReplica(old), after = NewReplica(now);
  Live(before.get());
  EXPECT_TRUE(before->Save(folder + "/old", 5).ok());
  const SafetensorsFile file = ReadSafetensors(folder + "/old").value();
  const absl::Status written = after->Overwrite(/*mean=*/true, [&](const std::vector<NamedTensor>& places) {
    return TakeOverParameters(taken.plan, file.tensors, now.seed(), places, noise);
  });
  EXPECT_TRUE(written.ok()) << written;
  EXPECT_TRUE(after->Save(folder + "/new", 5).ok());
  const SafetensorsFile new_file = ReadSafetensors(folder + "/new").value();
  std::memcpy(&taken.updates, new_file.Find("optimizer.updates")->data.data(), sizeof(int64_t));
  taken.old = ArraysOf(file);
  taken.now = ArraysOf(new_file);
  const std::vector<float> was = before->Predict(*BatchFor(old, old, {})).value();
  const std::vector<float> is = after->Predict(*BatchFor(now, old, names)).value();
  const auto probability = [](float logit) { return 1 / (1 + std::exp(-static_cast<double>(logit))); };
  for (int task = 0; task < now.task_size(); ++task) {
    const int from = taken.plan.tasks[static_cast<size_t>(task)];
    for (int record = 0; from >= 0 && record < kRecords; ++record) {
      taken.difference =
          std::max(taken.difference, std::fabs(probability(is[static_cast<size_t>(record * now.task_size() + task)]) -
                                               probability(was[static_cast<size_t>(record * old.task_size() + from)])));
    }
  }
  std::filesystem::remove_all(folder);
  return taken;
}

// ---- Tests

TEST(ParameterShapes, AreTheModelsOwnNamesAndShapes) {
  for (const std::string& model : Models()) {
    const Job job = OldJob(model);
    std::map<std::string, std::vector<int64_t>> said, is;
    for (const ParameterModule& module : ModulesOf(job)) {
      for (const Parameter& parameter : module.parameters) {
        std::vector<int64_t>& shape = said[module.path() + "." + parameter.leaf];
        for (const ParameterAxis& axis : parameter.axes) shape.push_back(axis.size);
      }
    }
    const auto replica = NewReplica(job);
    ASSERT_TRUE(replica
                    ->Overwrite(false,
                                [&](const std::vector<NamedTensor>& places) {
                                  for (const NamedTensor& place : places) {
                                    if (!absl::StartsWith(place.name, "optimizer.")) is[place.name] = place.shape;
                                  }
                                  return absl::OkStatus();
                                })
                    .ok());
    EXPECT_EQ(said, is) << model;
  }
}

TEST(AdoptDense, TheSameJobTakesEveryBitOver) {
  for (const std::string& model : Models()) {
    const Taken taken = TakeOver(OldJob(model), OldJob(model));
    EXPECT_EQ(taken.now, taken.old) << model;
    EXPECT_EQ(taken.updates, 77);
    EXPECT_EQ(taken.difference, 0);
  }
}

TEST(AdoptDense, WhatIsAddedLeavesEveryTaskThatStaysAsItWas) {
  struct Case {
    const char* what;
    std::vector<std::pair<std::string, std::string>> edits;  // of kOld
    Names names;
  };
  const Case cases[] = {
      {"a slot in the middle",
       {{R"(slot { name: "tags")", R"(slot { name: "author" table: "narrow" } slot { name: "tags")"}},
       {}},
      {"a slot in front of all, of a new width",
       {{R"(slot { name: "user")", R"(slot { name: "author" table: "tiny" } slot { name: "user")"},
        {R"(table { name: "wide" dim: 5 })", R"(table { name: "tiny" dim: 2 } table { name: "wide" dim: 5 })"}},
       {}},
      {"a dense feature", {{R"(dense { name: "age" })", R"(dense { name: "weight" } dense { name: "age" })"}}, {}},
      {"a task in an old category",
       {{R"(task { name: "like")", R"(task { name: "share" category: "watch" label: "s" } task { name: "like")"}},
       {}},
      {"a task in a new category",
       {{R"(task { name: "click")", R"(task { name: "share" category: "social" label: "s" } task { name: "click")"}},
       {}},
      {"two new categories",
       {{R"(task { name: "like")",
         R"(task { name: "share" category: "social" label: "s" } task { name: "pay" category: "money" label: "p" } task { name: "like")"}},
       {}},
      {"another order",
       {{R"(slot { name: "user" table: "wide" })", ""},
        {R"(dense { name: "age" } dense { name: "hour" })",
         R"(slot { name: "user" table: "wide" } dense { name: "hour" } dense { name: "age" })"},
        {R"(task { name: "click" category: "watch" label: "c" })", ""},
        {R"(task { name: "buy" category: "shop" label: "b" })",
         R"(task { name: "buy" category: "shop" label: "b" } task { name: "click" category: "watch" label: "c" })"},
        {R"(table { name: "wide" dim: 5 } table { name: "narrow" dim: 3 })",
         R"(table { name: "narrow" dim: 3 } table { name: "wide" dim: 5 })"}},
       {}},
      {"other names",
       {{R"(slot { name: "video")", R"(slot { name: "film" was: "video" salt: "video" column: "video")"},
        {R"(dense { name: "age" })", R"(dense { name: "years" was: "age" value: "`age`" })"},
        {R"(name: "long.view" category: "watch")", R"(name: "long_view" was: "long.view" category: "seen")"},
        {R"(name: "click" category: "watch")", R"(name: "click" category: "seen")"}},
       {{{"film", "video"}}, {{"years", "age"}}}},
      {"a wider table", {{R"(table { name: "narrow" dim: 3 })", R"(table { name: "narrow" dim: 6 })"}}, {}},
      {"all of it",
       {{R"(slot { name: "tags")", R"(slot { name: "author" table: "narrow" } slot { name: "tags")"},
        {R"(dense { name: "age" })", R"(dense { name: "weight" } dense { name: "age" })"},
        {R"(task { name: "like")", R"(task { name: "share" category: "social" label: "s" } task { name: "like")"},
        {R"(task { name: "buy")", R"(task { name: "hide" category: "shop" label: "h" } task { name: "buy")"}},
       {}},
  };
  for (const std::string& model : Models()) {
    for (const Case& one : cases) {
      std::string text = kOld;
      for (const auto& [from, to] : one.edits) {
        ASSERT_TRUE(absl::StrContains(text, from)) << from;
        text = absl::StrReplaceAll(text, {{from, to}});
      }
      const Taken taken = TakeOver(OldJob(model), JobOf(text + model), one.names);
      EXPECT_THAT(taken.plan.changes, IsEmpty()) << one.what << ", " << model;
      EXPECT_LE(taken.difference, kBound) << one.what << ", " << model;
      EXPECT_EQ(taken.updates, 77);
    }
  }
}

TEST(AdoptDense, MomentsAndTheMeanGoWithTheWeightsAndWhatIsNewHasNone) {
  const std::string model = Models()[0];
  const std::string text = absl::StrReplaceAll(
      kOld,
      {{R"(slot { name: "tags")", R"(slot { name: "author" table: "narrow" } slot { name: "tags")"},
       {R"(task { name: "like")", R"(task { name: "share" category: "social" label: "s" } task { name: "like")"}});
  const Taken taken = TakeOver(OldJob(model), JobOf(text + model));
  // v before: video 3, user 5, tags 5, age, hour; now video 3, author 3, user 5, …
  const size_t old_width = 15, width = 18;
  for (const char* prefix : {"", "ema.", "optimizer.first_moment.", "optimizer.second_moment."}) {
    const std::string name = absl::StrCat(prefix, "level1.category.inter.expert.hidden_weight");
    const std::vector<float>&was = taken.old.at(name), &is = taken.now.at(name);
    ASSERT_EQ(is.size() / width, was.size() / old_width);
    for (size_t row = 0; row < is.size() / width; ++row) {
      for (size_t column = 0; column < width; ++column) {
        const bool born = column >= 3 && column < 6;
        const float expected = born ? 0.0f : was[row * old_width + (column < 3 ? column : column - 3)];
        ASSERT_EQ(is[row * width + column], expected) << name << " " << row << " " << column;
      }
    }
    EXPECT_EQ(taken.now.at(absl::StrCat(prefix, "tower.like.hidden.weight")),
              taken.old.at(absl::StrCat(prefix, "tower.like.hidden.weight")));
  }
  for (const char* prefix : {"optimizer.first_moment.", "optimizer.second_moment."}) {
    for (const float moment : taken.now.at(absl::StrCat(prefix, "tower.share.hidden.weight"))) ASSERT_EQ(moment, 0.0f);
  }
  EXPECT_EQ(taken.now.at("ema.tower.share.hidden.weight"), taken.now.at("tower.share.hidden.weight"));
  EXPECT_NEAR(taken.now.at("tower.share.output.bias")[0], std::log(0.2 / 0.8), 1e-6) << "its base rate";
  EXPECT_EQ(taken.now.at("level1.category.social.expert.running_var")[0],
            taken.old.at("level1.shared.expert.running_var")[0]);
  // shared 2, watch 3, social 3 copies of the shared ones: the first of which has three, the second two to share with.
  for (const char* prefix : {"optimizer.first_moment.", "optimizer.second_moment."}) {
    const std::string name = absl::StrCat(prefix, "level1.shared.gate.bias");
    for (const auto& [is, was] :
         {std::make_pair(0, 0), std::make_pair(5, 0), std::make_pair(6, 1), std::make_pair(8, 5)})
      EXPECT_EQ(taken.now.at(name)[static_cast<size_t>(is)], taken.old.at(name)[static_cast<size_t>(was)]) << name;
  }
  for (const char* name : {"level1.shared.gate.bias", "ema.level1.shared.gate.bias"}) {
    EXPECT_FLOAT_EQ(taken.now.at(name)[7], taken.old.at(name)[0] - std::log(3.0f));
    EXPECT_FLOAT_EQ(taken.now.at(name)[1], taken.old.at(name)[1] - std::log(2.0f));
  }
  // What is born is what a fresh run would have.
  const auto fresh = NewReplica(JobOf(text + model));
  Arrays born;
  ASSERT_TRUE(fresh->Save(Folder(), 0).ok());
  born = ArraysOf(ReadSafetensors(Folder()).value());
  std::filesystem::remove_all(Folder());
  EXPECT_EQ(taken.now.at("tower.share.hidden.weight"), born.at("tower.share.hidden.weight"));
  EXPECT_EQ(taken.now.at("level1.category.social.gate.weight"), born.at("level1.category.social.gate.weight"));
}

TEST(AdoptDense, WhatLooksAtExpertsOfAnotherShapeIsBornWithThem) {
  const std::string model = Models()[0];
  const Job now = JobOf(absl::StrReplaceAll(
      absl::StrCat(kOld, model),
      {{"hidden_1: 7", "hidden_1: 8"},
       {R"(slot { name: "tags")", R"(slot { name: "author" table: "narrow" } slot { name: "tags")"}}));
  const Taken taken = TakeOver(OldJob(model), now);
  const auto fresh = NewReplica(now);
  ASSERT_TRUE(fresh->Save(Folder(), 0).ok());
  const Arrays born = ArraysOf(ReadSafetensors(Folder()).value());
  std::filesystem::remove_all(Folder());
  for (const char* name : {"level1.shared.gate.weight", "level1.shared.gate.bias", "level1.shared.expert.norm_weight",
                           "level1.category.watch.self.weight"}) {
    EXPECT_EQ(taken.now.at(name), born.at(name)) << name;
  }
  EXPECT_EQ(taken.now.at("level2.task.like.gate.weight"), taken.old.at("level2.task.like.gate.weight"));
  EXPECT_FALSE(taken.plan.changes.empty());
}

TEST(AdoptDense, MoreExpertsShareTheOriginalsWeightAndDifferByTheirNoiseAlone) {
  struct Case {
    const char* was;
    const char* is;
    int model;
  };
  for (const Case& one :
       {Case{"shared_experts_1: 2", "shared_experts_1: 3", 0},
        Case{"category_experts_1: 3", "category_experts_1: 5", 0},
        Case{"category_experts_2: 2", "category_experts_2: 7", 0}, Case{"task_experts_2: 2", "task_experts_2: 3", 1},
        Case{"experts: 3", "experts: 4", 2}, Case{"experts: 3", "experts: 8", 3}}) {
    std::string model = Models()[static_cast<size_t>(one.model)];
    if (!absl::StrContains(model, one.was))
      model = absl::StrReplaceAll(model, {{" }", absl::StrCat(" ", one.was, " }")}});
    const std::string more = absl::StrReplaceAll(model, {{absl::StrCat(" ", one.was), absl::StrCat(" ", one.is)}});
    ASSERT_NE(more, model);
    EXPECT_LE(TakeOver(OldJob(model), OldJob(more), {}, /*noise=*/0).difference, kBound) << one.is;
    const Taken noisy = TakeOver(OldJob(model), OldJob(more));
    EXPECT_GT(noisy.difference, 0) << one.is;
    EXPECT_LT(noisy.difference, 0.01) << one.is;
    EXPECT_FALSE(noisy.plan.changes.empty());
  }
}

TEST(Adopt, ASnapshotOfANewerHearthIsRefusedAndNothingIsMade) {
  const std::string folder = Folder();
  std::filesystem::remove_all(folder);
  ASSERT_TRUE(MakeDirectories(folder + "/old/snapshots/7").ok());
  Manifest manifest;
  manifest.set_schema(2);
  manifest.set_step(7);
  ASSERT_TRUE(WriteFileAtomically(folder + "/old/snapshots/7/MANIFEST", SerializeManifest(manifest)).ok());
  AdoptOptions options;
  options.snapshot = folder + "/old";
  options.job = OldJob(Models()[0]);
  options.out = folder + "/new";
  const absl::Status status = Adopt(options).status();
  EXPECT_EQ(ExitCodeOf(status), kExitConfig) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("schema"));
  EXPECT_EQ(ListDirectory(folder).value(), std::vector<std::string>{"old"});
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace hearth
