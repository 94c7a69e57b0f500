#include "common/artifact/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/file.h"

namespace hearth {
namespace {

std::string Folder() {
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("safetensors_test-", getpid()));
  EXPECT_TRUE(MakeDirectories(folder).ok());
  return folder;
}

template <typename T>
absl::Span<const char> BytesOf(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::string WithHeader(std::string header, const std::string& data) {
  header.append((8 - header.size() % 8) % 8, ' ');
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + data;
}

TEST(Safetensors, WritesWhatIsNotUtf8AsReplacementCharacters) {
  const std::vector<float> weights = {1};
  const std::string path = JoinPath(Folder(), "bytes.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"task\xff", "F32", {1}, BytesOf(weights)}}, {{"note", "\xff"}}).ok());
  const auto file = ReadSafetensors(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->tensors[0].name, "task\xef\xbf\xbd");
}

TEST(Safetensors, GivesBackWhatWasWrittenInNameOrder) {
  const std::vector<float> weights = {1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> count = {77};
  const std::vector<float> none;
  const std::string path = JoinPath(Folder(), "round.safetensors");
  ASSERT_TRUE(WriteSafetensors(path,
                               {{"z.weight", "F32", {2, 3}, BytesOf(weights)},
                                {"a.count", "I64", {}, BytesOf(count)},
                                {"m.empty", "F32", {0, 4}, BytesOf(none)}},
                               {{"step", "12"}})
                  .ok());
  const auto file = ReadSafetensors(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors.size(), 3u);
  EXPECT_EQ(file->tensors[0].name, "a.count");
  EXPECT_TRUE(file->tensors[0].shape.empty());
  EXPECT_EQ(file->tensors[2].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file->metadata.at("step"), "12");
  ASSERT_NE(file->Find("z.weight"), nullptr);
  EXPECT_EQ(std::memcmp(file->Find("z.weight")->data.data(), weights.data(), 24), 0);
  EXPECT_EQ(file->Find("nothing"), nullptr);
  const uint64_t header = *reinterpret_cast<const uint64_t*>(file->bytes.data());
  EXPECT_EQ((8 + header) % 8, 0u);
  EXPECT_EQ(HashTensors(file->tensors), HashTensors({file->tensors[2], file->tensors[0], file->tensors[1]}));
}

TEST(Safetensors, RefusesToWriteASizeThatDoesNotFitItsShape) {
  const std::vector<float> weights = {1, 2, 3};
  const std::string path = JoinPath(Folder(), "bad.safetensors");
  EXPECT_EQ(WriteSafetensors(path, {{"w", "F32", {2, 2}, BytesOf(weights)}}, {}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      WriteSafetensors(path, {{"w", "F32", {3}, BytesOf(weights)}, {"w", "F32", {3}, BytesOf(weights)}}, {}).code(),
      absl::StatusCode::kInvalidArgument);
}

TEST(Safetensors, NamesEachFaultOfADamagedFile) {
  const std::string eight(8, 'x');
  const struct {
    std::string bytes;
    const char* fault;
  } cases[] = {
      {"abc", "shorter than its header"},
      {std::string(8, '\xff') + "{}", "a header of"},
      {WithHeader("{\"a\":", eight), "no JSON object"},
      {WithHeader("[1]", ""), "no JSON object"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[2]}})", eight), "needs dtype"},
      {WithHeader(R"({"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}})", eight), "dtype Q7"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", eight), "natural number"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", eight), "shape and dtype"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})", eight),
       "shape and dtype"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", eight), "leave the file"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", eight), "leave the file"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", eight), "behind the last"},
      {WithHeader(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", eight), "leaves a hole"},
      {WithHeader(
           R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
           eight),
       "overlaps"},
  };
  for (const auto& c : cases) {
    const auto file = ParseSafetensors(c.bytes, "x.safetensors");
    EXPECT_EQ(file.status().code(), absl::StatusCode::kDataLoss) << c.fault;
    EXPECT_NE(std::string(file.status().message()).find(c.fault), std::string::npos) << file.status();
    EXPECT_NE(std::string(file.status().message()).find("x.safetensors"), std::string::npos);
  }
}

TEST(Safetensors, SurvivesAnyFlippedByteOfItsHeader) {
  const std::vector<float> weights = {1, 2, 3, 4};
  const std::string path = JoinPath(Folder(), "flip.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"w", "F32", {2, 2}, BytesOf(weights)}}, {{"k", "v"}}).ok());
  const auto whole = ReadFile(path);
  ASSERT_TRUE(whole.ok());
  Random random(5);
  int refused = 0;
  for (size_t at = 0; at < whole->size() - 16; ++at) {
    std::string bytes = *whole;
    bytes[at] = static_cast<char>(random.Next());
    const auto file = ParseSafetensors(bytes, "flipped");
    refused += !file.ok();
    if (!file.ok()) continue;
    for (const NamedTensor& tensor : file->tensors) EXPECT_EQ(tensor.data.size(), 16u);
  }
  EXPECT_GT(refused, 30);
}

// 5 GiB that take no room on the disk. A length alone refuses nothing, and what is none is not read into memory.
TEST(Safetensors, AFileOfMoreThanFourGibIsJudgedByItsBytesAndNotByItsLength) {
  const std::string path = JoinPath(Folder(), "long.safetensors");
  ASSERT_TRUE(WriteFileAtomically(path, std::string(8, '\xff')).ok());
  ASSERT_EQ(truncate(path.c_str(), off_t{5} << 30), 0);
  const absl::Status status = ReadSafetensors(path).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_NE(status.message().find("a header of 18446744073709551615 bytes in a file of 5368709120"),
            absl::string_view::npos)
      << status;
  ASSERT_TRUE(RemoveTree(path).ok());
}

}  // namespace
}  // namespace hearth
