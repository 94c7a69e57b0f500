#include "common/base/task_pool.h"

#include <atomic>
#include <vector>

#include "gtest/gtest.h"

namespace hearth {
namespace {

TEST(TaskPool, RunsEveryTaskOnceBeforeItIsGone) {
  for (const size_t threads : {size_t{0}, size_t{1}, size_t{4}}) {
    std::atomic<int> runs = 0;
    {
      TaskPool pool(Env::Real(), "test", threads);
      for (int i = 0; i < 500; ++i) pool.Run([&] { ++runs; }, i % 7 == 0);
    }
    EXPECT_EQ(runs, 500);
  }
}

TEST(TaskPool, OneThreadKeepsTheOrder) {
  std::vector<int> order;
  {
    TaskPool pool(Env::Real(), "test", 1);
    for (int i = 0; i < 200; ++i) pool.Run([&order, i] { order.push_back(i); });
  }
  ASSERT_EQ(order.size(), 200u);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(order[i], i);
}

TEST(TaskPool, UrgentTasksGoFirst) {
  std::vector<int> order;
  const auto go = Env::Real()->NewEvent();
  {
    TaskPool pool(Env::Real(), "test", 1);
    pool.Run([&] { go->WaitUntil(kNever); });
    pool.Run([&] { order.push_back(1); });
    pool.Run([&] { order.push_back(2); });
    pool.Run([&] { order.push_back(0); }, /*urgent=*/true);
    go->Notify();
  }
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
}

TEST(TaskPool, WhoWaitsMayRunWhatWaits) {
  const auto busy = Env::Real()->NewEvent(), go = Env::Real()->NewEvent();
  int ran = 0;
  TaskPool pool(Env::Real(), "test", 1);
  EXPECT_FALSE(pool.RunOne());
  pool.Run([&] {
    busy->Notify();
    go->WaitUntil(kNever);
  });
  busy->WaitUntil(kNever);
  pool.Run([&] { ran = 7; });
  EXPECT_TRUE(pool.RunOne());
  EXPECT_EQ(ran, 7);
  go->Notify();
}

}  // namespace
}  // namespace hearth
