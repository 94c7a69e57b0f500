// Deltas against full exports of the same snapshots: whole random histories with admission and expiry, on other numbers
// of servers at each snapshot.
#include "model/export/export_delta.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "common/artifact/bundle.h"
#include "common/artifact/bundle_chain.h"
#include "common/artifact/manifest.h"
#include "common/artifact/safetensors.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/expiry.h"
#include "embedding/rocksdb_store.h"
#include "model/export/export.h"
#include "model/export/export_manifest.h"
#include "tests/embedding/reference_table.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kShards = 5;
constexpr uint64_t kSteps = 24;

Job ThreeTables() {
  Job job;
  job.set_name("delta test");
  job.set_seed(9);
  job.mutable_training()->set_shards(kShards);
  const auto add = [&](const char* name, uint32_t dim, uint32_t count_min, uint32_t expire_after_steps) {
    Table* table = job.add_table();
    table->set_name(name);
    table->set_dim(dim);
    table->mutable_admission()->set_count_min(count_min);
    table->set_expire_after_steps(expire_after_steps);
    return table;
  };
  add("expires", 3, 2, 4)->mutable_optimizer()->set_kind(Optimizer::ADAM);
  add("counts in a filter", 2, 2, 3)->mutable_admission()->set_counter(Admission::BLOOM);
  job.mutable_table(1)->mutable_admission()->set_bloom_counters(1000);
  add("keeps", 4, 1, 0);
  return job;
}

using Rows = std::map<Sign, std::vector<float>>;

// A run's history, from which any snapshot can be made on any number of servers.
class ExportDeltaTest : public testing::Test {
 protected:
  ExportDeltaTest() {
    Random random(4);
    for (uint64_t step = 1; step <= kSteps; ++step) {
      for (int t = 0; t < job_.table_size(); ++t) {
        pushes_[step].push_back(RandomPart(&random, static_cast<TableNumber>(t) + 1, 150, 25, job_.table(t).dim()));
      }
    }
  }

  TableOptions OptionsOf(int t) const {
    TableOptions options;
    options.config = job_.table(t);
    options.number = static_cast<TableNumber>(t) + 1;
    options.seed = job_.seed();
    options.shards = kShards;
    options.memory_rows_max = 10;  // so that rows spill
    return options;
  }

  std::string Snapshot(uint64_t step, uint32_t servers) const {
    const std::string folder = JoinPath(root_, absl::StrCat("snapshot-", step, "-", servers));
    if (PathExists(folder)) return folder;
    EXPECT_TRUE(MakeDirectories(folder).ok());
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_job(PrintJob(job_));
    manifest.set_lanes(1);
    manifest.add_lane();
    manifest.set_shards(kShards);
    manifest.set_servers(servers);
    manifest.set_model_hash(step * 17);
    std::vector<std::string> names = {"dense.safetensors"};
    uint64_t hash = 0;
    for (uint32_t server = 0; server < servers; ++server) {
      const std::string live = JoinPath(root_, "live");
      EXPECT_TRUE(RemoveTree(live).ok());
      auto store = OpenRocksDbStore(live, RocksDbOptions());
      EXPECT_TRUE(store.ok()) << store.status();
      for (int t = 0; t < job_.table_size(); ++t) {
        auto table = EmbeddingTable::Open(OptionsOf(t), store->get());
        EXPECT_TRUE(table.ok()) << table.status();
        for (uint64_t s = 1; s <= step; ++s) {
          const Part mine = PartOfServer(pushes_.at(s)[static_cast<size_t>(t)], job_.table(t).dim(), server, servers);
          EXPECT_TRUE((*table)->Push(s, 4, {mine.span()}).ok());
        }
        hash += *(*table)->Snapshot(step);
      }
      names.push_back(absl::StrCat("ps-", server));
      EXPECT_TRUE((*store)->Checkpoint(JoinPath(folder, names.back())).ok());
    }
    manifest.set_rows_hash(hash);
    const std::vector<float> weights = {static_cast<float>(step), 0.5f};
    const absl::Span<const char> bytes(reinterpret_cast<const char*>(weights.data()), weights.size() * sizeof(float));
    EXPECT_TRUE(WriteSafetensors(JoinPath(folder, names[0]), {{"w", "F32", {2}, bytes}}, {}).ok());
    const auto files = DescribeFiles(folder, names);
    EXPECT_TRUE(files.ok()) << files.status();
    for (const FileEntry& file : *files) *manifest.add_file() = file;
    EXPECT_TRUE(CommitManifest(folder, manifest).ok());
    return folder;
  }

  static Part PartOfServer(const Part& all, uint32_t dim, uint32_t server, uint32_t servers) {
    Part mine;
    for (size_t i = 0; i < all.signs.size(); ++i) {
      if (LogicalShardOf(all.signs[i], kShards) % servers != server) continue;
      mine.signs.push_back(all.signs[i]);
      mine.occurrences.push_back(all.occurrences[i]);
      mine.gradients.insert(mine.gradients.end(), all.gradients.begin() + i * dim,
                            all.gradients.begin() + (i + 1) * dim);
    }
    return mine;
  }

  // `hearth export` without golden records and graph.
  std::string FullExport(const std::string& snapshot, const std::string& out,
                         const char* formats = "hps,npy,int8,safetensors") const {
    const absl::Status status = PublishFolder(out, [&](const std::string& folder) -> absl::Status {
      HEARTH_ASSIGN_OR_RETURN(const ExportFormats parsed, ParseExportFormats(formats));
      HEARTH_ASSIGN_OR_RETURN(const ExportSource source, OpenExportSource(snapshot, ""));
      HEARTH_RETURN_IF_ERROR(ExportFeatures(source, folder));
      HEARTH_RETURN_IF_ERROR(ExportDense(source, parsed, folder));
      ExportedRows none;
      HEARTH_ASSIGN_OR_RETURN(const auto tables, ExportTables(source, parsed, folder, &none));
      return FinishExport(ExportManifest(source, parsed, tables), folder).status();
    });
    EXPECT_TRUE(status.ok()) << status;
    return out;
  }

  std::string Out(const char* name) const { return JoinPath(root_, name); }

  // A full export of step 3 and deltas to 6, 7, 12, 13 and 24; each snapshot on another number of servers.
  std::string Chain(const char* name, const char* formats = "hps,npy,int8,safetensors") const {
    const std::string out = Out(name);
    FullExport(Snapshot(kBase, 2), JoinPath(out, "3"), formats);
    uint64_t since = kBase;
    uint32_t servers = 0;
    for (const uint64_t step : kDeltas) {
      const auto report = ExportDelta({Snapshot(step, servers++ % 3 + 1), out, since, ""});
      EXPECT_TRUE(report.ok()) << report.status();
      since = step;
    }
    return out;
  }
  static std::string Delta(const std::string& out, int seq) { return JoinPath(out, absl::StrCat("delta/3/", seq)); }

  static std::map<std::string, std::string> Contents(const std::string& folder) {
    std::map<std::string, std::string> contents;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
      if (entry.is_directory()) continue;
      contents[entry.path().lexically_relative(folder).string()] = ReadFile(entry.path().string()).value();
    }
    return contents;
  }
  // Without what tells how it was made.
  static std::map<std::string, std::string> Payload(const std::string& folder) {
    auto contents = Contents(folder);
    contents.erase(kBundleManifest);
    contents.erase(kBundleManifestSum);
    return contents;
  }

  // Live admitted rows after `step`, by the plain reference; and which of them a step after `since` touched.
  Rows Reference(uint64_t step, int t, uint64_t since, std::set<Sign>* touched) const {
    ReferenceTable table(OptionsOf(t));
    for (uint64_t s = 1; s <= step; ++s) table.Push(s, 4, {pushes_.at(s)[static_cast<size_t>(t)]});
    Rows rows;
    for (const auto& [sign, row] : table.rows()) {
      if (row.meta.flags == 0 || IsExpired(row.meta, HorizonOf(job_.table(t), {}, step))) continue;
      rows[sign] = {row.floats.begin(), row.floats.begin() + job_.table(t).dim()};
      if (row.meta.last_step > since) touched->insert(sign);
    }
    return rows;
  }

  static void ExpectRefused(const absl::StatusOr<std::string>& report, absl::StatusCode code, const std::string& text) {
    EXPECT_EQ(report.status().code(), code) << report.status();
    EXPECT_THAT(std::string(report.status().message()), HasSubstr(text));
  }
  void ExpectNothingLeft(const std::string& out) const {
    EXPECT_FALSE(PathExists(out));
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root_)) {
      EXPECT_EQ(entry.path().string().find(".partial-"), std::string::npos) << entry.path();
    }
  }

  static constexpr uint64_t kBase = 3;
  static constexpr uint64_t kDeltas[] = {6, 7, 12, 13, 24};
  Job job_ = ThreeTables();
  const std::string root_ = NewTestFolder();
  std::map<uint64_t, std::vector<Part>> pushes_;  // by step, then table
};

TEST_F(ExportDeltaTest, ABundleDoesNotDependOnTheNumberOfServers) {
  const auto one = Payload(FullExport(Snapshot(kSteps, 1), Out("one")));
  EXPECT_EQ(Payload(FullExport(Snapshot(kSteps, 2), Out("two"))), one);
  EXPECT_EQ(Payload(FullExport(Snapshot(kSteps, 3), Out("three"))), one);
}

TEST_F(ExportDeltaTest, RowsThatAreNotTheManifestsAreRefusedByDeltaAndFullExport) {
  const std::string out = Out("out");
  FullExport(Snapshot(kBase, 2), JoinPath(out, "3"));
  const std::string snapshot = Snapshot(6, 2);
  Manifest manifest = ReadManifest(snapshot).value();
  manifest.set_rows_hash(manifest.rows_hash() + 1);  // every file is whole, but a row was lost on its way into them
  ASSERT_TRUE(CommitManifest(snapshot, manifest).ok());
  ExpectRefused(ExportDelta({snapshot, out, kBase, ""}), absl::StatusCode::kDataLoss, "rows hash");
  ExpectNothingLeft(Delta(out, 1));
  const auto source = OpenExportSource(snapshot, "");
  ASSERT_TRUE(source.ok()) << source.status();
  ExportedRows none;
  const auto tables = ExportTables(*source, ParseExportFormats("hps").value(), Out("rows"), &none);
  EXPECT_EQ(tables.status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(ExportDeltaTest, WhatOnlyTrainingReadsIsLeftOutAndAMeanServesWhereTheJobSaysSo) {
  for (const bool mean_serves : {false, true}) {
    job_.mutable_training()->mutable_dense_optimizer()->set_ema_serves(mean_serves);
    const std::string snapshot = Snapshot(mean_serves ? 6 : 7, 1);
    Manifest manifest = ReadManifest(snapshot).value();
    const std::vector<float> weights = {1, 2}, mean = {3, 4}, buffer = {5, 6};
    const auto tensor = [](const char* name, const std::vector<float>& values) {
      const auto* bytes = reinterpret_cast<const char*>(values.data());
      return NamedTensor{name, "F32", {2}, absl::Span<const char>(bytes, values.size() * sizeof(float))};
    };
    ASSERT_TRUE(WriteSafetensors(JoinPath(snapshot, "dense.safetensors"),
                                 {tensor("w", weights), tensor("ema.w", mean), tensor("running_mean", buffer),
                                  tensor("optimizer.first_moment.w", mean)},
                                 {})
                    .ok());
    manifest.clear_file();
    const auto files = DescribeFiles(snapshot, {"dense.safetensors", "ps-0"});
    ASSERT_TRUE(files.ok()) << files.status();
    for (const FileEntry& file : *files) *manifest.add_file() = file;
    ASSERT_TRUE(CommitManifest(snapshot, manifest).ok());
    const auto source = OpenExportSource(snapshot, "");
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ(source->dense.tensors.size(), 2u);
    const auto* served = reinterpret_cast<const float*>(source->dense.Find("w")->data.data());
    EXPECT_EQ(std::vector<float>(served, served + 2), mean_serves ? mean : weights);
    const auto* running = reinterpret_cast<const float*>(source->dense.Find("running_mean")->data.data());
    EXPECT_EQ(std::vector<float>(running, running + 2), buffer);
  }
}

TEST_F(ExportDeltaTest, AppliedDeltasAreAFullExportToTheByte) {
  const std::string out = Chain("chain");
  std::vector<std::string> deltas;
  for (size_t i = 0; i < std::size(kDeltas); ++i) {
    deltas.push_back(Delta(out, static_cast<int>(i) + 1));
    const std::string applied = Out(absl::StrCat("applied-", i).c_str());
    const auto report = ApplyDeltas({JoinPath(out, "3"), deltas, applied});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(VerifyBundle(applied).ok());
    const std::string full = FullExport(Snapshot(kDeltas[i], 1), Out(absl::StrCat("full-", i).c_str()));
    EXPECT_EQ(Payload(applied), Payload(full)) << "step " << kDeltas[i];
  }
  const auto whole = Payload(Out("applied-4"));
  EXPECT_EQ(whole.size(), 3u * 5 + 3) << "five files a table, job, features, weights";

  // Without names: all that lie beside the base. In two parts: the same.
  ASSERT_TRUE(ApplyDeltas({JoinPath(out, "3"), {}, Out("all")}).ok());
  EXPECT_EQ(Payload(Out("all")), whole);
  const auto rest = ApplyDeltas({Out("applied-1"), {deltas.begin() + 2, deltas.end()}, Out("rest")});
  ASSERT_TRUE(rest.ok()) << rest.status();
  EXPECT_EQ(Contents(Out("rest")), Contents(Out("all")));
}

TEST_F(ExportDeltaTest, ABaseOfNpyFilesAloneServesAsWell) {
  const std::string out = Chain("chain", "npy");
  ASSERT_TRUE(ApplyDeltas({JoinPath(out, "3"), {}, Out("applied")}).ok());
  EXPECT_EQ(Payload(Out("applied")), Payload(FullExport(Snapshot(kSteps, 2), Out("full"), "npy")));
}

TEST_F(ExportDeltaTest, ADeltaHoldsTheRowsTouchedAndTheKeysLostAndNothingElse) {
  const std::string out = Chain("chain");
  uint64_t deletions_all = 0, reborn_all = 0;
  uint64_t since = kBase;
  for (size_t i = 0; i < std::size(kDeltas); ++i) {
    for (int t = 0; t < job_.table_size(); ++t) {
      std::set<Sign> touched, ignored;
      const Rows before = Reference(since, t, 0, &ignored);
      const Rows after = Reference(kDeltas[i], t, since, &touched);
      std::set<Sign> lost;
      for (const auto& [sign, row] : before) {
        if (after.count(sign) == 0) lost.insert(sign);
      }
      const std::string folder =
          JoinPath(Delta(out, static_cast<int>(i) + 1), "embeddings/" + ExportTableFolder(job_.table(t).name()));
      const auto signs_of = [&](const char* file) {
        const std::string bytes = ReadFile(JoinPath(folder, file)).value();
        std::vector<Sign> signs(bytes.size() / sizeof(Sign));
        if (!bytes.empty()) std::memcpy(signs.data(), bytes.data(), bytes.size());
        return signs;
      };
      const std::vector<Sign> upserts = signs_of("key"), deleted = signs_of("deleted");
      EXPECT_EQ(std::set<Sign>(upserts.begin(), upserts.end()), touched);
      EXPECT_EQ(std::set<Sign>(deleted.begin(), deleted.end()), lost);
      const std::string values = ReadFile(JoinPath(folder, "emb_vector")).value();
      const size_t row_bytes = job_.table(t).dim() * sizeof(float);
      ASSERT_EQ(values.size(), upserts.size() * row_bytes);
      for (size_t row = 0; row < upserts.size(); ++row) {
        EXPECT_EQ(std::memcmp(values.data() + row * row_bytes, after.at(upserts[row]).data(), row_bytes), 0);
        reborn_all += i > 0 && before.count(upserts[row]) == 0 ? 1 : 0;
      }
      deletions_all += lost.size();
    }
    since = kDeltas[i];
  }
  EXPECT_GT(deletions_all, 30u);
  EXPECT_GT(reborn_all, 30u);
}

TEST_F(ExportDeltaTest, MadeAgainItHasTheSameBytes) {
  const std::string out = Chain("chain");
  const auto first = Contents(Delta(out, 5));
  // As a killed exporter would leave it: nothing at its place, a part aside. No process has this number.
  ASSERT_TRUE(RenamePath(Delta(out, 5), JoinPath(out, "delta/3/5.partial-999999999")).ok());
  ASSERT_TRUE(ExportDelta({Snapshot(24, 2), out, 13, ""}).ok());
  auto again = Contents(Delta(out, 5));
  EXPECT_EQ(again, first);
  EXPECT_FALSE(PathExists(JoinPath(out, "delta/3/5.partial-999999999")));
}

TEST_F(ExportDeltaTest, AWrongPlaceInTheChainIsRefused) {
  const std::string out = Chain("chain");
  const auto refuse = [&](const std::vector<std::string>& deltas, absl::StatusCode code, const std::string& text) {
    ExpectRefused(ApplyDeltas({JoinPath(out, "3"), deltas, Out("x")}), code, text);
    ExpectNothingLeft(Out("x"));
  };
  const auto kPrecondition = absl::StatusCode::kFailedPrecondition;
  refuse({Delta(out, 2)}, kPrecondition, "due is delta 1");
  refuse({Delta(out, 1), Delta(out, 3)}, kPrecondition, "due is delta 2");
  refuse({Delta(out, 2), Delta(out, 1)}, kPrecondition, "due is delta 1");
  refuse({Delta(out, 1), Delta(out, 1)}, kPrecondition, "due is delta 2");
  refuse({JoinPath(out, "3")}, kPrecondition, "is no delta");
  refuse({Out("absent")}, absl::StatusCode::kNotFound, "absent");
  ExpectRefused(ApplyDeltas({Delta(out, 1), {Delta(out, 2)}, Out("x")}), kPrecondition, "is a delta");
  ExpectRefused(ApplyDeltas({JoinPath(out, "3"), {}, out}), kPrecondition, "not empty");

  // Another full export of the same step.
  const std::string other = FullExport(Snapshot(kBase, 1), Out("other/3"), "hps,safetensors");
  ExpectRefused(ApplyDeltas({other, {Delta(out, 1)}, Out("x")}), absl::StatusCode::kDataLoss,
                "behind another full export");
  ExpectRefused(ApplyDeltas({FullExport(Snapshot(6, 1), Out("6")), {Delta(out, 2)}, Out("x")}), kPrecondition,
                "due is delta 1 on the full export of step 6");

  const std::string snapshot = Snapshot(24, 1);
  ExpectRefused(ExportDelta({snapshot, out, 13, ""}), kPrecondition, "ends at step 24, not at 13; give --since 24");
  ExpectRefused(ExportDelta({snapshot, out, 24, ""}), kPrecondition, "not after --since 24");
  ExpectRefused(ExportDelta({snapshot, Out("nowhere"), 3, ""}), kPrecondition, "holds no full export");
  ExpectRefused(ExportDelta({Out("absent"), Out("other"), 3, ""}), absl::StatusCode::kNotFound, "absent");
  FullExport(Snapshot(kBase, 1), Out("rowless/3"), "safetensors");
  ExpectRefused(ExportDelta({snapshot, Out("rowless"), 3, ""}), kPrecondition, "holds no rows");
  ASSERT_TRUE(RemoveTree(Delta(out, 2)).ok());
  ExpectRefused(ExportDelta({snapshot, out, 24, ""}), absl::StatusCode::kDataLoss, "delta/3/2: is missing");
  ExpectRefused(ApplyDeltas({JoinPath(out, "3"), {}, Out("x")}), kPrecondition, "due is delta 2");
  ExpectNothingLeft(Out("x"));
}

TEST_F(ExportDeltaTest, AnyChangedByteIsFound) {
  const std::string out = Chain("chain");
  const std::string snapshot = Snapshot(24, 2);
  ASSERT_TRUE(RemoveTree(Delta(out, 5)).ok());
  const auto hurt = [&](const std::string& folder, const std::string& name, const std::function<void()>& try_it) {
    const std::string path = JoinPath(folder, name);
    const std::string good = ReadFile(path).value();
    if (good.empty()) return;
    std::string bad = good;
    bad[bad.size() / 2] ^= 1;
    ASSERT_TRUE(WriteFileAtomically(path, bad).ok());
    try_it();
    ASSERT_TRUE(WriteFileAtomically(path, good).ok());
  };
  for (const std::string& folder : {JoinPath(out, "3"), Delta(out, 2)}) {
    for (const auto& [name, contents] : Contents(folder)) {
      hurt(folder, name, [&] {
        ExpectRefused(ApplyDeltas({JoinPath(out, "3"), {}, Out("x")}), absl::StatusCode::kDataLoss,
                      name == kBundleManifestSum ? kBundleManifest : name);
        ExpectNothingLeft(Out("x"));
      });
      const bool keys = name.find("/key") != std::string::npos || name.find("/deleted") != std::string::npos;
      if (!keys) continue;
      hurt(folder, name, [&] {
        ExpectRefused(ExportDelta({snapshot, out, 13, ""}), absl::StatusCode::kDataLoss, name);
        ExpectNothingLeft(Delta(out, 5));
      });
    }
  }
  std::string table_file;
  for (const auto& [name, contents] : Contents(snapshot)) {
    if (name.find(".sst") != std::string::npos) table_file = name;
  }
  hurt(snapshot, table_file, [&] {
    ExpectRefused(ExportDelta({snapshot, out, 13, ""}), absl::StatusCode::kDataLoss, table_file);
    ExpectNothingLeft(Delta(out, 5));
  });
  EXPECT_TRUE(ExportDelta({snapshot, out, 13, ""}).ok());
  EXPECT_TRUE(ApplyDeltas({JoinPath(out, "3"), {}, Out("x")}).ok());
}

TEST_F(ExportDeltaTest, AnotherRunsSnapshotIsRefused) {
  const std::string out = Chain("chain");
  // Rows that were touched before the chain's end and that the chain does not have.
  Random random(5);
  for (auto& [step, parts] : pushes_) {
    parts[2] = RandomPart(&random, 3, 5000, 25, job_.table(2).dim());
  }
  ASSERT_TRUE(RemoveTree(Delta(out, 5)).ok());
  ExpectRefused(ExportDelta({Snapshot(20, 1), out, 13, ""}), absl::StatusCode::kDataLoss, "is not of");
  ExpectNothingLeft(Delta(out, 5));
}

TEST_F(ExportDeltaTest, WhatLiesBeyondAStepIsSetAsideLastLinkFirst) {
  const std::string out = Chain("chain");
  FullExport(Snapshot(20, 1), JoinPath(out, "20"));
  const auto aside = SetAsideBeyond(out, 12);
  ASSERT_TRUE(aside.ok()) << aside.status();
  EXPECT_THAT(*aside,
              testing::ElementsAre(JoinPath(out, "20.ahead"), Delta(out, 5) + ".ahead", Delta(out, 4) + ".ahead"));
  const auto chain = ReadNewestChain(out);
  ASSERT_TRUE(chain.ok()) << chain.status();
  EXPECT_EQ(chain->size(), 4u);
  EXPECT_EQ(chain->back().step, 12u);
  ASSERT_TRUE(SetAsideBeyond(out, 2).ok());
  EXPECT_TRUE(ReadNewestChain(out)->empty());
}

}  // namespace
}  // namespace hearth
