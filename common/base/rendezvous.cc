#include "common/base/rendezvous.h"

#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

std::vector<std::unique_ptr<Event>> NewEvents(Env* env, int count) {
  std::vector<std::unique_ptr<Event>> events;
  for (int i = 0; i < count; ++i) events.push_back(env->NewEvent());
  return events;
}

}  // namespace

Rendezvous::Rendezvous(Env* env, int members) : woken_(NewEvents(env, members)) { HEARTH_CHECK(members > 0); }

void Rendezvous::Meet(int member) {
  uint64_t own;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    own = meeting_;
    if (++arrived_ == static_cast<int>(woken_.size())) {
      arrived_ = 0;
      ++meeting_;
      // Under the lock: a member that has been woken takes it before it leaves, so nobody can tear this down meanwhile.
      for (size_t other = 0; other < woken_.size(); ++other) {
        if (static_cast<int>(other) != member) woken_[other]->Notify();
      }
      return;
    }
  }
  while (true) {
    woken_[static_cast<size_t>(member)]->WaitUntil(kNever);
    std::lock_guard<std::mutex> lock(mutex_);
    if (meeting_ != own) return;
  }
}

}  // namespace hearth
