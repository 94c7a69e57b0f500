// The front command. What needs MPI or Torch is done by the roles that it starts.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/bundle.h"
#include "common/base/command_line.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/net/seal.h"
#include "scripts/hearth/completion.h"
#include "scripts/hearth/doctor.h"
#include "scripts/hearth/generate.h"
#include "scripts/hearth/inspect.h"
#include "scripts/hearth/launch.h"
#include "scripts/hearth/plan_command.h"
#include "scripts/hearth/show_history.h"
#include "scripts/hearth/submit.h"

namespace hearth {
namespace {

constexpr int kRanksMax = 4096;

std::string Version() {
  const std::string torch = HEARTH_LIBTORCH_VERSION;
  const std::string cuda = HEARTH_CUDA_VERSION;
  return "hearth commit " + BuildCommit() + ", " + HEARTH_BUILD_TYPE + " build, LibTorch " +
         (torch.empty() ? "none" : torch) + ", " + (cuda.empty() ? "CPU only" : "CUDA " + cuda) +
         " (run on one NVIDIA H200 so far)";
}

constexpr char kProgram[] = "hearth";

// The commands, grouped by use, in the order in which a newcomer meets them; `next`: what is run after it.
struct CommandName {
  const char* name;
  const char* group;
  const char* what;
  const char* next;
};
constexpr CommandName kCommands[] = {
    {"doctor", "Begin", "Check this machine: MPI, programs, cores, memory, disk, ports, GPU", "generate, train"},
    {"generate", "Begin", "Generate a synthetic log, its true probabilities, and a job that trains on it", "train"},
    {"plan", "Begin", "Tell what a job will need: memory, disk, network, and the time of a step", "train, submit"},
    {"train", "Train", "Train a job, or go on with it from its newest snapshot", "inspect, eval, export"},
    {"adopt", "Train", "Take a model over into a new run: other features, tasks or tables", "train"},
    {"submit", "Train", "Submit a job to Slurm: saves before its time limit, requeues, resumes", "inspect"},
    {"inspect", "Look at what was trained", "Show what a snapshot holds", "verify, eval, export"},
    {"history", "Look at what was trained", "Show what a run has been through, a line an era", "inspect"},
    {"verify", "Look at what was trained", "Check every checksum of a snapshot or an export bundle", "export, score"},
    {"eval", "Look at what was trained", "Evaluate a snapshot on other logs, through servers, read only", "export"},
    {"export", "Serve", "Export a snapshot as a bundle for serving, or a delta on one, or merge them", "score, verify"},
    {"score", "Serve", "Score raw logs from an export bundle alone", "export --since, after more training"},
    {"completion", "Shell", "Print what makes a shell complete these commands", "source it"},
};

CLI::App* AddCommand(CLI::App* app, const std::string& name) {
  for (const CommandName& command : kCommands) {
    if (name != command.name) continue;
    return app->add_subcommand(name, absl::StrCat(command.what, ". Next: ", command.next))->group(command.group);
  }
  HEARTH_CHECK(false, "no command ", name);
  return nullptr;
}

// Becomes hearth-<name>, which lies beside this program, with all of the arguments behind the name.
int Become(const std::string& name, char** argv) {
  const std::string program = ProgramsBesideThis().folder + "/hearth-" + name;
  execv(program.c_str(), argv + 1);
  const std::string cause = std::strerror(errno);
  return Finish(kProgram, absl::FailedPreconditionError(absl::StrCat(
                              program, ": ", cause, "; build all of Hearth, with LibTorch: scripts/build")));
}

void AddRanks(CLI::App* command, int* servers, int* workers) {
  command->add_option("--np-ps", *servers, "Parameter servers")->check(CLI::Range(1, kRanksMax))->capture_default_str();
  command->add_option("--np-worker", *workers, "Workers, at most one a lane")
      ->check(CLI::Range(1, kRanksMax))
      ->capture_default_str();
}

void AddLive(CLI::App* command, std::string* live) {
  command
      ->add_option(
          "--live", *live,
          "Folder of each server's host, such as a disk of its own, for the rows it works on; default: in --out")
      ->type_name("FOLDER");
}

void AddOverrides(CLI::App* command, std::vector<std::string>* overrides) {
  command->add_option("--set", *overrides, "Override a field of the job, e.g. training.staleness=2")
      ->type_name("PATH=VALUE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void AddSubmit(CLI::App* app, int* code) {
  static SubmitOptions submit;
  CLI::App* command = AddCommand(app, "submit");
  command->add_option("JOB", submit.job, "The job file, job.txtpb")->required();
  command->add_option("--out", submit.out, "The run's folder, on a file system of all nodes")->required();
  command->add_option("--time", submit.time, "Time limit of one start, as Slurm writes it")->required();
  AddLive(command, &submit.live);
  command->add_option("--nodes", submit.nodes, "Nodes")->check(CLI::Range(1, kRanksMax))->capture_default_str();
  AddOverrides(command, &submit.overrides);
  AddRanks(command, &submit.servers, &submit.workers);
  command->add_option("--partition", submit.partition, "Slurm's partition");
  command->add_option("--cpus-per-task", submit.cpus_per_task, "Cores for each rank (if not said: training.threads)")
      ->check(CLI::Range(1, kRanksMax));
  command->add_option("--signal-lead", submit.signal_lead_s, "Seconds before the limit in which to save")
      ->check(CLI::Range(1, 65535))
      ->capture_default_str();
  command
      ->add_option("--max-requeues", submit.requeues_max,
                   "Requeues after a dead rank, or a start that saved nothing; each new snapshot begins the count anew")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  command
      ->add_option("--from", submit.from,
                   "Go back to the kept snapshot of this step; later ones are set aside under another name")
      ->type_name("STEP");
  command->add_option("--sbatch", submit.sbatch, "One more option for sbatch, e.g. --sbatch=--account=ranking")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_flag("--print", submit.print, "Print the batch script; write and submit nothing");
  command->callback([code] {
    submit.programs = ProgramsBesideThis().folder;
    *code = Submit(submit);
  });
}

// What scripts/slurm/hearth.sbatch asks; not for people.
void AddBatch(CLI::App* app, int* code) {
  static std::string folder, slurm_job;
  static BatchOutcome outcome;
  CLI::App* command = app->add_subcommand("batch-begin", "")->group("");
  command->add_option("DIR", folder)->required();
  command->add_option("--job", slurm_job)->required();
  // Its output is the start's token, which the script keeps in the ranks' environment.
  command->callback([code] {
    absl::StatusOr<JobToken> token = JobToken::Random();
    absl::Status status = token.status();
    status.Update(BatchBegin(folder, slurm_job));
    if (status.ok()) status = WriteStandardOutput(absl::StrCat(token->Hex(), "\n"));
    *code = Finish(kProgram, status);
  });

  command = app->add_subcommand("batch-end", "")->group("");
  command->add_option("DIR", folder)->required();
  command->add_option("--job", slurm_job)->required();
  command->add_option("--code", outcome.code)->required();
  command->add_option("--max-requeues", outcome.requeues_max)->required();
  command->add_flag("--asked", outcome.asked);
  command->add_flag("--stopped", outcome.stopped);
  command->add_flag("--requeued", outcome.requeued);
  command->callback([code] {
    const absl::StatusOr<BatchNext> next = BatchEnd(folder, slurm_job, outcome);
    *code = Finish(kProgram, next.status());
    if (!next.ok()) return;
    std::fprintf(stderr, "hearth: %s\n", next->reason.c_str());
    *code = Finish(kProgram, WriteStandardOutput(absl::StrCat(next->requeue ? "requeue " : "end ", next->code, "\n")));
  });
}

void AddTrain(CLI::App* app, int* code) {
  static TrainOptions train;
  static bool print_job = false;
  static bool print_changes = false;
  CLI::App* command = AddCommand(app, "train");
  command->add_option("JOB", train.job, "The job file, job.txtpb")->required();
  command->add_option("--out", train.out, "The run's folder; needed, but for --print-job");
  AddOverrides(command, &train.overrides);
  AddRanks(command, &train.servers, &train.workers);
  command->add_option("--hostfile", train.hostfile, "Hosts for mpirun");
  AddLive(command, &train.live);
  command
      ->add_option("--max-restarts", train.restarts_max,
                   "Restarts after a rank died; each new snapshot begins the count anew")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  command->add_flag("--again", train.again, "Train a file that the run has had once more, under another name");
  CLI::Option* const fresh = command->add_flag("--fresh", train.fresh, "Start anew; --out must be empty");
  command
      ->add_option("--from", train.from,
                   "Go back to the kept snapshot of this step; later ones are set aside under another name")
      ->type_name("STEP")
      ->excludes(fresh);
  command->add_flag("--print-job", print_job, "Print the effective job and stop");
  command->add_flag("--print-changes", print_changes,
                    "Print in what the job is another one than the newest snapshot's in --out, and stop");
  command->callback([code] {
    train.programs = ProgramsBesideThis();
    if (!print_job && train.out.empty()) throw CLI::RequiredError("--out");
    if (print_job || print_changes) {
      std::string text;
      const absl::Status status = print_job ? PrintEffectiveJob(train, &text) : PrintChanges(train, &text);
      *code = Finish(kProgram, status.ok() ? absl::StatusOr<std::string>(text) : status);
      return;
    }
    *code = Train(train);
  });
}

void AddEval(CLI::App* app, int* code) {
  static EvalOptions eval;
  CLI::App* command = AddCommand(app, "eval");
  command->add_option("JOB", eval.job, "The job file")->required();
  command->add_option("--snapshot", eval.snapshot, "A snapshot's folder, or a run's (its newest)")->required();
  command->add_flag("--best", eval.best, "The run's best snapshot by the job's snapshot.best, not its newest");
  command->add_option("--logs", eval.logs, "Log files")->required();
  command->add_option("--predictions", eval.predictions, "Write predictions there; zstd where the name ends in .zst");
  AddOverrides(command, &eval.overrides);
  AddRanks(command, &eval.servers, &eval.workers);
  command->callback([code] {
    eval.programs = ProgramsBesideThis();
    *code = Evaluate(eval);
  });
}

void AddGenerate(CLI::App* app, int* code) {
  static GenerateOptions generate;
  CLI::App* command = AddCommand(app, "generate");
  command->add_option("SPEC", generate.spec_path, "The spec, e.g. scripts/jobs/synthetic-log.txtpb")->required();
  command->add_option("--out", generate.out, "Its folder: new, empty, or an earlier log of this command, which goes")
      ->required();
  command->add_option("--records", generate.records, "Records of the training log; the test log scales with it");
  command->add_option("--seed", generate.seed, "Overrides the spec's");
  command->callback([code] {
    std::string report;
    const absl::Status status = Generate(generate, &report);
    *code = Finish(kProgram, status.ok() ? absl::StatusOr<std::string>(report) : status);
    if (*code == kExitOk) SayNext(absl::StrCat("hearth train ", JoinPath(generate.out, "job.txtpb"), " --out DIR"));
  });
}

void AddLooks(CLI::App* app, int* code) {
  static std::string path;
  static bool json = false;
  CLI::App* command = AddCommand(app, "inspect");
  command->add_option("SNAPSHOT", path, "A snapshot's folder, or a run's (its newest)")->required();
  command->add_flag("--json", json, "As JSON");
  command->callback([code] {
    *code = Finish(kProgram, InspectSnapshot(path, json));
    if (*code == kExitOk && !json)
      SayNext(absl::StrCat("hearth verify ", path, ", or hearth export ", path, " --out BUNDLE"));
  });

  command = AddCommand(app, "history");
  command->add_option("DIR", path, "A run's folder")->required();
  command->add_flag("--json", json, "As JSON");
  command->callback([code] {
    *code = Finish(kProgram, ShowHistory(path, json));
    if (*code == kExitOk && !json) SayNext(absl::StrCat("hearth inspect ", path));
  });

  command = AddCommand(app, "verify");
  command->add_option("SNAPSHOT", path, "A snapshot's folder, a run's (its newest), or a bundle's")->required();
  command->callback([code] {
    const bool bundle = IsBundle(path);
    *code = Finish(kProgram, bundle ? VerifyBundle(path) : VerifySnapshotAt(path));
    if (*code == kExitOk)
      SayNext(bundle ? absl::StrCat("hearth score ", path, " --logs FILE")
                     : absl::StrCat("hearth export ", path, " --out BUNDLE"));
  });
}

void AddDoctor(CLI::App* app, int* code) {
  static DoctorOptions doctor;
  CLI::App* command = AddCommand(app, "doctor");
  command->add_option("--out", doctor.out, "A folder in which runs are to lie")->capture_default_str();
  command->add_option("--hostfile", doctor.hostfile, "Hosts for mpirun: the two ranks of the ping are on them");
  command->add_option("--prometheus-port", doctor.prometheus_port, "Also look at the ports from this one on")
      ->check(CLI::Range(1, 65535));
  command->callback([code] {
    doctor.programs = ProgramsBesideThis();
    doctor.built_for_gpus = *HEARTH_CUDA_VERSION != 0;
    const std::vector<Finding> findings = Diagnose(doctor);
    *code = Finish(kProgram, WriteStandardOutput(DescribeFindings(findings)));
    if (*code != kExitOk) return;
    if (!AllFine(findings)) *code = kExitConfig;
    SayNext(*code == kExitOk
                ? "hearth generate scripts/jobs/synthetic-log.txtpb --out LOG, or hearth train JOB --out DIR"
                : "mend what is marked FAULT, and hearth doctor again");
  });
}

void AddPlan(CLI::App* app, int* code) {
  static PlanOptions plan;
  CLI::App* command = AddCommand(app, "plan");
  command->add_option("JOB", plan.job, "The job file, job.txtpb; without one --calibrate measures this machine alone");
  AddOverrides(command, &plan.overrides);
  AddRanks(command, &plan.servers, &plan.workers);
  command->add_option("--nodes", plan.nodes, "Nodes that the ranks are dealt round")
      ->check(CLI::Range(1, kRanksMax))
      ->capture_default_str();
  const auto many = [&](const char* name, std::vector<std::string>* values, const char* what, const char* type) {
    return command->add_option(name, *values, what)
        ->type_name(type)
        ->expected(1)
        ->allow_extra_args(false)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  many("--rows", &plan.rows, "Rows that are expected, of all tables together or of one", "N|TABLE=N");
  many("--signs", &plan.signs, "Distinct signs a step of a table; if not said: from the job's log", "TABLE=N");
  CLI::Option* const calibrate =
      command->add_flag("--calibrate", plan.calibrate, "Measure this machine first: tables, messages, the dense step");
  command->add_option("--out", plan.out, "Keep there what --calibrate measured")->needs(calibrate);
  command->add_option("--hostfile", plan.hostfile, "Hosts for mpirun: --calibrate's messages go between them")
      ->needs(calibrate);
  command->add_option("--calibration", plan.calibration, "What --calibrate --out has kept")->excludes(calibrate);
  command->add_option("--measured", plan.measured, "A run's folder: the dense step and the rows are as in its run.json")
      ->type_name("RUN");
  command->add_flag("--json", plan.json, "As JSON");
  command->callback([code] {
    plan.programs = ProgramsBesideThis();
    *code = Finish(kProgram, PlanRun(plan));
    if (*code == kExitOk && !plan.json && !plan.job.empty()) {
      SayNext(
          absl::StrCat("hearth train ", plan.job, " --out DIR --np-ps ", plan.servers, " --np-worker ", plan.workers));
    }
  });
}

void AddCompletion(CLI::App* app, int* code) {
  static std::string shell;
  CLI::App* command = AddCommand(app, "completion");
  command->add_option("SHELL", shell, "bash or zsh; e.g. source <(hearth completion bash)")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh"}));
  command->callback([code] {
    std::string names;
    for (const CommandName& one : kCommands) absl::StrAppend(&names, names.empty() ? "" : " ", one.name);
    *code = Finish(kProgram, WriteStandardOutput(CompletionScript(shell, names)));
  });
}

int Main(int argc, char** argv) {
  CLI::App app("Hearth: trains multi-task ranking models against sharded parameter servers.", kProgram);
  app.set_version_flag("--version", Version());
  app.footer("hearth COMMAND --help tells a command's options. Exit codes, signals, folders: docs/OPERATIONS.md.");
  app.require_subcommand(1);
  int code = 0;
  AddDoctor(&app, &code);
  AddGenerate(&app, &code);
  AddPlan(&app, &code);
  AddTrain(&app, &code);
  AddSubmit(&app, &code);
  AddBatch(&app, &code);
  AddLooks(&app, &code);
  AddEval(&app, &code);
  for (const char* name : {"adopt", "export", "score"}) {
    AddCommand(&app, name);  // for the list of commands; never parsed here
    if (argc < 2 || std::strcmp(argv[1], name) != 0) continue;
    const bool delta = std::any_of(argv + 2, argv + argc, [](absl::string_view argument) {
      return argument == "--apply" || argument == "--since" || absl::StartsWith(argument, "--since=");
    });
    return Become(delta && std::strcmp(name, "export") == 0 ? "delta" : name, argv);
  }
  AddCompletion(&app, &code);
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  if (argc > 1 && argv[1][0] != '-' && std::find(names.begin(), names.end(), argv[1]) == names.end()) {
    const std::string meant = NearestName(argv[1], names);
    std::fprintf(stderr, "hearth: there is no command \"%s\"; %s\n", argv[1],
                 meant.empty() ? "hearth --help lists them" : ("did you mean " + meant + "?").c_str());
    return kExitUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  return code;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) {
  hearth::HoldStandardDescriptors();
  return hearth::Main(argc, argv);
}
