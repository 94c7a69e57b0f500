// The publisher with an exporter of our own making: a shell script that makes folders with the manifests of a chain, or
// fails as it is told. Time is the test's.
#include "scheduler/publisher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include "common/artifact/bundle.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/base/status.h"
#include "tests/scheduler/scheduler_testing.h"

namespace hearth {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class TestEnv final : public Env {
 public:
  int64_t NowUs() override { return now_us; }
  int64_t WallUs() override { return now_us; }
  std::unique_ptr<Event> NewEvent() override { return Env::Real()->NewEvent(); }
  std::unique_ptr<Thread> StartThread(absl::string_view name, std::function<void()> run) override {
    return Env::Real()->StartThread(name, std::move(run));
  }
  int64_t now_us = 1;
};

class PublisherTest : public testing::Test {
 protected:
  PublisherTest() : dir_(MakeTestFolder()) {
    job_.mutable_export_()->set_delta_every_steps(10);
    WriteExporter(dir_);
    EXPECT_TRUE(MakeDirectories(Path("logs")).ok());
    for (int step = 5; step <= 100; step += 5)
      EXPECT_TRUE(MakeDirectories(Path(absl::StrCat("snapshots/", step))).ok());
  }
  std::string Path(const std::string& name) const { return JoinPath(dir_, name); }

  std::unique_ptr<Publisher> Start(const std::vector<uint64_t>& committed, bool finished = false) {
    Publisher::Options options = {&env_, job_, dir_, dir_};
    return std::make_unique<Publisher>(options, committed, finished);
  }
  // Until the child in work has ended.
  void Settle(Publisher* publisher) {
    publisher->Poll();
    while (publisher->working()) {
      siginfo_t ended = {};
      ASSERT_EQ(waitid(P_ALL, 0, &ended, WEXITED | WNOWAIT), 0);  // asleep; Poll takes the child's end
      publisher->Poll();
    }
  }
  // Until nothing waits, or nothing more is tried; time passes between tries.
  void Drain(Publisher* publisher) {
    while (!publisher->done()) {
      Settle(publisher);
      env_.now_us += 100'000'000;
    }
  }
  std::vector<uint64_t> Steps() const {
    const auto chain = ReadNewestChain(Path("export"));
    EXPECT_TRUE(chain.ok()) << chain.status();
    std::vector<uint64_t> steps;
    for (const BundleLink& link : *chain) steps.push_back(link.step);
    return steps;
  }
  void Touch(const char* name, const std::string& text = "") {
    ASSERT_TRUE(WriteFileAtomically(Path(name), text).ok());
  }

  const std::string dir_;
  Job job_;
  TestEnv env_;
};

TEST_F(PublisherTest, TheFirstIsAFullExportAndTheNextAreDeltas) {
  const auto publisher = Start({});
  for (const uint64_t step : {0, 5, 10, 15, 20, 25, 30}) {
    publisher->Committed(step, false);
    EXPECT_EQ(publisher->Waits(step), step > 0 && step % 10 == 0) << step;
    env_.now_us += 2'000'000;
    Settle(publisher.get());
    EXPECT_FALSE(publisher->Waits(step));
  }
  EXPECT_THAT(Steps(), ElementsAre(10, 20, 30));
  const std::string calls = ReadFile(Path("calls")).value();
  EXPECT_THAT(calls, HasSubstr(Path("snapshots/10") + " --out " + Path("export/10") + " --format all --golden 0\n"));
  EXPECT_THAT(calls, HasSubstr(Path("snapshots/20") + " --out " + Path("export") + " --since 10\n"));
  const PublicationFigures figures = publisher->figures();
  EXPECT_EQ(figures.base, 10u);
  EXPECT_EQ(figures.seq, 2u);
  EXPECT_EQ(figures.step, 30u);
  EXPECT_EQ(figures.published, 3u);
  EXPECT_EQ(figures.failures, 0u);
  EXPECT_DOUBLE_EQ(figures.seconds, 2.0);
}

TEST_F(PublisherTest, WhatFallsShortOfARequirementIsWithheldAndTheNextOneCoversIt) {
  Requirement* require = job_.mutable_export_()->add_require();
  require->set_split("test");
  require->set_min(0.7);
  const auto commit = [&](uint64_t step, double auc) {
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    Evaluation* evaluation = manifest.add_evaluation();
    evaluation->set_split("test");
    evaluation->set_step(step);
    evaluation->add_task()->set_auc(auc);
    ASSERT_TRUE(CommitManifest(Path(absl::StrCat("snapshots/", step)), manifest).ok());
  };
  auto publisher = Start({});
  for (const auto& [step, auc] : {std::pair(10, 0.8), std::pair(20, 0.6), std::pair(30, 0.75), std::pair(40, 0.1)}) {
    commit(step, auc);
    publisher->Committed(step, step == 40);
    EXPECT_EQ(publisher->Waits(step), auc > 0.7) << step;
    Drain(publisher.get());
  }
  EXPECT_THAT(Steps(), ElementsAre(10, 30));
  EXPECT_EQ(publisher->figures().withheld, 2u);
  EXPECT_EQ(publisher->figures().withheld_reason, "step 40: AUC of all tasks on test is 0.100000, below 0.7");
  publisher = Start({20, 30, 40}, true);  // a resume judges as the run did
  EXPECT_TRUE(publisher->done());
  EXPECT_THAT(Steps(), ElementsAre(10, 30));
}

TEST_F(PublisherTest, TheEndOfAJobIsPublishedAtAnyStep) {
  const auto publisher = Start({5, 10, 15});
  Drain(publisher.get());
  publisher->Committed(25, true);
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(10, 25));
  EXPECT_THAT(Start({15, 25}, true)->done(), true) << "it is there already";
  Drain(Start({15, 25, 35}, true).get());
  EXPECT_THAT(Steps(), ElementsAre(10, 25, 35));
}

// Who serves the chain may hold deltas of the line that the run has left: a delta on the same full export would not fit
// there, and one on a later full export than all of them would never come.
TEST_F(PublisherTest, BehindAForkTheFirstPublicationIsAFullExport) {
  Drain(Start({10, 20, 30}).get());
  HistoryEntry fork;
  fork.kind = HistoryEntry::Kind::kFork;
  fork.number = 1;
  fork.back_to = 20;
  ASSERT_TRUE(AppendHistory(dir_, fork).ok());
  const auto aside = SetAsideLine(Path("export"), 20, ".aside-1");
  ASSERT_TRUE(aside.ok()) << aside.status();
  EXPECT_THAT(*aside, ElementsAre(Path("export/delta/10/2.aside-1")));
  {
    const auto publisher = Start({10, 20});
    EXPECT_THAT(Steps(), ElementsAre(10, 20));
    EXPECT_TRUE(publisher->done()) << "both are there, and right";
  }  // killed; the next one knows it still
  const auto publisher = Start({10, 20});
  for (const uint64_t step : {30, 40}) {
    publisher->Committed(step, false);
    Drain(publisher.get());
  }
  EXPECT_THAT(Steps(), ElementsAre(30, 40)) << "a full export, and a delta on it";
  EXPECT_EQ(ReadChain(Path("export"), 10)->size(), 2u) << "what both lines have in common stays as it is";
  EXPECT_EQ(publisher->figures().failures, 0u);
}

TEST_F(PublisherTest, AForkSetsWholeChainsAsideAndKeepsWhatAnEarlierOneSetAside) {
  job_.mutable_export_()->set_deltas_max(1);
  Drain(Start({10, 20, 30, 40}).get());
  ASSERT_THAT(Steps(), ElementsAre(30, 40));
  Touch("export/delta/30/1/broken");
  const auto aside = SetAsideLine(Path("export"), 10, ".aside-1");
  ASSERT_TRUE(aside.ok()) << aside.status();
  EXPECT_THAT(*aside, ElementsAre(Path("export/delta/30.aside-1"), Path("export/30.aside-1"),
                                  Path("export/delta/10/1.aside-1")));
  EXPECT_THAT(Steps(), ElementsAre(10));
  EXPECT_TRUE(SetAsideLine(Path("export"), 10, ".aside-1")->empty()) << "again, behind a kill";
  EXPECT_TRUE(SetAsideLine(Path("nothing"), 10, ".aside-1")->empty());
}

TEST_F(PublisherTest, AResumePublishesWhatIsCommittedAndNotPublished) {
  Drain(Start({10}).get());
  {
    Touch("hold");
    const auto publisher = Start({10, 20});
    publisher->Poll();
    ASSERT_TRUE(publisher->working());
  }  // the scheduler is gone, and its child with it
  ASSERT_TRUE(RemoveTree(Path("hold")).ok());
  EXPECT_THAT(Steps(), ElementsAre(10));
  const auto publisher = Start({10, 20, 25, 30});
  EXPECT_TRUE(publisher->Waits(20) && publisher->Waits(30));
  EXPECT_FALSE(publisher->Waits(10) || publisher->Waits(25));
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(10, 20, 30));
}

TEST_F(PublisherTest, AKilledExporterIsTriedAgainAndItsLeavingsGo) {
  const auto publisher = Start({10});
  Touch("die");
  Settle(publisher.get());
  EXPECT_EQ(publisher->figures().failures, 1u);
  EXPECT_THAT(publisher->figures().reason, HasSubstr("ended with 137"));
  publisher->Poll();
  EXPECT_FALSE(publisher->working()) << "the next try waits a little";
  Drain(publisher.get());
  publisher->Committed(20, false);
  Touch("die");
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(10, 20));
  for (const char* folder : {"export", "export/delta/10"}) {
    const std::vector<std::string> names = ListDirectory(Path(folder)).value();
    for (const std::string& name : names) EXPECT_THAT(name, Not(HasSubstr("partial")));
  }
}

TEST_F(PublisherTest, TooManyThatWaitLeaveTheOldestOutAndTheNextDeltaCoversTheirSteps) {
  job_.mutable_export_()->set_waiting_max(2);
  Touch("hold");
  const auto publisher = Start({10});
  publisher->Poll();
  for (const uint64_t step : {20, 30, 40, 50}) publisher->Committed(step, false);
  EXPECT_TRUE(publisher->Waits(10)) << "it is being read";
  EXPECT_FALSE(publisher->Waits(20) || publisher->Waits(30));
  ASSERT_TRUE(RemoveTree(Path("hold")).ok());
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(10, 40, 50));
  EXPECT_EQ(publisher->figures().left_out, 2u);
}

TEST_F(PublisherTest, AfterDeltasMaxComesANewFullExport) {
  job_.mutable_export_()->set_deltas_max(2);
  job_.mutable_export_()->set_waiting_max(9);
  Drain(Start({10, 20, 30, 40, 50}).get());
  EXPECT_THAT(Steps(), ElementsAre(40, 50));
  EXPECT_EQ(ReadChain(Path("export"), 10)->back().step, 30u);
}

TEST_F(PublisherTest, WhatIsBeyondTheSnapshotIsSetAsideAndPublishedAgain) {
  Drain(Start({10, 20, 30}).get());
  const std::string before = ReadFile(Path("export/delta/10/2/manifest.json")).value();
  const auto publisher = Start({10, 20});
  EXPECT_THAT(Steps(), ElementsAre(10, 20));
  publisher->Committed(30, false);
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(10, 20, 30));
  EXPECT_EQ(ReadFile(Path("export/delta/10/2/manifest.json")).value(), before);
}

TEST_F(PublisherTest, AChainThatIsDamagedIsLeftBehindForANewFullExport) {
  Drain(Start({10, 20}).get());
  ASSERT_TRUE(WriteFileAtomically(Path("export/delta/10/1/manifest.json"), "{}").ok());
  const auto publisher = Start({10, 20, 30});
  EXPECT_EQ(publisher->figures().failures, 1u);
  EXPECT_THAT(publisher->figures().reason, HasSubstr("export/delta/10/1/manifest.json"));
  Drain(publisher.get());
  EXPECT_EQ(Steps().back(), 30u);
  EXPECT_TRUE(PathExists(Path("export/30"))) << "a full export";
}

TEST_F(PublisherTest, ADeltaThatIsRefusedMakesWayForAFullExport) {
  const auto publisher = Start({10});
  Drain(publisher.get());
  publisher->Committed(20, false);
  Touch("fail", "65");
  Settle(publisher.get());
  ASSERT_TRUE(RemoveTree(Path("fail")).ok());
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(20));
}

TEST_F(PublisherTest, FailuresAreToldAndEndNothing) {
  Touch("fail", "74");
  const auto publisher = Start({10, 20});
  Drain(publisher.get());
  EXPECT_EQ(publisher->figures().failures, 6u) << "three of each";
  EXPECT_THAT(publisher->figures().reason, HasSubstr("ended with 74; see " + Path("logs/export.log")));
  EXPECT_TRUE(publisher->Waits(20)) << "a later run may have more luck";
  EXPECT_FALSE(publisher->Waits(10)) << "a newer one took its place";
  ASSERT_TRUE(RemoveTree(Path("fail")).ok());
  publisher->Committed(30, false);
  env_.now_us += 100'000'000;
  Settle(publisher.get());
  Drain(publisher.get());
  EXPECT_THAT(Steps(), ElementsAre(20, 30));

  Publisher::Options options = {&env_, job_, dir_, Path("absent")};
  Publisher absent(options, {40}, false);
  Drain(&absent);
  EXPECT_THAT(absent.figures().reason, HasSubstr("cannot be started"));
}

}  // namespace
}  // namespace hearth
