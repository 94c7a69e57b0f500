// hearth-worker --ps P --worker W DIR: one training process of a job (docs/ARCHITECTURE.md, "A run, message by
// message").
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/command_line.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/job/config.h"
#include "common/net/control_message.h"
#include "common/net/mpi_runtime.h"
#include "common/proto/control.pb.h"
#include "worker/collective/device_plan.h"
#include "worker/collective/mpi_collective.h"
#include "worker/device/device_collective.h"
#ifdef HEARTH_CUDA
#include "worker/device/nccl_collective.h"
#endif
#include "worker/worker.h"

namespace hearth {
namespace {

constexpr int64_t kFailedGraceUs = 2'000'000;  // the scheduler ends the job within it

struct Arguments {
  int servers = 1;
  int workers = 1;
  std::string dir;
};

#ifndef HEARTH_CUDA
Gpus VisibleGpus() { return {}; }
#endif

absl::Status Train(const Arguments& arguments, MpiRuntime* runtime) {
  Transport* transport = runtime->transport();
  WorkerOptions options;
  options.env = Env::Real();
  options.transport = transport;
  options.ranks = {arguments.servers, arguments.workers};
  options.index = transport->rank() - options.ranks.worker(0);
  options.dir = arguments.dir;
  if (transport->size() != options.ranks.size() || options.index < 0 || options.index >= arguments.workers) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rank ", transport->rank(), " of ", transport->size(), " is no worker of a job with --ps ", arguments.servers,
        " --worker ", arguments.workers, "; start the scheduler first, then the servers, then the workers"));
  }
  HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(arguments.dir, "logs")));
  HEARTH_RETURN_IF_ERROR(StartLogging(absl::StrCat("worker-", options.index),
                                      JoinPath(arguments.dir, absl::StrCat("logs/worker-", options.index, ".log"))));
  HEARTH_ASSIGN_OR_RETURN(options.job, LoadJob(JoinPath(arguments.dir, "job.txtpb"), {}));
  HEARTH_RETURN_IF_ERROR(ValidateJob(options.job));
  std::unique_ptr<Collective> mpi =
      MakeMpiCollective(runtime, options.ranks.worker(0), options.index, arguments.workers);
  options.collective = mpi.get();
  const Training& training = options.job.training();
  const Gpus gpus = training.device() == Training::CPU ? Gpus() : VisibleGpus();
  const absl::StatusOr<DevicePlan> device = AgreeOnDevice(training, HostName(), gpus, mpi.get());
  if (!device.ok()) {
    // All know it: worker 0 tells it for all, and ends the job.
    if (options.index != 0) options.env->NewEvent()->WaitUntil(options.env->NowUs() + 2 * kFailedGraceUs);
    return device.status();
  }
  options.device = *device;
  std::unique_ptr<DeviceCollective> between_gpus;
#ifdef HEARTH_CUDA
  if (options.device.alone) {
    HEARTH_ASSIGN_OR_RETURN(between_gpus, MakeNcclCollective(options.env, options.device.gpu, mpi.get()));
  } else if (options.device.gpu != kNoGpu) {
    between_gpus = MakeHostedCollective(mpi.get());
  }
#endif
  options.device_collective = between_gpus.get();
  spdlog::info("event=device device={} gpu={} reduction={}", Quoted(NameOf(options.device)), options.device.gpu,
               options.device.alone ? "nccl" : "mpi");
  // Left alive on an error: threads may wait for peers, and the process is about to be ended as a whole.
  auto worker = std::make_unique<Worker>(options);
  const absl::Status status = worker->Run();
  if (!status.ok()) {
    static_cast<void>(worker.release());
    static_cast<void>(between_gpus.release());
    static_cast<void>(mpi.release());
  }
  return status;
}

// Tells the scheduler, which ends the job with this code; ends it here when the scheduler does not.
[[noreturn]] void Fail(const absl::Status& status, const Arguments& arguments, MpiRuntime* runtime) {
  const int code = ExitCodeOf(status);
  spdlog::error("event=failed code={} reason={}", code, Quoted(status.message()));
  std::fprintf(stderr, "hearth-worker: %s\n", std::string(status.message()).c_str());
  FlushLogging();
  Control control = FailedControl(status);
  control.set_from_role("worker");
  control.set_from_index(static_cast<uint32_t>(runtime->transport()->rank() - 1 - arguments.servers));
  const absl::Status sent = runtime->transport()->Send(kPortControl, {0, kPortScheduler}, EncodeControl(control));
  if (sent.ok()) Env::Real()->NewEvent()->WaitUntil(Env::Real()->NowUs() + kFailedGraceUs);
  runtime->Abort(code);
}

int Main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Trains the lanes of one worker of a Hearth job. Started by `hearth train`.", "hearth-worker");
  app.set_version_flag("--version", BuildCommit());
  app.add_option("--ps", arguments.servers, "number of parameter servers")->required()->check(CLI::PositiveNumber);
  app.add_option("--worker", arguments.workers, "number of workers")->required()->check(CLI::PositiveNumber);
  app.add_option("DIR", arguments.dir, "folder of the run")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  std::signal(SIGUSR1, SIG_IGN);                  // mpirun forwards it to all ranks; the scheduler acts on it
  static_cast<void>(StartLogging("worker", ""));  // stderr alone cannot fail
  absl::StatusOr<std::unique_ptr<MpiRuntime>> runtime = MpiRuntime::Start(Env::Real());
  if (!runtime.ok()) {
    std::fprintf(stderr, "hearth-worker: %s\n", std::string(runtime.status().message()).c_str());
    return ExitCodeOf(runtime.status());
  }
  const absl::Status status = Train(arguments, runtime->get());
  if (!status.ok()) Fail(status, arguments, runtime->get());
  (*runtime)->TellTraffic();
  FlushLogging();
  return kExitOk;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
