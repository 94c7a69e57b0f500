#include "scripts/hearth/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "common/base/output_file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "scripts/hearth/hidden_model.h"

namespace hearth {
namespace {

using Json = nlohmann::json;
using testing::Contains;
using testing::HasSubstr;

std::string NewFolder(const std::string& name) {
  const std::string folder = absl::StrCat(testing::TempDir(), "/generate_", getpid(), "_", name);
  std::filesystem::remove_all(folder);
  return folder;
}

std::string Contents(const std::string& path) {
  const absl::StatusOr<std::string> contents = ReadFile(path);
  EXPECT_TRUE(contents.ok()) << contents.status();
  return contents.ok() ? *contents : "";
}

GeneratorSpec SmallSpec() {
  GeneratorSpec spec;
  spec.set_records(3000);
  spec.set_test_records(2000);
  spec.set_part_records(1000);
  spec.mutable_user()->set_count(300);
  spec.mutable_video()->set_count(500);
  spec.mutable_author()->set_count(50);
  spec.mutable_tag()->set_count(20);
  const std::pair<const char*, double> tasks[] = {{"click", 0.4}, {"like", 0.05}};
  for (const auto& [name, rate] : tasks) {
    GeneratorTask* task = spec.add_task();
    task->set_name(name);
    task->set_category(rate > 0.1 ? "watch" : "inter");
    task->set_positive_rate(rate);
  }
  return spec;
}

// One string over every file's name and bytes.
std::string Everything(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file())
      files[entry.path().lexically_relative(folder).string()] = Contents(entry.path().string());
  }
  return absl::StrJoin(files, "\n", absl::PairFormatter(":"));
}

std::vector<std::vector<std::string>> Rows(const std::string& text, char delimiter) {
  std::vector<std::vector<std::string>> rows;
  for (const auto line : absl::StrSplit(text, '\n', absl::SkipEmpty())) rows.push_back(absl::StrSplit(line, delimiter));
  return rows;
}

TEST(PortableMath, AgreesWithLibmWithinAFewUlps) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const double x = random.Uniform() * 200 - 100;
    EXPECT_NEAR(PortableExp(x) / std::exp(x), 1, 4e-15);
    const double y = std::exp(x);
    EXPECT_NEAR(PortableLog(y), std::log(y), 4e-15 * std::max(1.0, std::fabs(x)));
  }
  EXPECT_EQ(PortableExp(0), 1);
  EXPECT_EQ(PortableLog(1), 0);
  EXPECT_EQ(PortableExp(-1e9), 0);
}

TEST(ZipfSampler, DrawsEachRankAsOftenAsThePowerLawSays) {
  for (const double exponent : {0.0, 0.5, 1.0, 1.05, 2.0}) {
    constexpr int kCount = 10, kDraws = 200000;
    const ZipfSampler sampler(kCount, exponent);
    Random random(7);
    std::vector<int> seen(kCount + 1, 0);
    for (int i = 0; i < kDraws; ++i) ++seen[sampler.Draw(&random)];
    double total = 0;
    for (int rank = 1; rank <= kCount; ++rank) total += std::pow(rank, -exponent);
    for (int rank = 1; rank <= kCount; ++rank) {
      const double expected = std::pow(rank, -exponent) / total * kDraws;
      EXPECT_NEAR(seen[rank], expected, 6 * std::sqrt(expected)) << "exponent " << exponent << " rank " << rank;
    }
  }
}

TEST(ZipfSampler, MapsRanksToIdsOneToOneInsideTheRange) {
  const ZipfSampler sampler(12, 0);
  Random random(3);
  std::map<uint64_t, int> seen;
  for (int i = 0; i < 5000; ++i) ++seen[sampler.DrawId(&random)];
  EXPECT_EQ(seen.size(), 12u);
  EXPECT_EQ(seen.begin()->first, 1u);
  EXPECT_EQ(seen.rbegin()->first, 12u);
  EXPECT_EQ(ZipfSampler(1, 1.05).DrawId(&random), 1u);
  EXPECT_LE(ZipfSampler(uint64_t{1} << 50, 1.05).DrawId(&random), uint64_t{1} << 50);
}

TEST(HiddenModel, GivesTheRatesThatWereAskedFor) {
  GeneratorSpec spec = SmallSpec();
  spec.mutable_task(1)->set_positive_rate(0.001);
  const HiddenModel model(spec);
  Random random(99);
  double sums[2] = {0, 0};
  constexpr int kDraws = 50000;
  VideoAttributes video;
  for (int i = 0; i < kDraws; ++i) {
    const Impression impression = model.Draw(&random, static_cast<uint32_t>(random.Below(86400000)));
    model.Video(impression.video, &video);
    double p[2];
    model.Probabilities(impression, model.User(impression.user), video, p);
    sums[0] += p[0];
    sums[1] += p[1];
  }
  EXPECT_NEAR(sums[0] / kDraws, 0.4, 0.01);
  EXPECT_NEAR(sums[1] / kDraws, 0.001, 0.0001);
}

TEST(Generate, WritesTheSameBytesForTheSameSeedAndOthersForAnother) {
  const std::string a = NewFolder("a"), b = NewFolder("b"), c = NewFolder("c");
  GeneratorSpec spec = SmallSpec();
  std::string report;
  ASSERT_TRUE(GenerateLog(spec, a, &report).ok());
  ASSERT_TRUE(GenerateLog(spec, b, &report).ok());
  EXPECT_EQ(Everything(a), Everything(b));
  spec.set_seed(2);
  ASSERT_TRUE(GenerateLog(spec, c, &report).ok());
  EXPECT_NE(Contents(a + "/test.csv"), Contents(c + "/test.csv"));
}

// Pins the bytes: whoever changes the generator changes every figure measured on its logs.
TEST(Generate, KeepsItsFirstRecord) {
  const std::string out = NewFolder("first");
  std::string report;
  ASSERT_TRUE(GenerateLog(SmallSpec(), out, &report).ok());
  const auto rows = Rows(Contents(out + "/train/part-0000.csv"), ',');
  EXPECT_EQ(absl::StrJoin(rows[0], ","), "user_id,video_id,day,hour,time_ms,tab,position,click,like");
  EXPECT_EQ(absl::StrJoin(rows[1], ","), "223,238,1,0,1704067211223,5,14,0,0");
}

TEST(Generate, WritesEachRecordOnceInTimeOrderAcrossParts) {
  const std::string out = NewFolder("order");
  GeneratorSpec spec = SmallSpec();
  spec.set_part_records(700);  // the last part is shorter
  std::string report;
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  std::vector<std::vector<std::string>> rows;
  const std::vector<std::string> names = *ListDirectory(out + "/train");
  for (const std::string& name : names) {
    const auto part = Rows(Contents(out + "/train/" + name), ',');
    rows.insert(rows.end(), part.begin() + 1, part.end());
  }
  EXPECT_EQ(names.size(), 5u);
  ASSERT_EQ(rows.size(), 3000u);
  const auto test = Rows(Contents(out + "/test.csv"), ',');
  rows.insert(rows.end(), test.begin() + 1, test.end());
  ASSERT_EQ(rows.size(), 5000u);
  for (size_t i = 1; i < rows.size(); ++i) {
    ASSERT_LE(std::stoull(rows[i - 1][4]), std::stoull(rows[i][4])) << "record " << i;
    ASSERT_LE(std::stoull(rows[i - 1][2]), std::stoull(rows[i][2])) << "record " << i;
  }
  EXPECT_EQ(rows[2999][2], "7");
  EXPECT_EQ(rows[3000][2], "8");
}

double SlowAuc(const std::vector<std::pair<double, bool>>& scored) {
  double wins = 0, pairs = 0;
  for (const auto& positive : scored) {
    for (const auto& negative : scored) {
      if (!positive.second || negative.second) continue;
      pairs += 1;
      wins += positive.first > negative.first ? 1 : positive.first == negative.first ? 0.5 : 0;
    }
  }
  return wins / pairs;
}

TEST(Generate, TellsTheAucThatItsProbabilitiesFileGives) {
  const std::string out = NewFolder("bayes");
  std::string report;
  ASSERT_TRUE(GenerateLog(SmallSpec(), out, &report).ok());
  ASSERT_TRUE(CopyZstdTo(out + "/bayes.tsv.zst", out + "/bayes.tsv").ok());
  const auto rows = Rows(Contents(out + "/bayes.tsv"), '\t');
  const std::string test = Contents(out + "/test.csv");
  ASSERT_EQ(rows.size(), 2001u);
  EXPECT_EQ(absl::StrJoin(rows[0], " "), "source offset user label_click label_like p_click p_like");
  const Json bayes = Json::parse(Contents(out + "/bayes.json"));
  for (const int task : {0, 1}) {
    std::vector<std::pair<double, bool>> scored;
    std::map<std::string, std::vector<std::pair<double, bool>>> by_user;
    for (size_t i = 1; i < rows.size(); ++i) {
      scored.push_back({std::stod(rows[i][5 + task]), rows[i][3 + task] == "1"});
      by_user[rows[i][2]].push_back(scored.back());
      // The offset leads to the record.
      const std::string line =
          test.substr(std::stoull(rows[i][1]), test.find('\n', std::stoull(rows[i][1])) - std::stoull(rows[i][1]));
      const std::vector<std::string> fields = absl::StrSplit(line, ',');
      ASSERT_EQ(fields[0], rows[i][2]);
      ASSERT_EQ(fields[fields.size() - 2 + task], rows[i][3 + task]);
    }
    double weighted = 0, weight = 0;
    for (const auto& [user, group] : by_user) {
      const double auc = SlowAuc(group);
      if (std::isnan(auc)) continue;
      weighted += auc * group.size();
      weight += group.size();
    }
    const Json& figures = bayes["tasks"][task == 0 ? "click" : "like"];
    EXPECT_NEAR(figures["auc"].get<double>(), SlowAuc(scored), 1e-12);
    EXPECT_NEAR(figures["gauc"].get<double>(), weighted / weight, 1e-12);
    EXPECT_GT(figures["auc"].get<double>(), 0.7);
    EXPECT_EQ(figures["samples"], 2000);
    const double requested = figures["rate_requested"];
    EXPECT_NEAR(figures["rate_train"].get<double>(), requested, 0.2 * requested);
  }
}

TEST(Generate, SaysNullWhereATaskHasNoPositive) {
  const std::string out = NewFolder("null");
  GeneratorSpec spec = SmallSpec();
  spec.mutable_task(1)->set_positive_rate(1e-6);
  std::string report;
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  EXPECT_TRUE(Json::parse(Contents(out + "/bayes.json"))["tasks"]["like"]["auc"].is_null());
}

TEST(Generate, WritesAJobThatIsValidWithFourSnapshotsOrMore) {
  const std::string out = NewFolder("job");
  std::string report;
  GeneratorSpec spec = SmallSpec();
  spec.mutable_job()->mutable_training()->set_batch_size(64);
  spec.mutable_job()->mutable_model()->set_width_1(8);
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  const absl::StatusOr<Job> job = LoadJob(out + "/job.txtpb", {});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_THAT(FaultsOf(*job), testing::IsEmpty());
  EXPECT_EQ(job->task_size(), 2);
  EXPECT_EQ(job->model().width_1(), 8u);
  EXPECT_TRUE(job->split(0).predictions());
  EXPECT_GE(spec.records() / job->training().batch_size() / job->snapshot().every_steps(), 4u);
  for (const std::string& path : job->log(0).path()) EXPECT_TRUE(PathExists(ResolvePath(*job, path))) << path;
}

TEST(Generate, PutsAttributesIntoTheLogWhereThereAreNoTables) {
  const std::string out = NewFolder("inline");
  GeneratorSpec spec = SmallSpec();
  spec.set_side_tables(false);
  spec.mutable_user()->set_count(uint64_t{1} << 40);
  spec.set_compression(GeneratorSpec::ZSTD);
  std::string report;
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  EXPECT_FALSE(PathExists(out + "/user.csv"));
  ASSERT_TRUE(CopyZstdTo(out + "/train/part-0000.csv.zst", out + "/part.csv").ok());
  EXPECT_TRUE(absl::StartsWith(
      Contents(out + "/part.csv"),
      "user_id,video_id,day,hour,time_ms,tab,position,activity,age,register_days,author_id,tag,video_type,"
      "duration_ms,click,like\n"));
  const Job job = *LoadJob(out + "/job.txtpb", {});
  EXPECT_EQ(job.side_table_size(), 0);
  EXPECT_EQ(job.log(0).path(0), "train/part-0000.csv.zst");
}

TEST(Generate, NamesEveryFaultOfASpecAtOnce) {
  GeneratorSpec spec = SmallSpec();
  spec.set_records(0);
  spec.mutable_user()->set_zipf(-1);
  spec.mutable_task(0)->set_positive_rate(1.5);
  spec.mutable_task(1)->set_name("user_id");
  spec.clear_video();
  spec.mutable_job()->mutable_training()->set_batch_size(0);
  *spec.add_task() = spec.task(0);
  spec.mutable_task(2)->set_name("2nd_click");  // reads as a number in an expression
  const std::vector<std::string> faults = FaultsOfSpec(spec);
  for (const char* field : {"records: ", "user.zipf: ", "task[0].positive_rate: ", "task[1].name: ", "video.count: ",
                            "job.training.batch_size: ", "task[2].name: "}) {
    EXPECT_THAT(faults, Contains(HasSubstr(field)));
  }
  const std::string out = NewFolder("faults");
  std::string report;
  EXPECT_EQ(ExitCodeOf(GenerateLog(spec, out, &report)), kExitConfig);
  EXPECT_FALSE(PathExists(out));
}

TEST(Generate, RefusesAnUnknownFieldWithItsLine) {
  const std::string folder = NewFolder("unknown");
  ASSERT_TRUE(MakeDirectories(folder).ok());
  ASSERT_TRUE(WriteFileAtomically(folder + "/spec.txtpb", "records: 5\n\nrecrods: 6\n").ok());
  const absl::StatusOr<GeneratorSpec> spec = LoadGeneratorSpec(folder + "/spec.txtpb");
  EXPECT_EQ(ExitCodeOf(spec.status()), kExitConfig);
  EXPECT_THAT(std::string(spec.status().message()), HasSubstr("spec.txtpb:3:"));
}

TEST(Generate, LeavesAFolderAloneThatHoldsSomethingElse) {
  const std::string out = NewFolder("foreign");
  ASSERT_TRUE(MakeDirectories(out).ok());
  ASSERT_TRUE(WriteFileAtomically(out + "/thesis.txt", "x").ok());
  std::string report;
  EXPECT_EQ(ExitCodeOf(GenerateLog(SmallSpec(), out, &report)), kExitConfig);
  EXPECT_EQ(ListDirectory(out)->size(), 1u);
}

TEST(Generate, LeavesAnotherDataSetAloneThatHasASchemaToo) {
  for (const char* schema : {"{\"schema\": 1}\n", "{\"generator\": 7}", "[]", "no JSON"}) {
    const std::string out = NewFolder("data_set");
    ASSERT_TRUE(MakeDirectories(out + "/train").ok());
    for (const char* name : {"train/day-1.csv", "test.csv", "user.csv", "job.txtpb"}) {
      ASSERT_TRUE(WriteFileAtomically(out + "/" + name, "precious").ok());
    }
    ASSERT_TRUE(WriteFileAtomically(out + "/schema.json", schema).ok());
    const std::string before = Everything(out);
    std::string report;
    const absl::Status status = GenerateLog(SmallSpec(), out, &report);
    EXPECT_EQ(ExitCodeOf(status), kExitConfig) << schema;
    EXPECT_THAT(std::string(status.message()), HasSubstr("schema.json"));
    EXPECT_EQ(Everything(out), before) << schema;
  }
}

TEST(Generate, RefusesANameThatIsNotUtf8) {
  GeneratorSpec spec = SmallSpec();
  spec.set_name("caf\xe9");
  const std::string out = NewFolder("latin");
  std::string report;
  EXPECT_EQ(ExitCodeOf(GenerateLog(spec, out, &report)), kExitConfig);
  EXPECT_FALSE(PathExists(out));
}

TEST(Generate, ReplacesALongerLogOfItsOwn) {
  const std::string out = NewFolder("again"), fresh = NewFolder("fresh");
  GeneratorSpec spec = SmallSpec();
  std::string report;
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  spec.set_records(1000);
  ASSERT_TRUE(GenerateLog(spec, out, &report).ok());
  ASSERT_TRUE(GenerateLog(spec, fresh, &report).ok());
  EXPECT_EQ(Everything(out), Everything(fresh));
}

TEST(Generate, ReadsTheShippedSpec) {
  const absl::StatusOr<GeneratorSpec> spec = LoadGeneratorSpec(HEARTH_SOURCE_DIR "/scripts/jobs/synthetic-log.txtpb");
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(FaultsOfSpec(*spec), testing::IsEmpty());
  EXPECT_GE(spec->task_size(), 8);
  const Job job = JobForSpec(*spec);
  EXPECT_THAT(FaultsOf(job), testing::IsEmpty());
}

}  // namespace
}  // namespace hearth
