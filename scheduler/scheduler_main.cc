// hearth-scheduler --ps P --worker W [--restarts N] [--evaluate SNAPSHOT] DIR: rank 0 of a job, started by `hearth` or
// srun.
#include <sys/ioctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "common/base/command_line.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "common/net/mpi_runtime.h"
#include "scheduler/scheduler.h"

namespace hearth {
namespace {

volatile std::sig_atomic_t stop_asked = 0;

void OnStopSignal(int) { stop_asked = 1; }

struct Arguments {
  uint32_t servers = 0;
  uint32_t workers = 0;
  uint32_t restarts = 0;
  bool again = false;
  std::string evaluate;
  std::string dir;
};

RunOutput StandardOutput() {
  RunOutput output;
  output.table = &std::cout;
  output.progress = &std::cerr;
  std::optional<size_t> columns;
  struct winsize window;
  if (isatty(STDERR_FILENO) == 1) columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 ? window.ws_col : 0;
  SetTerminal(std::getenv("HEARTH_TERMINAL_COLUMNS"), columns, std::getenv("NO_COLOR"), &output);
  return output;
}

absl::StatusOr<int> RunScheduler(const Arguments& arguments, Transport* transport) {
  const int ranks = static_cast<int>(1 + arguments.servers + arguments.workers);
  if (transport->size() != ranks || transport->rank() != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("MPI started ", transport->size(), " ranks and the scheduler as rank ", transport->rank(),
                     "; --ps ", arguments.servers, " --worker ", arguments.workers, " need ", ranks,
                     " with the scheduler as rank 0: mpirun -np 1 hearth-scheduler … : -np ", arguments.servers,
                     " hearth-ps … : -np ", arguments.workers, " hearth-worker …"));
  }
  SchedulerOptions options;
  options.env = Env::Real();
  options.transport = transport;
  options.servers = arguments.servers;
  options.workers = arguments.workers;
  HEARTH_ASSIGN_OR_RETURN(options.job, LoadJob(JoinPath(arguments.dir, "job.txtpb"), {}));
  HEARTH_RETURN_IF_ERROR(ValidateJob(options.job));
  options.dir = arguments.dir;
  options.restarts = arguments.restarts;
  options.again = arguments.again;
  options.evaluate_snapshot = arguments.evaluate;
  std::error_code error;
  options.programs = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  options.stop_asked = [] { return stop_asked != 0; };
  options.output = StandardOutput();
  return Scheduler(std::move(options)).Run();
}

int Main(const Arguments& arguments) {
  std::signal(SIGUSR1, OnStopSignal);
  const std::string logs = JoinPath(arguments.dir, "logs");
  absl::Status status = MakeDirectories(logs);
  if (status.ok()) status = StartLogging("scheduler-0", JoinPath(logs, "scheduler-0.log"));
  if (!status.ok()) {
    std::fprintf(stderr, "hearth-scheduler: %s\n", std::string(status.message()).c_str());
    return ExitCodeOf(status);
  }
  absl::StatusOr<std::unique_ptr<MpiRuntime>> runtime = MpiRuntime::Start(Env::Real());
  if (!runtime.ok()) {
    spdlog::error("event=failed code={} reason={}", ExitCodeOf(runtime.status()), Quoted(runtime.status().message()));
    FlushLogging();
    return ExitCodeOf(runtime.status());
  }
  const absl::StatusOr<int> code = RunScheduler(arguments, (*runtime)->transport());
  if (!code.ok())
    spdlog::error("event=failed code={} reason={}", ExitCodeOf(code.status()), Quoted(code.status().message()));
  (*runtime)->TellTraffic();
  FlushLogging();
  const int exit_code = code.ok() ? *code : ExitCodeOf(code.status());
  // Everybody was told Goodbye, or nobody will be.
  if (!code.ok() || (exit_code != kExitOk && exit_code != kExitSaved)) (*runtime)->Abort(exit_code);
  return exit_code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::Arguments arguments;
  CLI::App app("Hearth's scheduler: rank 0 of a training job", "hearth-scheduler");
  app.set_version_flag("--version", "hearth-scheduler " + hearth::BuildCommit());
  app.add_option("--ps", arguments.servers, "parameter servers in the job")->required()->check(CLI::PositiveNumber);
  app.add_option("--worker", arguments.workers, "workers in the job")->required()->check(CLI::PositiveNumber);
  app.add_option("--restarts", arguments.restarts, "how often the job was started again");
  app.add_flag("--again", arguments.again, "train files that the run knows once more under other names");
  app.add_option("--evaluate", arguments.evaluate, "evaluate this snapshot's folder instead of training");
  app.add_option("DIR", arguments.dir, "the run's folder")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return hearth::ExitOfParse(app, error);
  }
  return hearth::Main(arguments);
}
