#include "common/base/process.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int kNiceness = 5;

// In the child, between fork and exec: only async-signal-safe calls.
[[noreturn]] void Become(char* const* argv, int out, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(128 + SIGKILL);
  setpgid(0, 0);
  signal(SIGUSR1, SIG_IGN);  // mpirun may pass on "save and leave" to everyone it finds
  setpriority(PRIO_PROCESS, 0, kNiceness);
  const int in = open("/dev/null", O_RDONLY);
  if (in < 0) _exit(127);
  dup2(in, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(out, STDERR_FILENO);
  close_range(STDERR_FILENO + 1, ~0u, 0);
  execv(argv[0], argv);
  _exit(127);
}

}  // namespace

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 && name[0] != '\0' ? name : "localhost";
}

uint32_t UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return static_cast<uint32_t>(std::max(1, cores));
}

uint64_t PeakRssBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

int CodeOfWaitStatus(int wait_status) {
  return WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(const std::vector<std::string>& argv,
                                                                  const std::string& log) {
  std::vector<char*> pointers;
  for (const std::string& argument : argv) pointers.push_back(const_cast<char*>(argument.c_str()));
  pointers.push_back(nullptr);
  HEARTH_ASSIGN_OR_RETURN(const OwnedFile out, OpenForWriting(log, Writing::kAppend));
  const pid_t parent = getpid();
  const pid_t process = fork();
  if (process < 0) return absl::UnavailableError(absl::StrCat(argv[0], ": cannot be started: ", std::strerror(errno)));
  if (process == 0) Become(pointers.data(), fileno(out.get()), parent);
  return std::unique_ptr<ChildProcess>(new ChildProcess(process));
}

ChildProcess::~ChildProcess() {
  if (code_.has_value()) return;
  kill(process_, SIGKILL);
  while (waitpid(process_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

std::optional<int> ChildProcess::Poll() {
  int wait_status = 0;
  if (!code_.has_value() && waitpid(process_, &wait_status, WNOHANG) == process_) code_ = CodeOfWaitStatus(wait_status);
  return code_;
}

}  // namespace hearth
