#include "common/net/mailbox.h"

#include <gtest/gtest.h>

#include <cstring>

#include "common/base/file_list.h"

namespace hearth {
namespace {

Bytes BytesOfNumber(uint64_t number) {
  Bytes bytes(sizeof(number));
  std::memcpy(bytes.data(), &number, sizeof(number));
  return bytes;
}

uint64_t NumberOf(const Bytes& bytes) {
  uint64_t number = 0;
  EXPECT_EQ(bytes.size(), sizeof(number));
  std::memcpy(&number, bytes.data(), sizeof(number));
  return number;
}

TEST(Bytes, CloneIsACopyAndMovingLeavesNothing) {
  Bytes bytes = BytesOfNumber(5);
  Bytes copy = bytes.Clone();
  bytes.data()[0] = 6;
  EXPECT_EQ(NumberOf(copy), 5u);
  const Bytes moved = std::move(bytes);
  EXPECT_TRUE(bytes.empty());
  EXPECT_EQ(NumberOf(moved), 6u);
  EXPECT_TRUE(Bytes().Clone().empty());
}

TEST(BoundedQueue, CarriesEverythingInOrderThroughOnePlace) {
  Env* const env = Env::Real();
  for (size_t capacity : {1, 3}) {
    BoundedQueue<std::unique_ptr<int>> queue(env, capacity);
    const auto producer = env->StartThread("producer", [&] {
      for (int i = 0; i < 5000; ++i) ASSERT_TRUE(queue.Push(std::make_unique<int>(i)));
      queue.Close();
    });
    for (int i = 0; i < 5000; ++i) {
      const auto item = queue.Pop();
      ASSERT_TRUE(item.has_value());
      ASSERT_EQ(**item, i);
      ASSERT_LE(queue.size(), capacity);
    }
    EXPECT_FALSE(queue.Pop().has_value());
    EXPECT_TRUE(queue.closed());
  }
}

TEST(BoundedQueue, CloseWakesAProducerThatWaitsForRoom) {
  Env* const env = Env::Real();
  BoundedQueue<int> queue(env, 1);
  ASSERT_TRUE(queue.Push(1));
  bool pushed = true;
  auto producer = env->StartThread("producer", [&] { pushed = queue.Push(2); });
  queue.Close();  // before or after the producer waits: both must end it
  producer.reset();
  EXPECT_FALSE(pushed);
  EXPECT_EQ(queue.Pop(), std::optional<int>(1)) << "what was in it is still given out";
  EXPECT_EQ(queue.Pop(), std::nullopt);
}

TEST(BoundedQueue, CloseWakesAConsumerThatWaitsForAnItem) {
  Env* const env = Env::Real();
  BoundedQueue<int> queue(env, 1);
  std::optional<int> popped = 1;
  auto consumer = env->StartThread("consumer", [&] { popped = queue.Pop(); });
  queue.Close();
  consumer.reset();
  EXPECT_EQ(popped, std::nullopt);
}

TEST(BoundedQueue, PopGivesUpAtItsDeadline) {
  Env* const env = Env::Real();
  BoundedQueue<int> queue(env, 1);
  const int64_t deadline_us = env->NowUs() + 500;
  EXPECT_EQ(queue.Pop(deadline_us), std::nullopt);
  EXPECT_GE(env->NowUs(), deadline_us);
  EXPECT_FALSE(queue.closed());
}

TEST(Mailbox, DeliversFromManyThreadsEachInItsOrder) {
  Env* const env = Env::Real();
  Mailbox mailbox(env);
  constexpr int kThreads = 4;
  constexpr uint64_t kMessages = 2000;
  std::vector<std::unique_ptr<Thread>> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.push_back(env->StartThread("sender", [&mailbox, t] {
      for (uint64_t i = 0; i < kMessages; ++i) mailbox.Deliver({{t, 0}, BytesOfNumber(i)});
    }));
  }
  uint64_t next[kThreads] = {};
  for (uint64_t i = 0; i < kThreads * kMessages; ++i) {
    const std::optional<Message> message = mailbox.Receive(kNever);
    ASSERT_TRUE(message.has_value());
    ASSERT_EQ(NumberOf(message->payload), next[message->from.rank]++);
  }
  EXPECT_FALSE(mailbox.Receive(0).has_value());
}

TEST(Mailbox, ADeadlineInThePastPolls) {
  Mailbox mailbox(Env::Real());
  EXPECT_FALSE(mailbox.Receive(0).has_value());
  mailbox.Deliver({{1, 2}, BytesOfNumber(3)});
  const std::optional<Message> message = mailbox.Receive(0);
  ASSERT_TRUE(message.has_value());
  EXPECT_EQ(message->from, (Address{1, 2}));
  EXPECT_FALSE(mailbox.Receive(0).has_value());
}

TEST(FileList, WaitersSeeWhatIsAppendedAndTheEnd) {
  Env* const env = Env::Real();
  FileList list(env);
  LogFile file;
  file.set_path("a");
  list.Append({file}, false);
  list.WaitForMore(0, kNever);  // already more
  list.WaitForMore(1, env->NowUs() + 200);
  EXPECT_EQ(list.files().size(), 1u);
  auto appender = env->StartThread("appender", [&] { list.Append({file, file}, true); });
  list.WaitForMore(1, kNever);
  appender.reset();
  EXPECT_EQ(list.files().size(), 3u);
  EXPECT_TRUE(list.closed());
  list.WaitForMore(99, kNever);  // closed: nobody waits any more
  list.Append({}, false);
  EXPECT_TRUE(list.closed()) << "a closed list stays closed";
}

}  // namespace
}  // namespace hearth
