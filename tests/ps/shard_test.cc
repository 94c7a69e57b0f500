// One Shard, message by message.
#include "ps/shard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/net/transport.h"
#include "common/net/wire.h"
#include "ps/shard_map.h"
#include "tests/embedding/map_store.h"
#include "tests/ps/plan.h"

namespace hearth {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Sent {
  Address to;
  Bytes bytes;
  DecodedMessage decoded;  // into bytes
};

// A clock that moves when the store is written to, and not else.
class StoreClock final : public Env {
 public:
  int64_t NowUs() override { return now_us_; }
  int64_t WallUs() override { return now_us_; }
  std::unique_ptr<Event> NewEvent() override { return Env::Real()->NewEvent(); }
  std::unique_ptr<Thread> StartThread(absl::string_view name, std::function<void()> run) override {
    return Env::Real()->StartThread(name, std::move(run));
  }
  void Move() { now_us_ += 5000; }

 private:
  int64_t now_us_ = 1;
};

// Each write takes a while.
class SlowStore final : public KvStore {
 public:
  explicit SlowStore(StoreClock* clock) : clock_(clock) {}
  absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override {
    return map_->MultiGet(keys, values);
  }
  absl::Status Write(absl::Span<const KvWrite> writes) override {
    clock_->Move();
    return map_->Write(writes);
  }
  absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override {
    return map_->Scan(first, last, visit);
  }
  absl::Status Checkpoint(const std::string& path) override { return map_->Checkpoint(path); }
  uint64_t DiskBytes() override { return 0; }

 private:
  StoreClock* const clock_;
  const std::unique_ptr<KvStore> map_ = MakeMapStore();
};

// Messages of one table each: table 1 of Plan's job (dim 4, SGD), admitted at once.
class ShardTest : public ::testing::Test {
 protected:
  void Open(uint32_t lanes, uint32_t staleness, uint32_t every_steps, uint32_t server = 0, uint32_t servers = 1,
            bool read_only = false, uint32_t expire_after_hours = 0) {
    Plan plan;
    plan.lanes = lanes;
    plan.staleness = staleness;
    plan.every_steps = every_steps;
    ShardOptions options;
    options.job = plan.job();
    options.job.mutable_table(0)->set_expire_after_hours(expire_after_hours);
    options.lanes = lanes;
    options.server = server;
    options.servers = servers;
    options.read_only = read_only;
    options.cut_rows_max = cut_rows_max_;
    options.env = &clock_;
    shard_.reset();
    store_ = std::make_unique<SlowStore>(&clock_);
    io_ = std::make_unique<StoreIo>(Env::Real(), store_.get(), 0);
    auto shard = Shard::Open(
        options, io_.get(),
        [this](Address to, Bytes bytes) {
          Sent sent{to, std::move(bytes), {}};
          sent.decoded = *DecodeMessage(sent.bytes.span());
          sent_.push_back(std::move(sent));
          return absl::OkStatus();
        },
        [this](const ServerAtCut& report) {
          cuts_.push_back(report.step());
          report_ = report;
          return absl::OkStatus();
        });
    ASSERT_TRUE(shard.ok()) << shard.status();
    shard_ = *std::move(shard);
  }

  Section One(Sign sign) {
    signs_ = {sign};
    Section section;
    section.table = TableOf(sign);
    section.dim = kDims[section.table - 1];
    section.count = 1;
    section.signs = signs_;
    section.occurrences = ones_;
    section.values = {gradient_.data(), section.dim};
    return section;
  }
  absl::Status Give(Header header, std::vector<Section> sections) {
    if (header.kind != MessageKind::kPush) {
      for (Section& section : sections) section.values = {};
    }
    return shard_->Handle({{7, kPortPull}, EncodeMessage(header, sections)});
  }
  absl::Status Pull(uint32_t lane, uint64_t step, uint64_t view, Sign sign = MakeSign(1, 5)) {
    Header header;
    header.kind = MessageKind::kPull;
    header.lane = lane;
    header.step = step;
    header.view = view;
    return Give(header, {One(sign)});
  }
  Header PushHeader(uint32_t lane, uint64_t step, uint64_t next_cut = 0) {
    Header header;
    header.kind = MessageKind::kPush;
    header.lane = lane;
    header.step = step;
    header.n = 2;
    header.next_cut = next_cut;
    return header;
  }
  absl::Status Push(uint32_t lane, uint64_t step, uint64_t next_cut = 0) {
    return Give(PushHeader(lane, step, next_cut), {One(MakeSign(1, 5))});
  }
  std::vector<uint64_t> Steps(MessageKind kind) {
    std::vector<uint64_t> steps;
    for (const Sent& sent : sent_) {
      if (sent.decoded.header.kind == kind) steps.push_back(sent.decoded.header.step);
    }
    return steps;
  }

  std::vector<Sign> signs_;
  std::vector<uint32_t> ones_ = {1};
  std::vector<float> gradient_ = {1, 2, 3, 4};
  uint64_t cut_rows_max_ = 4096;
  StoreClock clock_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<StoreIo> io_;
  ServerAtCut report_;  // of the last cut
  std::unique_ptr<Shard> shard_;
  std::vector<Sent> sent_;
  std::vector<uint64_t> cuts_;
};

void ExpectRefused(const absl::Status& status, const std::string& what) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 7"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(what));
}

TEST_F(ShardTest, AnswersAPullOnlyOnceItsViewIsApplied) {
  Open(1, 0, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1));
  ASSERT_TRUE(Pull(0, 2, 1).ok());
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1));
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_EQ(shard_->applied_step(), 1u);
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1, 2));
  // SGD, learning rate 0.05: the gradient of step 1 divided by n = 2.
  const float* before = sent_.front().decoded.sections[0].values.data();
  const float* after = sent_.back().decoded.sections[0].values.data();
  for (int d = 0; d < 4; ++d) EXPECT_EQ(after[d], before[d] - 0.05f * (gradient_[d] / 2));
}

TEST_F(ShardTest, AcknowledgesAPushBeforeItIsAppliedAndEveryRepeatOfIt) {
  Open(2, 0, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  ASSERT_TRUE(Pull(1, 1, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_EQ(shard_->applied_step(), 0u);
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_THAT(Steps(MessageKind::kPushAck), ElementsAre(1, 1));
  ASSERT_TRUE(Push(1, 1).ok());
  EXPECT_EQ(shard_->applied_step(), 1u);
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_THAT(Steps(MessageKind::kPushAck), ElementsAre(1, 1, 1, 1));
  EXPECT_EQ(shard_->applied_step(), 1u);
}

TEST_F(ShardTest, RepeatsAReplyByteForByteWhileItsPushIsAwaited) {
  Open(1, 2, 0);
  for (uint64_t s = 1; s <= 3; ++s) ASSERT_TRUE(Pull(0, s, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  ASSERT_EQ(shard_->applied_step(), 1u);
  const size_t replies = sent_.size();
  ASSERT_TRUE(Pull(0, 3, 0).ok());  // its view is gone by now
  ASSERT_EQ(sent_.size(), replies + 1);
  ASSERT_EQ(sent_.back().bytes.size(), sent_[2].bytes.size());
  EXPECT_EQ(std::memcmp(sent_.back().bytes.data(), sent_[2].bytes.data(), sent_[2].bytes.size()), 0);
}

TEST_F(ShardTest, DropsAPullThatIsRepeatedAfterItsPush) {
  Open(2, 0, 0);
  for (uint32_t lane : {0u, 1u}) ASSERT_TRUE(Pull(lane, 1, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1, 1));
  ASSERT_TRUE(Push(1, 1).ok());
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1, 1));
}

TEST_F(ShardTest, DoesNotApplyAStepWhileAnEarlierPullOfALaneIsMissing) {
  Open(1, 2, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  ASSERT_TRUE(Pull(0, 3, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_EQ(shard_->applied_step(), 0u);
  ASSERT_TRUE(Pull(0, 2, 0).ok());
  EXPECT_EQ(shard_->applied_step(), 1u);
}

TEST_F(ShardTest, SavesAtPlannedAndAskedForCuts) {
  Open(1, 1, 4);
  uint64_t pulled = 0;
  const auto pull = [&](uint64_t view) { return Pull(0, ++pulled, view); };
  ASSERT_TRUE(pull(0).ok());
  ASSERT_TRUE(pull(0).ok());
  ASSERT_TRUE(Push(0, 1, 2).ok());  // the reduction of step 1 carried the flag: 2 is a cut
  EXPECT_EQ(shard_->applied_step(), 1u);
  ASSERT_TRUE(pull(2).ok());
  ASSERT_TRUE(Push(0, 2, 2).ok());  // needs no pull of 3: its view is the cut
  EXPECT_EQ(shard_->applied_step(), 2u);
  EXPECT_THAT(cuts_, ElementsAre(2));
  ASSERT_TRUE(pull(2).ok());
  ASSERT_TRUE(Push(0, 3).ok());
  ASSERT_TRUE(Push(0, 4).ok());
  EXPECT_THAT(cuts_, ElementsAre(2, 4));
}

TEST_F(ShardTest, ReportsForHowLongACutStoppedTheOthersAndNotHowLongItWasWritten) {
  cut_rows_max_ = 1;
  Open(1, 0, 1);  // every step is a cut
  const std::vector<Sign> signs = {MakeSign(1, 5), MakeSign(1, 6), MakeSign(1, 7), MakeSign(1, 8)};
  const std::vector<uint32_t> occurrences(signs.size(), 1);
  const std::vector<float> gradients(signs.size() * kDims[0], 1.0f);
  Section section = One(signs[0]);
  section.count = static_cast<uint32_t>(signs.size());
  section.signs = signs;
  section.occurrences = occurrences;
  section.values = gradients;
  Header pull;
  pull.kind = MessageKind::kPull;
  pull.step = 1;
  ASSERT_TRUE(Give(pull, {section}).ok());
  ASSERT_TRUE(Give(PushHeader(0, 1), {section}).ok());
  pull.step = 2;
  pull.view = 1;
  ASSERT_TRUE(Give(pull, {section}).ok());
  EXPECT_THAT(Steps(MessageKind::kPullReply), ElementsAre(1, 2));
  ASSERT_TRUE(cuts_.empty()) << "a slice a message: some of the cut is still to be copied";
  int64_t begin_us = clock_.NowUs();
  ASSERT_TRUE(Give(PushHeader(0, 2), {section}).ok());  // the second cut has to wait for the first
  const int64_t waited_us = clock_.NowUs() - begin_us;
  EXPECT_GT(waited_us, 0);
  ASSERT_THAT(cuts_, ElementsAre(1));
  EXPECT_TRUE(report_.has_stopped_us());
  EXPECT_EQ(report_.stopped_us(), 0u) << "nobody waited for the first cut itself";
  begin_us = clock_.NowUs();
  while (cuts_.size() == 1) ASSERT_TRUE(shard_->Idle().ok());
  ASSERT_THAT(cuts_, ElementsAre(1, 2));
  EXPECT_GT(clock_.NowUs(), begin_us) << "it was written";
  EXPECT_EQ(static_cast<int64_t>(report_.stopped_us()), waited_us);
}

TEST_F(ShardTest, ASkippedStepMovesTheClockAlone) {
  Open(1, 0, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  Header header = PushHeader(0, 1);
  header.flags = kFlagSkip;
  ASSERT_TRUE(Give(header, {One(MakeSign(1, 5))}).ok());
  EXPECT_EQ(shard_->applied_step(), 1u);
  ASSERT_TRUE(shard_->Cut().ok());
  EXPECT_EQ(report_.table(0).rows(), 0u);
  EXPECT_EQ(report_.rows_hash(), 0u);
}

TEST_F(ShardTest, RowsExpireByTheTimeThatPushesTellAndACutKeepsTheClock) {
  Open(1, 0, 10, 0, 1, /*read_only=*/false, /*expire_after_hours=*/1);
  constexpr uint32_t kNoonS = 1'700'000'000;
  const auto weight = [&] { return sent_.back().decoded.sections[0].values[0]; };
  float first = 0;
  for (uint64_t step = 1; step <= 40; ++step) {
    ASSERT_TRUE(Pull(0, step, step - 1, MakeSign(1, 5)).ok());
    if (step == 1) first = weight();
    if (step == 2) {
      EXPECT_NE(weight(), first);
    }
    // Touched in step 1 alone; a 16th of an hour goes by from step to step, but not in a skipped one.
    EXPECT_EQ(weight() == first, step == 1 || step > 18) << step;
    Header push = PushHeader(0, step);
    push.time_s = kNoonS + static_cast<uint32_t>(step) * 225;
    if (step == 7) {
      push.flags = kFlagSkip;
      push.time_s = 4'000'000'000u;
    }
    const bool touches = step == 1;
    ASSERT_TRUE(Give(push, touches ? std::vector<Section>{One(MakeSign(1, 5))} : std::vector<Section>()).ok());
  }
  while (shard_->Idle().value()) {
  }
  EXPECT_THAT(cuts_, ElementsAre(10, 20, 30, 40));
  EXPECT_EQ(report_.table(0).clock().time_s(), kNoonS + 39 * 225) << "the skipped step is not made up for";
  EXPECT_GT(report_.table(0).clock().horizon(), 20u);
  EXPECT_EQ(report_.table(0).rows(), 0u);
  EXPECT_FALSE(report_.table(1).has_clock());
}

TEST_F(ShardTest, RefusesLanesThatTellAnotherTimeOfAStep) {
  Open(2, 0, 0);
  for (uint32_t lane = 0; lane < 2; ++lane) ASSERT_TRUE(Pull(lane, 1, 0).ok());
  Header push = PushHeader(0, 1);
  push.time_s = 1'700'000'000;
  ASSERT_TRUE(Give(push, {One(MakeSign(1, 5))}).ok());
  EXPECT_THAT(std::string(Push(1, 1).message()), HasSubstr("time 0 differ"));
}

TEST_F(ShardTest, AReadOnlyPullWaitsForItsCutAndChangesNothing) {
  Open(1, 0, 1);
  Header read_only;
  read_only.kind = MessageKind::kReadOnlyPull;
  read_only.step = 99;  // the asker's own number
  read_only.view = 1;
  Section section = One(MakeSign(1, 5));
  section.occurrences = {};
  ASSERT_TRUE(Give(read_only, {section}).ok());
  EXPECT_TRUE(sent_.empty());
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  EXPECT_THAT(Steps(MessageKind::kReadOnlyReply), ElementsAre(99));
  const float trained = sent_.back().decoded.sections[0].values[0];
  EXPECT_NE(trained, 0);

  section = One(MakeSign(1, 6));  // a sign without a row reads as zeros
  section.occurrences = {};
  ++read_only.step;
  ASSERT_TRUE(Give(read_only, {section}).ok());
  EXPECT_EQ(sent_.back().decoded.sections[0].values[0], 0);
  ASSERT_TRUE(shard_->Cut().ok());
  EXPECT_EQ(report_.table(0).rows(), 1u);
}

TEST_F(ShardTest, AReadOnlyServerAnswersItsOneStepAndRefusesTheClock) {
  Open(1, 0, 0, 0, 1, /*read_only=*/true);
  Header read_only;
  read_only.kind = MessageKind::kReadOnlyPull;
  read_only.step = 1;
  EXPECT_TRUE(Give(read_only, {}).ok());
  EXPECT_THAT(Steps(MessageKind::kReadOnlyReply), ElementsAre(1));
  read_only.view = 3;
  ExpectRefused(Give(read_only, {}), "step 0 alone");
  ExpectRefused(Pull(0, 1, 0), "read-only");
}

TEST_F(ShardTest, PrefetchesChangeNoValue) {
  Open(1, 0, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  ASSERT_TRUE(Push(0, 1).ok());
  ASSERT_TRUE(shard_->Cut().ok());
  const ServerAtCut before = report_;
  Header hint;
  hint.kind = MessageKind::kPrefetch;
  hint.step = 2;
  for (uint64_t id = 1; id < 40; ++id) {
    Section section = One(MakeSign(1, id));
    section.occurrences = {};
    ASSERT_TRUE(Give(hint, {section}).ok());
  }
  ASSERT_TRUE(shard_->Cut().ok());
  EXPECT_EQ(report_.rows_hash(), before.rows_hash());
  EXPECT_EQ(report_.table(0).name(), "plain");
}

TEST_F(ShardTest, RefusesWhatTheClockDoesNotAllowAndNamesTheSender) {
  Open(2, 1, 4);
  ExpectRefused(Pull(2, 1, 0), "2 lanes");
  ExpectRefused(Pull(0, 0, 0), "begin at 1");
  ExpectRefused(Pull(0, 5, 3), "too far ahead");
  ExpectRefused(Pull(0, 1, 1), "view 1 is impossible");
  ExpectRefused(Pull(0, 4, 1), "view 1 is impossible");
  ExpectRefused(Push(0, 1), "never answered");
  ExpectRefused(Push(0, 9), "too far ahead");
  for (uint32_t lane : {0u, 1u}) {
    for (uint64_t s : {1, 2}) ASSERT_TRUE(Pull(lane, s, 0).ok());
  }
  ASSERT_TRUE(Push(0, 1).ok());
  Header other = PushHeader(1, 1);
  other.n = 3;
  ExpectRefused(Give(other, {}), "differ from another lane's");
  other = PushHeader(1, 1, 2);
  ExpectRefused(Give(other, {}), "differ from another lane's");
  other = PushHeader(1, 1);
  other.flags = kFlagSkip;
  ExpectRefused(Give(other, {}), "differ from another lane's");
  ASSERT_TRUE(Push(1, 1).ok());
  ASSERT_EQ(shard_->applied_step(), 1u);
  ExpectRefused(Push(0, 2, 1), "lies behind");
  ASSERT_TRUE(Push(0, 2).ok());
  ExpectRefused(Pull(0, 3, 2), "no such cut");
}

TEST_F(ShardTest, RefusesSectionsThatDoNotFitTheJob) {
  Open(1, 0, 0, /*server=*/1, /*servers=*/3);
  const ShardMap map(16, 3);
  uint64_t mine = 1, other = 1;
  while (map.ServerOf(MakeSign(1, mine)) != 1) ++mine;
  while (map.ServerOf(MakeSign(1, other)) == 1) ++other;
  Header header;
  header.kind = MessageKind::kPull;
  header.step = 1;
  const Section good = One(MakeSign(1, mine));

  Section bad = good;
  bad.table = 5;
  ExpectRefused(Give(header, {bad}), "table 5 is not in the job");
  bad = good;
  bad.dim = 5;
  ExpectRefused(Give(header, {bad}), "table plain: dim 5, the job says 4");
  bad = good;
  bad.table = 2;
  bad.dim = kDims[1];
  ExpectRefused(Give(header, {bad}), "signs of another table");
  bad = good;
  bad.occurrences = {};
  ExpectRefused(Give(header, {bad}), "no occurrences");
  bad = good;
  bad.signs = {};
  ExpectRefused(Give(header, {bad}), "no signs");
  ExpectRefused(Give(header, {good, good}), "twice");
  const std::vector<uint32_t> zero = {0};
  bad = good;
  bad.occurrences = zero;
  ExpectRefused(Give(header, {bad}), "does not occur");
  ExpectRefused(Give(header, {One(MakeSign(1, other))}), "belongs to server");

  ASSERT_TRUE(Pull(0, 1, 0, MakeSign(1, mine)).ok());
  Header push = PushHeader(0, 1);
  bad = One(MakeSign(1, mine));
  bad.values = {};
  ExpectRefused(Give(push, {bad}), "no gradients");
  push.n = 0;
  ExpectRefused(Give(push, {One(MakeSign(1, mine))}), "without records");
}

TEST_F(ShardTest, RefusesACutBytesOfAMessageAtAnyPlace) {
  Open(1, 0, 0);
  Header header;
  header.kind = MessageKind::kPull;
  header.step = 1;
  Section section = One(MakeSign(1, 5));
  section.values = {};
  const Bytes whole = EncodeMessage(header, {&section, 1});
  for (size_t length = 0; length < whole.size(); ++length) {
    Bytes cut(length);
    std::copy_n(whole.data(), length, cut.data());
    ExpectRefused(shard_->Handle({{7, kPortPull}, std::move(cut)}), "");
  }
  header.kind = MessageKind::kPushAck;
  ExpectRefused(Give(header, {}), "does not take");
}

TEST_F(ShardTest, RefusesAnAnnouncedCutThatIsForgotten) {
  Open(1, 1, 0);
  ASSERT_TRUE(Pull(0, 1, 0).ok());
  ASSERT_TRUE(Pull(0, 2, 0).ok());
  ASSERT_TRUE(Push(0, 1, 2).ok());
  const absl::Status status = Push(0, 2, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kOk) << "waits: without the cut, step 2 needs the pull of 3";
  EXPECT_EQ(shard_->applied_step(), 1u);
  const absl::Status later = Pull(0, 3, 1);
  EXPECT_EQ(later.code(), absl::StatusCode::kInternal) << later;
}

}  // namespace
}  // namespace hearth
