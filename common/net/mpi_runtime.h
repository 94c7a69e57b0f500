// The one place that knows MPI. One communication thread a process owns the library (MPI_THREAD_FUNNELED: it calls
// MPI_Init and MPI_Finalize itself); everyone else talks to it. Open MPI has no progress thread of its own, so the one
// loop progresses messages and the reduction's exchange together. It never spins for long: idle it sleeps between
// looks, up to half a millisecond each time, woken at once by a local Send or Exchange.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/net/transport.h"

namespace hearth {

class MpiRuntime {
 public:
  // Starts MPI. Once a process.
  static absl::StatusOr<std::unique_ptr<MpiRuntime>> Start(Env* env);
  // Waits for every rank (MPI_Finalize), having sent all that was handed over.
  ~MpiRuntime();

  // This process's endpoints over MPI: reliable, in order for each pair of ports.
  Transport* transport();

  struct SendBuffer {
    int rank;
    absl::Span<const char> bytes;
  };
  struct ReceiveBuffer {
    int rank;
    absl::Span<char> bytes;
  };
  // Sends and receives raw buffers without copies, and returns when all have moved. At most one buffer a peer and
  // direction. Calls are matched in order between each pair of ranks; one thread a process may call it. An empty
  // buffer is not sent. A length that differs from the sender's is Internal. A peer's death ends the job, so there is
  // no deadline; one rank may not name itself.
  absl::Status Exchange(absl::Span<const SendBuffer> sends, absl::Span<const ReceiveBuffer> receives);

  // Ends every rank of the job now with this exit code. Any thread. Does not return.
  [[noreturn]] void Abort(int exit_code);

 private:
  class Loop;
  struct State;
  explicit MpiRuntime(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace hearth
