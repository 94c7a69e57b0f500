#include "worker/log/expression.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/job/config.h"

namespace hearth {
namespace {

const std::vector<std::string> kColumns = {"a", "b", "name", "empty", "user.age"};
const std::vector<absl::string_view> kFields = {"3", "-0.5", "news", "", "41"};

int ColumnIndex(absl::string_view name) {
  for (size_t i = 0; i < kColumns.size(); ++i) {
    if (kColumns[i] == name) return static_cast<int>(i);
  }
  return -1;
}

double ValueOf(absl::string_view text) {
  auto expression = Expression::Parse(text, ColumnIndex);
  EXPECT_TRUE(expression.ok()) << expression.status();
  return expression.ok() ? expression->Evaluate(kFields).ToDouble() : -12345;
}

std::string ErrorOf(absl::string_view text) {
  auto expression = Expression::Parse(text, ColumnIndex);
  EXPECT_FALSE(expression.ok()) << text;
  EXPECT_EQ(expression.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(expression.status().message());
}

TEST(Expression, BindsOperatorsAsTheirGrammarSays) {
  EXPECT_EQ(ValueOf("1 + 2 * 3"), 7);
  EXPECT_EQ(ValueOf("(1 + 2) * 3"), 9);
  EXPECT_EQ(ValueOf("10 - 3 - 2"), 5);
  EXPECT_EQ(ValueOf("7 % 4 / 2"), 1.5);
  EXPECT_EQ(ValueOf("-a * -2"), 6);
  EXPECT_EQ(ValueOf("1 + 1 == 2 && 3 > 2"), 1);
  EXPECT_EQ(ValueOf("0 && 0 || 1"), 1);
  EXPECT_EQ(ValueOf("0 && (0 || 1)"), 0);
  EXPECT_EQ(ValueOf("!0 == 1"), 1);
  EXPECT_EQ(ValueOf("1.5e2"), 150);
}

TEST(Expression, ReadsColumnsAsNumbersOrAsTexts) {
  EXPECT_EQ(ValueOf("a >= 0.95 * 3 && a > 0"), 1);
  EXPECT_EQ(ValueOf("user.age + 1"), 42);
  EXPECT_EQ(ValueOf("`user.age`"), 41);
  EXPECT_EQ(ValueOf("name == 'news'"), 1);
  EXPECT_EQ(ValueOf("'news' != name"), 0);
  EXPECT_EQ(ValueOf("name < 'oo'"), 1);
  EXPECT_EQ(ValueOf("a == '3.0'"), 0) << "a text, not a number";
  EXPECT_EQ(ValueOf("empty == ''"), 1);
}

TEST(Expression, WhatRestsOnAMissingValueIsMissing) {
  for (const char* missing :
       {"empty", "name + 1", "min(a, empty)", "empty == 1", "empty != 1", "empty < 1", "1 >= empty", "empty == empty",
        "!empty", "!(empty > 0)", "empty && 1", "empty || 0", "1 && empty", "-empty", "abs(empty)", "0 / 0", "1 % 0"}) {
    EXPECT_TRUE(std::isnan(ValueOf(missing))) << missing;
  }
  EXPECT_EQ(ValueOf("empty && 0"), 0) << "one side decides";
  EXPECT_EQ(ValueOf("0 && empty"), 0);
  EXPECT_EQ(ValueOf("empty > 1 || a > 1"), 1);
  EXPECT_EQ(ValueOf("missing(empty)"), 1);
  EXPECT_EQ(ValueOf("missing(a)"), 0);
  EXPECT_FALSE(Expression::Parse("empty", ColumnIndex)->Evaluate(kFields).True());
}

TEST(Expression, NotesColumnsThatHoldNoNumber) {
  const auto unreadable = [](absl::string_view text) {
    std::vector<int> columns;
    Expression::Parse(text, ColumnIndex)->Evaluate(kFields, &columns);
    return columns;
  };
  EXPECT_THAT(unreadable("name + a"), testing::ElementsAre(ColumnIndex("name")));
  EXPECT_THAT(unreadable("empty + a"), testing::IsEmpty()) << "missing is not unreadable";
  EXPECT_THAT(unreadable("name == 'news'"), testing::IsEmpty());
  EXPECT_THAT(unreadable("if(a > 2, a, name)"), testing::IsEmpty()) << "it was not read";
}

TEST(Expression, KeepsIdsOf64Bits) {
  const std::vector<absl::string_view> fields = {"1152921504606846977", "1152921504606846976", "ad", "", "3"};
  const auto text_of = [&](absl::string_view text) {
    char buffer[40];
    return std::string(TextOf(Expression::Parse(text, ColumnIndex)->Evaluate(fields), buffer));
  };
  EXPECT_EQ(text_of("if(name == 'ad', a, b)"), "1152921504606846977");
  EXPECT_EQ(text_of("max(a, b)"), "1152921504606846977");
  EXPECT_EQ(text_of("a == b"), "0");
  EXPECT_EQ(text_of("a == 1152921504606846977"), "1");
  EXPECT_EQ(text_of("a - b"), "1");
  EXPECT_EQ(text_of("(a - a % 256) / 256"), "4503599627370496");
  EXPECT_EQ(text_of("a + 0.0"), "1152921504606846976") << "a real from here on";
}

TEST(Expression, CallsItsFunctions) {
  EXPECT_EQ(ValueOf("min(a, 2) + max(a, 5)"), 7);
  EXPECT_EQ(ValueOf("abs(b)"), 0.5);
  EXPECT_EQ(ValueOf("floor(b)"), -1);
  EXPECT_DOUBLE_EQ(ValueOf("log1p(a)"), std::log1p(3.0));
  EXPECT_EQ(ValueOf("if(a > 2, 10, 20)"), 10);
  EXPECT_EQ(ValueOf("if(empty, 10, 20)"), 20);
}

TEST(Expression, NamesThePositionAndWhatWasExpected) {
  EXPECT_EQ(ErrorOf("a >= "),
            "expression \"a >= \", position 6: expected a number, 'string', column or (, found the end");
  EXPECT_EQ(ErrorOf("(a + 1"), "expression \"(a + 1\", position 7: expected ')', found the end");
  EXPECT_EQ(ErrorOf("a b"), "expression \"a b\", position 3: expected an operator or the end, found 'b'");
  EXPECT_EQ(ErrorOf("1 + clicks"), "expression \"1 + clicks\", position 5: there is no column \"clicks\"");
  EXPECT_THAT(ErrorOf("sqrt(a)"), testing::HasSubstr("position 1: there is no function \"sqrt\""));
  EXPECT_THAT(ErrorOf("name == 'news"), testing::HasSubstr("position 9: this string lacks its closing '"));
  EXPECT_THAT(ErrorOf("'news' + 1"), testing::HasSubstr("position 1: a 'string' may only be compared"));
  EXPECT_THAT(ErrorOf("a + 1 == 'x'"), testing::HasSubstr("position 1: a 'string' may only be compared"));
  EXPECT_THAT(ErrorOf("1 < a < 3"), testing::HasSubstr("position 7: comparisons do not chain"));
  EXPECT_THAT(ErrorOf("min(a)"), testing::HasSubstr("position 6: expected ','"));
  EXPECT_THAT(ErrorOf("missing(a + 1)"), testing::HasSubstr("position 9: missing() takes the name of a column"));
  EXPECT_THAT(ErrorOf(""), testing::HasSubstr("position 1"));
  EXPECT_THAT(ErrorOf(std::string(1000, '(')), testing::HasSubstr("deep"));
  EXPECT_THAT(ErrorOf(std::string(1000, '-')), testing::HasSubstr("deep"));
}

std::string Chain(absl::string_view term, absl::string_view symbol, size_t terms) {
  std::string text(term);
  while (--terms > 0) absl::StrAppend(&text, symbol, term);
  return text;
}

TEST(Expression, EvaluatesTheLongestChainsAndRefusesLongerOnes) {
  EXPECT_EQ(ValueOf(Chain("1", "+", kExpressionBytesMax / 2)), kExpressionBytesMax / 2);
  EXPECT_EQ(ValueOf(Chain("0", "||", kExpressionBytesMax / 3)), 0);
  for (const char* symbol : {"||", "&&", "+", "*"}) {
    EXPECT_THAT(ErrorOf(Chain("1", symbol, 1'000'000)), testing::HasSubstr("bytes long, more than 8192; shorten it"));
  }
}

TEST(Expression, ListsItsColumnsInOrder) {
  EXPECT_THAT(*Expression::ColumnsOf("if(missing(x), y, min(x, `odd name`)) == t.z"),
              testing::ElementsAre("x", "y", "x", "odd name", "t.z"));
}

// A slow twin: random trees are written as text with every bracket, and evaluated while they are made.
double Grow(Random* random, int depth, std::string* text) {
  if (depth == 0 || random->Below(4) == 0) {
    switch (random->Below(3)) {
      case 0: {
        const int number = static_cast<int>(random->Below(10));
        *text += std::to_string(number);
        return number;
      }
      case 1:
        *text += "a";
        return 3;
      default:
        *text += "b";
        return -0.5;
    }
  }
  static const char* const kOperators[] = {"+", "-", "*", "<", ">=", "==", "!=", "&&", "||"};
  const int op = static_cast<int>(random->Below(9));
  *text += "(";
  const double x = Grow(random, depth - 1, text);
  *text += std::string(random->Below(2), ' ') + kOperators[op] + std::string(random->Below(2), ' ');
  const double y = Grow(random, depth - 1, text);
  *text += ")";
  switch (op) {
    case 0:
      return x + y;
    case 1:
      return x - y;
    case 2:
      return x * y;
    case 3:
      return x < y;
    case 4:
      return x >= y;
    case 5:
      return x == y;
    case 6:
      return x != y;
    case 7:
      return x != 0 && y != 0;
    default:
      return x != 0 || y != 0;
  }
}

TEST(Expression, AgreesWithADirectEvaluationOfRandomTrees) {
  Random random(11);
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    const double expected = Grow(&random, 5, &text);
    ASSERT_EQ(ValueOf(text), expected) << text;
  }
}

}  // namespace
}  // namespace hearth
