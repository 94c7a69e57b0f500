#include "common/base/task_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace hearth {
namespace {

bool Take(std::deque<TaskPool::Task>* from, TaskPool::Task* task) {
  if (from->empty()) return false;
  *task = std::move(from->front());
  from->pop_front();
  return true;
}

}  // namespace

TaskPool::TaskPool(Env* env, absl::string_view name, size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    workers_.push_back(std::make_unique<Worker>());
    workers_.back()->wake = env->NewEvent();
  }
  for (size_t i = 0; i < threads; ++i) {
    Worker* worker = workers_[i].get();
    worker->thread = env->StartThread(absl::StrCat(name, "-", i), [this, worker] { Work(worker); });
  }
}

TaskPool::~TaskPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  for (const auto& worker : workers_) worker->wake->Notify();
  for (const auto& worker : workers_) worker->thread.reset();
}

void TaskPool::Run(Task task, bool urgent) {
  if (workers_.empty()) return task();
  Worker* woken = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (urgent ? urgent_ : waiting_).push_back(std::move(task));
    for (const auto& worker : workers_) {
      if (!worker->idle) continue;
      worker->idle = false;  // so that the next task wakes another
      woken = worker.get();
      break;
    }
  }
  if (woken != nullptr) woken->wake->Notify();
}

bool TaskPool::RunOne() {
  Task task;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!Take(&urgent_, &task) && !Take(&waiting_, &task)) return false;
  }
  task();
  return true;
}

void TaskPool::Work(Worker* worker) {
  while (true) {
    if (RunOne()) continue;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!urgent_.empty() || !waiting_.empty()) continue;
      if (closing_) return;
      worker->idle = true;
    }
    worker->wake->WaitUntil(kNever);
  }
}

}  // namespace hearth
