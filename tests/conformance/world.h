// Where a conformance case runs: every member of a group runs the same function at the same time, as threads of this
// process or as ranks under mpirun. The suites know nothing of which.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/base/env.h"
#include "common/base/rendezvous.h"
#include "common/net/transport.h"
#include "worker/collective/collective.h"

namespace hearth {

// One member's view while a case runs.
struct TransportMember {
  Env* env;
  Transport* transport;
  int port;                       // ports port … port + 3 are this case's own
  std::function<void()> barrier;  // not over `transport`
};
using TransportCase = std::function<void(const TransportMember&)>;
using CollectiveCase = std::function<void(Collective*)>;

// Runs a case on all members and returns when this process's are through.
class TransportWorld {
 public:
  virtual ~TransportWorld() = default;
  virtual bool reliable() const = 0;  // in order for each pair of ports, without loss or repetition
  virtual void Run(const TransportCase& run) = 0;
};
class CollectiveWorld {
 public:
  virtual ~CollectiveWorld() = default;
  virtual void Run(const CollectiveCase& run) = 0;
};

// An implementation as the suites' parameter: worlds are made where the case runs.
template <typename World>
struct Implementation {
  std::string name;
  std::function<std::unique_ptr<World>()> make;
};
template <typename World>
void PrintTo(const Implementation<World>& implementation, std::ostream* out) {
  *out << implementation.name;
}

// Runs f(0) … f(count - 1), each in a thread of its own.
inline void RunInThreads(int count, const std::function<void(int)>& f) {
  std::vector<std::unique_ptr<Thread>> threads;
  for (int i = 0; i < count; ++i) threads.push_back(Env::Real()->StartThread("member", [&f, i] { f(i); }));
}

}  // namespace hearth
