// Collective over MpiRuntime::Exchange: every worker owns one slice of the sum; parts' slices go to their owners, are
// added there in lane order, and the sums are gathered. Two exchanges a call.
#pragma once

#include <memory>

#include "common/net/mpi_runtime.h"
#include "worker/collective/collective.h"

namespace hearth {

// first_rank: MPI rank of worker 0; workers' ranks are consecutive. `runtime` outlives it.
std::unique_ptr<Collective> MakeMpiCollective(MpiRuntime* runtime, int first_rank, int worker, int workers);

}  // namespace hearth
