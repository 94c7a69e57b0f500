#include "common/job/quality.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/job/config.h"

namespace hearth {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

Job TestJob() {
  return ParseJob(R"(
    split { name: "often" every_steps: 10 } split { name: "seldom" every_steps: 30 } split { name: "last" }
    snapshot { best { split: "often" task: "click" } }
    training { stop_after_no_gain: 2 })",
                  "test")
      .value();
}

struct Figures {
  std::optional<double> auc = {}, log_loss = {}, calibration = {};
};

Evaluation Evaluated(uint64_t step, const std::string& split, const Figures& click, const Figures& like = {}) {
  Evaluation evaluation;
  evaluation.set_step(step);
  evaluation.set_split(split);
  for (const auto& [name, figures] : {std::pair("click", click), std::pair("like", like)}) {
    Evaluation::Task* task = evaluation.add_task();
    task->set_name(name);
    if (figures.auc) task->set_auc(*figures.auc);
    if (figures.log_loss) task->set_log_loss(*figures.log_loss);
    if (figures.calibration) task->set_calibration(*figures.calibration);
  }
  return evaluation;
}

TEST(SplitsDueAt, AreThoseOfTheStepAndAllOfThemWhereSomethingEnds) {
  const Job job = TestJob();
  EXPECT_THAT(SplitsDueAt(job, 0, false), IsEmpty());
  EXPECT_THAT(SplitsDueAt(job, 5, false), IsEmpty());
  EXPECT_THAT(SplitsDueAt(job, 20, false), ElementsAre(0));
  EXPECT_THAT(SplitsDueAt(job, 30, false), ElementsAre(0, 1));
  EXPECT_THAT(SplitsDueAt(job, 7, true), ElementsAre(0, 1, 2));
}

TEST(FigureOf, IsOneTasksOrTheMeanOverThoseThatHaveOneAndOfThatStepAlone) {
  const std::vector<Evaluation> all = {Evaluated(10, "often", {0.75, 0.5}, {0.25, {}}), Evaluated(5, "old", {0.9})};
  EXPECT_EQ(FigureOf(all, 10, "often", "click", Quality::AUC), 0.75);
  EXPECT_EQ(FigureOf(all, 10, "often", "", Quality::AUC), 0.5);
  EXPECT_EQ(FigureOf(all, 10, "often", "", Quality::LOG_LOSS), 0.5);
  EXPECT_EQ(FigureOf(all, 10, "often", "like", Quality::LOG_LOSS), std::nullopt);
  EXPECT_EQ(FigureOf(all, 10, "often", "click", Quality::GAUC), std::nullopt);
  EXPECT_EQ(FigureOf(all, 10, "old", "click", Quality::AUC), std::nullopt) << "of another step";
  EXPECT_EQ(FigureOf({Evaluated(10, "often", {std::nan("")})}, 10, "often", "click", Quality::AUC), std::nullopt);
}

TEST(BestAfter, KeepsTheEarlierOfEqualsAndCountsWhatGainedNothing) {
  const Job job = TestJob();
  std::optional<BestSnapshot> best = BestAfter(job, std::nullopt, {}, 0);
  EXPECT_FALSE(best.has_value());
  const auto see = [&](uint64_t step, const Figures& click) {
    best = BestAfter(job, best, {Evaluated(step, "often", click)}, step);
  };
  see(10, {0.7});
  EXPECT_EQ(best->step(), 10u);
  EXPECT_EQ(best->of(), "AUC of click on often");
  see(20, {0.7});
  EXPECT_EQ(best->step(), 10u);
  EXPECT_EQ(best->without_gain(), 1u);
  EXPECT_FALSE(EndsWithoutGain(job, best));
  see(30, {});  // undefined: no word on it
  EXPECT_EQ(best->without_gain(), 1u);
  best = BestAfter(job, best, {Evaluated(35, "seldom", {0.1})}, 35);
  EXPECT_EQ(best->without_gain(), 1u) << "another split";
  see(40, {0.71});
  EXPECT_EQ(best->step(), 40u);
  EXPECT_EQ(best->without_gain(), 0u);
  see(50, {0.5});
  see(60, {0.6});
  EXPECT_TRUE(EndsWithoutGain(job, best));
  Job patient = job;
  patient.mutable_training()->set_stop_after_no_gain(0);
  EXPECT_FALSE(EndsWithoutGain(patient, best));
  patient.mutable_snapshot()->mutable_best()->set_task("like");
  EXPECT_FALSE(BestAfter(patient, best, {}, 60).has_value()) << "another figure begins anew";
  patient.mutable_snapshot()->clear_best();
  EXPECT_FALSE(BestAfter(patient, best, {}, 60).has_value());
}

TEST(BestAfter, KnowsWhichWayEachFigureIsBetter) {
  Job job = TestJob();
  const auto best_of = [&](Quality::Metric metric) {
    job.mutable_snapshot()->mutable_best()->set_metric(metric);
    std::optional<BestSnapshot> best;
    uint64_t step = 0;
    for (const Figures& figures : {Figures{0.6, 0.4, 1.5}, Figures{0.7, 0.5, 0.9}, Figures{0.5, 0.3, 2.0}}) {
      ++step;
      best = BestAfter(job, best, {Evaluated(step, "often", figures)}, step);
    }
    return best->step();
  };
  EXPECT_EQ(best_of(Quality::AUC), 2u);
  EXPECT_EQ(best_of(Quality::LOG_LOSS), 3u);
  EXPECT_EQ(best_of(Quality::CALIBRATION), 2u);
}

TEST(JudgeTheSame, IsTheFigureAndTheHeldOutRecordsAndNothingElseOfTheJob) {
  const Job job = TestJob();
  EXPECT_TRUE(JudgeTheSame(job, WithDefaults(job))) << "written out or not";
  Job other = job;
  other.mutable_split(0)->set_every_steps(20);
  other.mutable_split(1)->mutable_log()->add_path("elsewhere.csv");
  other.mutable_training()->set_epochs(7);
  EXPECT_TRUE(JudgeTheSame(job, other));
  other.mutable_split(0)->mutable_log()->set_where("day == 8");
  EXPECT_FALSE(JudgeTheSame(job, other));
  other = job;
  other.mutable_snapshot()->mutable_best()->set_metric(Quality::LOG_LOSS);
  EXPECT_FALSE(JudgeTheSame(job, other));
}

TEST(UnmetRequirements, NamesEachFigureThatIsOutOfItsBoundsOrUndefined) {
  Job job = ParseJob(R"(
    export {
      require { split: "often" task: "click" min: 0.7 }
      require { split: "often" metric: LOG_LOSS max: 0.4 }
      require { split: "often" task: "click" metric: CALIBRATION min: 0.9 max: 1.1 } })",
                     "test")
                .value();
  EXPECT_THAT(UnmetRequirements(job, {Evaluated(10, "often", {0.7, 0.4, 1.0})}, 10), IsEmpty());
  EXPECT_THAT(UnmetRequirements(job, {Evaluated(10, "often", {0.6, 0.5, 1.2})}, 10),
              ElementsAre("AUC of click on often is 0.600000, below 0.7",
                          "LOG_LOSS of all tasks on often is 0.500000, above 0.4",
                          "CALIBRATION of click on often is 1.200000, above 1.1"));
  EXPECT_THAT(UnmetRequirements(job, {Evaluated(9, "often", {0.9, 0.1, 1.0})}, 10),
              ElementsAre("AUC of click on often is undefined", "LOG_LOSS of all tasks on often is undefined",
                          "CALIBRATION of click on often is undefined"));
}

}  // namespace
}  // namespace hearth
