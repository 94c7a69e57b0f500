#include "scripts/hearth/supervise.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int64_t kKillAfterUs = 20 * 1000000;   // mpirun itself gives its ranks a few seconds
constexpr int64_t kAskAgainUs = 1000000;         // a save: whoever is asked may not listen yet
constexpr int64_t kOrphanTermUs = 2 * 1000000;   // between SIGTERM and SIGKILL
constexpr int64_t kOrphanKillUs = 10 * 1000000;  // until we say that it does not work
constexpr uint64_t kCommandLineBytesMax = 1 << 22;

bool IsRole(const std::string& argument) {
  const std::string name = std::filesystem::path(argument).filename().string();
  return name == "hearth-scheduler" || name == "hearth-ps" || name == "hearth-worker";
}

// In the child, between fork and exec: only async-signal-safe calls. Reports errno of a failed exec through the pipe.
[[noreturn]] void Become(char* const* argv, char* const* environment, const sigset_t& mask, int parent, int report) {
  setpgid(0, 0);  // a ^C reaches us alone, and we decide what the ranks are told
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(128 + SIGTERM);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  std::signal(SIGUSR1, SIG_DFL);  // ours may be ignored; a shell could not trap it then
  sigprocmask(SIG_SETMASK, &mask, nullptr);
  execvpe(argv[0], argv, environment);
  const int error = errno;
  if (write(report, &error, sizeof(error)) != sizeof(error)) _exit(126);
  _exit(127);
}

std::vector<std::string> MergedEnvironment(const Command& command) {
  std::vector<std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string name(*entry, std::strcspn(*entry, "="));
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

}  // namespace

Supervisor::Supervisor() {
  sigemptyset(&taken_);
  for (const int signal : {SIGUSR1, SIGTERM, SIGINT, SIGHUP, SIGCHLD}) sigaddset(&taken_, signal);
  sigprocmask(SIG_BLOCK, &taken_, &before_);
  prctl(PR_SET_CHILD_SUBREAPER, 1);
}

Supervisor::~Supervisor() {
  // What came when nobody waited any more is of no use now, and would end the process in place of its exit code.
  std::signal(SIGUSR1, SIG_IGN);
  while (NextSignal(0) != 0) {
  }
  prctl(PR_SET_CHILD_SUBREAPER, 0);
  sigprocmask(SIG_SETMASK, &before_, nullptr);
}

int Supervisor::NextSignal(int64_t deadline_us) {
  const int64_t wait_us = std::max<int64_t>(0, deadline_us - Env::Real()->NowUs());
  const timespec wait = {static_cast<time_t>(wait_us / 1000000), static_cast<long>(wait_us % 1000000 * 1000)};
  const int signal = std::max(0, sigtimedwait(&taken_, nullptr, &wait));
  if (signal == SIGUSR1) save_asked_ = true;
  if ((signal == SIGTERM || signal == SIGINT || signal == SIGHUP) && stop_signal_ == 0) stop_signal_ = signal;
  return signal;
}

absl::StatusOr<Supervisor::End> Supervisor::Run(const Command& command) {
  const std::vector<std::string> environment = MergedEnvironment(command);
  const std::vector<char*> argv = Pointers(command.argv), envp = Pointers(environment);
  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return absl::InternalError(absl::StrCat("pipe: ", std::strerror(errno)));
  const int parent = getpid();
  const pid_t child = fork();
  if (child < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (child == 0) Become(argv.data(), envp.data(), before_, parent, report[1]);
  close(report[1]);
  int error = 0;
  const bool failed = read(report[0], &error, sizeof(error)) == sizeof(error);  // end of file: exec succeeded
  close(report[0]);

  int64_t kill_at_us = kNever;
  int64_t ask_at_us = kNever;
  for (;;) {
    int wait_status = 0;
    for (pid_t ended; (ended = waitpid(-1, &wait_status, WNOHANG)) > 0;) {  // adopted orphans, too
      if (ended != child) continue;
      if (failed) return absl::NotFoundError(absl::StrCat(command.argv[0], ": ", std::strerror(error)));
      return End{CodeOfWaitStatus(wait_status)};
    }
    const int64_t now_us = Env::Real()->NowUs();
    if (now_us >= kill_at_us) kill(-child, SIGKILL);
    if (now_us >= ask_at_us) {
      kill(child, SIGUSR1);
      ask_at_us = now_us + kAskAgainUs;
    }
    const int signal = NextSignal(std::min(now_us + 1000000, kill_at_us > now_us ? kill_at_us : kNever));
    if (signal == 0 || signal == SIGCHLD) continue;
    kill(child, signal);
    if (signal == SIGUSR1) ask_at_us = Env::Real()->NowUs() + kAskAgainUs;
    if (signal != SIGUSR1 && kill_at_us == kNever) kill_at_us = Env::Real()->NowUs() + kKillAfterUs;
  }
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
  for (const std::string& name : *names) {
    int process = 0;
    if (!absl::SimpleAtoi(name, &process) || process == getpid()) continue;
    const absl::StatusOr<std::string> line = ReadFile(absl::StrCat("/proc/", name, "/cmdline"), kCommandLineBytesMax);
    if (!line.ok() || line->empty()) continue;  // gone meanwhile, or a zombie
    const std::vector<std::string> arguments =
        absl::StrSplit(absl::string_view(*line).substr(0, line->size() - 1), '\0');
    if (arguments.back() == folder && std::any_of(arguments.begin(), arguments.end(), IsRole)) found.push_back(process);
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
