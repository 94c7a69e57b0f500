// hearth-ps: one parameter server of a job. Started by `hearth train` and `hearth eval` under mpirun; its index follows
// from its rank.
#include <sys/stat.h>
#include <xxhash.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/command_line.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "common/net/mpi_runtime.h"
#include "ps/ps_server.h"

namespace hearth {
namespace {

constexpr int64_t kEndedByOthersUs = 2'000'000;
constexpr int kRanksMax = 65535;

struct Arguments {
  Ranks ranks;
  std::string live;
  std::string dir;
};

// Under --live: runs do not meet there.
std::string LiveOf(const Arguments& arguments) {
  const std::string path = std::filesystem::weakly_canonical(arguments.dir).string();
  struct stat info = {};  // folders of one path in two containers are two
  stat(path.c_str(), &info);
  const std::string run = absl::StrCat(path, "/", info.st_ino);
  return JoinPath(arguments.live, absl::StrCat(std::filesystem::path(path).filename().string(), "-",
                                               absl::Hex(XXH3_64bits(run.data(), run.size()), absl::kZeroPad16)));
}

// One clear line, a word to the scheduler, and time for it to end the job in good order.
[[noreturn]] void Fail(const Arguments& arguments, MpiRuntime* mpi, const absl::Status& status) {
  spdlog::error("event=failed code={} reason={}", ExitCodeOf(status), Quoted(status.message()));
  FlushLogging();
  if (SendFailed(mpi->transport(), arguments.ranks, status).ok()) {
    Env* env = Env::Real();
    env->NewEvent()->WaitUntil(env->NowUs() + kEndedByOthersUs);
  }
  mpi->Abort(ExitCodeOf(status));
}

absl::Status Serve(const Arguments& arguments, MpiRuntime* mpi) {
  Transport* transport = mpi->transport();
  const int rank = transport->rank();
  if (transport->size() != arguments.ranks.size()) {
    return absl::FailedPreconditionError(absl::StrCat("started as one of ", transport->size(), " ranks; --ps ",
                                                      arguments.ranks.servers, " --worker ", arguments.ranks.workers,
                                                      " and a scheduler make ", arguments.ranks.size()));
  }
  if (rank < arguments.ranks.server(0) || rank >= arguments.ranks.worker(0)) {
    return absl::FailedPreconditionError(absl::StrCat("started as rank ", rank, "; servers are ranks ",
                                                      arguments.ranks.server(0), " to ",
                                                      arguments.ranks.worker(0) - 1));
  }
  const std::string who = absl::StrCat("ps-", rank - arguments.ranks.server(0));
  const std::string logs = JoinPath(arguments.dir, "logs");
  HEARTH_RETURN_IF_ERROR(MakeDirectories(logs));
  HEARTH_RETURN_IF_ERROR(StartLogging(who, JoinPath(logs, who + ".log")));
  PsServerOptions options;
  options.env = Env::Real();
  options.transport = transport;
  options.ranks = arguments.ranks;
  options.dir = arguments.dir;
  if (!arguments.live.empty()) {
    options.live_dir = LiveOf(arguments);
    HEARTH_RETURN_IF_ERROR(MakeDirectories(arguments.live));
    HEARTH_RETURN_IF_ERROR(MakePrivateDirectory(options.live_dir));
  }
  HEARTH_ASSIGN_OR_RETURN(options.job, LoadJob(JoinPath(arguments.dir, "job.txtpb"), {}));
  HEARTH_RETURN_IF_ERROR(ValidateJob(options.job));
  if (options.job.training().lanes() == 0) {
    return absl::FailedPreconditionError(
        "training.lanes: not set in the effective job; start the job with `hearth train`");
  }
  const std::string live = options.live_dir;
  PsServer server(std::move(options));
  if (const absl::Status status = server.Run(); !status.ok()) {
    // While the server stands: what its threads are at may take long, on a disk that hangs for ever, and is of no use.
    Fail(arguments, mpi, status);
  }
  if (live.empty()) return absl::OkStatus();
  // Nobody else tidies up a disk of the host's own.
  if (const absl::Status removed = server.RemoveWorkingStore(); !removed.ok()) {
    spdlog::warn("event=working_store_stays cause={}", Quoted(removed.message()));
  }
  std::error_code others_are_there;
  std::filesystem::remove(live, others_are_there);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  // mpirun forwards it to every rank; a snapshot is the scheduler's to ask for.
  std::signal(SIGUSR1, SIG_IGN);
  Arguments arguments;
  CLI::App app("Serves the rows of a Hearth job to its workers.", "hearth-ps");
  app.set_version_flag("--version", absl::StrCat("hearth-ps ", BuildCommit()));
  app.add_option("--ps", arguments.ranks.servers, "number of parameter servers")
      ->required()
      ->check(CLI::Range(1, kRanksMax));
  app.add_option("--worker", arguments.ranks.workers, "number of workers")->required()->check(CLI::Range(1, kRanksMax));
  app.add_option("--live", arguments.live, "where a folder of this run gets the working store; default: DIR/live");
  app.add_option("DIR", arguments.dir, "the run's folder")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }

  static_cast<void>(StartLogging("ps", ""));  // stderr alone cannot fail
  auto mpi = MpiRuntime::Start(Env::Real());
  if (!mpi.ok()) {
    spdlog::error("event=failed code={} reason={}", ExitCodeOf(mpi.status()), Quoted(mpi.status().message()));
    return ExitCodeOf(mpi.status());
  }
  const absl::Status status = Serve(arguments, mpi->get());
  if (!status.ok()) Fail(arguments, mpi->get(), status);
  (*mpi)->TellTraffic();
  FlushLogging();
  return kExitOk;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
