// The suites over MPI. Runs under mpirun: every rank runs the same cases in the same order; rank 0 reports.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/match.h"
#include "common/base/status.h"
#include "common/net/mpi_runtime.h"
#include "tests/conformance/collective_suite.h"
#include "tests/conformance/transport_suite.h"
#include "worker/collective/mpi_collective.h"
#ifdef HEARTH_CUDA
#include "tests/conformance/device_world.h"
#include "worker/device/nccl_collective.h"
#endif

namespace hearth {
namespace {

MpiRuntime* runtime;  // MPI starts once a process
int next_port = 10;   // each case has ports of its own: MPI's inboxes live as long as the process

int Rank() { return runtime->transport()->rank(); }
int Size() { return runtime->transport()->size(); }

class MpiWorld : public TransportWorld {
 public:
  bool reliable() const override { return true; }
  void Run(const TransportCase& run) override {
    const auto all = MakeMpiCollective(runtime, 0, Rank(), Size());
    run({Env::Real(), runtime->transport(), next_port, [&] { ASSERT_TRUE(all->Barrier().ok()); }});
    next_port += 4;
  }
};

// The ranks from first_rank on; the others stand by.
class MpiCollectiveWorld : public CollectiveWorld {
 public:
  explicit MpiCollectiveWorld(int first_rank) : first_rank_(first_rank) {}
  void Run(const CollectiveCase& run) override {
    if (Rank() < first_rank_) return;
    run(MakeMpiCollective(runtime, first_rank_, Rank() - first_rank_, Size() - first_rank_).get());
  }

 private:
  const int first_rank_;
};

const auto kNameOf = [](const auto& info) { return info.param.name; };
const Implementation<TransportWorld> kMpi{"Mpi", [] { return std::make_unique<MpiWorld>(); }};
INSTANTIATE_TEST_SUITE_P(Mpi, TransportConformance, testing::Values(kMpi), kNameOf);
INSTANTIATE_TEST_SUITE_P(Mpi, ReliableTransportConformance, testing::Values(kMpi), kNameOf);

const Implementation<CollectiveWorld> kAllRanks{"AllRanks", [] { return std::make_unique<MpiCollectiveWorld>(0); }};
const Implementation<CollectiveWorld> kLaterRanks{
    "LaterRanks", [] { return std::make_unique<MpiCollectiveWorld>(std::min(1, Size() - 1)); }};
INSTANTIATE_TEST_SUITE_P(Mpi, CollectiveConformance, testing::Values(kAllRanks, kLaterRanks), kNameOf);

#ifdef HEARTH_CUDA
// One GPU may play several: NCCL is told that each rank is a host, and the ranks talk over sockets.
class NcclCollectiveWorld : public CollectiveWorld {
 public:
  // The end of a communicator aborts what a peer may still receive.
  ~NcclCollectiveWorld() override {
    if (mpi_ != nullptr) {
      EXPECT_TRUE(mpi_->Barrier().ok());
    }
  }
  void Run(const CollectiveCase& run) override {
    const int gpus = static_cast<int>(VisibleGpus().ids.size());
    const int gpu = Rank() % gpus;
    if (!collective_) {
      if (Size() > gpus) setenv("NCCL_HOSTID", std::to_string(Rank()).c_str(), 1);
      mpi_ = MakeMpiCollective(runtime, 0, Rank(), Size());
      auto made = MakeNcclCollective(Env::Real(), gpu, mpi_.get());
      ASSERT_TRUE(made.ok()) << made.status();
      collective_ = std::move(*made);
    }
    ThroughDevice through(collective_.get(), mpi_.get(), torch::Device(torch::kCUDA, static_cast<int8_t>(gpu)));
    run(&through);
  }

 private:
  std::unique_ptr<Collective> mpi_;
  std::unique_ptr<DeviceCollective> collective_;
};

std::vector<Implementation<CollectiveWorld>> OnGpus() {
  if (VisibleGpus().ids.empty()) return {};
  return {{"Nccl", [] { return std::make_unique<NcclCollectiveWorld>(); }}};
}
INSTANTIATE_TEST_SUITE_P(Gpus, CollectiveConformance, testing::ValuesIn(OnGpus()), kNameOf);
#endif

// --- MpiRuntime::Exchange

TEST(MpiExchange, MovesBuffersOfDifferentLengthsBothWays) {
  std::vector<Bytes> out, in;
  std::vector<MpiRuntime::SendBuffer> sends;
  std::vector<MpiRuntime::ReceiveBuffer> receives;
  const auto bytes_between = [](int from, int to) {
    return static_cast<size_t>((from * 7 + to * 3) * 30011 % 3'000'000);
  };
  for (int peer = 0; peer < Size(); ++peer) {
    if (peer == Rank()) continue;
    out.push_back(NumberedBytes(Rank(), static_cast<uint64_t>(peer), bytes_between(Rank(), peer)));
    in.emplace_back(16 + bytes_between(peer, Rank()));
    sends.push_back({peer, out.back().span()});
    receives.push_back({peer, absl::MakeSpan(in.back().data(), in.back().size())});
  }
  ASSERT_TRUE(runtime->Exchange(sends, receives).ok());
  for (size_t i = 0; i < receives.size(); ++i) {
    EXPECT_EQ(NumberOfBytes(receives[i].rank, in[i].span()), static_cast<uint64_t>(Rank()));
  }
}

// Lengths around the size at which MPI changes from copying to fetching; the next exchange is not confused by it.
TEST(MpiExchange, ALengthThatDiffersFromTheSendersIsInternal) {
  if (Size() < 2 || Rank() > 1) return;
  const int peer = 1 - Rank();
  const std::vector<std::pair<size_t, size_t>> cases = {{8, 16}, {16, 8}, {1000, 999}, {100'000, 300'000}};
  for (const auto& [sent, expected] : cases) {
    std::vector<char> out(Rank() == 0 ? sent : 5), in(Rank() == 0 ? 5 : expected);
    const absl::Status status = runtime->Exchange({{peer, out}}, {{peer, absl::MakeSpan(in)}});
    if (Rank() == 0) {
      EXPECT_TRUE(status.ok()) << status;
    } else {
      EXPECT_TRUE(absl::IsInternal(status)) << status;
    }
  }
}

TEST(MpiExchange, RefusesItselfStrangersAndTwoBuffersForOne) {
  const std::vector<char> bytes(3);
  EXPECT_TRUE(absl::IsInvalidArgument(runtime->Exchange({{Rank(), bytes}}, {})));
  EXPECT_TRUE(absl::IsInvalidArgument(runtime->Exchange({{Size(), bytes}}, {})));
  EXPECT_TRUE(absl::IsInvalidArgument(runtime->Exchange({{-1, bytes}}, {})));
  if (Size() < 2) return;
  const int peer = (Rank() + 1) % Size();
  EXPECT_TRUE(absl::IsInvalidArgument(runtime->Exchange({{peer, bytes}, {peer, bytes}}, {})));
}

// Messages and exchanges share one thread: neither may starve the other.
TEST(MpiExchange, GoesOnBesideMessages) {
  const int port = next_port;
  next_port += 4;
  const int next = (Rank() + 1) % Size();
  constexpr uint64_t kMessages = 500;
  const auto sender = Env::Real()->StartThread("sender", [&] {
    for (uint64_t i = 0; i < kMessages; ++i) {
      EXPECT_TRUE(runtime->transport()->Send(port, {next, port}, NumberedMessage(Rank(), i, 5000)).ok());
    }
    for (uint64_t i = 0; i < kMessages; ++i) {
      const auto message = runtime->transport()->Open(port)->Receive(Env::Real()->NowUs() + kPatienceUs);
      ASSERT_TRUE(message.has_value());
      ASSERT_EQ(NumberOf(*message), i);
    }
  });
  const auto collective = MakeMpiCollective(runtime, 0, Rank(), Size());
  for (uint64_t call = 0; call < 100; ++call)
    CheckSumParts(collective.get(), call, Size(), 10'000, 8, Numbers::kFloats);
}

// Handed over and not yet sent when the runtime ends: rank 0 sends as the last thing before it leaves, and the others
// receive it. Started after all tests, because MPI cannot start again.
void SendLast(int port) {
  for (int peer = 1; peer < Size() && Rank() == 0; ++peer) {
    for (uint64_t i = 0; i < 50; ++i) {
      EXPECT_TRUE(runtime->transport()->Send(port, {peer, port}, NumberedMessage(0, i, 100'000)).ok());
    }
  }
}
void ReceiveLast(int port) {
  for (uint64_t i = 0; i < 50 && Rank() != 0; ++i) {
    const auto message = runtime->transport()->Open(port)->Receive(Env::Real()->NowUs() + kPatienceUs);
    ASSERT_TRUE(message.has_value());
    ASSERT_EQ(NumberOf(*message), i);
  }
}

// --- A rank with another token than the rest: the last one, in a run of its own (--stranger).

constexpr int kStrangersPorts[] = {kPortScheduler, kPortServer, 77};
constexpr uint64_t kStrangersMessages = 50;  // to each port of each rank

bool IsStranger() { return Rank() == Size() - 1; }

// Until so many messages were dropped here.
void AwaitRefused(uint64_t count) {
  const int64_t give_up_us = Env::Real()->NowUs() + kPatienceUs;
  while (runtime->transport()->refused() < count) {
    ASSERT_LT(Env::Real()->NowUs(), give_up_us) << runtime->transport()->refused() << " messages were dropped";
    runtime->transport()->Open(kPortsMax - 1)->Receive(Env::Real()->NowUs() + 1000);
  }
}

TEST(MpiStranger, IsDroppedBeforeAnythingIsParsedAndEndsNothing) {
  Transport* const transport = runtime->transport();
  for (int peer = 0; peer < Size() - 1 && IsStranger(); ++peer) {
    for (uint64_t i = 0; i < kStrangersMessages; ++i) {
      for (const int port : kStrangersPorts) {
        // Every second one is what a rank of the job would send, but for its tag.
        Bytes message = NumberedMessage(Rank(), i, i * 10'000);
        if (i % 2 == 0) std::memset(message.data(), 0xff, sizeof(Header));
        ASSERT_TRUE(transport->Send(kPortControl, {peer, port}, std::move(message)).ok());
      }
    }
  }
  const uint64_t dropped = kStrangersMessages * std::size(kStrangersPorts);
  if (!IsStranger()) {
    AwaitRefused(dropped);
    for (int peer = 0; peer < Size(); ++peer)
      ASSERT_TRUE(transport->Send(kPortControl, {peer, kPortPull}, NumberedMessage(Rank(), 1, 1000)).ok());
    for (int peer = 0; peer < Size() - 1; ++peer) {  // and the job goes on
      const auto message = transport->Open(kPortPull)->Receive(Env::Real()->NowUs() + kPatienceUs);
      ASSERT_TRUE(message.has_value());
      EXPECT_EQ(NumberOf(*message), 1u);
    }
    EXPECT_EQ(transport->refused(), dropped);
    for (const int port : kStrangersPorts) EXPECT_FALSE(transport->Open(port)->Receive(0).has_value()) << port;
  } else {
    AwaitRefused(static_cast<uint64_t>(Size() - 1));  // it believes nobody, either
  }
}

TEST(MpiStranger, CannotTakePartInAnExchangeAndTheErrorNamesIt) {
  std::vector<char> out(100'000, 'x');
  std::vector<Bytes> in;
  std::vector<MpiRuntime::SendBuffer> sends;
  std::vector<MpiRuntime::ReceiveBuffer> receives;
  for (int peer = 0; peer < Size(); ++peer) {
    if (peer == Rank()) continue;
    in.emplace_back(out.size());
    sends.push_back({peer, out});
    receives.push_back({peer, absl::MakeSpan(in.back().data(), in.back().size())});
  }
  const absl::Status status = runtime->Exchange(sends, receives);
  EXPECT_TRUE(absl::IsInternal(status)) << status;
  const int named = IsStranger() ? 0 : Size() - 1;
  EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat("rank ", named, " has no proof"))) << status;
}

// One line a failure, with the rank's name; rank 0 has gtest's own report.
class FailuresOnly : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::printf("rank %d: %s:%d: %s\n", Rank(), result.file_name(), result.line_number(), result.message());
  }
};

int Main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool stranger = mode == "--stranger";
  if (!stranger) testing::GTEST_FLAG(filter) = "-MpiStranger.*";
  if (stranger) testing::GTEST_FLAG(filter) = "MpiStranger.*";
  const char* const number = std::getenv("OMPI_COMM_WORLD_RANK");
  const char* const size_text = std::getenv("OMPI_COMM_WORLD_SIZE");
  if (stranger && number != nullptr && std::atoi(number) == std::atoi(size_text) - 1)
    setenv(kJobTokenVariable, JobToken::Random()->Hex().c_str(), 1);
  auto started = MpiRuntime::Start(Env::Real());
  if (!started.ok()) {
    std::fprintf(stderr, "%s\n", started.status().ToString().c_str());
    return ExitCodeOf(started.status());
  }
  runtime = started->get();
  if (mode == "--abort") {  // what the test of Abort runs: one rank ends all
    if (Rank() == Size() - 1) runtime->Abort(kExitSaved);
    runtime->transport()->Open(1)->Receive(kNever);
  }
  const int rank = Rank(), size = Size();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOnly);
  }
  int result = RUN_ALL_TESTS();
  const int passed = testing::UnitTest::GetInstance()->successful_test_count();
  if (!stranger) {
    SendLast(next_port);
    ReceiveLast(next_port);
  }
  started->reset();  // MPI_Finalize: returns when all ranks are here
  if (testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed()) result = 1;
  if (rank == 0) std::printf("conformance: MPI on %d ranks passed %d cases\n", size, passed);
#ifdef HEARTH_CUDA
  if (rank == 0 && VisibleGpus().ids.empty()) std::printf("conformance: NCCL not tried, no GPU is here\n");
#endif
  return result;
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
