// The clients against real Shards on threads of their own, over transports that lose, repeat and reorder.
#include "ps/ps_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"
#include "ps/shard.h"
#include "tests/common/leaping_env.h"
#include "tests/common/net/faulty_transport.h"
#include "tests/embedding/map_store.h"
#include "tests/ps/plan.h"

namespace hearth {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kPortStop = 20;

std::vector<TableRows> RowsOf(LaneBatch* batch) {
  std::vector<TableRows> tables;
  for (uint32_t t = 0; t < kTables; ++t) {
    TableBatch& table = (*batch)[t];
    tables.push_back({t + 1, kDims[t], table.signs, table.occurrences, absl::MakeSpan(table.rows)});
  }
  return tables;
}

// What one server's thread does: its Shard, until a message on kPortStop.
struct ServerThread {
  ServerThread(const Plan& plan, Ranks ranks, int index, Transport* transport)
      : transport(transport), store(MakeMapStore()), io(Env::Real(), store.get(), 0) {
    ShardOptions options;
    options.job = plan.job();
    options.lanes = plan.lanes;
    options.server = static_cast<uint32_t>(index);
    options.servers = static_cast<uint32_t>(ranks.servers);
    auto opened = Shard::Open(
        options, &io,
        [transport](Address to, Bytes message) { return transport->Send(kPortServer, to, std::move(message)); },
        [this](const ServerAtCut& report) {
          hash = report.rows_hash();
          cut = report.step();
          return absl::OkStatus();
        });
    HEARTH_CHECK(opened.ok());
    shard = *std::move(opened);
  }

  void Run() {
    Mailbox* inbox = transport->Open(kPortServer);
    while (auto message = inbox->Receive(kNever)) {
      if (message->from.port == kPortStop) return;
      status = shard->Handle(*std::move(message));
      if (!status.ok()) return;
    }
  }

  Transport* const transport;
  std::unique_ptr<KvStore> store;
  StoreIo io;
  std::unique_ptr<Shard> shard;
  absl::Status status;
  uint64_t hash = 0;
  uint64_t cut = 0;
};

struct Pushed {
  uint32_t lane = 0;
  uint64_t step = 0;
  LaneBatch batch;
};

// One worker: a thread that pulls and trains, and one that pushes and repeats. Its lanes are l with l mod workers =
// worker.
class WorkerThreads {
 public:
  WorkerThreads(const Plan& plan, const Reference& reference, ClientOptions options, int worker)
      : plan_(plan),
        reference_(reference),
        options_(std::move(options)),
        worker_(worker),
        queue_(options_.env, 64),
        handed_(options_.env, 1024) {}

  void Train() {
    status = TrainAll();
    queue_.Close();
  }
  void Push() {
    push_status = PushAll();
    handed_.Close();
  }

  absl::Status status;
  absl::Status push_status;

 private:
  std::vector<uint32_t> Lanes() const {
    std::vector<uint32_t> lanes;
    for (uint32_t l = static_cast<uint32_t>(worker_); l < plan_.lanes;
         l += static_cast<uint32_t>(options_.ranks.workers)) {
      lanes.push_back(l);
    }
    return lanes;
  }

  absl::Status TrainAll() {
    PullClient client(options_, kPortPull);
    const std::vector<uint32_t> lanes = Lanes();
    std::map<std::pair<uint64_t, uint32_t>, LaneBatch> in_flight;
    uint64_t sent = 0;
    for (uint64_t step = 1; step <= plan_.steps; ++step) {
      for (; sent < std::min(plan_.steps, step + plan_.staleness); ++sent) {
        for (uint32_t lane : lanes) {
          // The permit of step s − k − 1 comes back when its push was handed over.
          if (sent + 1 > plan_.staleness + 1 && !handed_.Pop()) return absl::CancelledError("no permits");
          LaneBatch& batch = in_flight[{sent + 1, lane}];
          batch = plan_.MakeBatch(lane, sent + 1);
          const std::vector<TableRows> tables = RowsOf(&batch);
          if ((sent + lane) % 2 == 0) HEARTH_RETURN_IF_ERROR(SendPrefetch(options_, sent + 1, tables));
          HEARTH_RETURN_IF_ERROR(client.Send(lane, sent + 1, plan_.View(sent + 1), tables));
        }
      }
      for (uint32_t lane : lanes) {
        LaneBatch batch = std::move(in_flight[{step, lane}]);
        in_flight.erase({step, lane});
        std::vector<TableRows> tables = RowsOf(&batch);
        HEARTH_RETURN_IF_ERROR(client.Receive(lane, step, absl::MakeSpan(tables)));
        const LaneBatch expected = reference_.Pull(lane, step);
        for (uint32_t t = 0; t < kTables; ++t) {
          if (!SameBits(batch[t].rows, expected[t].rows)) {
            return absl::DataLossError(absl::StrCat("wrong rows: lane ", lane, ", step ", step, ", table ", t + 1));
          }
        }
        plan_.Train(lane, step, &batch);
        if (!queue_.Push({lane, step, std::move(batch)})) return absl::CancelledError("the push thread ended");
      }
    }
    // Evaluation: read only, at the last cut.
    LaneBatch batch = plan_.MakeBatch(lanes[0], 1);
    LaneBatch expected = batch;
    std::vector<TableRows> tables = RowsOf(&batch);
    for (TableRows& table : tables) table.occurrences = {};
    for (int i = 0; i < 3; ++i) HEARTH_RETURN_IF_ERROR(client.ReadOnly(plan_.steps, absl::MakeSpan(tables)));
    reference_.Evaluate(plan_.steps, &expected);
    for (uint32_t t = 0; t < kTables; ++t) {
      if (!SameBits(batch[t].rows, expected[t].rows)) return absl::DataLossError("wrong rows in the evaluation");
    }
    return absl::OkStatus();
  }

  absl::Status PushAll() {
    PushClient client(options_);
    int64_t due_us = kNever;
    while (true) {
      std::optional<Pushed> pushed = queue_.Pop(due_us);
      if (pushed) {
        const uint64_t step = pushed->step;
        const std::vector<TableRows> tables = RowsOf(&pushed->batch);
        HEARTH_RETURN_IF_ERROR(
            client.Push(pushed->lane, step, {plan_.Records(step), plan_.NextCut(step), plan_.Skip(step)}, tables));
        handed_.Push(1);
      } else if (queue_.closed()) {
        return client.Flush();
      }
      HEARTH_ASSIGN_OR_RETURN(due_us, client.Poll());
    }
  }

  const Plan& plan_;
  const Reference& reference_;
  const ClientOptions options_;
  const int worker_;
  BoundedQueue<Pushed> queue_;
  BoundedQueue<int> handed_;  // permits
};

// The whole of it; returns the sum of the servers' hashes at the last cut.
void RunThreads(const Plan& plan, const Reference& reference, int servers, int workers, Weather weather) {
  SCOPED_TRACE(absl::StrCat("staleness ", plan.staleness, ", servers ", servers, ", workers ", workers, ", seed ",
                            weather.seed));
  Env* env = Env::Real();
  Ranks ranks;
  ranks.servers = servers;
  ranks.workers = workers;
  InProcessHub hub(env, ranks.size());
  std::vector<std::unique_ptr<Transport>> faulty;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    Weather own = weather;
    own.seed = Mix64(weather.seed * 100 + static_cast<uint64_t>(rank));
    faulty.push_back(MakeFaultyTransport(hub.transport(rank), own));
  }
  std::vector<std::unique_ptr<ServerThread>> server;
  std::vector<std::unique_ptr<WorkerThreads>> worker;
  std::vector<std::unique_ptr<Thread>> server_thread;
  std::vector<std::unique_ptr<Thread>> worker_thread;
  for (int i = 0; i < servers; ++i) {
    server.push_back(std::make_unique<ServerThread>(plan, ranks, i, faulty[ranks.server(i)].get()));
    server_thread.push_back(env->StartThread("server", [s = server.back().get()] { s->Run(); }));
  }
  for (int i = 0; i < workers; ++i) {
    ClientOptions options;
    options.env = env;
    options.transport = faulty[ranks.worker(i)].get();
    options.map = ShardMap(plan.job().training().shards(), static_cast<uint32_t>(servers));
    options.ranks = ranks;
    options.retry_us = 2'000;
    worker.push_back(std::make_unique<WorkerThreads>(plan, reference, options, i));
    worker_thread.push_back(env->StartThread("train", [w = worker.back().get()] { w->Train(); }));
    worker_thread.push_back(env->StartThread("push", [w = worker.back().get()] { w->Push(); }));
  }
  worker_thread.clear();  // joins
  for (int i = 0; i < servers; ++i) {
    ASSERT_TRUE(hub.transport(0)->Send(kPortStop, {ranks.server(i), kPortServer}, EncodeOpaque(Header(), {})).ok());
  }
  server_thread.clear();
  uint64_t hash = 0;
  for (const auto& s : server) {
    ASSERT_TRUE(s->status.ok()) << s->status;
    EXPECT_EQ(s->cut, plan.steps);
    hash += s->hash;
  }
  for (const auto& w : worker) {
    ASSERT_TRUE(w->status.ok()) << w->status;
    ASSERT_TRUE(w->push_status.ok()) << w->push_status;
  }
  EXPECT_EQ(hash, reference.Hash(plan.steps));
}

TEST(PsClient, PullsTheReferencesBitsInCalmWeatherForAnyNumberOfWorkersAndServers) {
  for (uint32_t staleness : {0u, 1u, 3u}) {
    const Plan plan = Plan::Make(11, 4, staleness, 24);
    const Reference reference(plan);
    for (int servers : {1, 2, 3}) {
      for (int workers : {1, 2, 4}) RunThreads(plan, reference, servers, workers, Weather());
    }
  }
}

TEST(PsClient, PullsTheReferencesBitsWhenMessagesAreLostRepeatedAndOvertaken) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const uint32_t staleness = static_cast<uint32_t>(seed % 4);
    const Plan plan = Plan::Make(seed, 3, staleness, 16);
    const Reference reference(plan);
    Weather weather;
    weather.seed = seed;
    weather.lose = weather.repeat = weather.reorder = 0.1;
    RunThreads(plan, reference, 1 + static_cast<int>(seed % 3), 1 + static_cast<int>(seed / 3 % 3), weather);
  }
}

// ---- One client against a server played by the test

class PlayedServer : public ::testing::Test {
 protected:
  explicit PlayedServer(Env* env = Env::Real()) : hub_(env, 4) {
    options_.env = env;
    ranks_.servers = 2;
    options_.ranks = ranks_;
    options_.transport = hub_.transport(3);
    options_.map = ShardMap(16, 2);
    plan_.lane_end = {100, 100};
    plan_.signs_max = 20;
    plan_.ids = 1000;
    for (uint64_t step = 1; batch_.empty() || batch_[0].signs.size() < 8; ++step) batch_ = plan_.MakeBatch(0, step);
  }
  Message Next(int server) {
    auto message = hub_.transport(ranks_.server(server))->Open(kPortServer)->Receive(kNever);
    return *std::move(message);
  }
  void Answer(int server, const Header& asked, const std::vector<Section>& sections) {
    Header header = asked;
    header.kind = MessageKind::kPullReply;
    const Bytes reply = EncodeMessage(header, sections);
    ASSERT_TRUE(hub_.transport(ranks_.server(server))->Send(kPortServer, {3, kPortPull}, reply.Clone()).ok());
  }

  Ranks ranks_;
  InProcessHub hub_;
  ClientOptions options_;
  Plan plan_;
  LaneBatch batch_;
};

TEST_F(PlayedServer, EachSignGoesToItsOwnerAscendingAndItsRowComesBackInPlace) {
  PullClient client(options_, kPortPull);
  std::vector<TableRows> tables = RowsOf(&batch_);
  ASSERT_TRUE(client.Send(0, 1, 0, tables).ok());
  size_t signs = 0;
  for (int server : {1, 0}) {
    const Message message = Next(server);
    auto pull = DecodeMessage(message.payload.span());
    ASSERT_TRUE(pull.ok()) << pull.status();
    std::vector<std::vector<float>> values;
    std::vector<Section> reply;
    for (Section section : pull->sections) {
      values.emplace_back();
      for (size_t i = 0; i < section.count; ++i) {
        EXPECT_EQ(options_.map.ServerOf(section.signs[i]), static_cast<uint32_t>(server));
        const TableBatch& table = batch_[section.table - 1];
        const auto at = std::find(table.signs.begin(), table.signs.end(), section.signs[i]);
        ASSERT_NE(at, table.signs.end());
        EXPECT_EQ(section.occurrences[i], table.occurrences[at - table.signs.begin()]);
        for (uint32_t d = 0; d < section.dim; ++d)
          values.back().push_back(static_cast<float>(IdOf(section.signs[i]) * 10 + d));
        ++signs;
      }
      section.signs = {};
      section.occurrences = {};
      reply.push_back(section);
    }
    for (size_t i = 0; i < reply.size(); ++i) reply[i].values = values[i];
    Answer(server, pull->header, reply);
    Answer(server, pull->header, reply);  // a repeat
  }
  ASSERT_TRUE(client.Receive(0, 1, absl::MakeSpan(tables)).ok());
  size_t expected_signs = 0;
  for (uint32_t t = 0; t < kTables; ++t) {
    expected_signs += batch_[t].signs.size();
    for (size_t i = 0; i < batch_[t].rows.size(); ++i) {
      EXPECT_EQ(batch_[t].rows[i], static_cast<float>(IdOf(batch_[t].signs[i / kDims[t]]) * 10 + i % kDims[t]));
    }
  }
  EXPECT_EQ(signs, expected_signs);
}

TEST_F(PlayedServer, AReplyOfAnotherShapeIsInternalAndNamesTheServer) {
  for (int fault = 0; fault < 5; ++fault) {
    PullClient client(options_, kPortPull);
    const uint64_t step = static_cast<uint64_t>(fault) + 1;
    std::vector<TableRows> tables = RowsOf(&batch_);
    ASSERT_TRUE(client.Send(0, step, 0, tables).ok());
    for (int server : {0, 1}) {
      const Message message = Next(server);
      auto pull = DecodeMessage(message.payload.span());
      ASSERT_TRUE(pull.ok());
      std::vector<float> zeros(1000);
      std::vector<Section> reply = pull->sections;
      Header header = pull->header;
      if (server == 1) {
        if (fault == 0) reply.pop_back();
        if (fault == 1) ++reply[0].dim;
        if (fault == 2) --reply[0].count;
        if (fault == 3) header.view = 7;
      }
      for (Section& section : reply) {
        section.signs = {};
        section.occurrences = {};
        section.values = {zeros.data(), size_t{section.count} * section.dim};
        if (server == 1 && fault == 4) section.values = {};
      }
      Answer(server, header, reply);
    }
    const absl::Status status = client.Receive(0, step, absl::MakeSpan(tables));
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << "fault " << fault << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("server 1 (rank 2)"));
  }
}

TEST_F(PlayedServer, APullThatNobodyWillAnswerIsLetGoFromAnotherThread) {
  PullClient client(options_, kPortPull);
  ASSERT_TRUE(client.Send(0, 1, 0, {}).ok());
  ASSERT_TRUE(client.Send(1, 1, 0, {}).ok());
  absl::Status waited;
  std::unique_ptr<Thread> waits = Env::Real()->StartThread("waits", [&] { waited = client.Receive(0, 1, {}); });
  client.Stop();
  waits.reset();
  EXPECT_TRUE(absl::IsCancelled(waited)) << waited;
  EXPECT_TRUE(absl::IsCancelled(client.Receive(1, 1, {}))) << "and so are those after it";
}

TEST_F(PlayedServer, EveryServerHearsOfEmptyPullsAndOfSkippedPushes) {
  PullClient pulls(options_, kPortPull);
  PushClient pushes(options_);
  ASSERT_TRUE(pulls.Send(1, 1, 0, {}).ok());
  ASSERT_TRUE(pushes.Push(1, 1, {0, 5, /*skip=*/true}, RowsOf(&batch_)).ok());
  for (int server : {0, 1}) {
    const Message pull = Next(server);
    EXPECT_EQ(DecodeHeader(pull.payload.span())->kind, MessageKind::kPull);
    const Message push = Next(server);
    auto decoded = DecodeMessage(push.payload.span());
    EXPECT_EQ(decoded->header.kind, MessageKind::kPush);
    EXPECT_EQ(decoded->header.flags, kFlagSkip);
    EXPECT_EQ(decoded->header.next_cut, 5u);
    EXPECT_TRUE(decoded->sections.empty());
  }
}

// A server that answers hours later.
class SlowServer : public PlayedServer {
 protected:
  SlowServer() : PlayedServer(&time_) {}

  // Notes when server 1 was asked, and that each repeat is the first message again. After `hours` both servers answer.
  void AnswerAfter(int hours, std::function<void(int server)> answer) {
    const int64_t answer_us = time_.NowUs() + hours * int64_t{3'600'000'000};
    time_.before_leap = [=] {
      while (auto asked = hub_.transport(ranks_.server(1))->Open(kPortServer)->Receive(0)) {
        if (first_.empty()) first_ = asked->payload.Clone();
        EXPECT_EQ(asked->payload.span(), first_.span());
        asked_us_.push_back(time_.NowUs());
      }
      if (time_.NowUs() < answer_us) return;
      for (int server : {0, 1}) answer(server);
    };
  }
  std::vector<int64_t> WaitsInSeconds() const {
    std::vector<int64_t> waits;
    for (size_t i = 1; i < asked_us_.size(); ++i) waits.push_back((asked_us_[i] - asked_us_[i - 1]) / 1'000'000);
    return waits;
  }

  LeapingEnv time_;
  Bytes first_;
  std::vector<int64_t> asked_us_;
};

TEST_F(SlowServer, APullIsAskedForEverMoreSeldomAndNeverGivenUp) {
  PullClient client(options_, kPortPull);
  ASSERT_TRUE(client.Send(0, 1, 0, {}).ok());
  Header asked;
  asked.step = 1;
  AnswerAfter(2, [&](int server) { Answer(server, asked, {}); });
  ASSERT_TRUE(client.Receive(0, 1, {}).ok());
  const std::vector<int64_t> waits = WaitsInSeconds();
  ASSERT_GE(waits.size(), 7200u / 30);
  EXPECT_LE(waits.size(), 7200u / 30 + 5);
  EXPECT_THAT(absl::MakeSpan(waits).first(6), ElementsAre(2, 4, 8, 16, 30, 30));
  EXPECT_THAT(absl::MakeSpan(waits).subspan(5), Each(30));
}

TEST_F(SlowServer, APushIsRepeatedEverMoreSeldomAndNeverGivenUp) {
  PushClient client(options_);
  ASSERT_TRUE(client.Push(0, 1, {1, 0, false}, RowsOf(&batch_)).ok());
  Header ack;
  ack.kind = MessageKind::kPushAck;
  ack.step = 1;
  AnswerAfter(2, [&](int server) {
    ASSERT_TRUE(hub_.transport(ranks_.server(server))->Send(kPortServer, {3, kPortPush}, EncodeMessage(ack, {})).ok());
  });
  ASSERT_TRUE(client.Flush().ok());
  const std::vector<int64_t> waits = WaitsInSeconds();
  EXPECT_THAT(absl::MakeSpan(waits).first(6), ElementsAre(2, 4, 8, 16, 30, 30));
}

}  // namespace
}  // namespace hearth
