#include "scripts/hearth/supervise.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "scripts/hearth/relay.h"

namespace hearth {
namespace {

constexpr int64_t kKillAfterUs = 20 * 1000000;   // mpirun itself gives its ranks a few seconds
constexpr int64_t kAskAgainUs = 1000000;         // a save: whoever is asked may not listen yet
constexpr int64_t kOrphanTermUs = 2 * 1000000;   // between SIGTERM and SIGKILL
constexpr int64_t kOrphanKillUs = 10 * 1000000;  // until we say that it does not work
constexpr int64_t kLastWordsUs = 2 * 1000000;    // for what an ended child wrote, where we are told to stop
constexpr uint64_t kCommandLineBytesMax = 1 << 22;

// The strings of a file of /proc; at least one. Nothing of a process that is gone meanwhile, or a zombie.
std::vector<std::string> WordsOf(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kCommandLineBytesMax);
  if (!text.ok() || text->empty()) return {""};
  return absl::StrSplit(absl::string_view(*text).substr(0, text->size() - 1), '\0');
}

bool IsRole(const std::string& argument) {
  const std::string name = std::filesystem::path(argument).filename().string();
  return name == "hearth-scheduler" || name == "hearth-ps" || name == "hearth-worker";
}

// In the child, between fork and exec: only async-signal-safe calls. Reports errno of a failed exec through the pipe.
// out, err: what become standard output and error; negative: ours stay.
[[noreturn]] void Become(char* const* argv, char* const* environment, const sigset_t& mask, int parent, int report,
                         int out, int err) {
  setpgid(0, 0);  // a ^C reaches us alone, and we decide what the ranks are told
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(128 + SIGTERM);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  if (out >= 0) dup2(out, STDOUT_FILENO);
  if (err >= 0) dup2(err, STDERR_FILENO);
  for (const int signal : {SIGUSR1, SIGPIPE}) std::signal(signal, SIG_DFL);  // ignored, a shell could not trap them
  sigprocmask(SIG_SETMASK, &mask, nullptr);
  execvpe(argv[0], argv, environment);
  const int error = errno;
  if (write(report, &error, sizeof(error)) != sizeof(error)) _exit(126);
  _exit(127);
}

// What an mpirun tells its ranks who they are. A front command that is itself started by one would hand it on, and its
// own mpirun would refuse to start; what a user sets for MPI (OMPI_MCA_btl…) is something else.
bool NamesOuterRank(const std::string& name) {
  for (const char* begin : {"PMIX_", "OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix"}) {
    if (absl::StartsWith(name, begin)) return true;
  }
  for (const char* one : {"OMPI_UNIVERSE_SIZE", "OMPI_APP_CTX_NUM_PROCS", "OMPI_FIRST_RANKS", "OMPI_NUM_APP_CTX",
                          "OMPI_FILE_LOCATION", "OMPI_COMMAND", "OMPI_ARGV", "OMPI_MCA_initial_wdir",
                          "OMPI_MCA_mpi_oversubscribe", "OMPI_MCA_shmem_RUNTIME_QUERY_hint"}) {
    if (name == one) return true;
  }
  return false;
}

std::vector<std::string> MergedEnvironment(const Command& command) {
  const bool below_mpirun = command.mpirun && std::getenv("OMPI_UNIVERSE_SIZE") != nullptr;
  std::vector<std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string name(*entry, std::strcspn(*entry, "="));
    if (below_mpirun && NamesOuterRank(name)) continue;
    const bool replaced = std::any_of(command.environment.begin(), command.environment.end(),
                                      [&name](const auto& added) { return added.first == name; });
    if (!replaced) merged.push_back(*entry);
  }
  for (const auto& [name, value] : command.environment) merged.push_back(name + "=" + value);
  return merged;
}

std::vector<char*> Pointers(const std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (const std::string& string : strings) pointers.push_back(const_cast<char*>(string.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

bool IsReadable(int descriptor) {
  pollfd one = {descriptor, POLLIN, 0};
  return poll(&one, 1, 0) > 0;
}

// What an ended child left in the pipe; an orphan may hold it open.
void Drain(Relay* relay) {
  while (relay->reads() >= 0 && IsReadable(relay->reads())) relay->Read();
  if (relay->open() && relay->reads() >= 0) relay->Close();
}

// Waits until a signal is there or text can move, `wait_us` at most, and moves what can.
void MoveText(int signals, int64_t wait_us, Relay* out, Relay* err) {
  pollfd waits[] = {{signals, POLLIN, 0},
                    {out->reads(), POLLIN, 0},
                    {err->reads(), POLLIN, 0},
                    {out->writes(), POLLOUT, 0},
                    {err->writes(), POLLOUT, 0}};
  poll(waits, std::size(waits), static_cast<int>((wait_us + 999) / 1000));
  if (waits[1].revents != 0) out->Read();
  if (waits[2].revents != 0) err->Read();
  if (waits[3].revents != 0) out->Write();
  if (waits[4].revents != 0) err->Write();
}

// Both ends, -1 where there are none.
struct Pipe {
  int read = -1, write = -1;
  absl::Status Open(int flags) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return absl::InternalError(absl::StrCat("pipe: ", std::strerror(errno)));
    read = ends[0];
    write = ends[1];
    if (flags != 0) fcntl(read, F_SETFL, flags);
    return absl::OkStatus();
  }
  void CloseWrite() {
    if (write >= 0) close(write);
    write = -1;
  }
};

}  // namespace

Supervisor::Supervisor() {
  sigemptyset(&taken_);
  for (const int signal : {SIGUSR1, SIGTERM, SIGINT, SIGHUP, SIGCHLD}) sigaddset(&taken_, signal);
  sigprocmask(SIG_BLOCK, &taken_, &before_);
  before_pipe_ = std::signal(SIGPIPE, SIG_IGN);
  signals_ = signalfd(-1, &taken_, SFD_CLOEXEC | SFD_NONBLOCK);
  prctl(PR_SET_CHILD_SUBREAPER, 1);
}

Supervisor::~Supervisor() {
  // What came when nobody waited any more is of no use now, and would end the process in place of its exit code.
  std::signal(SIGUSR1, SIG_IGN);
  while (NextSignal(0) != 0) {
  }
  if (signals_ >= 0) close(signals_);
  std::signal(SIGPIPE, before_pipe_);
  prctl(PR_SET_CHILD_SUBREAPER, 0);
  sigprocmask(SIG_SETMASK, &before_, nullptr);
}

int Supervisor::NextSignal(int64_t deadline_us) {
  const int64_t wait_us = std::max<int64_t>(0, deadline_us - Env::Real()->NowUs());
  const timespec wait = {static_cast<time_t>(wait_us / 1000000), static_cast<long>(wait_us % 1000000 * 1000)};
  return Remember(std::max(0, sigtimedwait(&taken_, nullptr, &wait)));
}

int Supervisor::Remember(int signal) {
  if (signal == SIGUSR1) save_asked_ = true;
  if ((signal == SIGTERM || signal == SIGINT || signal == SIGHUP) && stop_signal_ == 0) stop_signal_ = signal;
  return signal;
}

absl::StatusOr<Supervisor::End> Supervisor::Run(const Command& command) {
  const std::vector<std::string> environment = MergedEnvironment(command);
  const std::vector<char*> argv = Pointers(command.argv), envp = Pointers(environment);
  Pipe report, out_pipe, err_pipe;
  HEARTH_RETURN_IF_ERROR(report.Open(0));
  if (command.mpirun) {
    HEARTH_RETURN_IF_ERROR(out_pipe.Open(O_NONBLOCK));
    HEARTH_RETURN_IF_ERROR(err_pipe.Open(O_NONBLOCK));
  }
  Relay out(out_pipe.read, STDOUT_FILENO, false), err(err_pipe.read, STDERR_FILENO, true);
  const int parent = getpid();
  const pid_t child = fork();
  if (child < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (child == 0) Become(argv.data(), envp.data(), before_, parent, report.write, out_pipe.write, err_pipe.write);
  for (Pipe* pipe : {&report, &out_pipe, &err_pipe}) pipe->CloseWrite();
  int error = 0;
  const bool failed = read(report.read, &error, sizeof(error)) == sizeof(error);  // end of file: exec succeeded
  close(report.read);
  int64_t kill_at_us = kNever;
  int64_t ask_at_us = kNever;
  std::optional<int> ended_with;
  int64_t ended_us = 0;
  // Until the child has ended, and what it wrote has gone on; who reads that may keep us waiting, but not once we are
  // told to stop.
  const auto waits_for_reader = [&] {
    return (out.writes() >= 0 || err.writes() >= 0) &&
           (stop_signal_ == 0 || Env::Real()->NowUs() < ended_us + kLastWordsUs);
  };
  while (!ended_with || waits_for_reader()) {
    int wait_status = 0;
    for (pid_t ended; !ended_with && (ended = waitpid(-1, &wait_status, WNOHANG)) > 0;) {  // adopted orphans, too
      if (ended != child) continue;
      if (failed) return absl::NotFoundError(absl::StrCat(command.argv[0], ": ", std::strerror(error)));
      ended_with = wait_status;
      ended_us = Env::Real()->NowUs();
    }
    if (ended_with) {
      for (Relay* relay : {&out, &err}) Drain(relay);
    }
    const int64_t now_us = Env::Real()->NowUs();
    if (!ended_with && now_us >= kill_at_us) kill(-child, SIGKILL);
    if (!ended_with && now_us >= ask_at_us) {
      kill(child, SIGUSR1);
      ask_at_us = now_us + kAskAgainUs;
    }
    const int64_t wait_us = std::min<int64_t>(1000000, kill_at_us > now_us ? kill_at_us - now_us : kNever);
    if (!ended_with || out.writes() >= 0 || err.writes() >= 0) MoveText(signals_, wait_us, &out, &err);
    const int signal = NextSignal(0);
    if (signal == 0 || signal == SIGCHLD || ended_with) continue;
    kill(child, signal);
    if (signal == SIGUSR1) ask_at_us = Env::Real()->NowUs() + kAskAgainUs;
    if (signal != SIGUSR1 && kill_at_us == kNever) kill_at_us = Env::Real()->NowUs() + kKillAfterUs;
  }
  End end;
  end.code = CodeOfWaitStatus(*ended_with);
  end.signaled = WIFSIGNALED(*ended_with);
  end.messages = err.filter().messages();
  end.refusal = RefusalOf(err.filter());
  end.output = out.status();
  return end;
}

void Supervisor::Pause(int64_t wait_us) {
  const int64_t deadline_us = Env::Real()->NowUs() + wait_us;
  do {
    NextSignal(deadline_us);
  } while (!save_asked_ && stop_signal_ == 0 && Env::Real()->NowUs() < deadline_us);
}

bool Supervisor::EndRolesOf(const std::string& folder) {
  const int64_t start_us = Env::Real()->NowUs();
  for (;;) {
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    const std::vector<int> left = RolesOf(folder);
    if (left.empty()) return true;
    const int64_t waited_us = Env::Real()->NowUs() - start_us;
    if (waited_us > kOrphanKillUs) return false;
    for (const int process : left) kill(process, waited_us < kOrphanTermUs ? SIGTERM : SIGKILL);
    NextSignal(Env::Real()->NowUs() + 50000);
  }
}

std::vector<int> RolesOf(const std::string& folder) {
  std::vector<int> found;
  const absl::StatusOr<std::vector<std::string>> names = ListDirectory("/proc");
  if (!names.ok()) return found;
  const std::string ours = absl::StrCat(kRunFolderVariable, "=", folder);
  for (const std::string& name : *names) {
    int process = 0;
    if (!absl::SimpleAtoi(name, &process) || process == getpid()) continue;
    const std::string proc = absl::StrCat("/proc/", name, "/");
    struct stat info;
    if (stat(proc.c_str(), &info) != 0 || info.st_uid != geteuid()) continue;
    std::error_code error;
    if (IsRole(std::filesystem::read_symlink(proc + "exe", error).string()) &&
        WordsOf(proc + "cmdline").back() == folder) {
      found.push_back(process);
      continue;
    }
    const std::vector<std::string> environment = WordsOf(proc + "environ");
    if (std::find(environment.begin(), environment.end(), ours) != environment.end()) found.push_back(process);
  }
  return found;
}

std::string DescribeEnd(int code) {
  if (code > 128 && code < 128 + 65)
    return absl::StrCat("killed by signal ", code - 128, " (", strsignal(code - 128), ")");
  switch (code) {
    case kExitUsage:
      return "exit code 64 (usage)";
    case kExitBadData:
      return "exit code 65 (bad data)";
    case kExitNoInput:
      return "exit code 66 (no input)";
    case kExitInternal:
      return "exit code 70 (internal error)";
    case kExitIo:
      return "exit code 74 (disk full or I/O)";
    case kExitSaved:
      return "exit code 75 (saved; the same command goes on)";
    case kExitConfig:
      return "exit code 78 (configuration)";
    default:
      return absl::StrCat("exit code ", code);
  }
}

}  // namespace hearth
