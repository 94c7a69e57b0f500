#include "worker/step/pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/net/wire.h"
#include "worker/collective/collective.h"

namespace hearth {
namespace {

// A job in small: per lane and segment a list of batches, each a set of signs of one table of dim 1. A batch has as
// many records as signs. The learner's gradient depends on the row, so a wrong view shows in the result.
struct Plan {
  uint32_t lanes = 1;
  uint32_t staleness = 0;
  uint32_t every_steps = 5;
  uint64_t steps_max = 0;
  uint32_t epochs = 1;
  uint32_t segments = 1;       // of an epoch
  uint64_t stop_at_vote = 0;   // the step whose reduction carries the flag
  std::set<uint64_t> skipped;  // steps with a gradient that is not finite
  // [epoch * segments + segment][lane][batch][signs], ascending. A batch without signs: nothing comes just now.
  std::vector<std::vector<std::vector<std::vector<Sign>>>> batches;
  bool tails = false;  // the worker has a gate
};

struct Row {
  float weight = 0;
  uint64_t last_step = 0;
  bool operator==(const Row& o) const { return weight == o.weight && last_step == o.last_step; }
};
using Rows = std::map<Sign, Row>;

// What a cut needs to start from.
struct Saved {
  uint64_t step = 0;
  SegmentEnd end;
  std::vector<Cursor> cursors;  // [lanes]
  Rows rows;
};

struct Outcome {
  std::vector<std::pair<uint64_t, uint64_t>> views;  // (step, view)
  std::map<uint64_t, Saved> cuts;
  std::map<uint64_t, CutState> states;  // of cuts
  uint64_t last_step = 0;
  uint64_t records = 0;  // trained
  uint64_t empty_steps = 0;
};

float Gradient(uint32_t lane, Sign sign, float weight) {
  return 0.5f * weight + static_cast<float>(lane) - 0.25f * static_cast<float>(sign % 7);
}

// `part`: the segment's place in Plan.batches. A segment is one file.
Cursor CursorAt(const Plan& plan, uint32_t lane, uint32_t part, uint64_t batch, bool end) {
  Cursor cursor;
  cursor.set_lane(lane);
  cursor.set_epoch(part / plan.segments);
  cursor.set_record(batch);
  cursor.set_file(part % plan.segments + (end ? 1 : 0));
  cursor.set_end_of_segment(end);
  cursor.set_end_of_epoch(end && cursor.file() == plan.segments);
  return cursor;
}
// That the cursor is in; at the end of one, the next one.
uint32_t PartOf(const Plan& plan, const Cursor& cursor) { return cursor.epoch() * plan.segments + cursor.file(); }

std::unique_ptr<Batch> MakeBatch(uint32_t lane, uint32_t epoch, const std::vector<Sign>& signs) {
  auto batch = std::make_unique<Batch>();
  batch->lane = lane;
  batch->epoch = epoch;
  batch->records = static_cast<int64_t>(signs.size());
  batch->groups.resize(1);
  batch->groups[0].dim = 1;
  batch->groups[0].unique = signs;
  batch->groups[0].occurrences.assign(signs.size(), 1);
  return batch;
}

class ScriptedReader : public LaneReader {
 public:
  ScriptedReader(const Plan& plan, const Cursor& start) : plan_(plan), lane_(start.lane()) {
    part_ = PartOf(plan, start);
    next_ = start.end_of_segment() ? 0 : start.record();
  }
  absl::StatusOr<std::unique_ptr<Batch>> Next() override {
    if (part_ >= plan_.epochs * plan_.segments) return std::unique_ptr<Batch>();
    const auto& batches = plan_.batches[part_][lane_];
    const uint32_t epoch = part_ / plan_.segments;
    std::unique_ptr<Batch> batch;
    if (next_ < batches.size()) {
      batch = MakeBatch(lane_, epoch, batches[next_]);
      if (batches[next_].empty()) batch->kind = Batch::Kind::kIdle;
      batch->cursor = CursorAt(plan_, lane_, part_, ++next_, false);
    } else {
      batch = MakeBatch(lane_, epoch, {});
      batch->kind = Batch::Kind::kAtEnd;
      batch->cursor = CursorAt(plan_, lane_, part_, next_, true);
      ++part_;
      next_ = 0;
    }
    return batch;
  }

 private:
  const Plan& plan_;
  const uint32_t lane_;
  uint32_t part_ = 0;
  uint64_t next_ = 0;
};

// The slow truth: one loop, every table kept, the rules of docs/PROTOCOL.md §2 and §3 written down as they stand.
Outcome Reference(const Plan& plan, const Saved& start) {
  Outcome outcome;
  const uint64_t k = plan.staleness;
  std::map<uint64_t, Rows> after = {{start.step, start.rows}};
  std::vector<Cursor> cursors = start.cursors;
  std::set<uint64_t> cuts = {start.step};
  SegmentEnd end = start.end;
  uint64_t stop = plan.steps_max;
  if (end.step > 0) cuts.insert(end.step);
  uint32_t part = 0;
  for (const Cursor& cursor : cursors) {
    part = std::max(part, PartOf(plan, cursor) - (cursor.end_of_segment() ? 1 : 0));
  }
  std::vector<bool> at_end;
  for (const Cursor& cursor : cursors) at_end.push_back(cursor.end_of_segment());
  for (uint64_t s = start.step + 1;; ++s) {
    if (end.step != 0 && s == end.step + 1) {
      ++part;
      at_end.assign(plan.lanes, false);
    }
    for (uint64_t cut = plan.every_steps; cut < s; cut += plan.every_steps) cuts.insert(cut);
    uint64_t view = s - 1 > k ? s - 1 - k : 0;
    for (const uint64_t cut : cuts) {
      if (cut < s) view = std::max(view, cut);
    }
    outcome.views.emplace_back(s, view);
    const Rows& seen = after.at(view);
    Rows rows = after.at(s - 1);
    uint64_t n = 0;
    std::map<Sign, float> sums;
    for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
      if (at_end[lane]) continue;
      const auto& batches = plan.batches[part][lane];
      const bool inside = PartOf(plan, cursors[lane]) == part && !cursors[lane].end_of_segment();
      const uint64_t next = inside ? cursors[lane].record() : 0;
      at_end[lane] = next == batches.size();
      cursors[lane] = CursorAt(plan, lane, part, at_end[lane] ? next : next + 1, at_end[lane]);
      if (at_end[lane]) continue;
      n += batches[next].size();
      for (const Sign sign : batches[next]) {
        const auto found = seen.find(sign);
        sums[sign] += Gradient(lane, sign, found == seen.end() ? 0.0f : found->second.weight);
      }
    }
    if (plan.skipped.count(s) == 0) {
      outcome.records += n;
      for (const auto& [sign, sum] : sums) {
        rows[sign].weight -= sum / static_cast<float>(n);
        rows[sign].last_step = s;
      }
    }
    after[s] = rows;
    const bool all_at_end = std::find(at_end.begin(), at_end.end(), false) == at_end.end();
    if (all_at_end && (end.step == 0 || s > end.step)) {
      end = {s + k, (part + 1) % plan.segments == 0};
      cuts.insert(end.step);
      if (part + 1 == plan.batches.size() && (stop == 0 || end.step < stop)) stop = end.step;
    }
    if (s == plan.stop_at_vote && (stop == 0 || s + k < stop)) {
      stop = s + k;
      cuts.insert(stop);
    }
    if (s % plan.every_steps == 0 || s == plan.steps_max || cuts.count(s) > 0) {
      outcome.cuts[s] = {s, end.step >= s ? end : SegmentEnd(), cursors, rows};
      CutState state;
      state.cut = true;
      state.epoch_ended = s == end.step && end.of_epoch;
      state.stopping = s == stop;
      state.job_finished = (s == end.step && part + 1 == plan.batches.size()) || s == plan.steps_max;
      outcome.states[s] = state;
    }
    if (s == stop) {
      outcome.last_step = s;
      return outcome;
    }
  }
}

// A server that holds to docs/PROTOCOL.md §2 and to nothing else, and notes whoever breaks it.
class StrictServer {
 public:
  StrictServer(const Plan& plan, Transport* transport, const Saved& start, const ShardMap& map, uint32_t index)
      : plan_(plan), transport_(transport), mailbox_(transport->Open(kPortServer)), applied_(start.step) {
    for (const auto& [sign, row] : start.rows) {
      if (map.ServerOf(sign) == index) rows_[sign] = row;
    }
    pulled_.assign(plan.lanes, start.step);
    answered_.assign(plan.lanes, start.step);
    thread_ = Env::Real()->StartThread("server", [this] {
      while (true) {
        std::optional<Message> message = mailbox_->Receive(kNever);
        if (message->payload.empty()) return;
        Handle(*message);
      }
    });
  }
  ~StrictServer() { Stop(); }
  void Stop() {
    if (thread_ == nullptr) return;
    mailbox_->Deliver(Message{});
    thread_.reset();
  }
  // After Stop.
  const std::map<uint64_t, Rows>& at_cut() const { return at_cut_; }
  uint64_t applied() const { return applied_; }
  const std::vector<std::string>& faults() const { return faults_; }
  // The last step that each sign was hinted and pulled for.
  const std::map<Sign, uint64_t>& hinted() const { return hinted_; }
  const std::map<Sign, uint64_t>& pulled_in() const { return pulled_in_; }

 private:
  struct Pull {
    Address from;
    Header header;
    std::vector<Sign> signs;
  };
  struct Push {
    uint64_t n = 0, next_cut = 0;
    bool skip = false;
    std::vector<std::pair<Sign, float>> gradients;
  };

  void Fault(const std::string& fault) { faults_.push_back(fault); }

  void Handle(const Message& message) {
    auto decoded = DecodeMessage(message.payload.span());
    HEARTH_CHECK(decoded.ok(), "", decoded.status().ToString());
    const Header& header = decoded->header;
    const std::string where = absl::StrCat("lane ", header.lane, " step ", header.step);
    switch (header.kind) {
      case MessageKind::kPull: {
        if (header.step != ++pulled_[header.lane]) Fault(absl::StrCat("pull out of order: ", where));
        if (header.view < applied_) Fault(absl::StrCat("view ", header.view, " is gone at ", applied_, ": ", where));
        Pull pull{message.from, header, {}};
        for (const Section& section : decoded->sections) {
          pull.signs.insert(pull.signs.end(), section.signs.begin(), section.signs.end());
          for (const Sign sign : section.signs) pulled_in_[sign] = header.step;
        }
        pulls_.push_back(std::move(pull));
        break;
      }
      case MessageKind::kPush: {
        Push push{header.n, header.next_cut, (header.flags & kFlagSkip) != 0, {}};
        for (const Section& section : decoded->sections) {
          for (uint32_t i = 0; i < section.count; ++i) push.gradients.emplace_back(section.signs[i], section.values[i]);
        }
        if (push.skip && !push.gradients.empty()) Fault(absl::StrCat("rows in a skipped push: ", where));
        if (!pushes_[header.step].emplace(header.lane, std::move(push)).second)
          Fault(absl::StrCat("pushed twice: ", where));
        Header ack = header;
        ack.kind = MessageKind::kPushAck;
        ack.flags = 0;
        Reply(message.from, EncodeMessage(ack, {}));
        break;
      }
      case MessageKind::kPrefetch:
        for (const Section& section : decoded->sections) {
          for (const Sign sign : section.signs) hinted_[sign] = header.step;
        }
        break;
      default:
        break;
    }
    while (Answer() || Apply()) {
    }
  }

  void Reply(Address to, Bytes bytes) {
    const absl::Status sent = transport_->Send(kPortServer, to, std::move(bytes));
    HEARTH_CHECK(sent.ok());
  }

  bool Answer() {
    for (size_t i = 0; i < pulls_.size(); ++i) {
      const Pull pull = pulls_[i];
      if (pull.header.view != applied_) continue;
      std::vector<float> values;
      for (const Sign sign : pull.signs) values.push_back(rows_.count(sign) ? rows_[sign].weight : 0.0f);
      Section section;
      section.table = 1;
      section.dim = 1;
      section.count = static_cast<uint32_t>(values.size());
      section.signs = pull.signs;
      section.values = values;
      std::vector<Section> sections;
      if (!values.empty()) sections.push_back(section);
      Header header = pull.header;
      header.kind = MessageKind::kPullReply;
      Reply(pull.from, EncodeMessage(header, sections));
      answered_[pull.header.lane] = std::max(answered_[pull.header.lane], pull.header.step);
      pulls_.erase(pulls_.begin() + static_cast<ptrdiff_t>(i));
      return true;
    }
    return false;
  }

  bool Apply() {
    const uint64_t step = applied_ + 1;
    const auto found = pushes_.find(step);
    if (found == pushes_.end() || found->second.size() < plan_.lanes) return false;
    const Push& first = found->second.begin()->second;
    const uint64_t needed = std::min(step + plan_.staleness, first.next_cut == 0 ? UINT64_MAX : first.next_cut);
    for (uint32_t lane = 0; lane < plan_.lanes; ++lane) {
      const Push& push = found->second.at(lane);
      if (push.n != first.n || push.next_cut != first.next_cut || push.skip != first.skip) {
        Fault(absl::StrCat("lanes disagree in step ", step));
      }
      if (answered_[lane] < needed) return false;
    }
    std::map<Sign, float> sums;
    for (const auto& [lane, push] : found->second) {
      for (const auto& [sign, gradient] : push.gradients) sums[sign] += gradient;
    }
    for (const auto& [sign, sum] : sums) {
      rows_[sign].weight -= sum / static_cast<float>(first.n);
      rows_[sign].last_step = step;
    }
    if (first.next_cut == step) at_cut_[step] = rows_;
    applied_ = step;
    pushes_.erase(found);
    return true;
  }

  const Plan& plan_;
  Transport* const transport_;
  Mailbox* const mailbox_;
  uint64_t applied_;
  Rows rows_;
  std::vector<uint64_t> pulled_, answered_;  // [lanes]
  std::vector<Pull> pulls_;
  std::map<uint64_t, std::map<uint32_t, Push>> pushes_;
  std::map<uint64_t, Rows> at_cut_;
  std::map<Sign, uint64_t> hinted_, pulled_in_;
  std::vector<std::string> faults_;
  std::unique_ptr<Thread> thread_;
};

// One worker's trainer around the real pipeline.
class FakeWorker {
 public:
  FakeWorker(const Plan& plan, const Saved& start, Transport* transport, Collective* collective, ShardMap map,
             Ranks ranks)
      : plan_(plan), collective_(collective) {
    PipelineOptions options;
    options.env = Env::Real();
    options.clients.env = Env::Real();
    options.clients.transport = transport;
    options.clients.map = map;
    options.clients.ranks = ranks;
    options.clock.staleness = plan.staleness;
    options.clock.every_steps = plan.every_steps;
    options.clock.steps_max = plan.steps_max;
    options.clock.epochs = plan.epochs;
    options.clock.step = start.step;
    options.clock.end = start.end;
    options.read_ahead_batches_max = 2;
    if (plan.tails) options.gate = &gate_;
    options.group_dims = {1};
    for (uint32_t lane = static_cast<uint32_t>(collective->worker()); lane < plan.lanes;
         lane += static_cast<uint32_t>(collective->workers())) {
      const Cursor& cursor = start.cursors[lane];
      options.clock.epoch = std::max(options.clock.epoch, cursor.epoch());
      options.lanes.push_back({std::make_unique<ScriptedReader>(plan_, cursor), cursor});
    }
    options_ = std::move(options);
  }

  void Run() {
    status_ = Loop();
    pipeline_.reset();
  }
  const absl::Status& status() const { return status_; }
  const Outcome& outcome() const { return outcome_; }

 private:
  struct Tail {
    uint64_t records = 0;
    uint32_t at_end = 0, last = 0, skip = 0, stop = 0;
  };

  absl::Status Loop() {
    pipeline_ = std::make_unique<Pipeline>(std::move(options_));
    while (true) {
      HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<StepBatch> batch, pipeline_->Next());
      if (batch == nullptr) break;
      const uint64_t step = batch->step;
      outcome_.views.emplace_back(step, batch->view);
      std::vector<Cursor> cursors;
      for (auto& lane : batch->lanes) {
        cursors.push_back(lane->cursor);
        RowGroup& group = lane->groups[0];
        group.gradients.resize(group.unique.size());
        for (size_t i = 0; i < group.unique.size(); ++i) {
          group.gradients[i] = Gradient(lane->lane, group.unique[i], group.rows[i]);
        }
      }
      HEARTH_ASSIGN_OR_RETURN(const StepVerdict verdict, Reduce(*batch));
      if (!verdict.skip) outcome_.records += verdict.records;
      outcome_.empty_steps += verdict.records == 0;
      HEARTH_ASSIGN_OR_RETURN(const CutState state, pipeline_->Finish(std::move(batch), verdict));
      outcome_.last_step = step;
      if (!state.cut) continue;
      outcome_.states[step] = state;
      outcome_.cuts[step] = {step, state.end, cursors, {}};
    }
    return pipeline_->Flush();
  }

  absl::StatusOr<StepVerdict> Reduce(const StepBatch& batch) {
    std::vector<Tail> own(batch.lanes.size());
    std::vector<Collective::Part> parts;
    for (size_t i = 0; i < own.size(); ++i) {
      own[i].records = static_cast<uint64_t>(batch.lanes[i]->records);
      own[i].at_end = batch.lanes[i]->kind == Batch::Kind::kAtEnd;
      own[i].last = batch.lanes[i]->cursor.end_of_epoch();
      own[i].skip = plan_.skipped.count(batch.step) > 0;
      own[i].stop = batch.step == plan_.stop_at_vote && collective_->worker() == 0;
      parts.push_back({{}, {reinterpret_cast<const char*>(&own[i]), sizeof(Tail)}});
    }
    std::vector<Tail> all(plan_.lanes);
    HEARTH_RETURN_IF_ERROR(
        collective_->SumParts(static_cast<int>(plan_.lanes), parts, {},
                              absl::MakeSpan(reinterpret_cast<char*>(all.data()), all.size() * sizeof(Tail))));
    StepVerdict verdict;
    verdict.all_at_end = true;
    for (const Tail& tail : all) {
      verdict.records += tail.records;
      verdict.skip |= tail.skip != 0;
      verdict.last |= tail.last != 0;
      verdict.stop |= tail.stop != 0;
      verdict.all_at_end &= tail.at_end != 0;
    }
    return verdict;
  }

  const Plan& plan_;
  Collective* const collective_;
  RestGate gate_{Env::Real(), nullptr};
  PipelineOptions options_;
  std::unique_ptr<Pipeline> pipeline_;
  absl::Status status_;
  Outcome outcome_;
};

Outcome RunForReal(const Plan& plan, const Saved& start, int workers, int servers) {
  Env* env = Env::Real();
  const Ranks ranks{servers, workers};
  const ShardMap map(16, static_cast<uint32_t>(servers));
  InProcessHub hub(env, ranks.size());
  LocalCollectiveHub collectives(env, workers);
  std::vector<std::unique_ptr<StrictServer>> server;
  for (int i = 0; i < servers; ++i) {
    server.push_back(
        std::make_unique<StrictServer>(plan, hub.transport(ranks.server(i)), start, map, static_cast<uint32_t>(i)));
  }
  std::vector<std::unique_ptr<FakeWorker>> worker;
  for (int i = 0; i < workers; ++i) {
    worker.push_back(std::make_unique<FakeWorker>(plan, start, hub.transport(ranks.worker(i)),
                                                  collectives.collective(i), map, ranks));
  }
  {
    std::vector<std::unique_ptr<Thread>> threads;
    for (auto& w : worker) threads.push_back(env->StartThread("worker", [&w] { w->Run(); }));
  }
  Outcome outcome = worker[0]->outcome();
  for (auto& [step, saved] : outcome.cuts) saved.cursors.resize(plan.lanes);
  for (int i = 0; i < workers; ++i) {
    EXPECT_TRUE(worker[static_cast<size_t>(i)]->status().ok()) << worker[static_cast<size_t>(i)]->status();
    EXPECT_EQ(worker[static_cast<size_t>(i)]->outcome().views, outcome.views);
  }
  for (auto& [step, saved] : outcome.cuts) {
    for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
      const auto& cuts = worker[lane % static_cast<size_t>(workers)]->outcome().cuts;
      if (cuts.count(step)) saved.cursors[lane] = cuts.at(step).cursors[lane / static_cast<size_t>(workers)];
    }
    for (auto& s : server) {
      s->Stop();
      EXPECT_EQ(s->at_cut().count(step), 1u) << "cut " << step;
      if (s->at_cut().count(step)) saved.rows.insert(s->at_cut().at(step).begin(), s->at_cut().at(step).end());
    }
  }
  for (auto& s : server) {
    s->Stop();
    EXPECT_EQ(s->applied(), outcome.last_step);
    EXPECT_TRUE(s->faults().empty()) << s->faults().front();
  }
  return outcome;
}

std::string Describe(const Saved& saved) {
  std::string text =
      absl::StrCat("step ", saved.step, " ends at ", saved.end.step, saved.end.of_epoch ? " of the epoch\n" : "\n");
  for (const Cursor& cursor : saved.cursors) absl::StrAppend(&text, cursor.ShortDebugString(), "\n");
  for (const auto& [sign, row] : saved.rows) absl::StrAppend(&text, sign, ": ", row.weight, " @", row.last_step, "\n");
  return text;
}

void ExpectEqual(const Outcome& real, const Outcome& truth) {
  EXPECT_EQ(real.views, truth.views);
  EXPECT_EQ(real.last_step, truth.last_step);
  EXPECT_EQ(real.records, truth.records);
  ASSERT_EQ(real.cuts.size(), truth.cuts.size());
  for (const auto& [step, saved] : truth.cuts) {
    ASSERT_EQ(real.cuts.count(step), 1u) << "cut " << step;
    EXPECT_EQ(Describe(real.cuts.at(step)), Describe(saved));
    const CutState& a = real.states.at(step);
    const CutState& b = truth.states.at(step);
    EXPECT_EQ(std::tie(a.epoch_ended, a.job_finished, a.stopping), std::tie(b.epoch_ended, b.job_finished, b.stopping))
        << "cut " << step;
  }
}

Saved Beginning(const Plan& plan) {
  Saved start;
  for (uint32_t lane = 0; lane < plan.lanes; ++lane) start.cursors.push_back(CursorAt(plan, lane, 0, 0, false));
  return start;
}

// Uneven lanes, some of them empty for a segment.
Plan RandomPlan(Random* random, uint32_t staleness) {
  Plan plan;
  plan.lanes = 1 + static_cast<uint32_t>(random->Below(4));
  plan.staleness = staleness;
  plan.every_steps = 2 + static_cast<uint32_t>(random->Below(6));
  plan.epochs = 1 + static_cast<uint32_t>(random->Below(3));
  plan.segments = 1 + static_cast<uint32_t>(random->Below(3));
  for (uint32_t part = 0; part < plan.epochs * plan.segments; ++part) {
    plan.batches.emplace_back(plan.lanes);
    for (auto& lane : plan.batches.back()) {
      lane.resize(random->Below(8));
      for (auto& batch : lane) {
        std::set<Sign> signs;
        for (uint64_t i = 0; i <= random->Below(5); ++i) signs.insert(MakeSign(1, random->Below(12)));
        batch.assign(signs.begin(), signs.end());
      }
    }
  }
  return plan;
}

int WorkersFor(const Plan& plan, Random* random) { return 1 + static_cast<int>(random->Below(plan.lanes)); }

class PipelineAtStaleness : public testing::TestWithParam<uint32_t> {};

TEST_P(PipelineAtStaleness, EqualsTheSequentialReferenceForAnyNumberOfWorkersAndServers) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed * 101 + GetParam());
    const Plan plan = RandomPlan(&random, GetParam());
    const Outcome truth = Reference(plan, Beginning(plan));
    ExpectEqual(RunForReal(plan, Beginning(plan), 1, 1), truth);
    ExpectEqual(RunForReal(plan, Beginning(plan), WorkersFor(plan, &random), 1 + static_cast<int>(random.Below(3))),
                truth);
  }
}

TEST_P(PipelineAtStaleness, SkippedStepsMoveTheClockAlone) {
  Random random(7 + GetParam());
  Plan plan = RandomPlan(&random, GetParam());
  plan.batches[0][0].assign(9, {MakeSign(1, 3), MakeSign(1, 5)});
  plan.skipped = {2, 3, 7};
  const Outcome truth = Reference(plan, Beginning(plan));
  ExpectEqual(RunForReal(plan, Beginning(plan), WorkersFor(plan, &random), 2), truth);
}

TEST_P(PipelineAtStaleness, AStopAskedForInOneReductionEndsEveryWorkerAtTheSameCut) {
  for (uint64_t vote = 1; vote <= 12; ++vote) {
    SCOPED_TRACE(absl::StrCat("vote ", vote));
    Random random(vote * 13 + GetParam());
    Plan plan = RandomPlan(&random, GetParam());
    plan.stop_at_vote = vote;
    const Outcome truth = Reference(plan, Beginning(plan));
    ExpectEqual(RunForReal(plan, Beginning(plan), WorkersFor(plan, &random), 1), truth);
  }
}

TEST_P(PipelineAtStaleness, StepsMaxIsACutThatFinishesTheJob) {
  Random random(31 + GetParam());
  Plan plan = RandomPlan(&random, GetParam());
  plan.batches[0][0].assign(9, {MakeSign(1, 1)});
  plan.steps_max = 4;
  const Outcome outcome = RunForReal(plan, Beginning(plan), WorkersFor(plan, &random), 1);
  ExpectEqual(outcome, Reference(plan, Beginning(plan)));
  EXPECT_EQ(outcome.last_step, 4u);
  EXPECT_TRUE(outcome.states.at(4).job_finished);
}

// A planned cut may fall between the decision to end a segment and the end itself: the resumed run must end it at the
// same step.
TEST_P(PipelineAtStaleness, AResumeFromAnyCutEndsLikeTheRunThatNeverStopped) {
  uint64_t resumed_while_a_segment_was_ending = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Random random(seed * 977 + GetParam());
    Plan plan = RandomPlan(&random, GetParam());
    plan.every_steps = 2;
    const Outcome truth = Reference(plan, Beginning(plan));
    const Outcome whole = RunForReal(plan, Beginning(plan), WorkersFor(plan, &random), 2);
    for (const auto& [step, saved] : whole.cuts) {
      if (step == whole.last_step) continue;
      SCOPED_TRACE(absl::StrCat("seed ", seed, " resumed at ", step));
      resumed_while_a_segment_was_ending += saved.end.step > step;
      const Outcome rest = RunForReal(plan, saved, WorkersFor(plan, &random), 1 + static_cast<int>(random.Below(3)));
      EXPECT_EQ(rest.last_step, truth.last_step);
      ASSERT_EQ(rest.cuts.count(truth.last_step), 1u);
      EXPECT_EQ(Describe(rest.cuts.at(truth.last_step)), Describe(truth.cuts.at(truth.last_step)));
    }
  }
  if (GetParam() > 0) {
    EXPECT_GT(resumed_while_a_segment_was_ending, 0u);
  }
}

TEST_P(PipelineAtStaleness, MakesNoStepWhileNoLaneHasARecord) {
  const Sign a = MakeSign(1, 1), b = MakeSign(1, 2);
  Plan plan;
  plan.lanes = 2;
  plan.staleness = GetParam();
  plan.every_steps = 1000;
  plan.tails = true;
  plan.batches = {{{{a}, {}, {}, {}, {b}, {}}, {{}, {}, {a, b}, {}, {}, {}, {}, {}, {b}}}};
  const Outcome outcome = RunForReal(plan, Beginning(plan), 1, 1);
  EXPECT_EQ(outcome.records, 5u);
  EXPECT_EQ(outcome.empty_steps, 1u + GetParam()) << "those that end the epoch";
}

INSTANTIATE_TEST_SUITE_P(Staleness, PipelineAtStaleness, testing::Values(0u, 1u, 2u, 3u));

// A table's signs end where the next table's begin; behind the last table, 4095, nothing begins.
TEST(ListTables, CutsABatchAtEachTableUpToTheLast) {
  for (TableNumber power = 1; power <= kTablesMax + 1; power *= 2) {
    for (const TableNumber table : {power - 1, power, power + 1}) {
      if (table < 1 || table > kTablesMax) continue;
      std::vector<Sign> signs;
      const std::set<TableNumber> numbers = {1, table, kTablesMax};
      for (const TableNumber number : numbers) {
        for (const uint64_t id : {uint64_t{0}, uint64_t{1}, kIdMask}) signs.push_back(MakeSign(number, id));
      }
      const std::unique_ptr<Batch> batch = MakeBatch(0, 0, signs);
      std::vector<TableRows> parts;
      ListTables(batch.get(), RowsOf::kPull, &parts);
      ASSERT_EQ(parts.size(), numbers.size()) << table;
      size_t part = 0;
      for (const TableNumber number : numbers) {
        EXPECT_EQ(parts[part].table, number);
        EXPECT_EQ(std::vector<Sign>(parts[part].signs.begin(), parts[part].signs.end()),
                  std::vector<Sign>(signs.begin() + 3 * part, signs.begin() + 3 * part + 3));
        EXPECT_EQ(parts[part].rows.data(), batch->groups[0].rows.data() + 3 * part);
        ++part;
      }
    }
  }
}

TEST(Pipeline, HintsASignForTheStepThatPullsItInEveryEpoch) {
  Plan plan;
  plan.epochs = 4;
  uint64_t id = 0;
  for (uint32_t epoch = 0; epoch < plan.epochs; ++epoch) {
    plan.batches.emplace_back(1);
    for (int batch = 0; batch < 5; ++batch) plan.batches.back()[0].push_back({MakeSign(1, ++id)});
  }
  const Saved start = Beginning(plan);
  const Ranks ranks{1, 1};
  const ShardMap map(16, 1);
  InProcessHub hub(Env::Real(), ranks.size());
  LocalCollectiveHub collectives(Env::Real(), 1);
  StrictServer server(plan, hub.transport(ranks.server(0)), start, map, 0);
  FakeWorker worker(plan, start, hub.transport(ranks.worker(0)), collectives.collective(0), map, ranks);
  worker.Run();
  ASSERT_TRUE(worker.status().ok()) << worker.status();
  server.Stop();
  ASSERT_EQ(server.pulled_in().size(), id);
  for (const auto& [sign, step] : server.pulled_in()) {
    ASSERT_EQ(server.hinted().count(sign), 1u);
    EXPECT_GE(server.hinted().at(sign), step) << "a server drops a hint for a step that it has applied";
    EXPECT_LE(server.hinted().at(sign), step + 1);
  }
}

TEST(Pipeline, HandsAReadersErrorToTheTrainer) {
  class FailingReader : public LaneReader {
   public:
    absl::StatusOr<std::unique_ptr<Batch>> Next() override { return absl::DataLossError("log.gz: truncated"); }
  };
  InProcessHub hub(Env::Real(), 3);
  PipelineOptions options;
  options.env = Env::Real();
  options.clients.env = Env::Real();
  options.clients.transport = hub.transport(2);
  options.group_dims = {1};
  options.lanes.push_back({std::make_unique<FailingReader>(), CursorAt(Plan(), 0, 0, 0, false)});
  Pipeline pipeline(std::move(options));
  const auto next = pipeline.Next();
  EXPECT_EQ(next.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(next.status().message(), "log.gz: truncated");
}

}  // namespace
}  // namespace hearth
