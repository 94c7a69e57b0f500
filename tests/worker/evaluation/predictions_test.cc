#include "worker/evaluation/predictions.h"

#include <gtest/gtest.h>
#include <zstd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "tests/worker/text_files.h"

namespace hearth {
namespace {

PredictionRows RandomRows(Random* random, size_t records, bool users) {
  PredictionRows rows;
  rows.tasks = 2;
  for (size_t i = 0; i < records; ++i) {
    rows.file.push_back(static_cast<uint32_t>(i % 3));
    rows.offset.push_back(i * 17);
    for (int t = 0; t < 2; ++t) {
      rows.logits.push_back(static_cast<float>(random->Uniform() * 8 - 4));
      rows.labels.push_back(random->Below(4) > 0 ? static_cast<uint8_t>(random->Below(2)) : PredictionRows::kMasked);
    }
    if (!users) continue;
    rows.user.push_back(random->Below(20));
    rows.user_text.push_back(absl::StrCat("u", rows.user.back()));
  }
  return rows;
}

void ExpectEqual(const PredictionRows& a, const PredictionRows& b) {
  EXPECT_EQ(a.file, b.file);
  EXPECT_EQ(a.offset, b.offset);
  EXPECT_EQ(a.logits, b.logits);
  EXPECT_EQ(a.labels, b.labels);
  EXPECT_EQ(a.user, b.user);
  EXPECT_EQ(a.user_text, b.user_text);
  EXPECT_EQ(a.read, b.read);
  EXPECT_EQ(a.rejected, b.rejected);
  EXPECT_EQ(a.bad_record, b.bad_record);
}

std::string Decompress(const std::string& bytes) {
  std::string text(1 << 20, '\0');
  const size_t size = ZSTD_decompress(text.data(), text.size(), bytes.data(), bytes.size());
  EXPECT_FALSE(ZSTD_isError(size));
  text.resize(ZSTD_isError(size) ? 0 : size);
  return text;
}

TEST(Predictions, TravelInChunksAndMergeIntoOneOrderHoweverTheyWereDealt) {
  Random random(3);
  for (const bool users : {false, true}) {
    PredictionRows truth = RandomRows(&random, 100, users);
    truth.read = 107;
    truth.rejected = 5;
    truth.bad_record = "b.csv\t7\tbad";
    ASSERT_TRUE(SortPredictions(&truth).ok());
    // Deal the rows to three workers at random, send them in chunks, gather them in any order.
    std::vector<PredictionRows> dealt(3);
    dealt[2].bad_record = "c.csv\t3\tbad";
    for (size_t i = 0; i < truth.records(); ++i) {
      const auto one = DecodePredictions(EncodePredictions(truth, i, i + 1, Header()).span());
      ASSERT_TRUE(one.ok()) << one.status();
      dealt[random.Below(3)].Append(*one);
    }
    PredictionRows merged;
    for (size_t w : {2u, 0u, 1u}) {
      for (size_t begin = 0; begin < dealt[w].records(); begin += 7) {
        const size_t end = std::min(dealt[w].records(), begin + 7);
        const auto chunk = DecodePredictions(EncodePredictions(dealt[w], begin, end, Header()).span());
        ASSERT_TRUE(chunk.ok()) << chunk.status();
        merged.Append(*chunk);
      }
    }
    ASSERT_TRUE(SortPredictions(&merged).ok());
    ExpectEqual(merged, truth);
  }
}

TEST(Predictions, RefuseATruncatedMessageAndARecordTwice) {
  Random random(4);
  PredictionRows rows = RandomRows(&random, 10, true);
  const Bytes message = EncodePredictions(rows, 0, 10, Header());
  const auto header = DecodeHeader(message.span());
  ASSERT_TRUE(header.ok());
  const absl::Span<const char> body = OpaqueBody(message.span());
  for (size_t size = 0; size < body.size(); ++size) {
    Bytes shorter = EncodeOpaque(*header, body.subspan(0, size));
    EXPECT_EQ(DecodePredictions(shorter.span()).status().code(), absl::StatusCode::kInternal) << size;
  }
  rows.Append(*DecodePredictions(EncodePredictions(rows, 4, 5, Header()).span()));
  EXPECT_EQ(SortPredictions(&rows).code(), absl::StatusCode::kDataLoss);
}

TEST(Predictions, AreScoredOverUnmaskedRecordsAlone) {
  PredictionRows rows;
  rows.tasks = 1;
  rows.file = {0, 0, 0, 0};
  rows.offset = {0, 1, 2, 3};
  rows.logits = {2, 1, 0, 9};
  rows.labels = {1, 0, 1, PredictionRows::kMasked};
  const Evaluation evaluation = ScorePredictions(rows, {"click"}, "test", 40);
  EXPECT_EQ(evaluation.split(), "test");
  EXPECT_EQ(evaluation.step(), 40u);
  ASSERT_EQ(evaluation.task_size(), 1);
  EXPECT_EQ(evaluation.task(0).samples(), 3u);
  EXPECT_EQ(evaluation.task(0).positives(), 2u);
  EXPECT_DOUBLE_EQ(evaluation.task(0).auc(), 0.5);
  EXPECT_FALSE(evaluation.task(0).has_gauc());
}

TEST(Predictions, AreWrittenAsTheFormatSays) {
  PredictionRows rows;
  rows.tasks = 2;
  rows.file = {0, 1};
  rows.offset = {5, 0};
  rows.logits = {0, 1000, -2, 0.5};
  rows.labels = {1, PredictionRows::kMasked, 0, 0};
  rows.user_text = {"anna", "b\tb"};
  std::vector<LogFile> files(2);
  files[0].set_path("a.csv");
  files[1].set_path("b.csv");
  const std::string folder = JoinPath(TestFolder(), "predictions");
  ASSERT_TRUE(MakeDirectories(folder).ok());
  const std::string path = JoinPath(folder, "test.tsv.zst");
  const auto file = OutputFile::Create(path, OutputFile::Links::kReplace).value();
  ASSERT_TRUE(WritePredictions(file.get(), rows, {"click", "like"}, files).ok());
  const auto bytes = ReadFile(path);
  ASSERT_TRUE(bytes.ok());
  EXPECT_EQ(Decompress(*bytes),
            "source\toffset\tuser\tlabel_click\tp_click\tlabel_like\tp_like\n"
            "a.csv\t5\tanna\t1\t0.5\t\t1\n"
            "b.csv\t0\tb b\t0\t0.119202922\t0\t0.6224593312\n");
  EXPECT_EQ(ListDirectory(folder)->size(), 1u) << "something is left beside it";
}

}  // namespace
}  // namespace hearth
