#include "model/adopt/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/job/config.h"

namespace hearth {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kTable[] = R"(table { name: "ids" dim: 3 } )";
constexpr char kTasks[] = R"(
  task { name: "click" category: "watch" label: "c" }
  task { name: "like" category: "inter" label: "l" } )";
constexpr char kSlots[] = R"(slot { name: "user" table: "ids" } slot { name: "video" table: "ids" } )";
constexpr char kRest[] = R"(
  log { name: "log" path: "log.csv" } dense { name: "age" } training { lanes: 1 }
  model { hidden_1: 4 hidden_2: 4 width_1: 4 width_2: 4 gate_rank_1: 2 gate_rank_2: 2 tower_hidden: 4 } )";

Job JobOf(const std::string& text) {
  Job job = ParseJob(text, "job").value();
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  return job;
}
Job Old() { return JobOf(absl::StrCat(kTable, kTasks, kSlots, kRest)); }
Job With(const std::string& tables, const std::string& tasks, const std::string& slots) {
  return JobOf(absl::StrCat(tables, tasks, slots, kRest));
}

absl::StatusOr<AdoptionPlan> Plan(const Job& now, const AdoptionRules& rules = {}) {
  return PlanAdoption(Old(), now, rules);
}
std::string FaultOf(const Job& now, const AdoptionRules& rules = {}) {
  const auto plan = Plan(now, rules);
  EXPECT_FALSE(plan.ok());
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kFailedPrecondition);
  return std::string(plan.status().message());
}
AdoptionRules Dropping(const std::vector<std::string>& dropped) {
  AdoptionRules rules;
  rules.dropped = dropped;
  return rules;
}
const AdoptionPlan::Line& LineOf(const std::vector<AdoptionPlan::Line>& lines, const std::string& what) {
  for (const AdoptionPlan::Line& line : lines) {
    if (line.what == what) return line;
  }
  ADD_FAILURE() << "no line " << what;
  static const AdoptionPlan::Line none;
  return none;
}
const ParameterMove& MoveOf(const AdoptionPlan& plan, const std::string& name) {
  for (const ParameterMove& move : plan.parameters) {
    if (move.name == name) return move;
  }
  ADD_FAILURE() << "no parameter " << name;
  static const ParameterMove none;
  return none;
}

TEST(AdoptionPlan, OfTheSameJobCarriesEverythingWhereItIs) {
  const auto plan = Plan(Old());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->changes, IsEmpty());
  EXPECT_THAT(plan->slots, ElementsAre(0, 1));
  EXPECT_TRUE(plan->tables[0].state);
  for (const ParameterMove& move : plan->parameters) {
    EXPECT_EQ(move.from, move.name);
    EXPECT_EQ(move.Carried(), move.Elements()) << move.name;
  }
  for (const AdoptionPlan::Line& line : plan->lines) {
    EXPECT_EQ(line.born + line.reset + line.dropped, 0u) << line.what;
    EXPECT_GT(line.carried, 0u) << line.what;
  }
}

TEST(AdoptionPlan, MatchesByNameWhateverTheOrder) {
  const Job now = With(
      R"(table { name: "more" dim: 2 } table { name: "ids" dim: 3 } )",
      R"(task { name: "like" category: "inter" label: "l" } task { name: "click" category: "watch" label: "c" } )",
      R"(slot { name: "tag" table: "more" } slot { name: "video" table: "ids" } slot { name: "user" table: "ids" } )");
  const auto plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->tables[0].from, -1);
  EXPECT_EQ(plan->tables[1].from, 0);
  EXPECT_THAT(plan->slots, ElementsAre(-1, 1, 0));
  EXPECT_THAT(plan->tasks, ElementsAre(1, 0));
  EXPECT_THAT(plan->changes, IsEmpty());
  // Groups by width: more's slot first, then the others in the job's order, then dense.
  EXPECT_THAT(MoveOf(*plan, "level1.shared.expert.hidden_weight").index[1],
              ElementsAre(kZeros, kZeros, 3, 4, 5, 0, 1, 2, 6));
  EXPECT_EQ(LineOf(plan->lines, "slot tag").born, 2u);
  EXPECT_EQ(LineOf(plan->lines, "dense age").carried, 1u);
}

TEST(AdoptionPlan, ANewNameBesideOneThatIsGoneIsRefusedUntilTheJobSaysWhich) {
  const std::string renamed =
      R"(task { name: "tap" category: "watch" label: "c" } task { name: "like" category: "inter" label: "l" } )";
  EXPECT_THAT(FaultOf(With(kTable, renamed, kSlots)),
              AllOf(HasSubstr("task \"click\" is gone and \"tap\" is new"), HasSubstr("was: \"click\""),
                    HasSubstr("--drop task:click")));
  Job said = With(kTable, renamed, kSlots);
  said.mutable_task(0)->set_was("click");
  const auto plan = Plan(said);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->tasks, ElementsAre(0, 1));
  EXPECT_THAT(plan->changes, IsEmpty());
  EXPECT_EQ(MoveOf(*plan, "tower.tap.output.bias").from, "tower.click.output.bias");
  EXPECT_EQ(LineOf(plan->lines, "task tap").how, "was \"click\"");

  const auto dropped = Plan(With(kTable, renamed, kSlots), Dropping({"task:click"}));
  ASSERT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_THAT(dropped->tasks, ElementsAre(-1, 1));
  EXPECT_GT(LineOf(dropped->lines, "task click").dropped, 0u);
  EXPECT_GT(LineOf(dropped->lines, "task tap").born, 0u);
  EXPECT_THAT(dropped->changes, IsEmpty()) << "no task that stays depends on another's tower";

  EXPECT_THAT(FaultOf(With(R"(table { name: "keys" dim: 3 } )", kTasks,
                           R"(slot { name: "user" table: "keys" } slot { name: "video" table: "keys" } )")),
              HasSubstr("table \"ids\" is gone and \"keys\" is new"));
  EXPECT_THAT(
      FaultOf(With(kTable, kTasks, R"(slot { name: "user" table: "ids" } slot { name: "film" table: "ids" } )")),
      HasSubstr("slot \"video\" is gone and \"film\" is new"));
}

TEST(AdoptionPlan, OfAJobThatWasAdoptedAlreadyTakesItsOwnNames) {
  Job now = Old();
  now.mutable_task(0)->set_was("tap");
  const auto plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->tasks, ElementsAre(0, 1));
}

TEST(AdoptionPlan, RefusesNamesThatNobodyHasAndNamesThatTwoWant) {
  Job nobody =
      With(kTable, absl::StrCat(kTasks, R"(task { name: "share" category: "inter" label: "s" was: "send" } )"), kSlots);
  EXPECT_THAT(FaultOf(nobody), AllOf(HasSubstr("task \"share\": was: \"send\": the model has no such task"),
                                     HasSubstr("\"click\", \"like\"")));
  Job two = nobody;
  two.mutable_task(2)->set_was("like");
  EXPECT_THAT(FaultOf(two), HasSubstr("tasks \"like\" and \"share\" both take over \"like\""));
  EXPECT_THAT(FaultOf(Old(), Dropping({"slot:nobody"})),
              HasSubstr("--drop slot:nobody: the model has no slot \"nobody\""));
  EXPECT_THAT(FaultOf(Old(), Dropping({"nobody"})), HasSubstr("give KIND:NAME"));
}

TEST(AdoptionPlan, ASlotsRowsAreKeptBySaltAloneWhereItsNameIsAnother) {
  const std::string slots = R"(slot { name: "user" table: "ids" } slot { name: "film" was: "video" table: "ids" } )";
  EXPECT_THAT(FaultOf(With(kTable, kTasks, slots)),
              AllOf(HasSubstr("add salt: \"video\""), HasSubstr("--drop slot:video")));
  Job salted = With(kTable, kTasks, slots);
  salted.mutable_slot(1)->set_salt("video");
  salted.mutable_slot(1)->set_column("video");
  const auto plan = Plan(salted);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->slots, ElementsAre(0, 1));
  EXPECT_THAT(plan->changes, IsEmpty());
  Job other_column = salted;
  other_column.mutable_slot(1)->clear_column();
  EXPECT_THAT(Plan(other_column)->changes, ElementsAre(HasSubstr("slot \"film\" is read otherwise: column")));
  Job hashed = Old();
  hashed.mutable_slot(0)->set_hash(Slot::HASHED);
  EXPECT_THAT(FaultOf(hashed), HasSubstr("slot \"user\".hash: SALTED -> HASHED"));
  const auto anew = Plan(hashed, Dropping({"slot:user"}));
  ASSERT_TRUE(anew.ok()) << anew.status();
  EXPECT_THAT(anew->slots, ElementsAre(-1, 1));
  EXPECT_THAT(anew->changes, ElementsAre("slot \"user\" is gone"));
}

TEST(AdoptionPlan, ASlotStaysWithTheTableThatHoldsItsRows) {
  EXPECT_THAT(FaultOf(With(absl::StrCat(kTable, R"(table { name: "own" dim: 3 } )"), kTasks,
                           R"(slot { name: "user" table: "own" } slot { name: "video" table: "ids" } )")),
              AllOf(HasSubstr("slot \"user\".table: \"own\" does not hold its rows"), HasSubstr("set table: \"ids\"")));
}

TEST(AdoptionPlan, ANewSlotThatCouldNeverLearnIsRefused) {
  Job now = With(kTable, kTasks, absl::StrCat(kSlots, R"(slot { name: "tag" table: "ids" })"));
  EXPECT_TRUE(Plan(now).ok());
  now.mutable_table(0)->set_init_uniform(0);
  EXPECT_THAT(FaultOf(now), HasSubstr("init_uniform is 0: its rows and what reads them would stay zero"));
}

TEST(AdoptionPlan, ATableGrowsAndShrinksOnlyWhenAsked) {
  const auto wide = Plan(With(R"(table { name: "ids" dim: 5 } )", kTasks, kSlots));
  ASSERT_TRUE(wide.ok()) << wide.status();
  EXPECT_EQ(wide->tables[0].dims, 3u);
  EXPECT_FALSE(wide->tables[0].state);
  EXPECT_THAT(wide->changes, IsEmpty());
  EXPECT_THAT(MoveOf(*wide, "level1.shared.self.weight").index[1],
              ElementsAre(0, 1, 2, kBornAt, kBornAt, 3, 4, 5, kBornAt, kBornAt, 6))
      << "where rows are zero, what reads them is not";
  const Job narrow = With(R"(table { name: "ids" dim: 2 } )", kTasks, kSlots);
  EXPECT_THAT(FaultOf(narrow), AllOf(HasSubstr("table \"ids\".dim: 3 -> 2"), HasSubstr("--truncate")));
  AdoptionRules truncate;
  truncate.truncate = true;
  const auto cut = Plan(narrow, truncate);
  ASSERT_TRUE(cut.ok()) << cut.status();
  EXPECT_THAT(MoveOf(*cut, "level1.shared.self.weight").index[1], ElementsAre(0, 1, 3, 4, 6));
  EXPECT_EQ(cut->changes.size(), 1u);
  EXPECT_EQ(LineOf(cut->lines, "slot user").dropped, 1u);
}

TEST(AdoptionPlan, RoundedWeightsChangeTheModelAndWiderOnesDoNot) {
  Job narrow = Old();
  narrow.mutable_table(0)->set_weights(Table::BFLOAT16);
  const auto rounded = Plan(narrow);
  ASSERT_TRUE(rounded.ok()) << rounded.status();
  EXPECT_THAT(rounded->table_lines[0].how, HasSubstr("weights FLOAT32 -> BFLOAT16, rounded to the nearest"));
  EXPECT_TRUE(rounded->tables[0].state);
  EXPECT_THAT(rounded->changes, ElementsAre(HasSubstr("has rounded weights")));
  const auto widened = PlanAdoption(narrow, Old(), {});
  EXPECT_THAT(widened->table_lines[0].how, HasSubstr("weights BFLOAT16 -> FLOAT32"));
  EXPECT_THAT(widened->changes, IsEmpty());
}

TEST(AdoptionPlan, AnotherOptimizerBeginsAnewAndIsTold) {
  Job now = Old();
  now.mutable_table(0)->mutable_optimizer()->set_kind(Optimizer::ADAM);
  auto plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->tables[0].state);
  EXPECT_THAT(plan->table_lines[0].how, HasSubstr("optimizer ADAGRAD -> ADAM; optimizer state begins anew"));
  EXPECT_TRUE(plan->dense_state && plan->dense_updates);
  now.mutable_training()->mutable_dense_optimizer()->set_kind(DenseOptimizer::ADAMW);
  EXPECT_TRUE(Plan(now)->dense_state);
  now.mutable_training()->mutable_dense_optimizer()->set_kind(DenseOptimizer::SGD);
  plan = Plan(now);
  EXPECT_FALSE(plan->dense_state);
  EXPECT_TRUE(plan->dense_updates);
  EXPECT_GT(LineOf(plan->lines, "dense model").reset, 0u);
  const auto from_sgd = PlanAdoption(now, Old(), {});
  EXPECT_FALSE(from_sgd->dense_state || from_sgd->dense_updates);
}

TEST(AdoptionPlan, ATaskInANewCategoryBeginsAsACopyOfWhatAllShare) {
  const auto plan =
      Plan(With(kTable, absl::StrCat(kTasks, R"(task { name: "buy" category: "shop" label: "b" } )"), kSlots));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->changes, IsEmpty());
  EXPECT_EQ(MoveOf(*plan, "level1.category.shop.expert.hidden_weight").from, "level1.shared.expert.hidden_weight");
  EXPECT_EQ(MoveOf(*plan, "level1.category.shop.gate.weight").from, "");
  EXPECT_EQ(MoveOf(*plan, "level2.category.shop.expert.hidden_weight").from, "");
  const ParameterMove& gate = MoveOf(*plan, "level1.shared.gate.bias");
  EXPECT_THAT(gate.index[0], ElementsAre(0, 1, 2, 3, 4, 5, 0, 1))
      << "shared, watch, inter; shop sees the shared ones twice";
  const float half = std::log(2.0f);
  EXPECT_THAT(gate.less, ElementsAre(half, half, 0, 0, 0, 0, half, half));
  EXPECT_THAT(MoveOf(*plan, "level1.shared.gate.weight").less, IsEmpty());
}

TEST(AdoptionPlan, ACategoryIsKnownByItsTasksWhereItsNameIsAnother) {
  const auto renamed = Plan(
      With(kTable,
           R"(task { name: "click" category: "view" label: "c" } task { name: "like" category: "inter" label: "l" } )",
           kSlots));
  ASSERT_TRUE(renamed.ok()) << renamed.status();
  EXPECT_THAT(renamed->changes, IsEmpty());
  EXPECT_EQ(MoveOf(*renamed, "level1.category.view.gate.weight").from, "level1.category.watch.gate.weight");
  EXPECT_EQ(LineOf(renamed->lines, "category view").how, "was \"watch\"");
  const auto moved = Plan(
      With(kTable,
           R"(task { name: "click" category: "inter" label: "c" } task { name: "like" category: "inter" label: "l" } )",
           kSlots));
  ASSERT_TRUE(moved.ok()) << moved.status();
  EXPECT_THAT(moved->changes, testing::Contains(HasSubstr("task \"click\" is in another category: watch -> inter")));
  EXPECT_THAT(moved->changes, testing::Contains(HasSubstr("category \"watch\" is gone")));
}

TEST(AdoptionPlan, MoreExpertsAreNoisyCopiesAndFewerAreRefused) {
  Job now = Old();
  now.mutable_model()->set_shared_experts_1(3);
  const auto plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->changes, ElementsAre(HasSubstr("level1.shared.expert: 2 -> 3 experts")));
  const ParameterMove& hidden = MoveOf(*plan, "level1.shared.expert.hidden_weight");
  EXPECT_THAT(hidden.index[0], ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  EXPECT_EQ(std::count(hidden.noisy.begin(), hidden.noisy.end(), true), 4);
  EXPECT_TRUE(hidden.noisy[8]);
  const ParameterMove& running = MoveOf(*plan, "level1.shared.expert.running_mean");
  EXPECT_EQ(std::count(running.noisy.begin(), running.noisy.end(), true), 0);
  EXPECT_THAT(MoveOf(*plan, "level1.category.watch.gate.bias").index[0], ElementsAre(0, 1, 0, 2, 3));
  EXPECT_FLOAT_EQ(MoveOf(*plan, "level1.category.watch.gate.bias").less[0], std::log(2.0f));
  now.mutable_model()->set_shared_experts_1(1);
  EXPECT_THAT(FaultOf(now), HasSubstr("level1.shared.expert: 2 -> 1 experts"));
  now.mutable_model()->set_shared_experts_1(2);
  now.mutable_model()->set_task_experts_2(2);
  EXPECT_THAT(Plan(now)->changes, testing::Contains(HasSubstr("a sigmoid, over several a softmax")));
}

TEST(AdoptionPlan, WhatHasAnotherShapeIsBornAndToldAndTheRestIsCarried) {
  Job now = Old();
  now.mutable_model()->set_hidden_2(6);
  auto plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->changes, testing::Contains("level2.shared.expert is born anew: its shape is another"));
  EXPECT_EQ(MoveOf(*plan, "level2.shared.expert.norm_weight").from, "") << "a stack is carried whole or not at all";
  EXPECT_EQ(MoveOf(*plan, "level1.shared.expert.norm_weight").from, "level1.shared.expert.norm_weight");
  EXPECT_EQ(MoveOf(*plan, "tower.click.hidden.weight").from, "tower.click.hidden.weight");
  now.mutable_model()->set_kind(Model::MMOE);
  plan = Plan(now);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->changes, ElementsAre(HasSubstr("model.kind: HOME -> MMOE")));
  for (const ParameterMove& move : plan->parameters) EXPECT_EQ(move.from, "");
  EXPECT_EQ(plan->tables[0].from, 0) << "rows are carried all the same";
  EXPECT_FALSE(plan->dense_updates);
}

TEST(AdoptionPlan, PrintsALineForEachThing) {
  const std::string text =
      DescribeAdoption(*Plan(With(kTable, kTasks, absl::StrCat(kSlots, R"(slot { name: "tag" table: "ids" } )"))));
  EXPECT_THAT(text, HasSubstr("table ids"));
  EXPECT_THAT(text, HasSubstr("slot tag"));
  EXPECT_THAT(text, HasSubstr("read with zeros"));
  EXPECT_THAT(text, HasSubstr("dense model"));
}

}  // namespace
}  // namespace hearth
