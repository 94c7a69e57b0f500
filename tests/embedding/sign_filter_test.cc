#include "embedding/sign_filter.h"

#include "common/base/env.h"
#include "gtest/gtest.h"

namespace hearth {
namespace {

Sign SignAt(uint64_t i) { return MakeSign(7, Mix64(i)); }

TEST(SignFilter, ContainsEverySignThatWasAddedWhileItGrows) {
  SignFilter filter(100);
  EXPECT_FALSE(filter.MayContain(SignAt(0)));
  constexpr uint64_t kSigns = 100000;  // some layers
  for (uint64_t i = 0; i < kSigns; ++i) {
    ASSERT_TRUE(filter.Reserve(1).ok());
    filter.Add(SignAt(i));
    ASSERT_TRUE(filter.MayContain(SignAt(i)));
  }
  for (uint64_t i = 0; i < kSigns; ++i) ASSERT_TRUE(filter.MayContain(SignAt(i)));
}

TEST(SignFilter, TakesFewOthersForOnesItHas) {
  SignFilter filter(100);
  constexpr uint64_t kSigns = 200000;
  ASSERT_TRUE(filter.Reserve(kSigns / 2).ok());
  for (uint64_t i = 0; i < kSigns / 2; ++i) filter.Add(SignAt(i));
  ASSERT_TRUE(filter.Reserve(kSigns / 2).ok());
  for (uint64_t i = kSigns / 2; i < kSigns; ++i) filter.Add(SignAt(i));
  uint64_t wrong = 0;
  for (uint64_t i = kSigns; i < 2 * kSigns; ++i) wrong += filter.MayContain(SignAt(i)) ? 1 : 0;
  EXPECT_LT(wrong, kSigns / 100);
  EXPECT_LT(filter.bytes(), kSigns * 4);
}

TEST(SignFilter, AnotherAddOfASignTakesNoRoom) {
  SignFilter filter(0);
  ASSERT_TRUE(filter.Reserve(1).ok());
  for (int i = 0; i < 1000000; ++i) filter.Add(SignAt(1));
  EXPECT_TRUE(filter.MayContain(SignAt(1)));
}

}  // namespace
}  // namespace hearth
