#include "tests/golden/in_process_run.h"

#include <atomic>
#include <memory>
#include <sstream>
#include <vector>

#include "common/artifact/manifest.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/net/transport.h"
#include "ps/ps_server.h"
#include "ps/shard_map.h"
#include "scheduler/scheduler.h"
#include "worker/collective/collective.h"
#include "worker/worker.h"

namespace hearth {

absl::StatusOr<Manifest> RunInProcess(const InProcessRun& run, int* exit_code) {
  Env* const env = Env::Real();
  for (const char* folder : {"", "logs", "snapshots", "live", "dead-letter", "predictions", "tb"}) {
    HEARTH_RETURN_IF_ERROR(MakeDirectories(JoinPath(run.dir, folder)));
  }
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(run.dir, "job.txtpb"), PrintJob(run.job)));
  const Ranks ranks{run.servers, run.workers};
  InProcessHub hub(env, ranks.size());
  LocalCollectiveHub collectives(env, run.workers);
  std::vector<absl::Status> statuses(ranks.size());
  std::ostringstream table, progress;
  {
    std::vector<std::unique_ptr<Thread>> threads;
    // A role that fails tells the scheduler, as its main does, or the others would wait for it.
    const auto start = [&](int rank, std::function<absl::Status()> role) {
      threads.push_back(env->StartThread("role", [&, rank, role] {
        statuses[rank] = role();
        if (!statuses[rank].ok()) (void)SendFailed(hub.transport(rank), ranks, statuses[rank]);
      }));
    };
    for (int i = 0; i < run.servers; ++i) {
      start(ranks.server(i), [&, i] {
        PsServerOptions options;
        options.env = env;
        options.transport = hub.transport(ranks.server(i));
        options.job = run.job;
        options.ranks = ranks;
        options.dir = run.dir;
        return PsServer(options).Run();
      });
    }
    for (int i = 0; i < run.workers; ++i) {
      start(ranks.worker(i), [&, i] {
        WorkerOptions options;
        options.env = env;
        options.transport = hub.transport(ranks.worker(i));
        options.collective = collectives.collective(i);
        options.job = run.job;
        options.dir = run.dir;
        options.ranks = ranks;
        options.index = i;
        return Worker(options).Run();
      });
    }
    SchedulerOptions options;
    options.env = env;
    options.transport = hub.transport(ranks.scheduler());
    options.servers = run.servers;
    options.workers = run.workers;
    options.job = run.job;
    options.dir = run.dir;
    uint64_t looks = 0;
    options.stop_asked = [&looks, &run] { return run.stop_after_polls > 0 && ++looks >= run.stop_after_polls; };
    options.output.table = &table;
    options.output.progress = &progress;
    const absl::StatusOr<int> code = Scheduler(options).Run();
    statuses[ranks.scheduler()] = code.status();
    *exit_code = code.ok() ? *code : ExitCodeOf(code.status());
    // Nobody aborts a thread: a run that failed would hang here in its join, so it ends the test program with the
    // cause.
    if (*exit_code != kExitOk && *exit_code != kExitSaved) {
      for (const absl::Status& status : statuses) {
        if (!status.ok()) fprintf(stderr, "%s\n", status.ToString().c_str());
      }
      HEARTH_CHECK(false, "the run in ", run.dir, " failed with ", *exit_code, "\n", progress.str());
    }
  }
  for (const absl::Status& status : statuses) HEARTH_RETURN_IF_ERROR(status);
  HEARTH_ASSIGN_OR_RETURN(const SnapshotChoice newest, FindNewestSnapshot(JoinPath(run.dir, "snapshots")));
  return newest.manifest;
}

}  // namespace hearth
