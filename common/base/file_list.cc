#include "common/base/file_list.h"

#include <mutex>

namespace hearth {

struct FileList::State {
  explicit State(Env* env) : changed(env->NewEvent()) {}
  const std::unique_ptr<Event> changed;
  std::mutex mutex;
  std::vector<LogFile> files;  // guarded by mutex
  bool closed = false;         // guarded by mutex
};

FileList::FileList(Env* env) : state_(std::make_unique<State>(env)) {}
FileList::~FileList() = default;

void FileList::Append(const std::vector<LogFile>& files, bool closed) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->files.insert(state_->files.end(), files.begin(), files.end());
    state_->closed = state_->closed || closed;
  }
  state_->changed->Notify();
}

std::vector<LogFile> FileList::files() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->files;
}

bool FileList::closed() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->closed;
}

void FileList::WaitForMore(size_t known, int64_t deadline_us) {
  while (true) {
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      if (state_->files.size() > known || state_->closed) return;
    }
    if (!state_->changed->WaitUntil(deadline_us)) return;
  }
}

}  // namespace hearth
