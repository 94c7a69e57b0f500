// Two ranks under mpirun: a message of 4 KiB there and back, and a request with its answer of the lengths given, once
// by bare MPI and once by Hearth's transport. Rank 0 prints one line of JSON with medians in microseconds.
//   wire_bench mpi|hearth REQUEST_BYTES REPLY_BYTES
#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "common/base/env.h"
#include "common/base/status.h"
#include "common/net/mpi_runtime.h"
#include "common/net/wire.h"

namespace hearth {
namespace {

constexpr size_t kSmallBytes = 4096;
constexpr int kSmallRounds = 2000;
constexpr int kLargeRounds = 200;
constexpr int kPort = 20;

// There and back between rank 0, which calls, and rank 1, which answers with `reply_bytes`.
using RoundTrip = std::function<void(size_t request_bytes, size_t reply_bytes)>;

double MedianUs(int rounds, const std::function<void()>& work) {
  std::vector<double> taken;
  for (int i = 0; i < rounds; ++i) {
    const int64_t begin_us = Env::Real()->NowUs();
    work();
    taken.push_back(static_cast<double>(Env::Real()->NowUs() - begin_us));
  }
  std::sort(taken.begin(), taken.end());
  return taken[taken.size() / 2];
}

// A single round trip is a few microseconds, the clock's own step: many of them at once.
void Measure(int rank, size_t request_bytes, size_t reply_bytes, const RoundTrip& round_trip) {
  constexpr int kAtOnce = 20;
  const double small_us = MedianUs(kSmallRounds / kAtOnce, [&] {
    for (int i = 0; i < kAtOnce; ++i) round_trip(kSmallBytes, kSmallBytes);
  });
  const double large_us = MedianUs(kLargeRounds, [&] { round_trip(request_bytes, reply_bytes); });
  if (rank == 0) std::printf("{\"one_way_us\": %.3f, \"exchange_us\": %.3f}\n", small_us / kAtOnce / 2, large_us);
}

void BareMpi(size_t request_bytes, size_t reply_bytes) {
  HEARTH_CHECK(MPI_Init(nullptr, nullptr) == MPI_SUCCESS);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  std::vector<char> bytes(std::max({request_bytes, reply_bytes, kSmallBytes}), 'x');
  const auto send = [&](size_t count) {
    MPI_Send(bytes.data(), static_cast<int>(count), MPI_CHAR, 1 - rank, 0, MPI_COMM_WORLD);
  };
  const auto receive = [&](size_t count) {
    MPI_Recv(bytes.data(), static_cast<int>(count), MPI_CHAR, 1 - rank, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  };
  Measure(rank, request_bytes, reply_bytes, [&](size_t there, size_t back) {
    if (rank == 0) send(there);
    receive(rank == 0 ? back : there);
    if (rank == 1) send(back);
  });
  MPI_Finalize();
}

void HearthTransport(size_t request_bytes, size_t reply_bytes) {
  auto started = MpiRuntime::Start(Env::Real());
  HEARTH_CHECK(started.ok(), "", started.status().ToString());
  Transport* const transport = (*started)->transport();
  const std::vector<char> body(std::max({request_bytes, reply_bytes, kSmallBytes}), 'x');
  Mailbox* const mailbox = transport->Open(kPort);
  const Address peer{1 - transport->rank(), kPort};
  const auto send = [&](size_t count) {
    Header header;
    header.kind = MessageKind::kControl;
    const absl::Status sent = transport->Send(kPort, peer, EncodeOpaque(header, {body.data(), count}));
    HEARTH_CHECK(sent.ok(), "", sent.ToString());
  };
  const auto receive = [&] { HEARTH_CHECK(mailbox->Receive(kNever).has_value()); };
  Measure(transport->rank(), request_bytes, reply_bytes, [&](size_t there, size_t back) {
    if (transport->rank() == 0) send(there);
    receive();
    if (transport->rank() == 1) send(back);
  });
}

int Main(int argc, char** argv) {
  const std::string by = argc == 4 ? argv[1] : "";
  size_t request_bytes = 0, reply_bytes = 0;
  if ((by != "mpi" && by != "hearth") || !absl::SimpleAtoi(argv[2], &request_bytes) ||
      !absl::SimpleAtoi(argv[3], &reply_bytes)) {
    fprintf(stderr, "usage: wire_bench mpi|hearth REQUEST_BYTES REPLY_BYTES\n");
    return kExitUsage;
  }
  (by == "mpi" ? BareMpi : HearthTransport)(request_bytes, reply_bytes);
  return kExitOk;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
