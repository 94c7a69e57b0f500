#include "worker/log/log_reader.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/artifact/reading.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/sign.h"
#include "tests/worker/text_files.h"
#include "worker/log/piece_order.h"
#include "worker/log/record_plan.h"

namespace hearth {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

Job JobOf(const std::string& text) {
  auto job = ParseJob(text, "test");
  EXPECT_TRUE(job.ok()) << job.status();
  return *job;
}

std::vector<Log> LogsOf(const Job& job) { return {job.log().begin(), job.log().end()}; }

// A reader with the list of files that it reads.
struct Opened {
  std::unique_ptr<FileList> files = std::make_unique<FileList>(Env::Real());
  LaneReaderOptions options;
  std::unique_ptr<LaneReader> reader;
};
absl::StatusOr<Opened> OpenLane(const Job& job, uint32_t lane, uint32_t lanes, const Cursor& start = Cursor(),
                                uint32_t epochs = 1, const std::string& scratch = "") {
  Opened opened;
  auto files = ListLogFiles(job, LogsOf(job));
  if (!files.ok()) return files.status();
  opened.files->Append(*files, true);
  opened.options.job = job;
  opened.options.logs = LogsOf(job);
  opened.options.files = opened.files.get();
  opened.options.lane = lane;
  opened.options.lanes = lanes;
  opened.options.epochs = epochs;
  opened.options.start = start;
  opened.options.scratch = scratch;
  opened.options.env = Env::Real();
  auto reader = LaneReader::Open(opened.options);
  if (!reader.ok()) return reader.status();
  opened.reader = *std::move(reader);
  return opened;
}

std::vector<std::unique_ptr<Batch>> ReadAll(const Job& job, uint32_t lane, uint32_t lanes,
                                            const Cursor& start = Cursor(), uint32_t epochs = 1) {
  std::vector<std::unique_ptr<Batch>> batches;
  auto opened = OpenLane(job, lane, lanes, start, epochs);
  EXPECT_TRUE(opened.ok()) << opened.status();
  while (opened.ok()) {
    auto batch = opened->reader->Next();
    EXPECT_TRUE(batch.ok()) << batch.status();
    if (!batch.ok() || *batch == nullptr) break;
    batches.push_back(*std::move(batch));
  }
  return batches;
}

void ExpectSame(const Batch& a, const Batch& b) {
  EXPECT_EQ(a.kind, b.kind);
  EXPECT_EQ(a.epoch, b.epoch);
  EXPECT_EQ(a.records, b.records);
  ASSERT_EQ(a.groups.size(), b.groups.size());
  for (size_t i = 0; i < a.groups.size(); ++i) {
    EXPECT_EQ(a.groups[i].unique, b.groups[i].unique);
    EXPECT_EQ(a.groups[i].occurrences, b.groups[i].occurrences);
    EXPECT_EQ(a.groups[i].row_of, b.groups[i].row_of);
    EXPECT_EQ(a.groups[i].offsets, b.groups[i].offsets);
  }
  EXPECT_EQ(a.dense, b.dense);
  EXPECT_EQ(a.labels, b.labels);
  EXPECT_EQ(a.mask, b.mask);
  EXPECT_EQ(a.time_s, b.time_s);
  EXPECT_EQ(a.offset, b.offset);
  EXPECT_EQ(a.file_of, b.file_of);
  EXPECT_EQ(a.cursor.SerializeAsString(), b.cursor.SerializeAsString());
  EXPECT_EQ(a.delta.SerializeAsString(), b.delta.SerializeAsString());
  EXPECT_EQ(a.dead_letters, b.dead_letters);
}

// The signs of one slot of one record.
std::vector<uint64_t> SignsOf(const Job& job, const Batch& batch, int slot, int64_t record) {
  const FeatureLayout layout = MakeFeatureLayout(job);
  const FeatureLayout::SlotPlace& place = layout.slots[slot];
  const RowGroup& group = batch.groups[place.group];
  const int64_t bag = place.bag * batch.records + record;
  std::vector<uint64_t> signs;
  for (int64_t i = group.offsets[bag]; i < group.offsets[bag + 1]; ++i) signs.push_back(group.unique[group.row_of[i]]);
  return signs;
}

// --- the order of records, against a slow twin ---

struct MadeRecord {
  uint32_t file = 0;
  uint64_t offset = 0;
  enum { kValid, kFiltered, kBad } fate = kValid;
};
struct MadeFile {
  uint32_t log = 0;
  bool compressed = false;
  uint64_t bytes = 0;
  std::vector<MadeRecord> records;
};
struct Made {
  Job job;
  std::vector<MadeFile> files;
};

std::string RandomLog(Random* random, int records, MadeFile* file) {
  std::string text = "id,click,keep\n";
  for (int i = 0; i < records; ++i) {
    if (random->Below(20) == 0) text += "\n";
    MadeRecord record;
    record.file = 0;
    record.offset = text.size();
    switch (random->Below(12)) {
      case 0:
        record.fate = MadeRecord::kBad;
        text += random->Below(2) ? "7,1\n" : "x,1,1\n";
        break;
      case 1:
        record.fate = MadeRecord::kFiltered;
        absl::StrAppend(&text, random->Below(1000), ",1,0\r\n");
        break;
      default:
        absl::StrAppend(&text, random->Below(100000), ",", random->Below(2), ",1",
                        i + 1 == records && random->Below(2) ? "" : "\n");
    }
    file->records.push_back(record);
  }
  file->bytes = text.size();
  return text;
}

Made RandomJob(Random* random, const std::string& folder) {
  Made made;
  made.job = JobOf(R"(
    table { name: "t" dim: 4 }
    slot { name: "id" table: "t" hash: RAW }
    task { name: "click" category: "c" label: "click" })");
  made.job.set_data_dir(folder);
  made.job.set_seed(random->Next());
  made.job.mutable_training()->set_batch_size(static_cast<uint32_t>(5 + random->Below(40)));
  const int logs = 1 + static_cast<int>(random->Below(2));
  for (int i = 0; i < logs; ++i) {
    Log* log = made.job.add_log();
    log->set_name(absl::StrCat("log", i));
    log->set_where("keep");
    log->set_piece_bytes(1 + random->Below(300));
    log->set_piece_batches(static_cast<uint32_t>(1 + random->Below(3)));
    if (random->Below(3) == 0) log->set_batch_size(static_cast<uint32_t>(5 + random->Below(20)));
    if (random->Below(2)) log->mutable_shuffle()->set_pieces(true);
    if (random->Below(2)) log->mutable_shuffle()->set_window_records_max(1 + random->Below(100));
    for (uint64_t k = 1 + random->Below(3); k > 0; --k) {
      MadeFile file;
      file.log = static_cast<uint32_t>(i);
      const std::string text = RandomLog(random, static_cast<int>(random->Below(200)), &file);
      for (MadeRecord& record : file.records) record.file = static_cast<uint32_t>(made.files.size());
      const uint64_t kind = random->Below(3);
      file.compressed = kind > 0;
      const std::string name = absl::StrCat("file", made.files.size());
      const int parts = 1 + static_cast<int>(random->Below(3));
      EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, name), kind == 0   ? text
                                                              : kind == 1 ? InParts(text, parts, Gzip)
                                                                          : InParts(text, parts, Zstd))
                      .ok());
      log->add_path(name);
      made.files.push_back(std::move(file));
    }
  }
  return made;
}

struct ReferencePiece {
  uint32_t file;
  uint64_t block;
  std::vector<MadeRecord> records;
};
struct ReferenceBatch {
  std::vector<std::pair<uint32_t, uint64_t>> records;  // (file, offset)
  uint64_t read = 0, rejected = 0, filtered = 0;
  uint64_t window = 0, record = 0;
  bool segment_ends = false;
};

// docs/PROTOCOL.md §1, read aloud: pieces → this lane's → windows → batches, and the end of each log. The last one is
// the end of the epoch.
std::vector<ReferenceBatch> Reference(const Made& made, uint32_t epoch, uint32_t lane, uint32_t lanes) {
  std::vector<ReferenceBatch> batches;
  ReferenceBatch pending;
  uint64_t window_number = 0;
  for (int l = 0; l < made.job.log_size(); ++l) {
    const Log& log = made.job.log(l);
    const uint32_t all = log.has_batch_size() ? log.batch_size() : made.job.training().batch_size();
    const uint64_t per_block = log.piece_batches() * ((all + lanes - 1) / lanes);
    const uint64_t mine = all / lanes + (lane < all % lanes);
    std::vector<ReferencePiece> pieces;
    for (uint32_t f = 0; f < made.files.size(); ++f) {
      const MadeFile& file = made.files[f];
      if (file.log != static_cast<uint32_t>(l)) continue;
      const uint64_t blocks = file.compressed ? (file.records.size() + per_block - 1) / per_block
                                              : (file.bytes + log.piece_bytes() - 1) / log.piece_bytes();
      const size_t first = pieces.size();
      for (uint64_t b = 0; b < blocks; ++b) pieces.push_back({f, b, {}});
      for (size_t i = 0; i < file.records.size(); ++i) {
        const uint64_t block = file.compressed ? i / per_block : file.records[i].offset / log.piece_bytes();
        pieces[first + block].records.push_back(file.records[i]);
      }
    }
    if (log.shuffle().pieces()) Shuffle(PieceShuffleSeed(made.job.seed(), epoch, l), &pieces);
    std::vector<ReferencePiece> own;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const uint64_t key = log.shuffle().pieces() ? i : pieces[i].file + pieces[i].block;
      if (key % lanes == lane) own.push_back(pieces[i]);
    }
    for (size_t i = 0; i < own.size();) {
      std::vector<MadeRecord> window = own[i++].records;
      const uint64_t max = log.shuffle().window_records_max();
      while (i < own.size() && window.size() + own[i].records.size() <= max) {
        window.insert(window.end(), own[i].records.begin(), own[i].records.end());
        ++i;
      }
      std::vector<MadeRecord> valid;
      for (const MadeRecord& record : window) {
        if (record.fate == MadeRecord::kValid) valid.push_back(record);
        pending.rejected += record.fate == MadeRecord::kBad;
        pending.filtered += record.fate == MadeRecord::kFiltered;
      }
      if (max > 0) Shuffle(WindowShuffleSeed(made.job.seed(), epoch, lane, window_number), &valid);
      for (size_t k = 0; k < valid.size(); ++k) {
        pending.records.emplace_back(valid[k].file, valid[k].offset);
        if (pending.records.size() < mine && k + 1 < valid.size()) continue;
        pending.read = pending.records.size() + pending.rejected + pending.filtered;
        pending.window = window_number;
        pending.record = k + 1;
        batches.push_back(pending);
        pending = ReferenceBatch();
      }
      ++window_number;
    }
    pending.read = pending.rejected + pending.filtered;
    pending.window = window_number;
    pending.segment_ends = true;
    batches.push_back(pending);
    pending = ReferenceBatch();
  }
  return batches;
}

TEST(LaneReader, GivesTheRecordsOfRandomLogsInTheOrderOfASlowTwin) {
  const std::string folder = TestFolder();
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    const Made made = RandomJob(&random, folder);
    const uint32_t lanes = static_cast<uint32_t>(1 + random.Below(5));
    std::multiset<std::pair<uint32_t, uint64_t>> seen, valid;
    for (const MadeFile& file : made.files) {
      for (const MadeRecord& record : file.records) {
        if (record.fate == MadeRecord::kValid) valid.emplace(record.file, record.offset);
      }
    }
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const auto batches = ReadAll(made.job, lane, lanes, Cursor(), 2);
      size_t at = 0;
      for (uint32_t epoch = 0; epoch < 2; ++epoch) {
        const std::vector<ReferenceBatch> expected = Reference(made, epoch, lane, lanes);
        for (size_t i = 0; i < expected.size(); ++i, ++at) {
          ASSERT_LT(at, batches.size());
          const Batch& batch = *batches[at];
          const bool last = i + 1 == expected.size();
          EXPECT_EQ(batch.kind, expected[i].segment_ends ? Batch::Kind::kAtEnd : Batch::Kind::kRecords);
          EXPECT_EQ(batch.cursor.end_of_segment(), expected[i].segment_ends);
          EXPECT_EQ(batch.cursor.end_of_epoch(), last);
          EXPECT_EQ(batch.cursor.epoch(), epoch);
          EXPECT_EQ(batch.cursor.lane(), lane);
          std::vector<std::pair<uint32_t, uint64_t>> records;
          for (int64_t r = 0; r < batch.records; ++r) records.emplace_back(batch.file_of[r], batch.offset[r]);
          ASSERT_EQ(records, expected[i].records);
          EXPECT_EQ(batch.cursor.window(), expected[i].window);
          EXPECT_EQ(batch.cursor.record(), expected[i].record);
          EXPECT_EQ(batch.delta.read(), expected[i].read);
          EXPECT_EQ(batch.delta.rejected(), expected[i].rejected);
          EXPECT_EQ(batch.delta.filtered(), expected[i].filtered);
          const int64_t letters = std::count(batch.dead_letters.begin(), batch.dead_letters.end(), '\n');
          EXPECT_EQ(static_cast<uint64_t>(letters), expected[i].rejected);
          if (epoch == 0) seen.insert(records.begin(), records.end());
        }
      }
      EXPECT_EQ(at, batches.size());
    }
    EXPECT_EQ(seen, valid) << "every valid record once, whatever the number of lanes";
  }
}

TEST(LaneReader, ResumesFromEveryCursorWithTheSameBatches) {
  const std::string folder = TestFolder();
  int resumed = 0;
  for (uint64_t seed = 101; seed <= 112; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    const Made made = RandomJob(&random, folder);
    const uint32_t lanes = static_cast<uint32_t>(1 + random.Below(3));
    const uint32_t lane = static_cast<uint32_t>(random.Below(lanes));
    const auto batches = ReadAll(made.job, lane, lanes, Cursor(), 2);
    for (size_t i = 0; i < batches.size(); ++i) {
      const auto rest = ReadAll(made.job, lane, lanes, batches[i]->cursor, 2);
      ASSERT_EQ(rest.size(), batches.size() - i - 1);
      for (size_t k = 0; k < rest.size(); ++k) ExpectSame(*rest[k], *batches[i + 1 + k]);
      ++resumed;
    }
  }
  EXPECT_GT(resumed, 100);
}

TEST(LaneReader, ShufflesDifferentlyInEachEpochAndForEachSeed) {
  const std::string folder = TestFolder();
  std::string text = "id,click\n";
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&text, i, ",0\n");
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "a"), Zstd(text)).ok());
  Job job = JobOf(R"(
    table { name: "t" } slot { name: "id" table: "t" hash: RAW } task { name: "click" category: "c" label: "click" }
    training { batch_size: 10 }
    log { name: "l" path: "a" piece_batches: 2 shuffle { pieces: true window_records_max: 100 } })");
  job.set_data_dir(folder);
  const auto order = [&](uint64_t seed) {
    job.set_seed(seed);
    std::vector<std::vector<uint64_t>> epochs(2);
    for (const auto& batch : ReadAll(job, 0, 1, Cursor(), 2)) {
      epochs[batch->epoch].insert(epochs[batch->epoch].end(), batch->offset.begin(), batch->offset.end());
    }
    return epochs;
  };
  const auto first = order(1), again = order(1), other = order(2);
  EXPECT_EQ(first, again);
  EXPECT_NE(first[0], first[1]);
  EXPECT_NE(first[0], other[0]);
  EXPECT_FALSE(std::is_sorted(first[0].begin(), first[0].end()));
}

TEST(LaneReader, SharesOutABatchThatLanesDoNotDivide) {
  const std::string folder = TestFolder();
  std::string text = "id,click\n";
  for (int i = 0; i < 40; ++i) absl::StrAppend(&text, i, ",0\n");
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "a"), text).ok());
  Job job = JobOf(R"(
    table { name: "t" } slot { name: "id" table: "t" hash: RAW } task { name: "click" category: "c" label: "click" }
    training { batch_size: 8 } log { name: "l" path: "a" piece_bytes: 50 })");
  job.set_data_dir(folder);
  const int64_t sizes[] = {3, 3, 2};
  for (uint32_t lane = 0; lane < 3; ++lane) {
    int64_t largest = 0;
    for (const auto& batch : ReadAll(job, lane, 3)) largest = std::max(largest, batch->records);
    EXPECT_EQ(largest, sizes[lane]);
  }
}

// --- features ---

struct Small {
  std::string folder = TestFolder();
  Job job;
  Small(const std::string& log, const std::string& job_text) {
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, "log.csv"), log).ok());
    job =
        JobOf(absl::StrCat(R"(table { name: "t" } table { name: "u" dim: 8 } training { batch_size: 64 } )", job_text));
    if (job.log().empty()) job.add_log()->set_name("log");
    if (job.log(0).path().empty()) job.mutable_log(0)->add_path("log.csv");
    if (job.task().empty()) *job.add_task() = JobOf(R"(task { name: "y" category: "c" label: "1" })").task(0);
    job.set_data_dir(folder);
  }
  void Write(const std::string& name, const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder, name), text).ok());
  }
  std::unique_ptr<Batch> First() {
    auto batches = ReadAll(job, 0, 1);
    EXPECT_EQ(batches.size(), 2u);
    return batches.empty() ? nullptr : std::move(batches[0]);
  }
};

uint64_t Salted(absl::string_view text, absl::string_view slot, uint32_t table = 1) {
  return MakeSign(table, HashId(text, SaltOf(slot)));
}

TEST(Features, HashIdsAsTheSlotSays) {
  Small small("a,b,c\nx,x,17\n,,\n", R"(
    slot { name: "s" column: "a" table: "t" }
    slot { name: "h1" column: "a" table: "t" hash: HASHED }
    slot { name: "h2" column: "b" table: "t" hash: HASHED missing: ZEROS }
    slot { name: "c" table: "u" hash: RAW })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 2);
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0), ElementsAre(Salted("x", "s")));
  EXPECT_THAT(SignsOf(small.job, *batch, 1, 0), ElementsAre(MakeSign(1, HashId("x", 0))));
  EXPECT_EQ(SignsOf(small.job, *batch, 2, 0), SignsOf(small.job, *batch, 1, 0)) << "one row for one text";
  EXPECT_THAT(SignsOf(small.job, *batch, 3, 0), ElementsAre(MakeSign(2, 17)));
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 1), ElementsAre(Salted("", "s")));
  EXPECT_THAT(SignsOf(small.job, *batch, 2, 1), ElementsAre());
  EXPECT_THAT(SignsOf(small.job, *batch, 3, 1), ElementsAre(MakeSign(2, kIdMask)));
}

TEST(Features, OfASlotWithASaltAreThoseOfTheSlotOfThatName) {
  Small small("a\nx\n\n", R"(
    slot { name: "s" column: "a" table: "t" }
    slot { name: "renamed" salt: "s" column: "a" table: "t" }
    slot { name: "other" column: "a" table: "t" })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 1);
  EXPECT_THAT(SignsOf(small.job, *batch, 1, 0), ElementsAre(Salted("x", "s")));
  EXPECT_NE(SignsOf(small.job, *batch, 2, 0), SignsOf(small.job, *batch, 0, 0));
}

TEST(Features, TakeListsApartAndDropWhatIsTooMuch) {
  Small small("tags\n\"1,2,,3,4\"\n\"0,\"\n\n\"5,0,5\"\n", R"(
    slot { name: "tags" table: "t" kind: LIST values_max: 3 missing_value: "0" }
    slot { name: "raw" column: "tags" table: "u" kind: LIST hash: RAW missing: ZEROS })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 3);
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0),
              ElementsAre(Salted("1", "tags"), Salted("2", "tags"), Salted("3", "tags")));
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 1), ElementsAre(Salted("", "tags")));
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 2), ElementsAre(Salted("5", "tags"), Salted("5", "tags")));
  EXPECT_THAT(SignsOf(small.job, *batch, 1, 1), ElementsAre(MakeSign(2, 0)));
}

TEST(Features, BucketiseNumbersAndExpressions) {
  Small small("x\n-3.5\n0\n7\n10\nmany\ninf\n", R"(
    slot { name: "b" column: "x" table: "t" kind: BUCKET boundary: 0 boundary: 10 hash: RAW missing: ZEROS }
    slot { name: "l" column: "x" table: "t" kind: BUCKET }
    slot { name: "hour" value: "floor(x / 5) " table: "t" }
    slot { name: "v" value: "x * 2" table: "t" kind: BUCKET boundary: 14 hash: HASHED })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 6);
  const int buckets[] = {0, 1, 1, 2};
  const char* const logs[] = {"-2", "0", "3", "3"};
  const char* const hours[] = {"-1", "0", "1", "2"};
  const char* const doubled[] = {"0", "0", "1", "1"};
  for (int r = 0; r < 4; ++r) {
    EXPECT_THAT(SignsOf(small.job, *batch, 0, r), ElementsAre(MakeSign(1, buckets[r])));
    EXPECT_THAT(SignsOf(small.job, *batch, 1, r), ElementsAre(Salted(logs[r], "l")));
    EXPECT_THAT(SignsOf(small.job, *batch, 2, r), ElementsAre(Salted(hours[r], "hour")));
    EXPECT_THAT(SignsOf(small.job, *batch, 3, r), ElementsAre(MakeSign(1, HashId(doubled[r], 0))));
  }
  for (int r = 4; r < 6; ++r) {
    EXPECT_THAT(SignsOf(small.job, *batch, 0, r), ElementsAre()) << "no number: missing";
    EXPECT_THAT(SignsOf(small.job, *batch, 1, r), ElementsAre(Salted("", "l")));
    EXPECT_THAT(SignsOf(small.job, *batch, 2, r), ElementsAre(Salted("", "hour")));
  }
}

TEST(Features, TransformDenseNumbers) {
  Small small("x,y\n-3,5\n,1e300\n", R"(
    dense { name: "x" }
    dense { name: "lx" value: "x" transform: LOG1P missing: 9 }
    dense { name: "sy" value: "y" transform: STANDARD mean: 1 deviation: 2 missing: -1 })");
  const auto batch = small.First();
  EXPECT_THAT(batch->dense, ElementsAre(-3.0f, static_cast<float>(-std::log1p(3.0)), 2.0f, 0.0f, 9.0f, -1.0f));
}

TEST(Features, JoinSideTablesByKeyAndTheLogWins) {
  Small small("user,item,color\n1,a,red\n2,b,\n3,zz,blue\n", R"(
    side_table { name: "users" path: "users.csv" key: "user" }
    side_table { name: "items" path: "items.tsv" key: "id" log_key: "item" delimiter: "\\t" }
    log { join: "users" join: "items" }
    slot { name: "age" table: "t" }
    slot { name: "color" table: "t" }
    slot { name: "item_color" column: "items.color" table: "t" }
    slot { name: "sum" value: "age + price" table: "t" })");
  small.Write("users.csv", Gzip("user,age\n1,30\n2,\"4\"\"0\"\n"));
  small.Write("items.tsv", "id\tcolor\tprice\na\tgreen\t2\nb\tblack\t3\n");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 3);
  const char* const expected[3][4] = {{"30", "red", "green", "32"}, {"4\"0", "", "black", ""}, {"", "blue", "", ""}};
  const char* const names[] = {"age", "color", "item_color", "sum"};
  for (int r = 0; r < 3; ++r) {
    for (int s = 0; s < 4; ++s) {
      EXPECT_THAT(SignsOf(small.job, *batch, s, r), ElementsAre(Salted(expected[r][s], names[s])))
          << r << " " << names[s];
    }
  }
}

TEST(Features, MaskTasksByLogByExpressionAndWhereALabelIsNoNumber) {
  Small small("click,play,length,ok\n1,95,100,1\n0,5,0,0\n,5,,1\n", R"(
    log { known_task: "click" known_task: "finish" }
    task { name: "click" category: "c" label: "click" }
    task { name: "finish" category: "c" label: "play >= 0.95 * length && length > 0" mask: "ok == 1 && !missing(length) " }
    task { name: "like" category: "d" label: "no_such_column" })");
  const auto batch = small.First();
  EXPECT_THAT(batch->labels, ElementsAre(1, 1, 0, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(batch->mask, ElementsAre(1, 1, 0, 1, 0, 0, 0, 0, 0));
}

TEST(LaneReader, KeepsTheUserOfEachRecord) {
  Small small("user,x\nu1,1\n,2\nu1,3\n", R"(dense { name: "x" })");
  auto opened = OpenLane(small.job, 0, 1);
  ASSERT_TRUE(opened.ok());
  opened->options.keep_user = opened->options.keep_user_text = true;
  opened->options.user_column = "user";
  auto reader = LaneReader::Open(opened->options);
  const auto batch = *(*reader)->Next();
  EXPECT_THAT(batch->user_text, ElementsAre("u1", "", "u1"));
  EXPECT_THAT(batch->user, ElementsAre(XXH3_64bits("u1", 2), kNoUser, XXH3_64bits("u1", 2)));
  opened->options.user_column = "visitor";
  EXPECT_THAT(std::string((*LaneReader::Open(opened->options))->Next().status().message()), HasSubstr("visitor"));
}

// --- bad records ---

TEST(LaneReader, CountsBadRecordsAndWritesDeadLetters) {
  Small small("id,text\n1,a\n2\n3,\"b\nx,c\n4503599627370495,d\n-5,e\n6,\"f\"g\n7,hhhhhhhhhhhhhhhhhhhhhhhhh\n8,i\n", R"(
    slot { name: "id" table: "t" hash: RAW } limits { record_bytes_max: 20 })");
  const auto batches = ReadAll(small.job, 0, 1);
  ASSERT_EQ(batches.size(), 2u);
  EXPECT_EQ(batches[0]->records, 2);
  EXPECT_EQ(batches[0]->delta.read(), 9u);
  EXPECT_EQ(batches[0]->delta.rejected(), 7u);
  const std::vector<std::string> letters = absl::StrSplit(batches[0]->dead_letters, '\n');
  EXPECT_THAT(
      letters,
      ElementsAre("log.csv\t12\thas 1 fields instead of 2",
                  "log.csv\t14\tunterminated quote; a field with a newline needs multiline_records: true",
                  HasSubstr("log.csv\t19\tRAW slot 0: \"x\" is no integer"), HasSubstr("log.csv\t23\tRAW slot 0"),
                  HasSubstr("log.csv\t42\tRAW slot 0"), "log.csv\t47\ttext after a closing quote",
                  "log.csv\t54\tlonger than limits.record_bytes_max, 20", ""));
}

TEST(LaneReader, TakesQuotedNewlinesOnlyWhereTheLogSaysSo) {
  Small small("id,text\n1,\"a\nb\"\n2,c\n", R"(slot { name: "text" table: "t" })");
  EXPECT_EQ(ReadAll(small.job, 0, 1)[0]->delta.rejected(), 2u);
  small.job.mutable_log(0)->set_multiline_records(true);
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 2);
  EXPECT_EQ(batch->delta.rejected(), 0u);
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0), ElementsAre(Salted("a\nb", "text")));
}

TEST(LaneReader, SkipsWindowsWithoutAValidRecordAndTellsTheirCountsLater) {
  // Pieces of one line: bad, bad, good, bad.
  Small small("id\nx\ny\n1\nz\n", R"(slot { name: "id" table: "t" hash: RAW } log { piece_bytes: 2 })");
  const auto batches = ReadAll(small.job, 0, 1);
  ASSERT_EQ(batches.size(), 2u);
  EXPECT_EQ(batches[0]->records, 1);
  EXPECT_EQ(batches[0]->delta.rejected(), 2u);
  EXPECT_EQ(batches[1]->kind, Batch::Kind::kAtEnd);
  EXPECT_EQ(batches[1]->delta.rejected(), 1u);
  EXPECT_EQ(batches[1]->delta.read(), 1u);
}

TEST(LaneReader, FilesMayOrderTheirColumnsDifferently) {
  Small small("a,b\n1,2\n", R"(
    slot { name: "a" table: "t" } log { path: "log.csv" path: "other.csv" shuffle { window_records_max: 10 } })");
  small.Write("other.csv",
              "\xef\xbb\xbf"
              "b,a\n4,3\n");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 2);
  std::set<uint64_t> signs;
  for (int r = 0; r < 2; ++r) signs.insert(SignsOf(small.job, *batch, 0, r)[0]);
  EXPECT_EQ(signs, (std::set<uint64_t>{Salted("1", "a"), Salted("3", "a")}));
}

// --- what could not be used as it was meant ---

std::string TextOfReading(const Batch& batch) { return batch.reading.ShortDebugString(); }

TEST(Reading, NumbersAsOtherToolsWriteThemAreRead) {
  Small small("y,x\n 1, 39\n+1,39.0\n\"  1\",+39\n1 ,3.9e1\n1e-400,39\n", R"(
    slot { name: "x" table: "t" kind: BUCKET boundary: [39] hash: RAW }
    slot { name: "id" column: "x" table: "u" hash: RAW }
    slot { name: "text" value: "x" table: "t" }
    dense { name: "x" } task { name: "y" category: "c" label: "y" })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 5);
  EXPECT_THAT(batch->dense, testing::Each(39.0f));
  EXPECT_THAT(batch->mask, testing::Each(1.0f));
  EXPECT_THAT(batch->labels, ElementsAre(1, 1, 1, 1, 0));
  for (int r = 0; r < 5; ++r) {
    EXPECT_THAT(SignsOf(small.job, *batch, 0, r), ElementsAre(MakeSign(1, 1)));
    EXPECT_THAT(SignsOf(small.job, *batch, 1, r), ElementsAre(MakeSign(2, 39)));
    EXPECT_THAT(SignsOf(small.job, *batch, 2, r), ElementsAre(Salted("39", "text")));
  }
  EXPECT_EQ(TextOfReading(*batch), "");
}

TEST(Reading, ALabelThatRestsOnNoNumberIsMaskedAndItsColumnCounted) {
  Small small("y,x\nTrue,1\n,2\nnan,3\n1,4\n0,n/a\n", R"(
    dense { name: "x" } dense { name: "again" value: "x + 1" }
    task { name: "bare" category: "c" label: "y" } task { name: "above" category: "c" label: "y > 0" }
    task { name: "text" category: "c" label: "y == 'True'" })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 5);
  EXPECT_THAT(batch->mask, ElementsAre(0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1));
  EXPECT_THAT(batch->labels, ElementsAre(0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0));
  EXPECT_EQ(
      TextOfReading(*batch),
      "column { name: \"y\" unreadable: 1 example: \"True\" } column { name: \"x\" unreadable: 1 example: \"n/a\" }")
      << "once a record, however many read it; what is missing is not counted";
}

TEST(Reading, CountsEachRecordOnceWhateverBecomesOfIt) {
  // Pieces of a line each: filtered, trained, rejected, and read again by a resume.
  Small small("x,id\nno,1\nyes,2\nno,z\nno,3\n", R"(
    log { where: "id > 1 || x == 'yes' || missing(x) || id != 1" piece_bytes: 6 }
    slot { name: "id" table: "t" hash: RAW } dense { name: "x" } dense { name: "id" })");
  const auto batches = ReadAll(small.job, 0, 1);
  Reading all;
  for (const auto& batch : batches) MergeReading(batch->reading, &all);
  EXPECT_EQ(
      all.ShortDebugString(),
      "column { name: \"x\" unreadable: 2 example: \"yes\" } column { name: \"id\" unreadable: 1 example: \"z\" }");
  for (size_t i = 0; i < batches.size(); ++i) {
    const auto rest = ReadAll(small.job, 0, 1, batches[i]->cursor);
    ASSERT_EQ(rest.size(), batches.size() - 1 - i);
    for (size_t k = 0; k < rest.size(); ++k) EXPECT_EQ(TextOfReading(*rest[k]), TextOfReading(*batches[i + 1 + k]));
  }
}

TEST(LaneReader, TellsTheMiddleTimeOfABatchAndRejectsWhatIsNoTime) {
  Small small("ts,x\n1700000300,1\n1700000100,2\n,3\nsoon,4\n4100000000,5\n1700000200,6\n1700000000000,7\n-5,8\n,9\n",
              R"(log { time_ms: "1000 * ts" } dense { name: "x" })");
  small.job.mutable_training()->set_batch_size(6);
  const auto batches = ReadAll(small.job, 0, 1);
  ASSERT_EQ(batches.size(), 3u);
  EXPECT_THAT(batches[0]->dense, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(batches[0]->time_s, 1700000200u) << "of 100, 200, 300 and one far ahead";
  EXPECT_EQ(TextOfReading(*batches[0]), "column { name: \"ts\" unreadable: 1 example: \"soon\" }");
  EXPECT_THAT(batches[1]->dense, ElementsAre(9));
  EXPECT_EQ(batches[1]->time_s, 0u);
  EXPECT_EQ(batches[2]->time_s, 0u);
  EXPECT_EQ(batches[0]->delta.rejected(), 2u);
  EXPECT_THAT(batches[0]->dead_letters,
              AllOf(HasSubstr("time_ms: 1700000000000000 is no time of the years 2000 to 2099 in milliseconds"),
                    HasSubstr("time_ms: -5000 is no time")));
}

TEST(LaneReader, AnExpressionForTheTimeIsCheckedAsTheOthersAre) {
  Small small("ts,x\n1,1\n", R"(log { time_ms: "1000 * when" } dense { name: "x" })");
  EXPECT_THAT(std::string(OpenLane(small.job, 0, 1).status().message()),
              AllOf(HasSubstr("time_ms"), HasSubstr("\"when\"")));
  small.job.mutable_log(0)->set_time_ms("1000 *");
  EXPECT_THAT(FaultsOfExpressions(small.job, LogsOf(small.job)), ElementsAre(HasSubstr("time_ms")));
}

TEST(Reading, CountsWhatAJoinFinds) {
  Small small("user\n7.0\n7\n\n8\n7\n", R"(
    side_table { name: "side" path: "side.csv" key: "user" } log { join: "side" }
    dense { name: "age" })");
  small.Write("side.csv", "user,age\n7,old\n");
  EXPECT_EQ(small.First()->records, 4);
  EXPECT_EQ(TextOfReading(*small.First()),
            "column { name: \"side.age\" unreadable: 2 example: \"old\" } "
            "join { side_table: \"side\" matched: 2 unmatched: 2 without_key: 0 example: \"7.0\" }");
}

TEST(Reading, IdsOf64BitsComeThroughAnExpression) {
  Small small("kind,ad,video\nad,1152921504606846977,1\nvideo,1,1152921504606846978\n", R"job(
    slot { name: "item" table: "t" value: "if(kind == 'ad', ad, video)" })job");
  const auto batch = small.First();
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0), ElementsAre(Salted("1152921504606846977", "item")));
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 1), ElementsAre(Salted("1152921504606846978", "item")));
}

TEST(Reading, AHeaderWithinAFileIsRejected) {
  Small small("\xef\xbb\xbfid,text\n1,a\nid,text\n2,b\n\xef\xbb\xbfid,text\n", R"(slot { name: "text" table: "t" })");
  const auto batch = small.First();
  EXPECT_EQ(batch->records, 2);
  EXPECT_EQ(batch->delta.rejected(), 2u);
  EXPECT_THAT(batch->dead_letters, HasSubstr("log.csv\t15\tis the header once more\n"));
}

TEST(Reading, AByteOrderMarkWithoutAHeaderIsNoPartOfTheFirstRecord) {
  Small small(
      "\xef\xbb\xbf"
      "7,a\n8,b\n",
      R"(
    log { header: false column: "id" column: "text" } slot { name: "id" table: "t" hash: RAW })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 2);
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0), ElementsAre(MakeSign(1, 7)));
}

TEST(Reading, NoPartOfAFieldOverSeveralLinesIsARecord) {
  Small small("text,id\n\"first\nsecond, with \"\"quotes\"\"\nthird\",1\nplain,2\n\"stray,3\nx,\"4\"\n",
              R"(slot { name: "text" table: "t" } slot { name: "id" table: "u" })");
  const auto batch = small.First();
  ASSERT_EQ(batch->records, 2);
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 0), ElementsAre(Salted("plain", "text")));
  EXPECT_THAT(SignsOf(small.job, *batch, 0, 1), ElementsAre(Salted("x", "text"))) << "a stray quote takes one record";
  EXPECT_EQ(
      batch->dead_letters,
      "log.csv\t8\ta newline inside quotes; set multiline_records: true for this log\n"
      "log.csv\t15\tbegins inside a quoted field of the record before it; set multiline_records: true for this log\n"
      "log.csv\t39\tbegins inside a quoted field of the record before it; set multiline_records: true for this log\n"
      "log.csv\t56\tunterminated quote; a field with a newline needs multiline_records: true\n");
}

TEST(Reading, LoneCarriageReturnsAreNamed) {
  Small small("id,y\r1,0\r2,1\r", R"(slot { name: "id" table: "t" })");
  const absl::Status status = OpenLane(small.job, 0, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("a carriage return inside the header"));
  Small headless("1,0\r2,1\r", R"(log { header: false column: "id" column: "y" } slot { name: "id" table: "t" })");
  EXPECT_THAT(ReadAll(headless.job, 0, 1)[0]->dead_letters, HasSubstr("a lone carriage return ends no line"));
}

// --- faults ---

TEST(LaneReader, ATruncatedGzipIsDataLoss) {
  std::string text = "id,click\n";
  for (int i = 0; i < 200000; ++i) absl::StrAppend(&text, i * 7919 % 10007, ",0\n");
  Small small("", R"(slot { name: "id" table: "t" hash: RAW })");
  for (const std::string& bytes : {Gzip(text), Zstd(text)}) {
    small.Write("log.csv", bytes.substr(0, bytes.size() / 2));
    auto opened = OpenLane(small.job, 0, 1);
    absl::Status status = opened.status();  // a short file shows it with its header
    while (status.ok()) {
      auto batch = opened->reader->Next();
      status = batch.status();
      ASSERT_TRUE(!batch.ok() || *batch != nullptr) << "ended without a word";
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr("log.csv: byte "));
    EXPECT_THAT(std::string(status.message()), HasSubstr("copy the file again"));
  }
}

TEST(LaneReader, AHeaderThatIsTooLongIsDataLossWithFilePlaceAndRemedy) {
  Small small("id\n1\n", R"(slot { name: "id" table: "t" hash: RAW } limits { record_bytes_max: 16 })");
  const std::string text = "\nid,a_name_that_is_too_long\n1,2\n";
  for (const std::string& bytes : {text, Gzip(text)}) {
    small.Write("log.csv", "id\n1\n");
    const auto schema = LogSchema::Open(small.job, LogsOf(small.job));
    ASSERT_TRUE(schema.ok());
    small.Write("log.csv", bytes);
    auto opened = OpenLane(small.job, 0, 1);
    const absl::Status found_early = opened.status();
    opened = Opened();  // as when the file comes into a directory that grows
    opened->files->Append(*ListLogFiles(small.job, LogsOf(small.job)), true);
    opened->options.job = small.job;
    opened->options.logs = LogsOf(small.job);
    opened->options.schema = *schema;
    opened->options.files = opened->files.get();
    const absl::Status found_late = (*LaneReader::Open(opened->options))->Next().status();
    for (const absl::Status& status : {found_early, found_late}) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
      EXPECT_THAT(
          std::string(status.message()),
          AllOf(HasSubstr("log.csv: byte 1: the header is longer than limits.record_bytes_max = 16"), HasSubstr("; ")));
    }
  }
}

TEST(LaneReader, DeadLettersStayBoundedWhileNoRecordIsValid) {
  std::string text = "id,text\n";
  constexpr uint64_t kRecords = 50000;
  for (uint64_t i = 0; i < kRecords; ++i) text += "one field\n";
  Small small(text, R"(slot { name: "id" table: "t" } log { piece_bytes: 65536 })");
  const auto batches = ReadAll(small.job, 0, 1);
  ASSERT_EQ(batches.size(), 1u);
  EXPECT_EQ(batches[0]->delta.rejected(), kRecords);
  const std::string& letters = batches[0]->dead_letters;
  EXPECT_LT(letters.size(), (1u << 20) + 200);
  // The last line tells of those that were left out, so the lines still add up.
  const std::vector<std::string> lines = absl::StrSplit(letters, '\n', absl::SkipEmpty());
  EXPECT_EQ(lines.back(), absl::StrCat("log.csv\t", text.size() - 10, "\tand ", kRecords - (lines.size() - 1),
                                       " bad records up to here that are not listed"));
  EXPECT_EQ(lines[0], "log.csv\t8\thas 1 fields instead of 2");
}

TEST(LaneReader, AFileThatIsNotTheListedOneIsDataLoss) {
  Small small("id\n1\n", R"(slot { name: "id" table: "t" hash: RAW })");
  for (const char* const other : {"id\n1\n2\n", "id\n2\n"}) {
    small.Write("log.csv", "id\n1\n");
    auto opened = OpenLane(small.job, 0, 1);
    small.Write("log.csv", other);
    const absl::Status status = opened->reader->Next().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr("log.csv"));
  }
}

// Writes over the file as it lies there; the time of its modification moves, however fast the test is.
void WriteInPlace(const std::string& path, const std::string& text) {
  struct stat before;
  ASSERT_EQ(stat(path.c_str(), &before), 0);
  const int fd = open(path.c_str(), O_WRONLY | O_TRUNC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(write(fd, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  const struct timespec times[2] = {before.st_atim, {before.st_mtim.tv_sec + 1, 0}};
  ASSERT_EQ(futimens(fd, times), 0);
  close(fd);
}

std::string Numbers(int begin, int end) {
  std::string text = "id,click\n";
  for (int i = begin; i < end; ++i) absl::StrAppend(&text, i, ",0\n");
  return text;
}

TEST(LaneReader, ReadsOnInTheFileThatItOpenedWhateverItsNameComesToMean) {
  const std::string text = Numbers(100, 400);
  for (const std::string& bytes : {text, Gzip(text), Zstd(text)}) {
    Small small("", R"(slot { name: "id" table: "t" hash: RAW } log { name: "l" path: "log.csv" piece_bytes: 100
      piece_batches: 1 batch_size: 10 })");
    small.Write("log.csv", bytes);
    const auto whole = ReadAll(small.job, 0, 1);
    for (const std::string& other : {Numbers(500, 520), std::string("something else")}) {
      small.Write("log.csv", bytes);
      auto opened = OpenLane(small.job, 0, 1);
      ASSERT_TRUE(opened.ok()) << opened.status();
      for (size_t i = 0; i < whole.size(); ++i) {
        auto batch = opened->reader->Next();
        ASSERT_TRUE(batch.ok()) << batch.status();
        ExpectSame(**batch, *whole[i]);
        if (i == 2) small.Write("log.csv", other);  // by rename
      }
    }
  }
}

TEST(LaneReader, AFileThatIsWrittenToWhileItIsReadIsDataLoss) {
  const std::string text = Numbers(100, 400);
  std::string same_length = text;
  same_length[same_length.size() - 3] = '1';
  for (const std::string& other : {std::string(), text.substr(0, text.size() / 2), text + "400,0\n", same_length}) {
    Small small("", R"(slot { name: "id" table: "t" hash: RAW } log { name: "l" path: "log.csv" piece_bytes: 100
      batch_size: 10 })");
    small.Write("log.csv", text);
    auto opened = OpenLane(small.job, 0, 1);
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_TRUE(opened->reader->Next().ok());
    WriteInPlace(JoinPath(small.folder, "log.csv"), other);
    absl::Status status;
    while (status.ok()) {
      auto batch = opened->reader->Next();
      status = batch.status();
      ASSERT_TRUE(!batch.ok() || *batch != nullptr) << "ended without a word";
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("log.csv: was written to"), HasSubstr("; put it back")));
  }
}

// Opens lane 0 of 1 on a given list. `schema`: of a job whose files are gone since.
absl::StatusOr<Opened> OpenOn(const Job& job, const std::vector<LogFile>& files, const Cursor& start,
                              std::shared_ptr<const LogSchema> schema = nullptr) {
  Opened opened;
  opened.files->Append(files, true);
  opened.options.job = job;
  opened.options.logs = LogsOf(job);
  opened.options.schema = std::move(schema);
  opened.options.files = opened.files.get();
  opened.options.start = start;
  opened.options.env = Env::Real();
  HEARTH_ASSIGN_OR_RETURN(opened.reader, LaneReader::Open(opened.options));
  return opened;
}

TEST(LaneReader, AMendedFileGoesOnWhereTheTrainedPartIsTheSameAndIsRefusedWhereItIsNot) {
  const std::string text = Numbers(100, 400);
  std::string other_head = text;
  other_head[text.find("120,0")] = '9';
  for (const bool compressed : {false, true}) {
    Small small("", R"(slot { name: "id" table: "t" hash: RAW } log { name: "l" path: "log.csv" piece_bytes: 100
      piece_batches: 2 batch_size: 10 })");
    const auto put = [&](const std::string& content) { small.Write("log.csv", compressed ? Gzip(content) : content); };
    put(text);
    const auto before = ReadAll(small.job, 0, 1);
    const Cursor cursor = before[6]->cursor;
    ASSERT_TRUE(cursor.has_text_digest());
    put(text + "400,0\n401,0\n");
    std::vector<LogFile> files = *ListLogFiles(small.job, LogsOf(small.job));
    files[0].set_amended(true);
    auto opened = OpenOn(small.job, files, cursor);
    ASSERT_TRUE(opened.ok()) << opened.status();
    int64_t records = 0;
    for (const auto& batch : before) records += &batch - &before[0] <= 6 ? batch->records : 0;
    while (const auto batch = *opened->reader->Next()) records += batch->records;
    EXPECT_EQ(records, 302);

    for (const std::string& wrong : {other_head, text.substr(0, 60)}) {
      put(wrong);
      files = *ListLogFiles(small.job, LogsOf(small.job));
      files[0].set_amended(true);
      const absl::Status status = OpenOn(small.job, files, cursor).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("log.csv"));
    }
  }
}

TEST(LaneReader, AFileThatIsTakenOffIsSteppedOverFromWhereverTheLaneIsInIt) {
  Small small("", R"(slot { name: "id" table: "t" hash: RAW }
    log { name: "l" path: "a" path: "b" path: "c" piece_bytes: 100 batch_size: 10 })");
  for (const char* name : {"a", "b", "c"}) small.Write(name, Numbers(100, 150));
  const auto whole = ReadAll(small.job, 0, 1);
  std::vector<LogFile> files = *ListLogFiles(small.job, LogsOf(small.job));
  files[1].set_taken_off(true);
  const auto schema = LogSchema::Open(small.job, LogsOf(small.job));
  ASSERT_TRUE(schema.ok());
  ASSERT_TRUE(RemoveTree(JoinPath(small.folder, "b")).ok());
  for (const auto& at : whole) {
    if (at->kind != Batch::Kind::kRecords) continue;
    auto opened = OpenOn(small.job, files, at->cursor, *schema);
    ASSERT_TRUE(opened.ok()) << opened.status();
    std::vector<std::pair<uint32_t, uint64_t>> expected, got;
    for (const auto& batch : whole) {
      for (int64_t i = 0; i<batch->records&& & batch> & at; ++i) {
        if (batch->file_of[i] != 1) expected.emplace_back(batch->file_of[i], batch->offset[i]);
      }
    }
    while (const auto batch = *opened->reader->Next()) {
      for (int64_t i = 0; i < batch->records; ++i) got.emplace_back(batch->file_of[i], batch->offset[i]);
    }
    EXPECT_EQ(got, expected) << at->cursor.ShortDebugString();
  }
}

TEST(LaneReader, TheLastCursorOfAFileSaysSoAndAResumeFromItDoesNotNeedTheFile) {
  for (const bool compressed : {false, true}) {
    Small small("", R"(slot { name: "id" table: "t" hash: RAW }
      log { name: "l" path: "a" path: "b" piece_bytes: 100 piece_batches: 2 batch_size: 10 })");
    for (const char* name : {"a", "b"}) {
      small.Write(name, compressed ? Zstd(Numbers(100, 150)) : Numbers(100, 150));
    }
    const auto whole = ReadAll(small.job, 0, 1);
    const std::vector<LogFile> files = *ListLogFiles(small.job, LogsOf(small.job));
    const auto schema = LogSchema::Open(small.job, LogsOf(small.job));
    ASSERT_TRUE(schema.ok());
    size_t ends = 0;
    for (size_t i = 0; i + 1 < whole.size(); ++i) {
      const bool last = whole[i + 1]->kind != Batch::Kind::kRecords || whole[i + 1]->file_of[0] != whole[i]->file_of[0];
      EXPECT_EQ(whole[i]->cursor.file_ended(), last) << i;
      if (!last || whole[i]->file_of[0] != 0) continue;
      ++ends;
      ASSERT_TRUE(RemoveTree(JoinPath(small.folder, "a")).ok());
      auto opened = OpenOn(small.job, files, whole[i]->cursor, *schema);
      ASSERT_TRUE(opened.ok()) << opened.status();
      for (size_t k = i + 1; k < whole.size(); ++k) {
        auto batch = opened->reader->Next();
        ASSERT_TRUE(batch.ok()) << batch.status();
        ExpectSame(**batch, *whole[k]);
      }
    }
    EXPECT_EQ(ends, 1u);
  }
}

TEST(LaneReader, ACompressedLogThatIsShuffledKeepsItsOwnPiecesAloneAndWithinTheirBound) {
  Small small("", R"(slot { name: "id" table: "t" hash: RAW } log { name: "l" path: "log.csv" piece_batches: 1
    shuffle { pieces: true } batch_size: 10 } limits { spool_bytes_max: 1400 })");
  small.Write("log.csv", Zstd(Numbers(100, 400)));  // 1,800 bytes of records
  EXPECT_TRUE(OpenLane(small.job, 0, 2).ok());
  auto half = OpenLane(small.job, 0, 2);
  EXPECT_TRUE(half->reader->Next().ok()) << "half of the pieces, of half the batch each";
  auto all = OpenLane(small.job, 0, 1);
  const absl::Status status = all->reader->Next().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("limits.spool_bytes_max = 1400"));
}

TEST(LaneReader, ACursorBeyondTheFilesIsDataLoss) {
  Small small("id\n1\n", R"(slot { name: "id" table: "t" hash: RAW })");
  Cursor cursor;
  cursor.set_record(5);
  EXPECT_EQ(OpenLane(small.job, 0, 1, cursor).status().code(), absl::StatusCode::kDataLoss);
  cursor.set_file(3);
  EXPECT_EQ(OpenLane(small.job, 0, 1, cursor).status().code(), absl::StatusCode::kDataLoss);
}

TEST(LogSchema, TellsAllFaultsAtOnceWithLogColumnAndRemedy) {
  Small small("a,b\n1,2\n", R"(
    side_table { name: "s" path: "s.csv" key: "a" }
    side_table { name: "r" path: "s.csv" key: "a" }
    log { name: "days" join: "s" join: "r" where: "a >" absent_column: "gone" }
    slot { name: "a" table: "t" }
    slot { name: "clikc" table: "t" }
    slot { name: "gone" table: "t" }
    slot { name: "x" table: "t" }
    dense { name: "d" value: "b + c" }
    task { name: "y" category: "c" label: "is_y" mask: "sqrt(b) " })");
  small.Write("s.csv", "a,x\n1,2\n");
  const absl::Status status = LogSchema::Open(small.job, LogsOf(small.job)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  const std::vector<std::string> lines = absl::StrSplit(status.message(), '\n');
  EXPECT_THAT(
      lines,
      ElementsAre(
          HasSubstr("log.csv: log \"days\": where: expression \"a >\", position 4"),
          HasSubstr(
              "log.csv: log \"days\": slot \"clikc\": reads column \"clikc\", which neither the log nor a joined side "
              "table has; correct the name. Only where the log is meant to lack it: absent_column"),
          HasSubstr("log \"days\": slot \"x\": column \"x\" is in side tables s and r; write s.x"),
          HasSubstr("log \"days\": dense \"d\": reads column \"c\""),
          HasSubstr("log \"days\": label of task \"y\": reads column \"is_y\""),
          HasSubstr("log \"days\": mask of task \"y\": expression \"sqrt(b) \", position 1: there is no function"),
          HasSubstr("log.csv: its header has ")));
  // The check from headers alone says the same, each fault of an expression once.
  const absl::Status checked = LogSchema::Check(small.job, LogsOf(small.job));
  const std::vector<std::string> again = absl::StrSplit(checked.message(), '\n');
  EXPECT_EQ(again.size(), lines.size());
  EXPECT_EQ(again[0],
            "log \"days\": where: expression \"a >\", position 4" + lines[0].substr(lines[0].find("position 4") + 10));
  EXPECT_EQ(again.back(), lines.back());
}

TEST(LogSchema, AHeaderThatIsNotWhatTheJobExpectsIsShown) {
  Small small("User;click\n1;2\n", R"(slot { name: "user" table: "t" })");
  const auto faults = [&] { return std::string(LogSchema::Check(small.job, LogsOf(small.job)).message()); };
  EXPECT_THAT(faults(), HasSubstr("its header has 1 column: User;click; by another delimiter it has 2: set the log's "
                                  "delimiter: \";\""));
  small.job.mutable_log(0)->set_delimiter(";");
  EXPECT_THAT(faults(), HasSubstr("it has \"User\". Only"));
  EXPECT_THAT(faults(), HasSubstr("its header has 2 columns: User, click"));
  small.job.mutable_slot(0)->set_column("User");
  EXPECT_EQ(faults(), "");
}

TEST(LogSchema, WhatIsNoDelimitedTextIsNamedAsWhatItIs) {
  Small small("", R"(slot { name: "a" table: "t" })");
  const auto fault = [&](const std::string& text) {
    small.Write("log.csv", text);
    const absl::Status status = LogSchema::Check(small.job, LogsOf(small.job));
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("log.csv: "));
    return std::string(status.message());
  };
  using std::string;
  EXPECT_THAT(fault(string("PK\x03\x04\x14\0", 6)), HasSubstr("a zip archive"));
  EXPECT_THAT(fault("BZh91AY&SY\x01\x02"), HasSubstr("bzip2"));
  EXPECT_THAT(fault(string("\xfd"
                           "7zXZ\0",
                           6)),
              HasSubstr("xz"));
  EXPECT_THAT(fault("PAR1\x15\x04"), HasSubstr("Parquet"));
  EXPECT_THAT(fault(string("\xff\xfe"
                           "a\0",
                           4)),
              HasSubstr("UTF-16"));
  EXPECT_THAT(fault(string("a\0,\0b\0\n\0", 8)), HasSubstr("NUL byte"));
  EXPECT_THAT(fault("a,b\r1,2\r3,4\r"), HasSubstr("\\r"));
  // A header may begin as they do.
  small.Write("log.csv", "BZh,PAR1,a\n1,2,3\n");
  EXPECT_TRUE(LogSchema::Check(small.job, LogsOf(small.job)).ok());
  small.Write("log.csv", "PAR1,a\r\n1,2\r\n");
  EXPECT_TRUE(LogSchema::Check(small.job, LogsOf(small.job)).ok());
}

TEST(LogSchema, TheCheckReadsNoRowOfASideTableAndNoFileForAnExpression) {
  Small small("a\n1\n", R"(
    side_table { name: "s" path: "s.csv" key: "a" rows_max: 1 } log { join: "s" } slot { name: "a" table: "t" })");
  small.Write("s.csv", "a\n1\n2\n3\n");
  EXPECT_TRUE(LogSchema::Check(small.job, LogsOf(small.job)).ok());
  EXPECT_FALSE(LogSchema::Open(small.job, LogsOf(small.job)).ok());
  small.Write("s.csv", "b\n1\n");
  EXPECT_THAT(std::string(LogSchema::Check(small.job, LogsOf(small.job)).message()), HasSubstr("it has b"));
  small.job.mutable_log(0)->clear_path();
  small.job.mutable_log(0)->clear_join();
  small.job.mutable_log(0)->set_directory("grows");
  small.job.mutable_slot(0)->set_value("a +");
  EXPECT_THAT(std::string(LogSchema::Check(small.job, LogsOf(small.job)).message()),
              HasSubstr("slot \"a\": expression"));
}

TEST(LogSchema, ChecksTheUserOfASplitWithItsColumns) {
  Small small("a,b\n1,2\n", R"(slot { name: "a" table: "t" })");
  EXPECT_TRUE(LogSchema::Open(small.job, LogsOf(small.job), {"b"}).ok());
  const absl::Status status = LogSchema::Open(small.job, LogsOf(small.job), {"visitor"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("log \"log\": the user of GAUC: reads column \"visitor\", which"));
}

TEST(LogSchema, AMissingFileIsNotFoundWithItsPath) {
  Small small("a\n1\n", R"(
    side_table { name: "s" path: "s.csv" key: "a" } log { name: "days" join: "s" path: "log.csv" path: "nowhere.csv" }
    slot { name: "a" table: "t" })");
  const absl::Status status = LogSchema::Open(small.job, LogsOf(small.job)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("s.csv"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("nowhere.csv"));
  EXPECT_EQ(ListLogFiles(small.job, LogsOf(small.job)).status().code(), absl::StatusCode::kNotFound);
}

TEST(LogSchema, SideTablesAreCheckedWhenTheyAreLoaded) {
  Small small("a\n1\n", R"(
    side_table { name: "s" path: "s.csv" key: "a" rows_max: 3 } log { join: "s" } slot { name: "a" table: "t" })");
  const auto code_of = [&](const std::string& text, const std::string& cause) {
    small.Write("s.csv", text);
    const absl::Status status = LogSchema::Open(small.job, LogsOf(small.job)).status();
    EXPECT_THAT(std::string(status.message()), HasSubstr(cause));
    return status.code();
  };
  EXPECT_EQ(code_of("a,b\n1,1\n2,2\n1,3\n", "byte 12: the key \"1\" comes a second time"), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code_of("a,b\n1\n", "byte 4: has another number of fields"), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code_of("a\n1\n2\n3\n4\n", "more than 3 rows"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code_of("b\n1\n", "has no column \"a\""), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code_of("", "is empty"), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code_of("a\n1\n2\n3\n", ""), absl::StatusCode::kOk);
}

TEST(LogSchema, ASideTableThatIsNotTheExpectedFileIsDataLoss) {
  Small small("a\n1\n", R"(
    side_table { name: "s" path: "s.csv" key: "a" } log { join: "s" } slot { name: "a" table: "t" })");
  small.Write("s.csv", "a\n1\n");
  SideTableFile expected;
  expected.set_name("s");
  expected.set_bytes(4);
  expected.set_xxh3(XXH3_64bits("a\n1\n", 4));
  EXPECT_TRUE(LogSchema::Open(small.job, LogsOf(small.job), {}, {expected}).ok());
  for (const char* const other : {"a\n2\n", "a\n1\n2\n"}) {
    small.Write("s.csv", other);
    EXPECT_TRUE(LogSchema::Open(small.job, LogsOf(small.job)).ok());
    const absl::Status status = LogSchema::Open(small.job, LogsOf(small.job), {}, {expected}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("side_table \"s\""), HasSubstr("s.csv")));
  }
}

// --- base rates ---

TEST(CountBaseRates, CountsTheHeadOfEachLogInFileOrder) {
  Small small("y,z\n1,\n1,0\n0,1\n0,0\n", R"(
    log { name: "a" path: "log.csv" shuffle { pieces: true window_records_max: 9 } }
    log { name: "b" path: "b.csv" known_task: "y" }
    task { name: "y" category: "c" label: "y" }
    task { name: "z" category: "c" label: "z" }
    task { name: "w" category: "c" label: "y" base_rate: 0.25 }
    slot { name: "y" table: "t" hash: RAW })");
  small.Write("b.csv", Zstd("y\nbad\n1\n0\n1\n"));
  const std::vector<Log> logs = LogsOf(small.job);
  const auto schema = LogSchema::Open(small.job, logs);
  ASSERT_TRUE(schema.ok()) << schema.status();
  const auto files = ListLogFiles(small.job, logs);
  // a: y 1 1 0, z ? 0 1; b: y 1 0 1.
  const auto rates = CountBaseRates(small.job, *schema, *files, 3);
  ASSERT_TRUE(rates.ok()) << rates.status();
  EXPECT_THAT(*rates, ElementsAre(4.5 / 7, 1.5 / 3, 0.25));
  EXPECT_THAT(*CountBaseRates(small.job, *schema, *files, 0), ElementsAre(0.5, 0.5, 0.25));
}

// --- growing directories ---

TEST(LaneReader, TailsADirectoryAndJoinsIdleWhileNothingComes) {
  Small small("", R"(
    slot { name: "id" table: "t" hash: RAW } log { name: "l" directory: "in" })");
  small.job.mutable_training()->set_batch_size(4);
  small.job.mutable_training()->set_idle_ms(1);
  small.job.mutable_log(0)->clear_path();
  ASSERT_TRUE(MakeDirectories(JoinPath(small.folder, "in")).ok());
  const auto grow = [&](uint32_t number, const std::string& text) {
    LogFile file;
    file.set_number(number);
    file.set_path(absl::StrCat("in/", number));
    small.Write(file.path(), text);
    file.set_bytes(text.size());
    file.set_digest(*HashFileHead(JoinPath(small.folder, file.path()), 65536));
    return std::vector<LogFile>{file};
  };
  FileList files(Env::Real());
  LaneReaderOptions options;
  options.job = small.job;
  options.logs = LogsOf(small.job);
  options.files = &files;
  options.env = Env::Real();
  auto reader = LaneReader::Open(options);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto next = [&] {
    auto batch = (*reader)->Next();
    EXPECT_TRUE(batch.ok()) << batch.status();
    return *std::move(batch);
  };
  EXPECT_EQ(next()->kind, Batch::Kind::kIdle);
  files.Append(grow(0, "id\n1\n2\n3\n4\n5\n"), false);
  EXPECT_EQ(next()->records, 4);
  const auto second = next();
  EXPECT_EQ(second->records, 1);
  files.Append(grow(1, "id\nbad\n"), false);
  const auto idle = next();
  EXPECT_EQ(idle->kind, Batch::Kind::kIdle);
  EXPECT_EQ(idle->cursor.SerializeAsString(), second->cursor.SerializeAsString());
  EXPECT_EQ(idle->delta.read(), 0u) << "a resume from here reads the bad record again";
  files.Append(grow(2, "id\n6\n"), true);
  const auto third = next();
  EXPECT_EQ(third->records, 1);
  EXPECT_EQ(third->delta.rejected(), 1u);
  EXPECT_EQ(next()->kind, Batch::Kind::kAtEnd);
  EXPECT_EQ(next(), nullptr);
}

// Time that stands still but for waits, which take just as long as they may.
class LeapingEnv : public Env {
 public:
  int64_t NowUs() override { return now_us; }
  int64_t WallUs() override { return now_us; }
  std::unique_ptr<Event> NewEvent() override {
    class LeapingEvent : public Event {
     public:
      explicit LeapingEvent(LeapingEnv* env) : env_(env) {}
      void Notify() override { notified_ = true; }
      bool WaitUntil(int64_t deadline_us) override {
        if (std::exchange(notified_, false)) return true;
        HEARTH_CHECK(deadline_us != kNever, "waits for ever");
        env_->now_us = std::max(env_->now_us, deadline_us);
        return false;
      }

     private:
      LeapingEnv* const env_;
      bool notified_ = false;
    };
    return std::make_unique<LeapingEvent>(this);
  }
  std::unique_ptr<Thread> StartThread(absl::string_view, std::function<void()>) override { return nullptr; }
  int64_t now_us = 1'000'000'000;
};

TEST(LaneReader, DryLanesTogetherWaitIdleMsFromWhenTheyRanDry) {
  constexpr uint32_t kLanes = 4;
  constexpr int64_t kIdleUs = 100'000;
  Small small("id\n1\n2\n3\n4\n", R"(
    slot { name: "id" table: "t" hash: RAW } log { name: "l" path: "log.csv" piece_bytes: 2 })");
  small.job.mutable_training()->set_batch_size(4);
  small.job.mutable_training()->set_idle_ms(100);
  LeapingEnv env;
  FileList files(&env);
  files.Append(*ListLogFiles(small.job, LogsOf(small.job)), false);
  small.job.mutable_log(0)->clear_path();
  small.job.mutable_log(0)->set_directory("in");
  std::atomic<bool> rests{true};
  std::vector<std::unique_ptr<LaneReader>> lanes;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    LaneReaderOptions options;
    options.job = small.job;
    options.logs = LogsOf(small.job);
    options.files = &files;
    options.lane = lane;
    options.lanes = kLanes;
    options.env = &env;
    options.job_rests = &rests;
    lanes.push_back(*LaneReader::Open(options));
  }
  const auto round = [&](Batch::Kind kind) {  // as the pipeline's read thread asks; the time it takes
    const int64_t begin_us = env.now_us;
    for (auto& lane : lanes) EXPECT_EQ((*lane->Next())->kind, kind);
    return env.now_us - begin_us;
  };
  EXPECT_EQ(round(Batch::Kind::kRecords), 0);
  EXPECT_EQ(round(Batch::Kind::kIdle), kIdleUs);
  EXPECT_EQ(round(Batch::Kind::kIdle), kIdleUs) << "nobody has anything: no more than one such step in idle_ms";
  rests = false;
  EXPECT_EQ(round(Batch::Kind::kIdle), 0) << "others have records: who has been dry for so long holds nobody up again";
  rests = true;
  env.now_us += kIdleUs / 4;  // the trainer was busy for so long
  EXPECT_EQ(round(Batch::Kind::kIdle), kIdleUs - kIdleUs / 4);
  files.Append({}, true);
  EXPECT_EQ(round(Batch::Kind::kAtEnd), 0);
}

TEST(LaneReader, WaitsForFilesThatAnotherThreadAppends) {
  Small small("id\n1\n2\n", R"(slot { name: "id" table: "t" hash: RAW } log { path: "log.csv" path: "log.csv" })");
  const auto listed = ListLogFiles(small.job, LogsOf(small.job));
  FileList files(Env::Real());
  LaneReaderOptions options;
  options.job = small.job;
  options.logs = LogsOf(small.job);
  options.logs[0].clear_path();
  options.logs[0].set_directory("in");  // the files of a log with paths are listed at once
  options.files = &files;
  options.env = Env::Real();
  auto reader = LaneReader::Open(options);
  ASSERT_TRUE(reader.ok());
  const auto appender = Env::Real()->StartThread("appender", [&] {
    files.Append({(*listed)[0]}, false);
    files.Append({(*listed)[1]}, true);
  });
  int64_t records = 0;
  while (true) {
    const auto batch = *(*reader)->Next();
    ASSERT_NE(batch, nullptr);
    if (batch->kind == Batch::Kind::kAtEnd) break;
    EXPECT_EQ(batch->kind, Batch::Kind::kRecords);
    records += batch->records;
  }
  EXPECT_EQ(records, 4);
}

}  // namespace
}  // namespace hearth
