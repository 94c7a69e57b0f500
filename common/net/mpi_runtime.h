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
#include "common/net/seal.h"
#include "common/net/transport.h"

namespace hearth {

class MpiRuntime {
 public:
  // Starts MPI. Once a process, before its other threads. What goes to other ranks is sealed with `token`, the
  // environment's if it is not given; a message that another token sealed, or none, is dropped, counted, and told once
  // a rank. It ends nothing: whoever reaches a port could else end the job with one message.
  static absl::StatusOr<std::unique_ptr<MpiRuntime>> Start(Env* env);
  static absl::StatusOr<std::unique_ptr<MpiRuntime>> Start(Env* env, const JobToken& token);
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
  // buffer is not sent. A length that differs from the sender's is Internal, and so are bytes without this job's proof:
  // they lie where the rank's should, and cannot be told from them any more by dropping something. A peer's death ends
  // the job, so there is no deadline; one rank may not name itself.
  absl::Status Exchange(absl::Span<const SendBuffer> sends, absl::Span<const ReceiveBuffer> receives);

  // Writes into the log what went to other ranks and came from them so far: messages, buffers of exchanges and the
  // proofs beside these, without MPI's own headers. Any thread.
  void TellTraffic() const;

  // Ends every rank of the job now with this exit code. Any thread. Does not return.
  [[noreturn]] void Abort(int exit_code);

 private:
  class Loop;
  struct State;
  explicit MpiRuntime(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace hearth
