#include "scripts/hearth/completion.h"

#include <gtest/gtest.h>

namespace hearth {
namespace {

TEST(NearestName, IsTheOneThatWasProbablyMeant) {
  const std::vector<std::string> names = {"train", "eval", "export", "score", "verify", "generate"};
  EXPECT_EQ(NearestName("tran", names), "train");
  EXPECT_EQ(NearestName("trian", names), "train");
  EXPECT_EQ(NearestName("exprot", names), "export");
  EXPECT_EQ(NearestName("evl", names), "eval");
  EXPECT_EQ(NearestName("generates", names), "generate");
  EXPECT_EQ(NearestName("train", names), "train");
}

TEST(NearestName, IsNoneWhereNoneIsNear) {
  const std::vector<std::string> names = {"train", "eval"};
  EXPECT_EQ(NearestName("", names), "");
  EXPECT_EQ(NearestName("x", names), "");
  EXPECT_EQ(NearestName("serve", names), "");
  EXPECT_EQ(NearestName("train", {}), "");
}

}  // namespace
}  // namespace hearth
