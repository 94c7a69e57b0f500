// Threads that run what they are given.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/base/env.h"

namespace hearth {

// Tasks start in the order they came in, urgent ones before all others. With one thread each has ended before the next
// starts. Thread-safe. The destructor runs what is left.
class TaskPool {
 public:
  using Task = std::function<void()>;

  // 0 threads: Run runs the task itself, before it returns.
  TaskPool(Env* env, absl::string_view name, size_t threads);
  ~TaskPool();

  void Run(Task task, bool urgent = false);
  // Runs the next waiting task on the caller's thread, for a caller that would else wait for it. False: none waits.
  bool RunOne();

 private:
  struct Worker {
    std::unique_ptr<Event> wake;
    bool idle = false;  // guarded by mutex_
    std::unique_ptr<Thread> thread;
  };

  void Work(Worker* worker);

  std::mutex mutex_;
  std::deque<Task> urgent_;                       // guarded by mutex_
  std::deque<Task> waiting_;                      // guarded by mutex_
  bool closing_ = false;                          // guarded by mutex_
  std::vector<std::unique_ptr<Worker>> workers_;  // constant while threads run
};

}  // namespace hearth
