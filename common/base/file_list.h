// The list of a job's log files, as one process knows it.
#pragma once

#include <memory>
#include <vector>

#include "common/base/env.h"
#include "common/proto/control.pb.h"

namespace hearth {

// The list of files as this worker knows it; the scheduler appends (FilesAppended), readers wait for more. Thread-safe.
class FileList {
 public:
  explicit FileList(Env* env);
  ~FileList();
  void Append(const std::vector<LogFile>& files, bool closed);
  std::vector<LogFile> files() const;
  bool closed() const;
  // Waits until there are more than `known` files, the list is closed, or the deadline. One waiting thread a list.
  void WaitForMore(size_t known, int64_t deadline_us);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
