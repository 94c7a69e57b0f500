#include "scripts/hearth/launch.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/algorithm/container.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/net/seal.h"
#include "scripts/hearth/run_json.h"
#include "scripts/hearth/supervise.h"

namespace hearth {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

// A job, and programs that only pretend: `mpirun` is a shell script that a test writes. It finds the run's folder as
// its last argument in $dir, and the number of its call, from 1, in $call.
class LaunchTest : public testing::Test {
 protected:
  LaunchTest()
      : root_(absl::StrCat(testing::TempDir(), "launch_", getpid(), "_",
                           testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::remove_all(root_);
    EXPECT_TRUE(MakeDirectories(root_ + "/bin").ok());
    for (const char* role : {"hearth-scheduler", "hearth-ps", "hearth-worker"}) WriteProgram(role, "exec sleep 1000");
    Write("log.csv", "user_id,click\n1,0\n");
    Write("job.txtpb", JobText());
    options_.programs = {root_ + "/bin", root_ + "/bin/mpirun"};
    options_.job = root_ + "/job.txtpb";
    options_.out = root_ + "/run";
    options_.back_off_us = 1000;
  }

  static std::string JobText() {
    return "name: 'small' log { name: 'train' path: 'log.csv' } task { name: 'click' category: 'watch' label: 'click' "
           "}\n"
           "slot { name: 'user_id' table: 'user' } table { name: 'user' dim: 4 }\n";
  }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomically(root_ + "/" + name, text).ok());
  }
  void WriteProgram(const std::string& name, const std::string& body) {
    Write("bin/" + name, "#!/bin/bash\n" + body + "\n");
    std::filesystem::permissions(root_ + "/bin/" + name, std::filesystem::perms::owner_all);
  }
  void WriteMpirun(const std::string& body) {
    WriteProgram("mpirun", absl::StrCat("root='", root_, "'; dir=\"${@: -1}\"; echo \"$*\" >> \"$root/calls\"\n",
                                        "call=$(wc -l < \"$root/calls\")\n", body));
  }
  std::vector<std::string> Calls() {
    const absl::StatusOr<std::string> text = ReadFile(root_ + "/calls");
    if (!text.ok()) return {};
    return absl::StrSplit(*text, '\n', absl::SkipEmpty());
  }
  nlohmann::json RunJson() { return nlohmann::json::parse(*ReadFile(options_.out + "/run.json")); }
  // A committed snapshot of the effective job.
  void CommitSnapshot(uint64_t step, uint32_t lanes, const std::vector<std::string>& overrides = {},
                      uint32_t epoch = 0) {
    Job job = *LoadJob(options_.job, overrides);
    job.mutable_training()->set_lanes(lanes);
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_job(PrintJob(job));
    manifest.set_lanes(lanes);
    manifest.set_shards(1);
    manifest.set_servers(1);
    for (uint32_t l = 0; l < lanes; ++l) manifest.add_lane()->mutable_cursor()->set_epoch(epoch);
    const std::string folder = absl::StrCat(options_.out, "/snapshots/", step);
    ASSERT_TRUE(MakeDirectories(folder).ok());
    ASSERT_TRUE(WriteFileAtomically(folder + "/rows", "rows").ok());
    const std::vector<FileEntry> entries = *DescribeFiles(folder, {"rows"});
    for (const FileEntry& entry : entries) *manifest.add_file() = entry;
    ASSERT_TRUE(CommitManifest(folder, manifest).ok());
  }
  std::vector<std::string> Snapshots() { return *ListDirectory(options_.out + "/snapshots"); }
  int TrainSaying(std::string* said) {
    testing::internal::CaptureStderr();
    const int code = Train(options_);
    *said = testing::internal::GetCapturedStderr();
    return code;
  }

  const std::string root_;
  TrainOptions options_;
  std::string said_;
};

TEST_F(LaunchTest, StartsTheRolesWithTheirCountsAndTheFolderLast) {
  EXPECT_THAT(MpirunArguments({"/bin-dir"}, {2, 3}, "", {"--restarts", "1"}, {"--live", "/disk"}, "/run"),
              ElementsAre("mpirun", "--oversubscribe", "--bind-to", "none", "-np", "1", "/bin-dir/hearth-scheduler",
                          "--ps", "2", "--worker", "3", "--restarts", "1", "/run", ":", "-np", "2",
                          "/bin-dir/hearth-ps", "--ps", "2", "--worker", "3", "--live", "/disk", "/run", ":", "-np",
                          "3", "/bin-dir/hearth-worker", "--ps", "2", "--worker", "3", "/run"));
}

TEST_F(LaunchTest, WritesTheEffectiveJobAndHandsTheRanksTheirEnvironment) {
  WriteMpirun("env > \"$root/env\"; read -r line && exit 1; exit 0");
  options_.workers = 2;
  options_.overrides = {"training.threads=3"};
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  const Job job = *LoadJob(options_.out + "/job.txtpb", {});
  EXPECT_EQ(job.training().lanes(), 2u);
  EXPECT_TRUE(std::filesystem::path(job.data_dir()).is_absolute());
  EXPECT_TRUE(std::filesystem::equivalent(job.data_dir(), root_));
  const std::string env = *ReadFile(root_ + "/env");
  for (const char* line : {"OMP_NUM_THREADS=3\n", "OMP_WAIT_POLICY=passive\n", "OMPI_MCA_mpi_yield_when_idle=1\n",
                           "OMPI_ALLOW_RUN_AS_ROOT=1\n", "MALLOC_TRIM_THRESHOLD_="}) {
    EXPECT_THAT(env, HasSubstr(line));
  }
  for (const char* name : {"logs", "snapshots", "dead-letter", "predictions", "tb"})
    EXPECT_TRUE(PathExists(options_.out + "/" + name));
}

// Not on a command line, which every user of the host can read.
TEST_F(LaunchTest, EachStartHasATokenOfItsOwnThatOnlyItsEnvironmentHolds) {
  WriteMpirun("printenv HEARTH_JOB_TOKEN >> \"$root/tokens\"; [ $call -lt 3 ] && exit 70; exit 0");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  const std::vector<std::string> tokens = absl::StrSplit(*ReadFile(root_ + "/tokens"), '\n', absl::SkipEmpty());
  ASSERT_EQ(tokens.size(), 3u);
  for (const std::string& token : tokens) {
    EXPECT_TRUE(JobToken::Parse(token).ok());
    EXPECT_EQ(absl::c_count(tokens, token), 1);
    EXPECT_THAT(said_, testing::Not(HasSubstr(token)));
    for (const std::string& call : Calls()) EXPECT_THAT(call, testing::Not(HasSubstr(token)));
    for (const auto& entry : std::filesystem::recursive_directory_iterator(options_.out)) {
      if (!entry.is_regular_file()) continue;
      EXPECT_THAT(*ReadFile(entry.path().string()), testing::Not(HasSubstr(token))) << entry.path();
    }
  }
  EXPECT_THAT(Calls()[0], HasSubstr("-x HEARTH_JOB_TOKEN -np 1"));
}

TEST_F(LaunchTest, ALinkThatSomebodyPlantedInTheLocksPlaceIsRefused) {
  WriteMpirun("exit 0");
  ASSERT_TRUE(MakeDirectories(options_.out).ok());
  Write("victim", "theirs");
  std::filesystem::create_symlink(root_ + "/victim", options_.out + "/lock");
  EXPECT_EQ(TrainSaying(&said_), kExitConfig) << said_;
  EXPECT_THAT(said_, HasSubstr("run/lock: is a symbolic link"));
  EXPECT_EQ(*ReadFile(root_ + "/victim"), "theirs");
  EXPECT_TRUE(Calls().empty());
}

TEST_F(LaunchTest, ExportsTheEnvironmentToOtherHosts) {
  Write("hosts", "localhost\n");
  options_.hostfile = root_ + "/hosts";
  WriteMpirun("exit 0");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(Calls()[0], HasSubstr("--hostfile " + root_ +
                                    "/hosts -x OMP_NUM_THREADS -x OMP_WAIT_POLICY -x MALLOC_MMAP_THRESHOLD_"));
}

TEST_F(LaunchTest, RestartsAfterADeadRankAndCountsItsRestarts) {
  WriteMpirun("[ $call -lt 3 ] && kill -9 $$; exit 0");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  ASSERT_EQ(Calls().size(), 3u);
  EXPECT_THAT(Calls()[0], HasSubstr("--restarts 0 "));
  EXPECT_THAT(Calls()[2], HasSubstr("--restarts 2 "));
  EXPECT_THAT(said_, HasSubstr("killed by signal 9"));
}

TEST_F(LaunchTest, GivesUpAfterMaxRestartsAndSaysSoInRunJson) {
  WriteMpirun("echo '{\"status\": \"running\", \"steps\": 7}' > \"$dir/run.json\"; exit 70");
  options_.restarts_max = 2;
  EXPECT_EQ(TrainSaying(&said_), 70);
  EXPECT_EQ(Calls().size(), 3u);
  EXPECT_EQ(RunJson()["status"], "failed");
  EXPECT_EQ(RunJson()["exit"]["code"], 70);
  EXPECT_EQ(RunJson()["steps"], 7);
}

// The script commits by a name alone: how far a run has come is seen from those.
TEST_F(LaunchTest, EachNewSnapshotBeginsTheCountOfRestartsAnew) {
  WriteMpirun(
      "commit() { mkdir -p \"$dir/snapshots/$1\" && touch \"$dir/snapshots/$1/MANIFEST\"; }\n"
      "case $call in 2) commit 10;; 4) commit 20;; 5) commit 30;; esac; exit 70");
  options_.restarts_max = 2;
  EXPECT_EQ(TrainSaying(&said_), 70);
  EXPECT_EQ(Calls().size(), 7u) << "two in vain behind the newest snapshot, which the fifth start saved:\n" << said_;
  EXPECT_THAT(Calls()[6], HasSubstr("--restarts 6 ")) << "run.json counts all of them";
  EXPECT_THAT(said_, HasSubstr("restart 1 of 2 from the newest snapshot (10: new, the count begins anew) in"));
  EXPECT_THAT(said_, HasSubstr("restarted 2 times without a new snapshot, --max-restarts"));
}

TEST_F(LaunchTest, ASnapshotThatIsSavedAgainIsNoNewOne) {
  CommitSnapshot(20, 1);
  WriteMpirun(
      "rm -r \"$dir/snapshots/20\"; mkdir -p \"$dir/snapshots/20\"; touch \"$dir/snapshots/20/MANIFEST\"; exit 70");
  options_.restarts_max = 2;
  EXPECT_EQ(TrainSaying(&said_), 70);
  EXPECT_EQ(Calls().size(), 3u) << said_;
}

TEST_F(LaunchTest, DoesNotRetryWhatWouldFailAgain) {
  for (const int code : {64, 65, 66, 74, 78}) {
    EXPECT_TRUE(IsFinalExit(code));
    WriteMpirun(absl::StrCat("exit ", code));
    std::filesystem::remove(root_ + "/calls");
    EXPECT_EQ(TrainSaying(&said_), code);
    EXPECT_EQ(Calls().size(), 1u);
  }
  for (const int code : {1, 70, 137, 134, 139}) EXPECT_FALSE(IsFinalExit(code));
}

TEST_F(LaunchTest, KeepsWhatTheSchedulerSaidOfTheEnd) {
  WriteMpirun(
      "echo '{\"status\": \"failed\", \"exit\": {\"code\": 65, \"reason\": \"bad log\"}}' > \"$dir/run.json\"; exit "
      "65");
  EXPECT_EQ(TrainSaying(&said_), 65);
  EXPECT_EQ(RunJson()["exit"]["reason"], "bad log");
}

// The script tells its parent, the front command, as a batch system would.
TEST_F(LaunchTest, ForwardsSigusr1AndReturnsSaved) {
  WriteMpirun("trap 'exit 75' USR1; kill -USR1 $PPID; while :; do sleep 0.01; done");
  EXPECT_EQ(TrainSaying(&said_), 75);
  EXPECT_EQ(Calls().size(), 1u);
  EXPECT_EQ(RunJson()["status"], "saved");
}

TEST_F(LaunchTest, ReturnsSavedWhereARankDiesWhileASaveIsAskedFor) {
  WriteMpirun("trap 'kill -9 $$' USR1; kill -USR1 $PPID; while :; do sleep 0.01; done");
  EXPECT_EQ(TrainSaying(&said_), 75);
  EXPECT_EQ(Calls().size(), 1u);
}

TEST_F(LaunchTest, ForwardsSigtermAndDoesNotRestart) {
  WriteMpirun("trap 'echo last words >&2; exit 1' TERM; kill -TERM $PPID; while :; do sleep 0.01; done");
  EXPECT_EQ(TrainSaying(&said_), 128 + SIGTERM);
  EXPECT_THAT(said_, HasSubstr("last words"));
  EXPECT_EQ(Calls().size(), 1u);
  EXPECT_EQ(RunJson()["status"], "failed");
}

// The signal comes when mpirun has ended: its last act, and the test's own process is its parent.
TEST_F(LaunchTest, AFinishedRunStaysFinishedWhateverSignalComesLast) {
  for (const int signal : {SIGTERM, SIGUSR1, SIGHUP}) {
    WriteMpirun(
        absl::StrCat("echo '{\"status\": \"finished\", \"exit\": {\"code\": 0, \"reason\": \"\"}}' > "
                     "\"$dir/run.json\"; trap '' USR1 TERM HUP; kill -",
                     signal, " $PPID; exit 0"));
    EXPECT_EQ(TrainSaying(&said_), 0) << said_;
    EXPECT_EQ(RunJson()["status"], "finished");
  }
}

TEST_F(LaunchTest, ASavedRunStaysSavedWhateverSignalComesLast) {
  WriteMpirun(
      "echo '{\"status\": \"saved\", \"exit\": {\"code\": 75, \"reason\": \"asked\"}}' > \"$dir/run.json\"; trap '' "
      "TERM; "
      "kill -TERM $PPID; exit 75");
  EXPECT_EQ(TrainSaying(&said_), 75) << said_;
  EXPECT_EQ(RunJson()["status"], "saved");
  EXPECT_EQ(RunJson()["exit"]["reason"], "asked");
}

// Signals that nobody waited for any more must not end the process when they are let through again.
TEST_F(LaunchTest, ASupervisorLeavesNoSignalBehind) {
  {
    Supervisor supervisor;
    for (const int signal : {SIGUSR1, SIGTERM, SIGHUP}) kill(getpid(), signal);
  }
  kill(getpid(), SIGUSR1);  // a batch system's, after the end
  Supervisor supervisor;    // and what it starts can be asked to save nevertheless
  const auto end = supervisor.Run({{"/bin/bash", "-c", "trap 'exit 75' USR1; kill -USR1 $$; exit 1"}, {}});
  ASSERT_TRUE(end.ok()) << end.status();
  EXPECT_EQ(end->code, 75);
}

TEST_F(LaunchTest, ASaveIsAskedForUntilSomeoneListens) {
  Supervisor supervisor;
  const char* const deaf_once =
      "trap 'asked=$((asked + 1)); [ $asked = 2 ] && exit 75' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done";
  const auto end = supervisor.Run({{"/bin/bash", "-c", deaf_once}, {}});
  ASSERT_TRUE(end.ok()) << end.status();
  EXPECT_EQ(end->code, 75);
}

TEST_F(LaunchTest, ASaveThatIsAskedForBeforeTheStartStartsNothing) {
  WriteMpirun("exit 70");
  sigset_t asked, before;
  sigemptyset(&asked);
  sigaddset(&asked, SIGUSR1);
  sigprocmask(SIG_BLOCK, &asked, &before);
  kill(getpid(), SIGUSR1);  // while the job is being prepared
  EXPECT_EQ(TrainSaying(&said_), 75) << said_;
  sigprocmask(SIG_SETMASK, &before, nullptr);
  EXPECT_EQ(RunJson()["status"], "saved");
  EXPECT_NE(said_.find("before anything was started"), std::string::npos) << said_;
}

// The snapshot is damaged: whoever verified it to its end would say so, and end with 65.
TEST_F(LaunchTest, AStopWhileASnapshotIsVerifiedEndsTheCommandThere) {
  CommitSnapshot(50, 1);
  Write("run/snapshots/50/rows", "rowz");
  WriteMpirun("exit 0");
  for (const auto& [signal, code] : {std::pair<int, int>{SIGINT, 130}, {SIGTERM, 143}, {SIGUSR1, 75}}) {
    sigset_t asked, before;
    sigemptyset(&asked);
    sigaddset(&asked, signal);
    sigprocmask(SIG_BLOCK, &asked, &before);
    kill(getpid(), signal);
    EXPECT_EQ(TrainSaying(&said_), code) << said_;
    sigprocmask(SIG_SETMASK, &before, nullptr);
    EXPECT_THAT(said_, HasSubstr(code == 75 ? "asked to save before anything was started" : "stopped by signal"));
  }
  EXPECT_TRUE(Calls().empty());
  EXPECT_FALSE(PathExists(options_.out + "/run.json"));
  EXPECT_EQ(TrainSaying(&said_), kExitBadData) << "nobody asks: " << said_;
}

TEST_F(LaunchTest, GoesBackToAKeptSnapshotAndSetsTheLaterOnesAside) {
  for (const uint64_t step : {10, 20, 30, 40}) CommitSnapshot(step, 1);
  Write("run/requeues", "7 2 40\n");
  WriteMpirun("exit 0");
  options_.from = 20;
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("resuming from " + options_.out + "/snapshots/20"));
  EXPECT_THAT(said_, HasSubstr("set aside: " + options_.out + "/snapshots/40 is now " + options_.out +
                               "/snapshots/40.aside-1 and stays until you remove it"));
  EXPECT_THAT(Snapshots(), ElementsAre("10", "20", "30.aside-1", "40.aside-1"));
  EXPECT_FALSE(PathExists(options_.out + "/requeues"));
  // The next line has snapshots of the same names.
  CommitSnapshot(30, 1);
  options_.from = 10;
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(Snapshots(), ElementsAre("10", "20.aside-2", "30.aside-1", "30.aside-2", "40.aside-1"));
  // There is nothing to set aside, and a plain start goes on.
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  options_.from.reset();
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("resuming from " + options_.out + "/snapshots/10"));
  const History history = *ReadHistory(options_.out);
  ASSERT_EQ(history.entries.size(), 4u);
  EXPECT_EQ(history.entries[0].back_to, 20u);
  EXPECT_EQ(history.entries[0].state->step, 40u);
  EXPECT_EQ(history.entries[2].number, 2u);
}

TEST_F(LaunchTest, AStepThatIsNotKeptIsToldWithThoseThatAre) {
  for (const uint64_t step : {10, 20}) CommitSnapshot(step, 1);
  ASSERT_TRUE(MakeDirectories(options_.out + "/snapshots/15").ok());  // never committed
  WriteMpirun("exit 0");
  options_.from = 15;
  EXPECT_EQ(TrainSaying(&said_), kExitNoInput);
  EXPECT_THAT(said_, HasSubstr("no snapshot of step 15 is kept; give --from one of those that are: 10, 20\n"));
  std::string text;
  EXPECT_EQ(PrintChanges(options_, &text).code(), absl::StatusCode::kNotFound);
  options_.out = root_ + "/none";
  EXPECT_EQ(TrainSaying(&said_), kExitNoInput);
  EXPECT_THAT(said_, HasSubstr("none is: leave --from out"));
}

TEST_F(LaunchTest, WhatCannotGoOnFromAStepSetsNothingAside) {
  CommitSnapshot(10, 1);
  CommitSnapshot(20, 1);
  WriteMpirun("exit 0");
  options_.from = 10;
  options_.overrides = {"table[user].dim=8"};
  EXPECT_EQ(TrainSaying(&said_), kExitConfig) << said_;
  options_.overrides = {"training.steps_max=9"};
  EXPECT_EQ(TrainSaying(&said_), kExitConfig) << said_;
  options_.overrides.clear();
  Write("run/snapshots/10/rows", "rowz");
  EXPECT_EQ(TrainSaying(&said_), kExitBadData) << said_;
  EXPECT_THAT(said_, HasSubstr("snapshots/10/rows: checksum"));
  EXPECT_THAT(Snapshots(), ElementsAre("10", "20"));
  EXPECT_TRUE(Calls().empty());
}

// A kill leaves the entry of what was begun, and some of the renames.
TEST_F(LaunchTest, GoingBackThatAKillCutShortIsEndedByTheNextStart) {
  for (const bool again : {false, true}) {
    ASSERT_TRUE(RemoveTree(options_.out).ok());
    for (const uint64_t step : {10, 20, 30, 40}) CommitSnapshot(step, 1);
    HistoryEntry fork;
    fork.kind = HistoryEntry::Kind::kFork;
    fork.number = 1;
    fork.back_to = 10;
    ASSERT_TRUE(AppendHistory(options_.out, fork).ok());
    ASSERT_TRUE(RenamePath(options_.out + "/snapshots/40", options_.out + "/snapshots/40.aside-1").ok());
    WriteMpirun("exit 0");
    options_.from = again ? std::make_optional(uint64_t{10}) : std::nullopt;
    EXPECT_EQ(TrainSaying(&said_), 0) << said_;
    EXPECT_THAT(said_, HasSubstr("going back to step 10 was cut short; it is done now"));
    EXPECT_THAT(said_, HasSubstr("resuming from " + options_.out + "/snapshots/10"));
    EXPECT_THAT(Snapshots(), ElementsAre("10", "20.aside-1", "30.aside-1", "40.aside-1"));
    CommitSnapshot(20, 1);
    options_.from.reset();
    EXPECT_EQ(TrainSaying(&said_), 0) << said_;
    EXPECT_THAT(said_, HasSubstr("resuming from " + options_.out + "/snapshots/20")) << "it is ended once";
  }
}

TEST_F(LaunchTest, AStartThatFailsDoesNotKeepThePreviousEnding) {
  ASSERT_TRUE(MakeDirectories(options_.out).ok());
  Write("run/run.json", "{\"status\": \"saved\", \"exit\": {\"code\": 75, \"reason\": \"asked\"}, \"steps\": 7}");
  WriteMpirun("exit 74");
  EXPECT_EQ(TrainSaying(&said_), 74);
  EXPECT_EQ(RunJson()["status"], "failed");
  // Nor does one of the same code.
  Write("run/run.json", "{\"status\": \"failed\", \"exit\": {\"code\": 74, \"reason\": \"long ago\"}, \"steps\": 7}");
  EXPECT_EQ(TrainSaying(&said_), 74);
  EXPECT_EQ(RunJson()["exit"]["code"], 74);
  EXPECT_THAT(RunJson()["exit"]["reason"].get<std::string>(), HasSubstr("exit code 74"));
  EXPECT_EQ(RunJson()["steps"], 7);
}

TEST_F(LaunchTest, AppendsToWhatTheSchedulerSaidThatItGaveUp) {
  WriteMpirun(
      "echo '{\"status\": \"failed\", \"exit\": {\"code\": 70, \"reason\": \"worker-1: torn\"}}' > \"$dir/run.json\"; "
      "exit "
      "70");
  options_.restarts_max = 1;
  EXPECT_EQ(TrainSaying(&said_), 70);
  const std::string reason = RunJson()["exit"]["reason"];
  EXPECT_THAT(reason, testing::StartsWith("worker-1: torn; "));
  EXPECT_THAT(reason, HasSubstr("restarted 1 times"));
}

TEST_F(LaunchTest, WritesAReasonThatIsNotUtf8) {
  ASSERT_TRUE(WriteRunEnd(root_, "caf\xe9", "failed", 66, "caf\xe9.csv: no such file").ok());
  const auto run = nlohmann::json::parse(*ReadFile(root_ + "/run.json"));
  EXPECT_EQ(run["exit"]["reason"], "caf\uFFFD.csv: no such file");
}

TEST_F(LaunchTest, RefusesAnEndThatLiesBeforeWhatIsTrained) {
  CommitSnapshot(50, 2, {"training.epochs=3"}, 1);  // in its second epoch
  WriteMpirun("exit 0");
  options_.workers = 2;
  options_.overrides = {"training.epochs=1"};
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("training.epochs: is 1"));
  EXPECT_THAT(said_, HasSubstr("at least 2"));
  options_.overrides = {"training.epochs=2", "training.steps_max=49"};
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("training.steps_max: is 49"));
  EXPECT_THAT(said_, HasSubstr("at least 50"));
  EXPECT_TRUE(Calls().empty());
  options_.overrides = {"training.epochs=2", "training.steps_max=50"};
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
}

TEST_F(LaunchTest, EndsRanksThatAKilledMpirunLeftBeforeItStartsOthers) {
  WriteMpirun(
      "if [ $call = 1 ]; then\n"
      "  \"$root/bin/hearth-worker\" --ps 1 --worker 1 \"$dir\" & \"$root/bin/hearth-ps\" \"$dir\" &\n"
      "  until [ \"$(cat \"$root/pids\" 2>/dev/null | wc -l)\" = 2 ]; do sleep 0.01; done\n"
      "  kill -9 $$\n"
      "fi\n"
      "for pid in $(cat \"$root/pids\"); do kill -0 $pid 2>/dev/null && echo $pid; done > \"$root/left\"; exit 0");
  const std::string linger = absl::StrCat("echo $$ >> '", root_, "/pids'; while :; do sleep 0.01; done");
  WriteProgram("hearth-worker", "trap '' TERM; " + linger);  // SIGTERM is not enough for this one
  WriteProgram("hearth-ps", linger);
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(Calls().size(), 2u);
  EXPECT_EQ(*ReadFile(root_ + "/left"), "");
}

// As Open MPI says it: ssh's line, then a message between two lines of dashes.
constexpr char kRefuses[] =
    "echo 'ssh: Could not resolve hostname nowhere' >&2; printf -- '-%.0s' {1..76} >&2; echo >&2\n"
    "printf 'ORTE was unable to reliably start\\none or more daemons.\\n\\nThis usually is caused by:\\n' >&2\n"
    "printf -- '-%.0s' {1..76} >&2; echo >&2\n";

TEST_F(LaunchTest, WhatMpirunRefusesIsToldWithItsReasonAndNotRetried) {
  WriteMpirun(absl::StrCat(kRefuses, "exit 255"));
  EXPECT_EQ(TrainSaying(&said_), kExitConfig);
  EXPECT_EQ(Calls().size(), 1u);
  for (const char* text : {"could not start the ranks", "Could not resolve hostname nowhere",
                           "unable to reliably start one or more daemons.", "hostfile"}) {
    EXPECT_THAT(said_, HasSubstr(text));
    EXPECT_THAT(RunJson()["exit"]["reason"].get<std::string>(), HasSubstr(text));
  }
  EXPECT_EQ(RunJson()["exit"]["code"], kExitConfig);
  EXPECT_THAT(*ReadFile(options_.out + "/logs/mpirun.log"), HasSubstr("This usually is caused by:"));
}

TEST_F(LaunchTest, WhatMpirunRefusesAfterAStartThatWorkedIsRetried) {
  WriteMpirun(absl::StrCat("if [ $call = 1 ]; then echo began >> \"$dir/logs/scheduler-0.log\"; exit 1; fi\n", kRefuses,
                           "[ $call = 2 ] && exit 255; exit 0"));
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(Calls().size(), 3u);
}

TEST_F(LaunchTest, ARankThatASignalEndedIsNoRefusal) {
  WriteMpirun(
      "[ $call = 2 ] && exit 0; printf -- '-%.0s' {1..76} >&2; echo >&2\n"
      "echo 'mpirun noticed that process rank 1 exited on signal 9 (Killed).' >&2\n"
      "printf -- '-%.0s' {1..76} >&2; echo >&2; exit 137");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(Calls().size(), 2u);
  EXPECT_THAT(said_, testing::Not(HasSubstr("noticed")));
}

TEST_F(LaunchTest, BelowAnotherMpirunTheRanksAreToldNothingOfIt) {
  WriteMpirun("env > \"$root/env\"; exit 0");
  for (const char* name : {"OMPI_UNIVERSE_SIZE", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "OMPI_MCA_orte_hnp_uri"})
    setenv(name, "outer", 1);
  setenv("OMPI_MCA_btl", "tcp,self", 1);
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  for (const char* name : {"OMPI_UNIVERSE_SIZE", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "OMPI_MCA_orte_hnp_uri"})
    unsetenv(name);
  unsetenv("OMPI_MCA_btl");
  const std::string env = *ReadFile(root_ + "/env");
  EXPECT_THAT(env, testing::Not(HasSubstr("=outer")));
  EXPECT_THAT(env, HasSubstr("OMPI_MCA_btl=tcp,self"));
}

TEST_F(LaunchTest, WhatTheRanksWriteGoesOnAndALostTableIsAnError) {
  WriteMpirun("printf 'step 1\\rstep 2' >&2; printf 'a table\\n'; echo ' done' >&2; exit 0");
  testing::internal::CaptureStdout();
  EXPECT_EQ(TrainSaying(&said_), 0);
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "a table\n");
  EXPECT_THAT(said_, HasSubstr("step 1\rstep 2 done\n"));
  EXPECT_THAT(said_, HasSubstr("next: hearth inspect "));
  WriteMpirun("echo '{\"status\": \"finished\"}' > \"$dir/run.json\"; echo 'a table'; exit 0");
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/full", O_WRONLY), STDOUT_FILENO);
    _exit(Train(options_));
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), kExitIo);
  EXPECT_EQ(RunJson()["status"], "finished");  // the training is
}

// As `hearth train … 2>&1 | head` does.
TEST_F(LaunchTest, AReaderOfItsProgressThatGoesAwayStopsNoRun) {
  WriteMpirun("for i in $(seq 100); do echo \"step $i\" >&2; done; echo done > \"$root/trained\"; exit 0");
  const pid_t child = fork();
  if (child == 0) {
    int ends[2];
    if (pipe(ends) != 0) _exit(1);
    close(ends[0]);
    dup2(ends[1], STDERR_FILENO);
    _exit(Train(options_));
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && PathExists(root_ + "/trained")) << status;
}

TEST_F(LaunchTest, ANeighbourThatCallsItselfARoleKeepsNoRunFromStarting) {
  WriteMpirun("exit 0");
  ASSERT_TRUE(MakeDirectories(options_.out).ok());
  const std::string folder = std::filesystem::canonical(options_.out).string();
  for (const char* name : {"/started", "/go"}) ASSERT_EQ(mkfifo((root_ + name).c_str(), 0600), 0);
  const std::string script = absl::StrCat("echo > '", root_, "/started'; read -r line < '", root_, "/go'");
  const pid_t neighbour = fork();
  if (neighbour == 0) {  // an editor, say: its arguments name a role and end with the folder
    execl("/bin/bash", "hearth-worker", "-c", script.c_str(), (root_ + "/bin/hearth-worker").c_str(), folder.c_str(),
          nullptr);
    _exit(127);
  }
  EXPECT_EQ(*ReadFile(root_ + "/started"), "\n");  // it runs
  EXPECT_THAT(RolesOf(folder), testing::IsEmpty());
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(kill(neighbour, 0), 0) << "a process that is none of ours was ended";
  kill(neighbour, SIGKILL);
  waitpid(neighbour, nullptr, 0);
}

TEST_F(LaunchTest, ExpressionsAndColumnsAreJudgedBeforeAnyRankAllFaultsAtOnce) {
  WriteMpirun("exit 0");
  Write("side.csv", "key,age\n1,2\n");
  Write("job.txtpb",
        "name: 'small' log { name: 'train' path: 'log.csv' join: 'side' } slot { name: 'user' table: 'user' }\n"
        "task { name: 'click' category: 'watch' label: 'click = 1' mask: 'agee > 1' } table { name: 'user' dim: 4 }\n"
        "side_table { name: 'side' path: 'side.csv' key: 'key' log_key: 'user_id' } dense { name: 'age' }");
  EXPECT_EQ(TrainSaying(&said_), kExitConfig);
  for (const char* text : {"label of task \"click\"", "agee", "/log.csv: ", "its header has 2 columns: user_id, click",
                           "slot \"user\"", "/job.txtpb"}) {
    EXPECT_THAT(said_, HasSubstr(text));
  }
  EXPECT_TRUE(Calls().empty());
  EXPECT_FALSE(PathExists(options_.out));
  std::string text;
  EXPECT_EQ(ExitCodeOf(PrintEffectiveJob(options_, &text)), kExitConfig);
  options_.overrides = {"side_table[0].delimiter=ab"};
  EXPECT_EQ(TrainSaying(&said_), kExitConfig);
  EXPECT_THAT(said_, HasSubstr("side_table[0].delimiter"));
}

TEST_F(LaunchTest, PrintsAJobWhoseFilesAreElsewhereButNoExpressionThatCannotBe) {
  std::filesystem::remove(root_ + "/log.csv");
  std::string text;
  EXPECT_TRUE(PrintEffectiveJob(options_, &text).ok());
  options_.overrides = {"task[0].label=click ="};
  EXPECT_EQ(ExitCodeOf(PrintEffectiveJob(options_, &text)), kExitConfig);
}

TEST_F(LaunchTest, RefusesAJobWithFaultsBeforeItMakesAnything) {
  Write("job.txtpb",
        JobText() + "training { batch_size: 0 } model { hidden_1: 0 } slot { name: 'x' table: 'nowhere' }");
  EXPECT_EQ(TrainSaying(&said_), 78);
  for (const char* field : {"training.batch_size", "model.hidden_1", "nowhere"}) EXPECT_THAT(said_, HasSubstr(field));
  EXPECT_FALSE(PathExists(options_.out));
}

TEST_F(LaunchTest, WantsTheProgramsThatPublishBeforeAJobThatPublishesTrains) {
  WriteMpirun("exit 0");
  options_.overrides = {"snapshot.every_steps=10", "export.delta_every_steps=10"};
  testing::internal::CaptureStderr();
  EXPECT_EQ(Train(options_), kExitConfig);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("/bin/hearth-export: "));
  EXPECT_FALSE(PathExists(options_.out));
  for (const char* program : {"hearth-export", "hearth-delta"}) WriteProgram(program, "exit 0");
  EXPECT_EQ(Train(options_), kExitOk);
}

TEST_F(LaunchTest, NamesEveryMissingFile) {
  Write("job.txtpb", JobText() + "side_table { name: 's' path: 'gone.csv' key: 'user_id' }");
  options_.overrides = {"log[0].path=absent.csv"};
  EXPECT_EQ(TrainSaying(&said_), 66);
  EXPECT_THAT(said_, HasSubstr("/absent.csv"));
  EXPECT_THAT(said_, HasSubstr("/gone.csv"));
}

TEST_F(LaunchTest, TakesItsLanesFromTheSnapshotOnAnyNumberOfWorkersUpToThem) {
  CommitSnapshot(5, 4);
  WriteMpirun("exit 0");
  options_.workers = 3;
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(LoadJob(options_.out + "/job.txtpb", {})->training().lanes(), 4u);
  options_.workers = 5;
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("--np-worker 4 or fewer"));
}

TEST_F(LaunchTest, RefusesTheFolderOfAnotherJobAndSaysWhichFieldsDiffer) {
  CommitSnapshot(5, 1, {"table[0].dim=8"});
  WriteMpirun("exit 0");
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("table[0].dim: 8 -> 4: it decides what a row holds"));
  EXPECT_TRUE(Calls().empty());
}

TEST_F(LaunchTest, ARunOf01KeepsItsMomentumWhereTheJobNamesNone) {
  CommitSnapshot(5, 1, {"model.batch_norm_momentum=0.1"});
  WriteMpirun("exit 0");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(LoadJob(options_.out + "/job.txtpb", {})->model().batch_norm_momentum(), 0.1);
}

TEST_F(LaunchTest, TellsFromWhichStepAChangedJobHolds) {
  CommitSnapshot(5, 1);
  WriteMpirun("exit 0");
  options_.overrides = {"training.clip_norm=2", "limits.bad_records_min=7"};
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("changed from step 6 on: training.clip_norm: 0 -> 2\n"));
  EXPECT_THAT(said_, Not(HasSubstr("bad_records_min"))) << "no bit depends on it";
}

TEST_F(LaunchTest, PrintsWhatWouldBeCarriedFreeAndRefusedAndStartsNothing) {
  WriteMpirun("exit 0");
  std::string text;
  ASSERT_TRUE(PrintChanges(options_, &text).ok());
  EXPECT_THAT(text, HasSubstr("holds no snapshot"));
  CommitSnapshot(5, 1);
  ASSERT_TRUE(PrintChanges(options_, &text).ok());
  EXPECT_THAT(text, HasSubstr("/snapshots/5: the same job\n"));
  options_.overrides = {"training.clip_norm=2", "limits.bad_records_min=7"};
  ASSERT_TRUE(PrintChanges(options_, &text).ok());
  EXPECT_THAT(text, HasSubstr("carried   training.clip_norm: 0 -> 2  (from step 6 on)\n"));
  EXPECT_THAT(text, HasSubstr("free      limits.bad_records_min: "));
  options_.overrides.push_back("table[0].dim=8");
  const absl::Status refused = PrintChanges(options_, &text);
  EXPECT_EQ(ExitCodeOf(refused), 78);
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("refused   table[0].dim: 4 -> 8  (it decides what a row holds"));
  EXPECT_TRUE(Calls().empty());
  EXPECT_FALSE(PathExists(options_.out + "/job.txtpb"));
}

TEST_F(LaunchTest, GoesOnWhereOnlyTheDataFolderMoved) {
  CommitSnapshot(5, 1);
  WriteMpirun("exit 0");
  ASSERT_TRUE(MakeDirectories(root_ + "/moved").ok());
  std::filesystem::rename(root_ + "/log.csv", root_ + "/moved/log.csv");
  options_.overrides = {"data_dir=" + root_ + "/moved"};
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("resuming from "));
  EXPECT_EQ(LoadJob(options_.out + "/job.txtpb", {})->data_dir(), root_ + "/moved");
}

TEST_F(LaunchTest, FallsBackToAnOlderSnapshotAndRefusesWhereNoneVerifies) {
  CommitSnapshot(5, 1);
  CommitSnapshot(10, 1);
  WriteMpirun("exit 0");
  ASSERT_TRUE(WriteFileAtomically(options_.out + "/snapshots/10/rows", "r0ws").ok());
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("resuming from "));
  EXPECT_THAT(said_, HasSubstr("/snapshots/5\n"));
  EXPECT_THAT(said_, HasSubstr("passed over: "));
  ASSERT_TRUE(WriteFileAtomically(options_.out + "/snapshots/5/rows", "r0ws").ok());
  EXPECT_EQ(TrainSaying(&said_), 65);
  EXPECT_EQ(Calls().size(), 1u);
}

TEST_F(LaunchTest, StartsAnewWhereTheFirstSnapshotWasNeverCommitted) {
  ASSERT_TRUE(MakeDirectories(options_.out + "/snapshots/0").ok());
  WriteMpirun("exit 0");
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
}

TEST_F(LaunchTest, WantsAnEmptyFolderWhenFresh) {
  WriteMpirun("exit 0");
  options_.fresh = true;
  EXPECT_EQ(TrainSaying(&said_), 0) << said_;
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("--fresh needs an empty folder"));
}

TEST_F(LaunchTest, RefusesAFolderInWhichAnotherRuns) {
  for (const uint64_t step : {10, 20}) CommitSnapshot(step, 1);
  ASSERT_EQ(mkfifo((root_ + "/started").c_str(), 0600), 0);
  ASSERT_EQ(mkfifo((root_ + "/go").c_str(), 0600), 0);
  WriteMpirun("echo > \"$root/started\"; read -r line < \"$root/go\"; exit 0");
  const pid_t other = fork();
  if (other == 0) {
    Train(options_);
    _exit(0);
  }
  const int started = open((root_ + "/started").c_str(), O_RDONLY);
  char line = 0;
  EXPECT_EQ(read(started, &line, 1), 1);  // it has begun, and has written: without a reader that would end it
  close(started);
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr(absl::StrCat("/lock: held by process ", other, " on ")));
  EXPECT_THAT(said_, HasSubstr("another hearth is running"));
  options_.from = 10;
  EXPECT_EQ(TrainSaying(&said_), 78) << "nor is anything set aside under it";
  EXPECT_THAT(Snapshots(), ElementsAre("10", "20"));
  close(open((root_ + "/go").c_str(), O_WRONLY));
  waitpid(other, nullptr, 0);
}

TEST_F(LaunchTest, SaysThatMpirunIsMissing) {
  EXPECT_EQ(TrainSaying(&said_), 78);
  EXPECT_THAT(said_, HasSubstr("scripts/setup"));
}

TEST_F(LaunchTest, PrintsTheEffectiveJob) {
  options_.workers = 2;
  std::string text;
  ASSERT_TRUE(PrintEffectiveJob(options_, &text).ok());
  EXPECT_EQ(ParseJob(text, "printed")->training().lanes(), 2u);
  EXPECT_THAT(text, HasSubstr("staleness: 0"));
}

TEST_F(LaunchTest, EvaluatesInAFolderOfItsOwn) {
  CommitSnapshot(5, 1);
  Write("other.csv", "user_id,click\n2,1\n");
  WriteMpirun(
      "cp \"$dir/job.txtpb\" \"$root/eval-job.txtpb\"; echo \"$dir\" > \"$root/eval-dir\"\n"
      "printf 'source\\toffset\\n' | zstd -q > \"$dir/predictions/eval.tsv.zst\"\n"
      "echo the table");
  EvalOptions options;
  options.overrides = {"metrics.prometheus_port=9100"};  // perhaps served by the training job at this moment
  options.programs = options_.programs;
  options.job = options_.job;
  options.snapshot = options_.out;
  options.logs = {root_ + "/other.csv"};
  options.predictions = root_ + "/predictions.tsv";
  testing::internal::CaptureStdout();
  EXPECT_EQ(Evaluate(options), 0);
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "the table\n");
  EXPECT_EQ(*ReadFile(options.predictions), "source\toffset\n");
  EXPECT_THAT(Calls()[0],
              HasSubstr(" --evaluate " + std::filesystem::canonical(options_.out).string() + "/snapshots/5 "));
  const Job job = *LoadJob(root_ + "/eval-job.txtpb", {});
  ASSERT_EQ(job.split_size(), 1);
  EXPECT_EQ(job.split(0).name(), "eval");
  EXPECT_EQ(job.metrics().prometheus_port(), 0u);
  EXPECT_EQ(job.split(0).log().path(0), root_ + "/other.csv");
  EXPECT_FALSE(PathExists(std::string(absl::StripAsciiWhitespace(*ReadFile(root_ + "/eval-dir")))));
  EXPECT_THAT(*ListDirectory(options_.out), ElementsAre("snapshots"));  // nothing was written there
}

TEST_F(LaunchTest, EvaluatesLogsThatAreReadInAnotherWay) {
  CommitSnapshot(5, 1);
  Write("other.tsv", "user_id\tclicked\n2\t1\n");
  WriteMpirun("cp \"$dir/job.txtpb\" \"$root/eval-job.txtpb\"");
  EvalOptions options;
  options.programs = options_.programs;
  options.job = options_.job;
  options.snapshot = options_.out;
  options.logs = {root_ + "/other.tsv"};
  options.overrides = {"log[train].delimiter=\\t", "task[click].label=clicked"};
  EXPECT_EQ(Evaluate(options), 0);
  EXPECT_EQ(LoadJob(root_ + "/eval-job.txtpb", {})->split(0).log().delimiter(), "\\t");
  std::filesystem::remove(root_ + "/calls");
  options.overrides = {"log[train].delimiter=\\t"};  // no column "click"
  EXPECT_EQ(Evaluate(options), kExitConfig);
  options.overrides = {"log[train].delimiter=\\t", "task[click].label=clicked", "table[user].dim=8"};
  EXPECT_EQ(Evaluate(options), kExitConfig);
  EXPECT_TRUE(Calls().empty());
}

}  // namespace
}  // namespace hearth
