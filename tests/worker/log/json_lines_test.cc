#include "worker/log/json_lines.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/job/config.h"
#include "tests/worker/text_files.h"
#include "worker/log/log_reader.h"
#include "worker/log/record_plan.h"

namespace hearth {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// The texts of the columns of one record; a column with a * in front may be an array.
struct Texts {
  std::string fault;
  std::vector<std::string> of;
};
Texts Split(const std::vector<std::string>& names, const std::string& record) {
  std::vector<JsonFields::Column> columns;
  for (const std::string& name : names) {
    columns.push_back({name[0] == '*' ? name.substr(1) : name, name[0] == '*'});
  }
  const JsonFields plan(columns);
  JsonParser parser;
  std::vector<absl::string_view> fields = {"left over"};
  std::string scratch = "left over";
  Texts texts;
  EXPECT_EQ(plan.Split(R"({"a": "of the record before"})", &parser, &fields, &scratch), "");
  texts.fault = plan.Split(record, &parser, &fields, &scratch);
  for (const absl::string_view field : fields) texts.of.emplace_back(field);
  return texts;
}

TEST(JsonFields, TakesTheTextsOfTheColumnsThatAJobReads) {
  const Texts texts = Split({"user.id", "b", "text", "none", "gone", "user.place.x", "on", "off"},
                            R"( {"b": 7, "unread": [{"b": 1}], "user": {"id": "u\"1\u00e9", "place": {"x": -3}},)"
                            R"( "text": "a,b", "none": null, "on": true, "off": false} )");
  EXPECT_EQ(texts.fault, "");
  EXPECT_THAT(texts.of, ElementsAre("u\"1é", "7", "a,b", "", "", "-3", "1", "0"));
}

TEST(JsonFields, WritesANumberAsAnIdIsWritten) {
  const auto number = [](const std::string& text) { return Split({"n"}, absl::StrCat(R"({"n": )", text, "}")); };
  EXPECT_EQ(number("1").of[0], "1");
  EXPECT_EQ(number("1.0").of[0], "1");
  EXPECT_EQ(number("1e2").of[0], "100");
  EXPECT_EQ(number("-0").of[0], "0");
  EXPECT_EQ(number("0.1").of[0], "0.1");
  EXPECT_EQ(number("-9223372036854775808").of[0], "-9223372036854775808");
  EXPECT_EQ(number("18446744073709551615").of[0], "18446744073709551615");
  EXPECT_THAT(number("18446744073709551616").fault, HasSubstr("is no JSON"));
  EXPECT_THAT(number("1e400").fault, HasSubstr("is no JSON"));
  EXPECT_THAT(number("NaN").fault, HasSubstr("is no JSON"));
}

TEST(JsonFields, APathsPointsMayStandInAKey) {
  EXPECT_THAT(Split({"a.b.c", "a.d"}, R"({"a.b": {"c": 1}, "a": {"d": 2}})").of, ElementsAre("1", "2"));
  EXPECT_THAT(Split({"a.b.c"}, R"({"a.b.c": 5, "a.b.c.d": 6, ".": 7, "": 8, "a.": 9})").of, ElementsAre("5"));
}

TEST(JsonFields, OfAKeyThatComesTwiceTheLaterHolds) {
  EXPECT_THAT(Split({"a"}, R"({"a": 1, "a": "x"})").of, ElementsAre("x"));
  EXPECT_THAT(Split({"a"}, R"({"a": "x", "a": 1})").of, ElementsAre("1"));
  EXPECT_THAT(Split({"a"}, R"({"a": "x", "a": null})").of, ElementsAre(""));
}

TEST(JsonFields, MarksTheElementsOfAnArrayWhereAListReadsIt) {
  EXPECT_THAT(Split({"*l", "b"}, R"({"l": ["a,b", 2.0, null, true], "b": "x"})").of, ElementsAre("\x1e"
                                                                                                 "a,b\x1e"
                                                                                                 "2\x1e\x1e"
                                                                                                 "1",
                                                                                                 "x"));
  EXPECT_THAT(Split({"*l"}, R"({"l": []})").of, ElementsAre(""));
  EXPECT_THAT(Split({"*l"}, R"({"l": "a,b"})").of, ElementsAre("a,b"));
}

TEST(JsonFields, ABadRecordIsToldWithItsReason) {
  EXPECT_THAT(Split({"a"}, "").fault, HasSubstr("is no JSON: "));
  EXPECT_THAT(Split({"a"}, R"({"a": 1)").fault, HasSubstr("is no JSON: "));
  EXPECT_THAT(Split({"a"}, R"({"a": 1} {"a": 2})").fault, HasSubstr("is no JSON: "));
  EXPECT_THAT(Split({"a"}, "{\"a\": \"\xff\"}").fault, HasSubstr("is no JSON: "));
  EXPECT_THAT(Split({"a"}, R"({"a": "\ud800"})").fault, HasSubstr("is no JSON: "));
  EXPECT_EQ(Split({"a"}, "[1]").fault, "is JSON, but no object");
  EXPECT_EQ(Split({"a"}, "7").fault, "is JSON, but no object");
  EXPECT_EQ(Split({"a"}, R"({"a": {"b": 1}})").fault, "column \"a\" holds an object; name a path in it, as user.id");
  EXPECT_THAT(Split({"a", "a.b"}, R"({"a": {"b": 1}})").fault, HasSubstr("holds an object"));
  EXPECT_EQ(Split({"a"}, R"({"a": [1]})").fault,
            "column \"a\" holds an array, which a slot of kind LIST alone can read");
  EXPECT_EQ(Split({"*a"}, R"({"a": [[1]]})").fault, "column \"a\" holds an array of arrays or objects");
  EXPECT_THAT(Split({"*a"}, R"({"a": ["x\u001ey"]})").fault, HasSubstr("U+001E"));
  const std::string deep = std::string(5000, '[') + std::string(5000, ']');
  EXPECT_THAT(Split({"a"}, absl::StrCat(R"({"a": 1, "b": )", deep, "}")).fault, HasSubstr("is no JSON: "));
}

// --- as a log ---

class JsonLog : public testing::Test {
 protected:
  JsonLog() : folder_(TestFolder()) {}
  Job JobOf(const std::string& log, const std::string& more) {
    auto job = ParseJob(absl::StrCat(R"(name: "json" log { name: "days" path: "log" )", log, "} ", R"(
        slot { name: "id" column: "user.id" table: "t" }
        slot { name: "tags" table: "t" kind: LIST values_max: 3 }
        slot { name: "raw" table: "u" hash: RAW }
        slot { name: "age" column: "side.age" table: "t" kind: BUCKET boundary: [30] }
        dense { name: "x" value: "user.x / 2" }
        task { name: "y" category: "c" label: "y" mask: "shown" }
        side_table { name: "side" path: "side.csv" key: "k" log_key: "user.id" }
        table { name: "t" dim: 4 } table { name: "u" dim: 4 }
        model { kind: SHARED_BOTTOM } training { batch_size: 16 })",
                                     more),
                        "test");
    EXPECT_TRUE(job.ok()) << job.status();
    job->set_data_dir(folder_);
    return *job;
  }
  void Write(const std::string& name, const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(JoinPath(folder_, name), text).ok());
  }
  // All that is read in an epoch.
  std::vector<std::unique_ptr<Batch>> ReadAll(const Job& job) {
    std::vector<std::unique_ptr<Batch>> batches;
    const std::vector<Log> logs(job.log().begin(), job.log().end());
    FileList files(Env::Real());
    auto listed = ListLogFiles(job, logs);
    EXPECT_TRUE(listed.ok()) << listed.status();
    files.Append(*listed, true);
    LaneReaderOptions options;
    options.job = job;
    options.logs = logs;
    options.files = &files;
    options.env = Env::Real();
    auto reader = LaneReader::Open(options);
    EXPECT_TRUE(reader.ok()) << reader.status();
    while (reader.ok()) {
      auto batch = (*reader)->Next();
      EXPECT_TRUE(batch.ok()) << batch.status();
      if (!batch.ok() || *batch == nullptr) break;
      batches.push_back(*std::move(batch));
    }
    return batches;
  }
  std::unique_ptr<Batch> First(const Job& job) {
    auto batches = ReadAll(job);
    return batches.empty() ? nullptr : std::move(batches[0]);
  }
  absl::Status Check(const Job& job) { return LogSchema::Check(job, {job.log().begin(), job.log().end()}); }

  const std::string folder_;
};

TEST_F(JsonLog, GivesTheBatchThatTheSameDelimitedLogGives) {
  Write("side.csv", "k,age\n1,20\n2,40\n");
  Write("log",
        "user.id;tags;raw;user.x;y;shown\n"
        "1;a,b;5;3;1;1\n2;;0;0.5;0;1\n;c,,d,e,f;18;;1;0\n1.5;7;3;1e300;0;\n");
  const auto delimited = First(JobOf(R"(delimiter: ";" join: "side")", ""));
  Write("log", R"({"user": {"id": 1, "x": 3}, "tags": ["a", "b"], "raw": 5, "y": 1, "shown": true})"
               "\n"
               R"({"user.id": "2", "user": {"x": 0.5}, "tags": [], "raw": 0.0, "y": false, "shown": 1})"
               "\n\n"
               R"({"user": {"id": null}, "tags": "c,,d,e,f", "raw": "18", "y": "1", "shown": 0})"
               "\r\n"
               R"({"user": {"id": 1.5, "x": 1e300}, "tags": [7], "raw": 3, "y": 0})");
  const auto json = First(JobOf(R"(format: JSON_LINES join: "side")", ""));
  ASSERT_NE(delimited, nullptr);
  ASSERT_NE(json, nullptr);
  ASSERT_EQ(json->records, 4);
  EXPECT_EQ(json->delta.rejected(), 0u) << json->dead_letters;
  ASSERT_EQ(json->groups.size(), delimited->groups.size());
  for (size_t i = 0; i < json->groups.size(); ++i) {
    EXPECT_EQ(json->groups[i].unique, delimited->groups[i].unique);
    EXPECT_EQ(json->groups[i].row_of, delimited->groups[i].row_of);
    EXPECT_EQ(json->groups[i].offsets, delimited->groups[i].offsets);
  }
  EXPECT_EQ(json->dense, delimited->dense);
  EXPECT_EQ(json->labels, delimited->labels);
  EXPECT_EQ(json->mask, delimited->mask);
}

TEST_F(JsonLog, SetsBadRecordsAsideWithPlaceAndReason) {
  Write("side.csv", "k,age\n1,20\n");
  Write("log",
        "\xef\xbb\xbf{\"user\": {\"id\": 1}, \"raw\": 1}\n{\"user\": [1]}\nnot json\n{\"raw\": -1}\n"
        "{\"user\": {\"id\": 2}, \"raw\": 1, \"tags\": [{}]}\n");
  Job job = JobOf(R"(format: JSON_LINES join: "side" column: "y" column: "shown" column: "tags" column: "user.x")", "");
  const auto batch = First(job);
  ASSERT_NE(batch, nullptr);
  EXPECT_EQ(batch->records, 2) << batch->dead_letters;  // an array where an object might be holds no user.id
  EXPECT_EQ(batch->delta.rejected(), 3u);
  EXPECT_THAT(batch->dead_letters, HasSubstr("log\t47\tis no JSON: "));
  EXPECT_THAT(batch->dead_letters, HasSubstr("log\t56\tRAW slot 2: \"-1\" is no integer"));
  EXPECT_THAT(batch->dead_letters, HasSubstr("log\t68\tcolumn \"tags\" holds an array of arrays or objects"));
}

TEST_F(JsonLog, ANameThatNoRecordHasIsToldWithWhatTheyHave) {
  Write("side.csv", "k,age\n1,20\n");
  Write("log", "{\"user\": {\"id\": 1, \"x\": 2}, \"raw\": 1, \"tag\": [], \"y\": 1, \"shown\": 1}\n");
  const auto faults = [&](const std::string& log) {
    return std::string(Check(JobOf(absl::StrCat(R"(format: JSON_LINES join: "side" )", log), "")).message());
  };
  EXPECT_THAT(faults(""), HasSubstr("log \"days\": column \"tags\" is in none of the first records; correct the name"));
  EXPECT_THAT(faults(""), HasSubstr("its first records have 6 columns: raw, shown, tag, user.id, user.x, y"));
  EXPECT_EQ(faults(R"(column: "tags")"), "");
  EXPECT_EQ(faults(R"(absent_column: "tags")"), "");
}

TEST_F(JsonLog, WhatHoldsNoObjectIsDataLossAndJsonUnderAnotherNameIsRecognised) {
  Write("side.csv", "k,age\n1,20\n");
  Write("log", "a,b\n1,2\n");
  const absl::Status status = Check(JobOf(R"(format: JSON_LINES join: "side")", ""));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("log: byte 0: is no JSON: "));
  EXPECT_THAT(std::string(status.message()), HasSubstr("correct log.format"));
  Write("log", "{\"user\": {\"id\": 1}}\n");
  EXPECT_THAT(std::string(Check(JobOf(R"(join: "side")", "")).message()),
              HasSubstr("it looks like JSON lines: set format: JSON_LINES"));
}

TEST_F(JsonLog, ReadsWhatIsPackedAndCutsPlainFilesIntoPieces) {
  Write("side.csv", "k,age\n1,20\n");
  std::string text;
  for (int i = 0; i < 40; ++i) {
    absl::StrAppend(&text, "{\"user\": {\"id\": ", i, ", \"x\": 1}, \"raw\": ", i, ", \"tags\": [], \"y\": 1, ",
                    "\"shown\": 1}\n");
  }
  const auto records = [&](const std::string& log) {
    int64_t sum = 0;
    for (const auto& batch : ReadAll(JobOf(absl::StrCat(R"(format: JSON_LINES join: "side" )", log), ""))) {
      sum += batch->records;
      EXPECT_EQ(batch->delta.rejected(), 0u) << batch->dead_letters;
    }
    return sum;
  };
  Write("log", text);
  EXPECT_EQ(records("piece_bytes: 100"), 40);
  Write("log", Gzip(text));
  EXPECT_EQ(records(""), 40);
  Write("log", Zstd(text));
  EXPECT_EQ(records("piece_batches: 1"), 40);
}

}  // namespace
}  // namespace hearth
