// Seam 3: sums over the lanes of all workers, part by part in lane order, so that the bits do not depend on which
// process held which lane (docs/PROTOCOL.md §3).
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/env.h"

namespace hearth {

// Called by one thread of each worker, the same calls with the same sizes in the same order everywhere.
class Collective {
 public:
  virtual ~Collective() = default;
  virtual int worker() const = 0;
  virtual int workers() const = 0;

  // A lane's part: floats that are added, and bytes that ride along and are kept apart (flags, moments, counts).
  struct Part {
    absl::Span<const float> sum;  // [n], the same n for all lanes
    absl::Span<const char> tail;  // [m], the same m for all lanes
  };
  // This worker brings the parts of its lanes: lane worker() + i · workers() is parts[i]. Afterwards, on every worker:
  // sum_out[j] = ((part_0[j] + part_1[j]) + part_2[j]) + … over all `lanes` lanes in lane order, and tails_out holds
  // the tails of all lanes in lane order, [lanes × m]. sum_out may not alias a part.
  virtual absl::Status SumParts(int lanes, absl::Span<const Part> parts, absl::Span<float> sum_out,
                                absl::Span<char> tails_out) = 0;
  // `bytes` of worker `root` to all.
  virtual absl::Status Broadcast(int root, absl::Span<char> bytes) = 0;
  virtual absl::Status Barrier() = 0;
};

// Workers played by threads of one process, for tests and for one worker alone: hub of `workers` collectives.
class LocalCollectiveHub {
 public:
  LocalCollectiveHub(Env* env, int workers);
  ~LocalCollectiveHub();
  Collective* collective(int worker);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
