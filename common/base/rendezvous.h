// A place where a fixed number of threads meet, again and again.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common/base/env.h"

namespace hearth {

class Rendezvous {
 public:
  Rendezvous(Env* env, int members);
  // Returns when every member has called it as often as this one. One thread a member. What each did before is seen by
  // all afterwards.
  void Meet(int member);

 private:
  const std::vector<std::unique_ptr<Event>> woken_;  // by member
  std::mutex mutex_;
  int arrived_ = 0;       // guarded by mutex_; at the present meeting
  uint64_t meeting_ = 0;  // guarded by mutex_; number of complete meetings
};

}  // namespace hearth
