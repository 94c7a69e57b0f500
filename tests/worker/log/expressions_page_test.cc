// docs/EXPRESSIONS.md says what its examples give: so they do.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/file.h"
#include "worker/log/expression.h"

namespace hearth {
namespace {

// The lines of the page's block of that kind, each cut where its value begins: after the last two blanks.
std::vector<std::pair<std::string, std::string>> BlockOf(const std::string& page, const std::string& kind) {
  std::vector<std::pair<std::string, std::string>> rows;
  bool inside = false;
  for (const absl::string_view line : absl::StrSplit(page, '\n')) {
    if (line == "```" + kind) {
      inside = true;
    } else if (line == "```") {
      inside = false;
    } else if (inside) {
      const size_t gap = line.rfind("  ");
      const bool alone = gap == absl::string_view::npos;
      rows.emplace_back(absl::StripTrailingAsciiWhitespace(line.substr(0, gap)), alone ? "" : line.substr(gap + 2));
    }
  }
  return rows;
}

TEST(ExpressionsPage, EveryExampleGivesWhatThePageSays) {
  const auto page = ReadFile(std::string(HEARTH_SOURCE_DIR) + "/docs/EXPRESSIONS.md");
  ASSERT_TRUE(page.ok()) << page.status();
  std::vector<std::string> names, values;
  for (const auto& [name, value] : BlockOf(*page, "record")) {
    absl::string_view text = value;
    if (absl::ConsumePrefix(&text, "\"")) absl::ConsumeSuffix(&text, "\"");
    names.push_back(name);
    values.emplace_back(text);
  }
  EXPECT_EQ(names.size(), 10u);
  const std::vector<absl::string_view> fields(values.begin(), values.end());
  const auto column = [&](absl::string_view name) {
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == name) return static_cast<int>(i);
    }
    return -1;
  };
  const auto examples = BlockOf(*page, "examples");
  EXPECT_GT(examples.size(), 40u);
  for (const auto& [text, expected] : examples) {
    const auto expression = Expression::Parse(text, column);
    ASSERT_TRUE(expression.ok()) << expression.status();
    const Number value = expression->Evaluate(fields);
    char buffer[40];
    EXPECT_EQ(value.missing() ? "missing" : std::string(TextOf(value, buffer)), expected) << text;
  }
}

}  // namespace
}  // namespace hearth
