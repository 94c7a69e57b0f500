#include "worker/log/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/base/env.h"

namespace hearth {
namespace {

Number Read(absl::string_view text) {
  Number number;
  EXPECT_EQ(ReadNumber(text, &number), NumberText::kNumber) << text;
  return number;
}

std::string Text(Number number) {
  char buffer[40];
  return number.missing() ? "missing" : std::string(TextOf(number, buffer));
}

TEST(Number, ReadsWhatFloatReads) {
  for (const char* one : {"1", " 1", "1 ", "\t1\r", "+1", "1.", "01", "1.0", "1e0", "10e-1", ".1E+1", "0.1e1"}) {
    EXPECT_EQ(Compare(Read(one), Number::OfNatural(1)), 0) << one;
  }
  EXPECT_EQ(Read("-2.5").ToDouble(), -2.5);
  EXPECT_EQ(Read("1e-400").ToDouble(), 0);
  EXPECT_EQ(Read("0.0000001e-320").ToDouble(), 0);
  EXPECT_EQ(Read("0e999999999999999999999").ToDouble(), 0);
  EXPECT_EQ(Read("1e-99999999999999999999").ToDouble(), 0);
  EXPECT_EQ(Read("4.9e-324").ToDouble(), 4.9e-324);
  EXPECT_EQ(Read("1.7976931348623157e308").ToDouble(), 1.7976931348623157e308);
  EXPECT_TRUE(std::signbit(Read("-0").ToDouble()));
}

TEST(Number, TellsWhatIsMissingFromWhatIsNoNumber) {
  Number number;
  for (const char* missing : {"", " ", "\t \r", "nan", "NaN", " -nan "}) {
    EXPECT_EQ(ReadNumber(missing, &number), NumberText::kMissing) << missing;
    EXPECT_TRUE(number.missing());
  }
  for (const char* none : {"True", "n/a", "?", "1_000", "1,5", "0x10", "inf", "-Infinity", "1e400",  "12345e308", "1e",
                           "e1",   ".",   "+", "-",     "--1", "+-1",  "1 2", "1e5x",      "nan(1)", "½"}) {
    EXPECT_EQ(ReadNumber(none, &number), NumberText::kUnreadable) << none;
    EXPECT_TRUE(number.missing());
  }
}

TEST(Number, KeepsIntegersOf64Bits) {
  for (const char* exact : {"0", "9007199254740993", "1152921504606846977", "9223372036854775808",
                            "18446744073709551615", "-1", "-9007199254740993", "-9223372036854775808"}) {
    EXPECT_TRUE(Read(exact).integer()) << exact;
    EXPECT_EQ(Text(Read(exact)), exact);
  }
  EXPECT_EQ(Text(Read("0000000000000000000000000018")), "18");
  EXPECT_FALSE(Read("18446744073709551616").integer()) << "beyond 64 bits it is the nearest real";
  EXPECT_EQ(Read("18446744073709551616").ToDouble(), 0x1p64);
  EXPECT_FALSE(Read("-9223372036854775809").integer());
}

TEST(Number, ComparesIntegersAndRealsExactly) {
  const auto order = [](const char* a, const char* b) { return Compare(Read(a), Read(b)); };
  EXPECT_LT(order("9007199254740992", "9007199254740993"), 0);
  EXPECT_LT(order("9007199254740992.0", "9007199254740993"), 0) << "they are one as doubles";
  EXPECT_GT(order("9007199254740993", "9007199254740992.0"), 0);
  EXPECT_GT(order("18446744073709551616.0", "18446744073709551615"), 0);
  EXPECT_LT(order("18446744073709551615", "1e300"), 0);
  EXPECT_GT(order("-9223372036854775808", "-1e300"), 0);
  EXPECT_EQ(order("-9223372036854775808", "-9223372036854775808.0"), 0);
  EXPECT_LT(order("-9223372036854775808", "18446744073709551615"), 0);
  EXPECT_GT(order("3", "2.5"), 0);
  EXPECT_GT(order("-2", "-2.5"), 0);
  EXPECT_EQ(order("7", "7.0"), 0);
}

TEST(Number, ComputesWithIntegersExactlyAndGoesToRealsBeyondThem) {
  const Number big = Read("9007199254740993"), most = Read("18446744073709551615"),
               least = Read("-9223372036854775808");
  EXPECT_EQ(Text(Add(big, Read("2"))), "9007199254740995");
  EXPECT_EQ(Text(Subtract(Read("1"), big)), "-9007199254740992");
  EXPECT_EQ(Text(Multiply(Read("4294967297"), Read("4294967295"))), "18446744073709551615");
  EXPECT_EQ(Text(Modulo(most, Read("10"))), "5");
  EXPECT_EQ(Text(Modulo(Read("-7"), Read("4"))), "-3");
  EXPECT_EQ(Text(Divide(most, Read("5"))), "3689348814741910323");
  EXPECT_EQ(Divide(Read("7"), Read("2")).ToDouble(), 3.5);
  EXPECT_EQ(Text(Negate(Read("9223372036854775808"))), "-9223372036854775808");
  EXPECT_FALSE(Add(most, Read("1")).integer());
  EXPECT_EQ(Add(most, Read("1")).ToDouble(), 0x1p64);
  EXPECT_EQ(Subtract(least, Read("1")).ToDouble(), -0x1p63);
  EXPECT_EQ(Multiply(most, most).ToDouble(), 0x1p128);
  EXPECT_EQ(Negate(most).ToDouble(), -0x1p64);
  EXPECT_EQ(Divide(Read("1"), Read("0")).ToDouble(), HUGE_VAL);
  EXPECT_TRUE(Divide(Read("0"), Read("0")).missing());
  EXPECT_TRUE(Modulo(Read("1"), Read("0")).missing());
  EXPECT_TRUE(Add(Number(), Read("1")).missing());
}

// Where doubles are exact, integers and doubles must say the same.
TEST(Number, AgreesWithDoublesWhereTheseAreExact) {
  Random random(5);
  for (int i = 0; i < 20000; ++i) {
    const double x = static_cast<double>(random.Below(1 << 20)) - (1 << 19);
    const double y = static_cast<double>(random.Below(1 << 20)) - (1 << 19);
    const Number a = Number::OfInteger(static_cast<int64_t>(x)), b = Number::OfInteger(static_cast<int64_t>(y));
    ASSERT_EQ(Add(a, b).ToDouble(), x + y);
    ASSERT_EQ(Subtract(a, b).ToDouble(), x - y);
    ASSERT_EQ(Multiply(a, b).ToDouble(), x * y);
    if (y != 0) {
      ASSERT_EQ(Divide(a, b).ToDouble(), x / y);
      ASSERT_EQ(Modulo(a, b).ToDouble(), std::fmod(x, y));
    }
    ASSERT_EQ(Compare(a, b) < 0, x < y);
    ASSERT_EQ(Compare(a, Number::OfReal(y)) < 0, x < y);
  }
}

// The short way to a number gives what the long one does, to the bit; white space takes the long one.
TEST(Number, ReadsShortNumbersLikeLongOnes) {
  Random random(6);
  for (int i = 0; i < 50000; ++i) {
    std::string text = random.Below(3) == 0 ? "-" : "";
    for (size_t k = random.Below(12); k > 0; --k) text += static_cast<char>('0' + random.Below(10));
    if (random.Below(3) > 0) text += '.';
    for (size_t k = random.Below(12); k > 0; --k) text += static_cast<char>('0' + random.Below(10));
    Number quick, slow;
    ASSERT_EQ(ReadNumber(text, &quick), ReadNumber(text + "                     ", &slow)) << text;
    ASSERT_EQ(quick.integer(), slow.integer()) << text;
    if (quick.missing()) continue;
    ASSERT_EQ(Compare(quick, slow), 0) << text;
    ASSERT_EQ(quick.ToDouble(), std::strtod(text.c_str(), nullptr)) << text;
    ASSERT_EQ(std::signbit(quick.ToDouble()), std::signbit(slow.ToDouble())) << text;
  }
}

TEST(Number, IsANaturalNumberHoweverItIsWritten) {
  uint64_t id = 0;
  for (const char* seven : {"7", "7.0", " 7", "70e-1"}) {
    EXPECT_TRUE(ToNatural(Read(seven), &id)) << seven;
    EXPECT_EQ(id, 7);
  }
  EXPECT_TRUE(ToNatural(Read("18446744073709551615"), &id));
  EXPECT_EQ(id, UINT64_MAX);
  for (const char* none : {"-1", "7.5", "1e17"}) EXPECT_FALSE(ToNatural(Read(none), &id)) << none;
  EXPECT_FALSE(ToNatural(Number(), &id));
}

}  // namespace
}  // namespace hearth
