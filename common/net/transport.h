// Seam 1: carries messages between endpoints. The contract is the weakest one that users must live with: a message may
// be lost, repeated, delayed or overtaken; it is never altered or made up: one that leaves the process carries the
// proof that a rank of this job sent it (common/net/seal.h). Whoever needs more retries and numbers.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "common/base/bytes.h"
#include "common/base/env.h"
#include "common/net/mailbox.h"

namespace hearth {

// Endpoints of a process, as ports.
enum Port : int {
  kPortScheduler = 1,     // the scheduler's loop
  kPortServer = 2,        // a parameter server's loop
  kPortPull = 3,          // a worker's pull thread
  kPortPush = 4,          // a worker's push thread
  kPortControl = 5,       // a worker's control endpoint: start, ask-cut, files, goodbye
  kPortEvaluate = 6,      // worker 0 gathers the other workers' evaluation results here
  kPortPrefetch = 7,      // a worker's read thread (sends only)
  kPortEvaluatePull = 9,  // a worker's read-only pulls during an evaluation
};

constexpr int kPortsMax = 128;  // ports are 0 … kPortsMax - 1
constexpr size_t kPayloadBytesMax = size_t{1} << 30;

// InvalidArgument for a rank or a port that does not exist, or a payload beyond kPayloadBytesMax or too short to be a
// message. Every Send begins so.
absl::Status CheckSend(int size, int from_port, Address to, size_t payload_bytes);

// Thread-safe.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // The inbox of {rank(), port}; the same object on every call; messages that came before the first call are kept.
  // Owned by the transport.
  virtual Mailbox* Open(int port) = 0;
  // Hands the message over and returns; delivery is not implied. Fails only for a bad address or after an abort.
  // REQUIRES: `payload` is of EncodeMessage or EncodeOpaque (common/net/wire.h).
  virtual absl::Status Send(int from_port, Address to, Bytes payload) = 0;
  // How many messages that reached this process had no proof, and were dropped.
  virtual uint64_t refused() const { return 0; }
};

// Processes played by threads of one process: `size` transports over shared memory, in order and without loss.
// The hub outlives its transports' users.
class InProcessHub {
 public:
  InProcessHub(Env* env, int size);
  ~InProcessHub();
  Transport* transport(int rank);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
