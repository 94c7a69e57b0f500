#include "worker/log/delimited.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "common/base/env.h"
#include "tests/worker/text_files.h"
#include "worker/log/text_source.h"

namespace hearth {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// Gives the text in pieces of at most `step` bytes.
class SlowSource : public TextSource {
 public:
  SlowSource(std::string text, size_t step) : text_(std::move(text)), step_(step) {}
  absl::StatusOr<size_t> Read(char* out, size_t size) override {
    const size_t taken = std::min({size, step_, text_.size() - at_});
    std::memcpy(out, text_.data() + at_, taken);
    at_ += taken;
    return taken;
  }

 private:
  const std::string text_;
  const size_t step_;
  size_t at_ = 0;
};

struct Cut {
  std::vector<std::string> records;  // "<too long>" for those
  std::vector<uint64_t> offsets;
};
Cut CutUp(const std::string& text, RecordSplitter::Options options, size_t step = 7) {
  RecordSplitter splitter(std::make_unique<SlowSource>(text, step), 0, options);
  Cut cut;
  std::string kept;
  RecordText record;
  while (*splitter.Next(&kept, &record)) {
    cut.records.push_back(record.too_long ? "<too long>" : kept.substr(record.begin, record.size));
    cut.offsets.push_back(record.offset);
  }
  return cut;
}

std::vector<std::string> Fields(absl::string_view record, std::string* reason = nullptr) {
  std::vector<absl::string_view> fields;
  std::string scratch;
  const absl::string_view cause = SplitFields(record, ',', &fields, &scratch);
  if (reason != nullptr) *reason = std::string(cause);
  std::vector<std::string> texts;
  for (const absl::string_view field : fields) texts.emplace_back(field);
  return texts;
}

TEST(SplitFields, UndoesQuotes) {
  EXPECT_THAT(Fields("a,,c"), ElementsAre("a", "", "c"));
  EXPECT_THAT(Fields("a,"), ElementsAre("a", ""));
  EXPECT_THAT(Fields("\"a,b\",c"), ElementsAre("a,b", "c"));
  EXPECT_THAT(Fields("\"\",\"\"\"\",\"x\"\"y\"\"\",z"), ElementsAre("", "\"", "x\"y\"", "z"));
  EXPECT_THAT(Fields("5\" pipe,b"), ElementsAre("5\" pipe", "b"));
  EXPECT_THAT(Fields("\"a\nb\",c"), ElementsAre("a\nb", "c"));
}

TEST(SplitFields, SaysWhyARecordIsBad) {
  std::string reason;
  Fields("a,\"b", &reason);
  EXPECT_EQ(reason, "unterminated quote");
  Fields("a,\"b\"\"", &reason);
  EXPECT_EQ(reason, "unterminated quote");
  Fields("\"a\"b,c", &reason);
  EXPECT_EQ(reason, "text after a closing quote");
}

TEST(RecordSplitter, CutsAtNewlinesAndStepsOverEmptyLines) {
  const Cut cut = CutUp("a,b\r\n\n\r\nc\n\"d\ne", {});
  EXPECT_THAT(cut.records, ElementsAre("a,b", "c", "\"d", "e"));
  EXPECT_THAT(cut.offsets, ElementsAre(0, 8, 10, 13));
}

TEST(RecordSplitter, KeepsQuotedNewlinesWhereTheLogSaysSo) {
  RecordSplitter::Options options;
  options.multiline = true;
  const Cut cut = CutUp("a,\"b\nc\"\n\"x\"\"\n\"\"y\",1\nq\"r\ns\n", options);
  EXPECT_THAT(cut.records, ElementsAre("a,\"b\nc\"", "\"x\"\"\n\"\"y\",1", "q\"r", "s"));
}

TEST(RecordSplitter, DoesNotKeepRecordsThatAreTooLong) {
  RecordSplitter::Options options;
  options.record_bytes_max = 4;
  EXPECT_THAT(CutUp("abcd\nabcde\nx\n", options).records, ElementsAre("abcd", "<too long>", "x"));
  options.multiline = true;
  // The quote that nobody closes costs the lines up to the limit, not the file.
  EXPECT_THAT(CutUp("\"ab\ncdef\nx\ny\n", options).records, ElementsAre("<too long>", "x", "y"));
}

// The slow twin reads byte by byte.
Cut ReferenceCut(const std::string& text, bool multiline) {
  Cut cut;
  std::string record;
  uint64_t start = 0;
  bool quoted = false;
  const auto end = [&](size_t next) {
    if (!record.empty() && record.back() == '\r') record.pop_back();
    if (!record.empty()) {
      cut.records.push_back(record);
      cut.offsets.push_back(start);
    }
    record.clear();
    start = next;
    quoted = false;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const bool field_start = record.empty() || record.back() == ',';
    if (text[i] == '\n' && !quoted) {
      end(i + 1);
      continue;
    }
    if (multiline && text[i] == '"') {
      const bool reopens = !quoted && !record.empty() && record.back() == '"' && !field_start;
      if (quoted) {
        quoted = false;
      } else if (field_start || reopens) {
        quoted = true;
      }
    }
    record += text[i];
  }
  end(text.size());
  return cut;
}

TEST(RecordSplitter, AgreesWithASlowTwinOnRandomText) {
  Random random(3);
  for (int round = 0; round < 400; ++round) {
    // Fields are plain or properly quoted, so that twin and splitter agree on what a quote means.
    std::string text;
    for (uint64_t i = random.Below(30); i > 0; --i) {
      if (random.Below(2) == 0) {
        text += '"';
        for (uint64_t k = random.Below(6); k > 0; --k)
          text += std::string("a,\n\"").substr(random.Below(4), 1) == "\"" ? "\"\"" : "\n,";
        text += '"';
      } else {
        text += std::string(random.Below(4), 'x');
      }
      static const char* const kAfter[] = {",", "\n", "\r\n", ",\n"};
      text += kAfter[random.Below(4)];
    }
    for (const bool multiline : {false, true}) {
      RecordSplitter::Options options;
      options.multiline = multiline;
      const Cut expected = ReferenceCut(text, multiline);
      const Cut cut = CutUp(text, options, 1 + random.Below(9));
      ASSERT_EQ(cut.records, expected.records) << text;
      ASSERT_EQ(cut.offsets, expected.offsets) << text;
    }
  }
}

// --- sources ---

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  auto source = OpenTextSource(path);
  if (!source.ok()) return source.status();
  std::string text;
  char buffer[999];
  while (true) {
    auto got = (*source)->Read(buffer, sizeof(buffer));
    if (!got.ok()) return got.status();
    if (*got == 0) return text;
    text.append(buffer, *got);
  }
}

std::string RandomText(size_t size) {
  Random random(5);
  std::string text;
  while (text.size() < size) absl::StrAppend(&text, random.Below(1000000), random.Below(9) == 0 ? "\n" : ",");
  return text;
}

TEST(TextSource, ReadsPlainGzipAndZstdByContentWhateverTheName) {
  const std::string folder = TestFolder();
  const std::string path = JoinPath(folder, "log.csv");
  const std::string text = RandomText(700000);
  for (const std::string& bytes : {text, Gzip(text), InParts(text, 3, Gzip), Zstd(text), InParts(text, 3, Zstd)}) {
    ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
    const auto read = ReadAll(path);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_TRUE(*read == text);
  }
  EXPECT_EQ(ReadAll(JoinPath(folder, "none")).status().code(), absl::StatusCode::kNotFound);
}

TEST(TextSource, EmptyFilesAndEmptyMembersAreFine) {
  const std::string path = JoinPath(TestFolder(), "log");
  for (const std::string& bytes : {std::string(), Gzip(""), Zstd(""), Gzip("") + Gzip(""), Zstd("") + Zstd("")}) {
    ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
    EXPECT_EQ(*ReadAll(path), "");
  }
}

TEST(TextSource, EveryTruncationIsDataLossWithFileOffsetCauseAndRemedy) {
  const std::string path = JoinPath(TestFolder(), "log");
  const std::string text = RandomText(3000);
  for (const std::string& whole : {Gzip(text), Zstd(text), Zstd(text) + Zstd(text)}) {
    for (size_t cut = 4; cut < whole.size(); cut += cut < 40 ? 1 : 37) {
      if (cut == Zstd(text).size()) continue;  // the end of a frame: a whole file
      ASSERT_TRUE(WriteFileAtomically(path, whole.substr(0, cut)).ok());
      const absl::Status status = ReadAll(path).status();
      ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << cut << " of " << whole.size();
      EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(path, ": byte ", cut, ": the ")));
      EXPECT_THAT(std::string(status.message()), HasSubstr("truncated"));
      EXPECT_THAT(std::string(status.message()), HasSubstr("copy the file again"));
    }
  }
}

TEST(TextSource, DamageInsideIsDataLoss) {
  const std::string path = JoinPath(TestFolder(), "log");
  const std::string text = RandomText(3000);
  std::string damaged = Gzip(text);
  damaged[damaged.size() - 6] ^= 1;  // its CRC
  ASSERT_TRUE(WriteFileAtomically(path, damaged).ok());
  EXPECT_EQ(ReadAll(path).status().code(), absl::StatusCode::kDataLoss);
  ASSERT_TRUE(WriteFileAtomically(path, Gzip(text) + "trailing").ok());
  EXPECT_EQ(ReadAll(path).status().code(), absl::StatusCode::kDataLoss);
  ASSERT_TRUE(WriteFileAtomically(path, Zstd(text) + "trailing").ok());
  EXPECT_EQ(ReadAll(path).status().code(), absl::StatusCode::kDataLoss);
}

// A frame by hand: its window is what its writer says, however short the text.
TEST(TextSource, AWindowThatIsTooLargeIsRefusedAndNotCalledDamage) {
  const std::string path = JoinPath(TestFolder(), "log.zst");
  const std::string text = "a\n1\n";
  const auto frame = [&](int window_log) {
    std::string bytes("\x28\xb5\x2f\xfd\0", 5);
    bytes.push_back(static_cast<char>((window_log - 10) << 3));
    bytes.push_back(static_cast<char>(text.size() << 3 | 1));  // the last block, as it is
    return bytes + std::string(2, '\0') + text;
  };
  ASSERT_TRUE(WriteFileAtomically(path, frame(27)).ok());
  EXPECT_EQ(*ReadAll(path), text);
  for (const int window_log : {28, 31}) {
    ASSERT_TRUE(WriteFileAtomically(path, frame(window_log)).ok());
    const absl::Status status = ReadAll(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(HasSubstr("log.zst"), HasSubstr("more than 128 MiB"), HasSubstr("pack it again")));
    EXPECT_THAT(std::string(status.message()), testing::Not(HasSubstr("damaged")));
  }
}

TEST(Spool, GivesTheSameBytesFromMemoryAndFromItsFileAndLeavesNothing) {
  const std::string folder = TestFolder();
  const std::string text = RandomText(100000);
  for (const uint64_t memory_bytes_max : {uint64_t{1} << 20, uint64_t{5000}, uint64_t{0}}) {
    Spool spool(folder, memory_bytes_max, 1u << 20);
    for (size_t at = 0; at < text.size(); at += 3000) {
      ASSERT_TRUE(spool.Append(text.data() + at, std::min<size_t>(3000, text.size() - at)).ok());
    }
    ASSERT_EQ(spool.size(), text.size());
    std::unique_ptr<TextSource> source = spool.Open(1234, 60001);
    std::string read(60001 - 1234, '\0');
    size_t got = 0;
    while (const size_t more = *source->Read(&read[got], 777)) got += more;
    EXPECT_EQ(got, read.size());
    EXPECT_TRUE(read == text.substr(1234, read.size()));
    EXPECT_TRUE(ListDirectory(folder)->empty()) << "the scratch file has no name";
  }
  Spool nowhere("", 10, 1u << 20);
  EXPECT_EQ(nowhere.Append(text.data(), 100).code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace hearth
