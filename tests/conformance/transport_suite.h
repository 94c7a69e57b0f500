// The contract of common/net/transport.h, over every implementation: once per program that instantiates it.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <vector>

#include "common/net/wire.h"
#include "tests/conformance/world.h"

namespace hearth {

constexpr int64_t kPatienceUs = 20'000'000;  // longer than anything that works takes

// Bytes that say who sent them and that nobody altered them: each is a function of (sender, number, place).
inline Bytes NumberedBytes(int sender, uint64_t number, size_t bytes) {
  Bytes payload(16 + bytes);
  const uint64_t head[2] = {static_cast<uint64_t>(sender), number};
  std::memcpy(payload.data(), head, sizeof(head));
  Random random(Mix64(head[0]) ^ number);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random.Next();
    std::memcpy(payload.data() + 16 + i, &word, std::min<size_t>(8, bytes - i));
  }
  return payload;
}

inline Bytes NumberedMessage(int sender, uint64_t number, size_t bytes) {
  Header header;
  header.kind = MessageKind::kControl;
  header.step = number;
  return EncodeOpaque(header, NumberedBytes(sender, number, bytes).span());
}

// The number of bytes from `sender`; checks every one of them.
inline uint64_t NumberOfBytes(int sender, absl::Span<const char> bytes) {
  uint64_t head[2] = {};
  EXPECT_GE(bytes.size(), sizeof(head));
  if (bytes.size() < sizeof(head)) return UINT64_MAX;
  std::memcpy(head, bytes.data(), sizeof(head));
  EXPECT_EQ(head[0], static_cast<uint64_t>(sender));
  const Bytes want = NumberedBytes(sender, head[1], bytes.size() - sizeof(head));
  EXPECT_TRUE(bytes == want.span()) << "message " << head[1] << " of rank " << head[0] << " was altered";
  return head[1];
}

inline uint64_t NumberOf(const Message& message) {
  const absl::StatusOr<Header> header = DecodeHeader(message.payload.span());
  EXPECT_TRUE(header.ok()) << header.status();
  if (!header.ok()) return UINT64_MAX;
  const uint64_t number = NumberOfBytes(message.from.rank, OpaqueBody(message.payload.span()));
  EXPECT_EQ(header->step, number);
  return number;
}

inline std::optional<Message> ReceiveSoon(const TransportMember& member, int port) {
  return member.transport->Open(port)->Receive(member.env->NowUs() + kPatienceUs);
}

class TransportConformance : public testing::TestWithParam<Implementation<TransportWorld>> {
 protected:
  void SetUp() override { world_ = GetParam().make(); }
  std::unique_ptr<TransportWorld> world_;
};

// Whoever retries gets everything through, whatever the weather, and nothing that was not sent. Each member asks all
// members in turn and repeats a question until its answer comes; a second thread of each answers.
TEST_P(TransportConformance, RetriesGetEverythingThroughUnaltered) {
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    const int asks = member.port, answers = member.port + 1;
    constexpr uint64_t kQuestions = 40;
    std::atomic<bool> all_done{false};
    const auto answering = member.env->StartThread("answering", [&] {
      while (!all_done) {
        const std::optional<Message> question = transport->Open(answers)->Receive(member.env->NowUs() + 2000);
        if (!question.has_value()) continue;
        EXPECT_EQ(question->from.port, asks);
        const uint64_t number = NumberOf(*question);
        EXPECT_TRUE(transport->Send(answers, question->from, NumberedMessage(transport->rank(), number, number)).ok());
      }
    });
    for (uint64_t number = 0; number < kQuestions; ++number) {
      for (int peer = 0; peer < transport->size(); ++peer) {
        const int64_t give_up_us = member.env->NowUs() + kPatienceUs;
        for (bool answered = false; !answered;) {
          ASSERT_LT(member.env->NowUs(), give_up_us) << "rank " << peer << " does not answer " << number;
          ASSERT_TRUE(transport->Send(asks, {peer, answers}, NumberedMessage(transport->rank(), number, 500)).ok());
          const int64_t retry_us = member.env->NowUs() + 3000;
          while (!answered) {  // old answers come again, when the weather is such
            const std::optional<Message> answer = transport->Open(asks)->Receive(retry_us);
            if (!answer.has_value()) break;
            EXPECT_EQ(answer->from.port, answers);
            answered = NumberOf(*answer) == number && answer->from.rank == peer;
          }
        }
      }
    }
    member.barrier();
    all_done = true;
  });
}

TEST_P(TransportConformance, OpenGivesTheSameInboxEachTimeAndKnowsItsPlace) {
  world_->Run([](const TransportMember& member) {
    EXPECT_EQ(member.transport->Open(member.port), member.transport->Open(member.port));
    EXPECT_NE(member.transport->Open(member.port), member.transport->Open(member.port + 1));
    EXPECT_GE(member.transport->rank(), 0);
    EXPECT_LT(member.transport->rank(), member.transport->size());
  });
}

TEST_P(TransportConformance, BadAddressesAreRefused) {
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    for (const Address to : {Address{-1, 1}, Address{transport->size(), 1}, Address{0, -1}, Address{0, kPortsMax}}) {
      EXPECT_TRUE(absl::IsInvalidArgument(transport->Send(member.port, to, NumberedMessage(0, 1, 8))))
          << to.rank << ":" << to.port;
    }
    EXPECT_TRUE(absl::IsInvalidArgument(transport->Send(kPortsMax, {0, member.port}, NumberedMessage(0, 1, 8))));
    EXPECT_TRUE(absl::IsInvalidArgument(transport->Send(-1, {0, member.port}, NumberedMessage(0, 1, 8))));
    EXPECT_TRUE(absl::IsInvalidArgument(transport->Send(member.port, {0, member.port}, Bytes(sizeof(Header) - 1))));
  });
}

// What production implementations promise beyond the weakest contract (common/net/transport.h,
// common/net/mpi_runtime.h).
class ReliableTransportConformance : public TransportConformance {};

TEST_P(ReliableTransportConformance, MessagesOfAnyLengthStayInOrderForEachPairOfPorts) {
  ASSERT_TRUE(world_->reliable());
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    constexpr uint64_t kMessages = 120;
    Random random(static_cast<uint64_t>(transport->rank()));
    for (uint64_t number = 0; number < kMessages; ++number) {
      for (int peer = 0; peer < transport->size(); ++peer) {
        for (int port = member.port; port < member.port + 2; ++port) {
          // Mostly short, some long enough that they travel another way and finish after shorter ones behind them.
          const size_t bytes = random.Below(8) == 0 ? random.Below(1 << 18) : random.Below(200);
          const int from_port = port + 2 * static_cast<int>(number % 2);
          ASSERT_TRUE(transport->Send(from_port, {peer, port}, NumberedMessage(transport->rank(), number, bytes)).ok());
        }
      }
    }
    for (int port = member.port; port < member.port + 2; ++port) {
      std::map<std::pair<int, int>, uint64_t> next;  // (rank, port) → number
      for (uint64_t i = 0; i < kMessages * static_cast<uint64_t>(transport->size()); ++i) {
        const std::optional<Message> message = ReceiveSoon(member, port);
        ASSERT_TRUE(message.has_value()) << i << " messages arrived";
        uint64_t& expected =
            next.try_emplace({message->from.rank, message->from.port}, (message->from.port - port) / 2).first->second;
        ASSERT_EQ(NumberOf(*message), expected);
        expected += 2;
      }
    }
    member.barrier();
    EXPECT_FALSE(transport->Open(member.port)->Receive(0).has_value()) << "nothing comes twice";
  });
}

TEST_P(ReliableTransportConformance, EmptyAndLongMessagesArrive) {
  ASSERT_TRUE(world_->reliable());
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    const int next = (transport->rank() + 1) % transport->size();
    constexpr size_t kLong = 5'000'003;
    ASSERT_TRUE(transport->Send(member.port, {next, member.port}, EncodeOpaque(Header(), {})).ok());
    ASSERT_TRUE(transport->Send(member.port, {next, member.port}, NumberedMessage(transport->rank(), 1, kLong)).ok());
    const std::optional<Message> empty = ReceiveSoon(member, member.port);
    ASSERT_TRUE(empty.has_value());
    EXPECT_TRUE(OpaqueBody(empty->payload.span()).empty());
    const std::optional<Message> message = ReceiveSoon(member, member.port);
    ASSERT_TRUE(message.has_value());
    EXPECT_EQ(OpaqueBody(message->payload.span()).size(), kLong + 16);
    EXPECT_EQ(NumberOf(*message), 1u);
  });
}

TEST_P(ReliableTransportConformance, MessagesThatCameBeforeTheFirstOpenAreKept) {
  ASSERT_TRUE(world_->reliable());
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    for (int peer = 0; peer < transport->size(); ++peer) {
      // The second port tells the peer that the first has had its message: they are in order, and so is their arrival.
      ASSERT_TRUE(transport->Send(member.port, {peer, member.port}, NumberedMessage(transport->rank(), 7, 3)).ok());
      ASSERT_TRUE(transport->Send(member.port, {peer, member.port + 1}, NumberedMessage(transport->rank(), 8, 3)).ok());
    }
    for (int peer = 0; peer < transport->size(); ++peer) ASSERT_TRUE(ReceiveSoon(member, member.port + 1).has_value());
    for (int peer = 0; peer < transport->size(); ++peer) {
      const std::optional<Message> message = ReceiveSoon(member, member.port);
      ASSERT_TRUE(message.has_value());
      EXPECT_EQ(NumberOf(*message), 7u);
    }
  });
}

TEST_P(ReliableTransportConformance, ManyThreadsMaySendAtOnce) {
  ASSERT_TRUE(world_->reliable());
  world_->Run([](const TransportMember& member) {
    Transport* const transport = member.transport;
    constexpr uint64_t kMessages = 300;
    constexpr int kSenders = 3;
    RunInThreads(kSenders, [&](int sender) {
      for (uint64_t number = 0; number < kMessages; ++number) {
        const Address to{
            static_cast<int>((number + static_cast<uint64_t>(sender)) % static_cast<uint64_t>(transport->size())),
            member.port + 3};
        EXPECT_TRUE(transport->Send(member.port + sender, to, NumberedMessage(transport->rank(), number, 100)).ok());
      }
    });
    // Over all senders and numbers every member is named equally often.
    for (uint64_t i = 0; i < kSenders * kMessages; ++i) {
      const std::optional<Message> message = ReceiveSoon(member, member.port + 3);
      ASSERT_TRUE(message.has_value()) << i << " messages arrived";
      EXPECT_LT(NumberOf(*message), kMessages);
    }
  });
}

}  // namespace hearth
