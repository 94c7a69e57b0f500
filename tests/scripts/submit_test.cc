#include "scripts/hearth/submit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "scripts/hearth/run_json.h"

namespace hearth {
namespace {

using testing::HasSubstr;
using testing::Not;

class SubmitTest : public testing::Test {
 protected:
  SubmitTest()
      : dir_(absl::StrCat(testing::TempDir(), "submit_", getpid(), "_",
                          testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::remove_all(dir_);
    EXPECT_TRUE(MakeDirectories(dir_).ok());
  }
  void Commit(int step) {
    const std::string folder = absl::StrCat(dir_, "/snapshots/", step);
    ASSERT_TRUE(MakeDirectories(folder).ok());
    ASSERT_TRUE(WriteFileAtomically(folder + "/MANIFEST", "").ok());
  }
  // One start of Slurm's job: what the scheduler leaves in run.json ("": it died first), a snapshot, and srun's code.
  BatchNext Start(const std::string& job, const std::string& status, int code, BatchOutcome outcome, int step = 0) {
    EXPECT_TRUE(BatchBegin(dir_, job).ok());
    if (step > 0) Commit(step);
    if (!status.empty()) {
      EXPECT_TRUE(WriteRunEnd(dir_, "small", status, code, "why").ok());
    }
    const absl::StatusOr<BatchNext> next = BatchEnd(dir_, job, outcome);
    EXPECT_TRUE(next.ok()) << next.status();
    return *next;
  }
  nlohmann::json RunJson() { return nlohmann::json::parse(*ReadFile(dir_ + "/run.json")); }
  static BatchOutcome Ended(int code, int requeues_max = 2) {
    BatchOutcome outcome;
    outcome.code = code;
    outcome.requeues_max = requeues_max;
    return outcome;
  }
  static BatchOutcome Asked(int code, int requeues_max = 2) {
    BatchOutcome outcome = Ended(code, requeues_max);
    outcome.asked = true;
    return outcome;
  }

  const std::string dir_;
};

TEST_F(SubmitTest, TheScriptHoldsItsParametersAndNoneOfTheTemplates) {
  SubmitOptions options;
  options.programs = "/opt/bin";
  options.servers = 2;
  options.workers = 4;
  options.nodes = 3;
  options.time = "8:00:00";
  options.partition = "long";
  options.live = "/local/rows";
  options.sbatch = {"--account=ranking"};
  const std::string script = *BatchScript(options, "/runs/a", 2, {{"OMP_NUM_THREADS", "2"}});
  for (const char* line :
       {"#SBATCH --nodes=3\n", "#SBATCH --ntasks=7\n", "#SBATCH --cpus-per-task=2\n", "#SBATCH --time=8:00:00\n",
        "#SBATCH --signal=B:USR1@90\n", "#SBATCH --partition=long\n", "#SBATCH --account=ranking\n",
        "export HEARTH_OUT=/runs/a\n", "export HEARTH_PS=2\n", "export HEARTH_WORKER=4\n",
        "export HEARTH_LIVE=/local/rows\n", "export OMP_NUM_THREADS=2\n"}) {
    EXPECT_THAT(script, HasSubstr(line));
  }
  EXPECT_EQ(script.rfind("#!/bin/bash\n", 0), 0u);
  EXPECT_THAT(script, Not(HasSubstr("${HEARTH_OUT:-}")));
  // sbatch stops looking for its options at the first command.
  EXPECT_LT(script.rfind("#SBATCH"), script.find("\nexport "));
}

TEST_F(SubmitTest, PathsThatSrunCannotQuoteAreRefused) {
  SubmitOptions options;
  options.programs = "/opt/bin";
  options.time = "60";
  ASSERT_TRUE(BatchScript(options, "/runs/a", 1, {}).ok());
  for (const char* folder : {"/runs/a b", "/runs/%t", "/runs/it's", "/runs/a\"b", "/runs/$HOME", "/runs/a\nb"}) {
    EXPECT_EQ(ExitCodeOf(BatchScript(options, folder, 1, {}).status()), kExitConfig) << folder;
  }
}

// Each of them stands in a line of its own of a script that a shell reads.
TEST_F(SubmitTest, NothingThatAUserGivesReachesTheShell) {
  const auto refused = [](void (*set)(SubmitOptions*)) {
    SubmitOptions options;
    options.programs = "/opt/bin";
    options.time = "60";
    set(&options);
    const absl::StatusOr<std::string> script = BatchScript(options, "/runs/a", 1, {});
    return ExitCodeOf(script.status()) == kExitConfig;
  };
  EXPECT_FALSE(refused([](SubmitOptions* options) { options->partition = "long,gpu_a-1.b"; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->partition = "a\ntouch /tmp/x"; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->partition = "a b"; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->partition = "$(id)"; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->time = "60\ntouch /tmp/x"; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->sbatch = {"--account=a\ntouch /tmp/x"}; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->sbatch = {"--account=a\rtouch /tmp/x"}; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->sbatch = {"touch"}; }));
  EXPECT_TRUE(refused([](SubmitOptions* options) { options->programs = "/opt/$(id)"; }));
}

// Somebody's editor, or a disk, may leave anything there.
TEST_F(SubmitTest, ARunJsonOfAnyShapeEndsInAVerdict) {
  for (const char* text : {"", "{", "[]", "7", "null", "{\"status\": 7}", "{\"status\": null, \"exit\": 3}",
                           "{\"status\": \"failed\", \"exit\": {\"code\": \"x\", \"reason\": []}}",
                           "{\"status\": {\"a\": []}}", "{\"status\": \"failed\", \"exit\": {\"code\": 1e300}}",
                           "{\"status\": \"failed\", \"exit\": {\"code\": -1, \"reason\": \"x\"}}", "\xff\xfe{}"}) {
    ASSERT_TRUE(BatchBegin(dir_, "7").ok());
    ASSERT_TRUE(WriteFileAtomically(dir_ + "/run.json", text).ok());
    const absl::StatusOr<BatchNext> next = BatchEnd(dir_, "7", Ended(137, 100));
    ASSERT_TRUE(next.ok()) << text;
    EXPECT_TRUE(next->requeue) << text;
    EXPECT_EQ(RunJson()["status"], "saved") << text;
  }
  // Deeper than a stack: neither read nor written again.
  std::string deep = "{\"a\": ";
  for (int i = 0; i < 1000000; ++i) deep += '[';
  ASSERT_TRUE(WriteFileAtomically(dir_ + "/run.json", deep).ok());
  EXPECT_TRUE(BatchEnd(dir_, "7", Ended(137, 100)).ok());
  for (int i = 0; i < 1000000; ++i) deep += ']';
  ASSERT_TRUE(WriteFileAtomically(dir_ + "/run.json", deep + "}").ok());
  EXPECT_TRUE(BatchEnd(dir_, "7", Ended(137, 100)).ok());
  EXPECT_EQ(RunJson()["status"], "saved");
}

TEST_F(SubmitTest, ASavedRunGoesBackAsLongAsEachStartBringsASnapshot) {
  for (int start = 1; start <= 5; ++start) {
    const BatchNext next = Start("7", "saved", kExitSaved, Asked(kExitSaved), start * 10);
    EXPECT_TRUE(next.requeue) << next.reason;
    EXPECT_EQ(next.code, kExitSaved);
  }
  EXPECT_TRUE(Start("7", "", 0, Asked(138)).requeue);
  EXPECT_TRUE(Start("7", "", 0, Asked(138)).requeue);
  const BatchNext next = Start("7", "", 0, Asked(138));
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, kExitSaved);
  EXPECT_THAT(next.reason, HasSubstr("--max-requeues"));
  EXPECT_TRUE(Start("8", "", 0, Asked(138)).requeue) << "another job of Slurm's counts anew";
}

TEST_F(SubmitTest, ALimitThatCutsTheSaveShortGoesBackSoOftenAndNoMore) {
  // Earlier snapshots of the start are no reason to hide that its last one never got whole.
  BatchNext next = Start("7", "running", 0, Asked(143), 10);
  EXPECT_TRUE(next.requeue);
  EXPECT_THAT(next.reason, HasSubstr("counted anew behind a new one"));
  EXPECT_THAT(next.reason, HasSubstr("the time limit came before the snapshot was whole"));
  EXPECT_THAT(next.reason, HasSubstr("--signal-lead"));
  EXPECT_THAT(next.reason, HasSubstr("requeue 1 of 2"));
  EXPECT_TRUE(Start("7", "running", 0, Asked(143)).requeue);
  next = Start("7", "running", 0, Asked(143));
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, kExitSaved);
  EXPECT_THAT(next.reason, HasSubstr("submit it again"));
}

TEST_F(SubmitTest, ADeadRankGoesBackAsLongAsSnapshotsComeAndElseSoOftenAndNoMore) {
  for (int start = 1; start <= 5; ++start) {
    EXPECT_TRUE(Start("7", "running", 0, Ended(137), start * 10).requeue);
    EXPECT_EQ(RunJson()["status"], "saved");
    EXPECT_EQ(RunJson()["exit"]["code"], 75);
  }
  EXPECT_EQ(*ReadFile(dir_ + "/requeues"), "7 1 40\n");
  EXPECT_TRUE(Start("7", "running", 0, Ended(137)).requeue);
  // A start that fell back to an older snapshot, and saved the newer one again, is none the further.
  ASSERT_TRUE(RemoveTree(dir_ + "/snapshots/50").ok());
  const BatchNext next = Start("7", "running", 0, Ended(137), 50);
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, 137);
  EXPECT_EQ(RunJson()["status"], "failed");
  EXPECT_EQ(RunJson()["exit"]["code"], 137);
}

TEST_F(SubmitTest, WhatWouldRepeatEndsTheJobWithTheSchedulersCode) {
  for (const int code : {64, 65, 66, 74, 78}) {
    // The others were killed harder, and srun says so.
    const BatchNext next = Start("7", "failed", code, Ended(137));
    EXPECT_FALSE(next.requeue);
    EXPECT_EQ(next.code, code);
    EXPECT_EQ(RunJson()["exit"]["reason"], "why");
  }
  const BatchNext usage = Start("7", "", 0, Ended(64));
  EXPECT_FALSE(usage.requeue);
  EXPECT_EQ(RunJson()["status"], "failed");
}

TEST_F(SubmitTest, AFinishedRunEndsTheJob) {
  const BatchNext next = Start("7", "finished", 0, Ended(0));
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, 0);
  EXPECT_EQ(RunJson()["status"], "finished");
}

TEST_F(SubmitTest, AnOldOutcomeIsNotTakenForThisStartsAndZeroFromSrunAloneIsNoSuccess) {
  ASSERT_FALSE(Start("7", "failed", 65, Ended(137)).requeue);
  EXPECT_TRUE(Start("7", "", 0, Ended(137)).requeue);
  EXPECT_TRUE(Start("7", "", 0, Ended(0)).requeue) << "srun may end with 0 when no rank was launched";
}

TEST_F(SubmitTest, ACancelledJobStaysCancelled) {
  BatchOutcome outcome = Ended(143);
  outcome.stopped = true;
  const BatchNext next = Start("7", "running", 0, outcome, 10);
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, 143);
  EXPECT_EQ(RunJson()["exit"]["code"], 143);
}

TEST_F(SubmitTest, AJobThatSlurmPutsBackIsNotPutBackAgainNorCounted) {
  BatchOutcome outcome = Ended(143, 0);
  outcome.requeued = true;
  const BatchNext next = Start("7", "running", 0, outcome, 10);
  EXPECT_FALSE(next.requeue);
  EXPECT_EQ(next.code, kExitSaved);
  EXPECT_EQ(RunJson()["status"], "saved");
  EXPECT_EQ(*ReadFile(dir_ + "/requeues"), "7 0 -1\n");
}

}  // namespace
}  // namespace hearth
