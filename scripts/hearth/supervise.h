// One child process at a time, with the signals of the terminal and the batch system under control.
#pragma once

#include <csignal>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace hearth {

struct Command {
  std::vector<std::string> argv;
  std::vector<std::pair<std::string, std::string>> environment;  // added to ours
};

// While one lives, SIGUSR1, SIGTERM, SIGINT, SIGHUP and SIGCHLD are taken in by its methods instead of ending the
// process, and orphaned descendants become children of this process. After it those that are pending are forgotten and
// SIGUSR1 stays ignored: whoever asks for a save comes too late. One a process; single-threaded use.
class Supervisor {
 public:
  Supervisor();
  ~Supervisor();

  struct End {
    int code = 0;  // exit code, or 128 + the signal that ended the child
  };
  // Runs the command in a process group of its own, stdin from /dev/null, and waits for its end. SIGUSR1, SIGTERM,
  // SIGINT and SIGHUP are forwarded to the child as they come and remembered; SIGUSR1 is sent again each second, for an
  // mpirun whose ranks are not there yet drops it. A child that is still there `kKillAfterUs` after one of the latter
  // three is killed with its group. The child is sent SIGTERM when this process dies. NotFound where the program is
  // not.
  absl::StatusOr<End> Run(const Command& command);
  // Waits so long, or until a signal comes; takes in what came before, too.
  void Pause(int64_t wait_us);
  // Ends every process whose last argument is `folder` and that is, or starts, one of our roles, and waits until there
  // is none: whatever an mpirun that was killed left behind. False: some could not be ended.
  bool EndRolesOf(const std::string& folder);

  // Signals received so far: SIGUSR1; the first of SIGTERM, SIGINT, SIGHUP (0: none).
  bool save_asked() const { return save_asked_; }
  int stop_signal() const { return stop_signal_; }

 private:
  // Waits for one signal until the deadline and remembers it; 0 at the deadline.
  int NextSignal(int64_t deadline_us);

  sigset_t taken_;
  sigset_t before_;
  bool save_asked_ = false;
  int stop_signal_ = 0;
};

// Processes, other than this one, whose last argument is `folder` and one of whose arguments is a program called
// hearth-scheduler, hearth-ps or hearth-worker.
std::vector<int> RolesOf(const std::string& folder);

// "exit code 70", "killed by signal 9 (Killed)".
std::string DescribeEnd(int code);

}  // namespace hearth
