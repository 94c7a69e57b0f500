#include "scheduler/event_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "absl/strings/escaping.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

std::string Hex(const std::string& bytes) { return absl::BytesToHexString(bytes); }

TEST(Crc32c, GivesThePublishedAnswers) {
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(MaskedCrc32c("123456789"), 0xc78ab0e5u);
  EXPECT_EQ(Crc32c(""), 0u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);  // RFC 3720, B.4
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
}

TensorBoardEvent Version(double wall_seconds) {
  TensorBoardEvent event;
  event.set_wall_time(wall_seconds);
  event.set_file_version("brain.Event:2");
  return event;
}
TensorBoardEvent Start(double wall_seconds, int64_t step) {
  TensorBoardEvent event;
  event.set_wall_time(wall_seconds);
  event.set_step(step);
  event.mutable_session_log()->set_status(TensorBoardEvent::SessionLog::START);
  return event;
}
TensorBoardEvent Scalars(double wall_seconds, int64_t step, const std::vector<Scalar>& scalars) {
  TensorBoardEvent event;
  event.set_wall_time(wall_seconds);
  event.set_step(step);
  for (const Scalar& scalar : scalars) {
    TensorBoardEvent::Summary::Value* value = event.mutable_summary()->add_value();
    value->set_tag(scalar.tag);
    value->set_simple_value(scalar.value);
  }
  return event;
}

TEST(EventFile, RecordsHaveTheGoldenBytes) {
  EXPECT_EQ(Hex(EncodeRecord(Version(1.0))),
            "1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a");
  EXPECT_EQ(Hex(EncodeRecord(Scalars(2.0, 100, {{"auc/click", 0.75f}}))),
            "1f00000000000000514b441809000000000000004010642a120a100a096175632f636c69636b150000403f30ef7f7a");
}

TEST(EventFile, ALinkThatSomebodyPlantedIsPassedOver) {
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("event_file_test-links-", getpid()));
  ASSERT_TRUE(MakeDirectories(folder).ok());
  std::string name;
  {
    const auto first = EventFile::Create(folder, 5'000'000, 0);
    ASSERT_TRUE(first.ok()) << first.status();
    name = (*first)->path();
  }
  ASSERT_TRUE(RenamePath(name, JoinPath(folder, "victim")).ok());
  const std::string before = ReadFile(JoinPath(folder, "victim")).value();
  ASSERT_EQ(symlink(JoinPath(folder, "victim").c_str(), name.c_str()), 0);
  const auto second = EventFile::Create(folder, 5'000'000, 0);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ((*second)->path(), name + ".1");
  EXPECT_EQ(ReadFile(JoinPath(folder, "victim")).value(), before);
  ASSERT_TRUE(RemoveTree(folder).ok());
}

TEST(EventFile, HoldsTheVersionTheFirstStepAndThenWhatWasWritten) {
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("event_file_test-", getpid()));
  ASSERT_TRUE(RemoveTree(folder).ok());
  auto events = EventFile::Create(folder, 1'000'000, 41);
  ASSERT_TRUE(events.ok()) << events.status();
  const std::vector<Scalar> scalars = {{"train/loss", 0.5f}, {"auc/click", std::nanf("")}, {"x", 3.0f}};
  ASSERT_TRUE((*events)->Write(2'000'000, 100, {{"auc/click", 0.75f}}).ok());
  ASSERT_TRUE((*events)->Write(3'000'000, 300, scalars).ok());
  ASSERT_TRUE((*events)->Write(3'000'000, 300, {{"y", std::numeric_limits<float>::infinity()}}).ok());
  // Readable while the file is still open: TensorBoard looks at it during the run.
  EXPECT_EQ(Hex(ReadFile((*events)->path()).value()),
            Hex(EncodeRecord(Version(1.0)) + EncodeRecord(Start(1.0, 41)) +
                EncodeRecord(Scalars(2.0, 100, {{"auc/click", 0.75f}})) +
                EncodeRecord(Scalars(3.0, 300, {{"train/loss", 0.5f}, {"x", 3.0f}}))));
  auto second = EventFile::Create(folder, 1'000'000, 41);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_NE((*second)->path(), (*events)->path()) << "a second start within the second has a file of its own";
  const std::vector<std::string> names = ListDirectory(folder).value();
  EXPECT_EQ(names.size(), 2u);
  for (const std::string& name : names) {
    EXPECT_EQ(name.rfind("events.out.tfevents.1.", 0), 0u) << name;
  }
  ASSERT_TRUE(RemoveTree(folder).ok());
}

}  // namespace
}  // namespace hearth
