#include "scripts/hearth/relay.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"

namespace hearth {
namespace {

using ::testing::HasSubstr;

const std::string& Rule() {
  static const auto* const rule = new std::string(std::string(74, '-') + "\n");
  return *rule;
}

TEST(MpirunFilter, KeepsMpirunsMessagesBackAndLetsTheRest) {
  const std::string text =
      absl::StrCat("ssh: no such host\n", Rule(), "No nodes are available.\nThis is usually caused by:\n\nMore.\n",
                   Rule(), "hearth-worker: log.csv: broken\n- a list\n[vm:1] odd\nstep 1\rstep 2");
  const std::string expected =
      "ssh: no such host\nhearth-worker: log.csv: broken\n- a list\n[vm:1] odd\nstep 1\rstep 2";
  // However the text is cut, the same comes out.
  Random random(7);
  for (int round = 0; round < 200; ++round) {
    MpirunFilter filter;
    std::string passed;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random.Below(round % 20 + 1);
      filter.Take(absl::string_view(text).substr(at, size), &passed);
      at += size;
    }
    filter.Finish(&passed);
    ASSERT_EQ(passed, expected);
    EXPECT_THAT(filter.messages(), HasSubstr("No nodes are available.\n"));
    EXPECT_EQ(RefusalOf(filter),
              "ssh: no such host - a list step 1\rstep 2 No nodes are available. This is usually caused by: More.");
  }
}

TEST(MpirunFilter, AReasonThatGoesOnBehindAColonIsToldAndAListOfGuessesIsNot) {
  const auto refusal = [](const std::string& text) {
    MpirunFilter filter;
    std::string passed;
    filter.Take(absl::StrCat(Rule(), text, Rule()), &passed);
    return RefusalOf(filter);
  };
  EXPECT_EQ(refusal("None of the networks\ncould be found:\n\n  Value given: nope0\n\nPlease revise it.\n"),
            "None of the networks could be found: Value given: nope0 Please revise it.");
  EXPECT_EQ(refusal("Unable to start.\nThis usually is caused by:\n\n* not finding it\n"), "Unable to start.");
  EXPECT_EQ(refusal(""), "");
}

TEST(MpirunFilter, AnUnfinishedLinePassesAtOnce) {
  MpirunFilter filter;
  std::string passed;
  filter.Take("step 1\r", &passed);
  EXPECT_EQ(passed, "step 1\r");
}

TEST(MpirunFilter, SaysNotThatMoreOfTheSameWasHeldBack) {
  MpirunFilter filter;
  std::string passed;
  filter.Take(
      "[vm:12] 3 more processes have sent help message help-mpi-api.txt / mpi-abort\n"
      "[vm:12] Set MCA parameter \"orte_base_help_aggregate\" to 0 to see all help / error messages\n",
      &passed);
  filter.Take("[vm:12] *** An error occurred in MPI_Init_thread\n[vm:12] *** Unknown error\n", &passed);
  EXPECT_EQ(passed, "");
  EXPECT_THAT(filter.messages(), HasSubstr("MPI_Init_thread"));
}

TEST(MpirunFilter, ALineOfDashesThatNobodyClosesSwallowsLittle) {
  MpirunFilter filter;
  std::string passed;
  filter.Take(Rule(), &passed);
  for (int i = 0; i < 500; ++i) filter.Take("a line\n", &passed);
  EXPECT_GT(passed.size(), 300 * 7u);
}

TEST(MpirunFilter, HoldsNoMoreThanItsBounds) {
  MpirunFilter filter;
  std::string passed;
  filter.Take("-", &passed);
  for (int i = 0; i < 1000; ++i) filter.Take(std::string(1000, 'x'), &passed);
  EXPECT_GT(passed.size(), 900000u);
  EXPECT_LE(filter.messages().size() + filter.others().size(), 2 * MpirunFilter::kKeptBytesMax);
  EXPECT_LE(RefusalOf(filter).size(), 1000u);
}

}  // namespace
}  // namespace hearth
