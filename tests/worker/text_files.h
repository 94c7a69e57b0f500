// Files for the reader's tests: plain, gzip and zstd.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"

namespace hearth {

inline std::string Gzip(absl::string_view text) {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

inline std::string Zstd(absl::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

// Compressed in `parts` members (gzip) or frames (zstd).
template <typename Compress>
std::string InParts(absl::string_view text, int parts, Compress compress) {
  std::string out;
  for (int i = 0; i < parts; ++i) {
    const size_t begin = text.size() * i / parts, end = text.size() * (i + 1) / parts;
    out += compress(text.substr(begin, end - begin));
  }
  return out;
}

// A folder of this test's own.
inline std::string TestFolder() {
  const auto* info = testing::UnitTest::GetInstance()->current_test_info();
  const std::string folder =
      absl::StrCat(testing::TempDir(), "/hearth-reader-", info->test_suite_name(), "-", info->name(), "-", getpid());
  EXPECT_TRUE(RemoveTree(folder).ok());
  EXPECT_TRUE(MakeDirectories(folder).ok());
  return folder;
}

}  // namespace hearth
