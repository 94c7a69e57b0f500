// The suites over what lives in one process.

#include <cmath>

#include "tests/common/net/faulty_transport.h"
#include "tests/conformance/collective_suite.h"
#include "tests/conformance/transport_suite.h"

namespace hearth {
namespace {

class InProcessWorld : public TransportWorld {
 public:
  // weather null: none, and what arrives is reliable.
  InProcessWorld(int size, const Weather* weather)
      : size_(size), reliable_(weather == nullptr), hub_(Env::Real(), size), rendezvous_(Env::Real(), size) {
    for (int rank = 0; weather != nullptr && rank < size; ++rank) {
      Weather own = *weather;
      own.seed += static_cast<uint64_t>(rank);
      faulty_.push_back(MakeFaultyTransport(hub_.transport(rank), own));
    }
  }
  bool reliable() const override { return reliable_; }
  void Run(const TransportCase& run) override {
    RunInThreads(size_, [&](int rank) {
      Transport* const transport = reliable_ ? hub_.transport(rank) : faulty_[static_cast<size_t>(rank)].get();
      run({Env::Real(), transport, 10, [this, rank] { rendezvous_.Meet(rank); }});
    });
  }

 private:
  const int size_;
  const bool reliable_;
  InProcessHub hub_;
  std::vector<std::unique_ptr<Transport>> faulty_;
  Rendezvous rendezvous_;
};

class LocalCollectiveWorld : public CollectiveWorld {
 public:
  explicit LocalCollectiveWorld(int workers) : workers_(workers), hub_(Env::Real(), workers) {}
  void Run(const CollectiveCase& run) override {
    RunInThreads(workers_, [&](int worker) {
      Collective* const collective = hub_.collective(worker);
      EXPECT_EQ(collective->worker(), worker);
      EXPECT_EQ(collective->workers(), workers_);
      run(collective);
    });
  }

 private:
  const int workers_;
  LocalCollectiveHub hub_;
};

std::vector<Implementation<TransportWorld>> InProcess() {
  std::vector<Implementation<TransportWorld>> worlds;
  for (int size : {1, 2, 3, 4}) {
    worlds.push_back(
        {"InProcess" + std::to_string(size), [size] { return std::make_unique<InProcessWorld>(size, nullptr); }});
  }
  return worlds;
}

std::vector<Implementation<TransportWorld>> Faulty() {
  const std::vector<std::pair<std::string, Weather>> weathers = {
      {"Calm", {1, 0, 0, 0}},         {"Losing", {2, 0.2, 0, 0}},       {"Repeating", {3, 0, 0.5, 0}},
      {"Reordering", {4, 0, 0, 0.4}}, {"Storm", {5, 0.15, 0.15, 0.15}},
  };
  std::vector<Implementation<TransportWorld>> worlds;
  for (const auto& [name, weather] : weathers) {
    worlds.push_back({"Faulty" + name, [weather = weather] { return std::make_unique<InProcessWorld>(3, &weather); }});
  }
  return worlds;
}

std::vector<Implementation<CollectiveWorld>> Local() {
  std::vector<Implementation<CollectiveWorld>> worlds;
  for (int workers : {1, 2, 3, 4}) {
    worlds.push_back(
        {"Local" + std::to_string(workers), [workers] { return std::make_unique<LocalCollectiveWorld>(workers); }});
  }
  return worlds;
}

const auto kNameOf = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(InProcess, TransportConformance, testing::ValuesIn(InProcess()), kNameOf);
INSTANTIATE_TEST_SUITE_P(InProcess, ReliableTransportConformance, testing::ValuesIn(InProcess()), kNameOf);
INSTANTIATE_TEST_SUITE_P(Faulty, TransportConformance, testing::ValuesIn(Faulty()), kNameOf);
INSTANTIATE_TEST_SUITE_P(Local, CollectiveConformance, testing::ValuesIn(Local()), kNameOf);

// What the weather does to a thousand numbered messages from one rank to another.
std::vector<uint64_t> Arrived(const Weather& weather) {
  InProcessHub hub(Env::Real(), 2);
  const auto faulty = MakeFaultyTransport(hub.transport(0), weather);
  for (uint64_t number = 0; number < 1000; ++number) {
    EXPECT_TRUE(faulty->Send(1, {1, 2}, NumberedMessage(0, number, 4)).ok());
  }
  std::vector<uint64_t> numbers;
  while (const std::optional<Message> message = hub.transport(1)->Open(2)->Receive(0))
    numbers.push_back(NumberOf(*message));
  return numbers;
}

TEST(FaultyTransport, EachKindOfWeatherDoesWhatItSaysAndTheSameForASeed) {
  std::vector<uint64_t> all(1000);
  for (uint64_t i = 0; i < 1000; ++i) all[i] = i;
  EXPECT_EQ(Arrived({1, 0, 0, 0}), all);

  const std::vector<uint64_t> losing = Arrived({1, 0.3, 0, 0});
  EXPECT_GT(losing.size(), 600u);
  EXPECT_LT(losing.size(), 800u);
  EXPECT_TRUE(std::is_sorted(losing.begin(), losing.end()));

  std::vector<uint64_t> repeating = Arrived({1, 0, 0.3, 0});
  EXPECT_GT(repeating.size(), 1200u);
  repeating.erase(std::unique(repeating.begin(), repeating.end()), repeating.end());
  EXPECT_EQ(repeating, all);

  std::vector<uint64_t> reordering = Arrived({1, 0, 0, 0.3});
  EXPECT_FALSE(std::is_sorted(reordering.begin(), reordering.end()));
  std::sort(reordering.begin(), reordering.end());
  EXPECT_GE(reordering.size(), 990u) << "all but what is held at the end";
  EXPECT_EQ(std::unique(reordering.begin(), reordering.end()), reordering.end());

  EXPECT_EQ(Arrived({7, 0.2, 0.2, 0.2}), Arrived({7, 0.2, 0.2, 0.2}));
  EXPECT_NE(Arrived({7, 0.2, 0.2, 0.2}), Arrived({8, 0.2, 0.2, 0.2}));
}

TEST(Transport, RefusesPayloadsThatMpiCouldNotCountOrThatAreNoMessage) {
  EXPECT_TRUE(CheckSend(2, 1, {1, 2}, kPayloadBytesMax).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(CheckSend(2, 1, {1, 2}, kPayloadBytesMax + 1)));
  EXPECT_TRUE(CheckSend(2, 1, {1, 2}, sizeof(Header)).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(CheckSend(2, 1, {1, 2}, sizeof(Header) - 1)));
}

TEST(LocalCollective, PartsThatDoNotFitAreRefusedOnEveryWorker) {
  LocalCollectiveHub hub(Env::Real(), 2);
  RunInThreads(2, [&](int worker) {
    std::vector<float> part(static_cast<size_t>(3 + worker)), sum(part.size());
    const Collective::Part parts[] = {{part, {}}};
    EXPECT_TRUE(absl::IsInternal(hub.collective(worker)->SumParts(2, parts, absl::MakeSpan(sum), {})));
    EXPECT_TRUE(hub.collective(worker)->Barrier().ok()) << "and the hub still works";
  });
}

}  // namespace
}  // namespace hearth
