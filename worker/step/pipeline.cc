#include "worker/step/pipeline.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/net/mailbox.h"

namespace hearth {

// ---- Tables of a batch

void ListTables(Batch* batch, RowsOf rows, std::vector<TableRows>* tables) {
  tables->clear();
  for (RowGroup& group : batch->groups) {
    const size_t count = group.unique.size();
    float* values = nullptr;  // [unique, dim]
    if (rows == RowsOf::kPull) {
      group.rows.resize(count * group.dim);
      values = group.rows.data();
    } else if (rows == RowsOf::kPush) {
      HEARTH_CHECK(group.gradients.size() == count * group.dim, "lane ", batch->lane, ", step ", batch->step,
                   ": gradients of ", group.gradients.size(), " floats for ", count, " rows of ", group.dim);
      values = group.gradients.data();
    }
    for (size_t begin = 0; begin < count;) {
      // Each sign is asked for its table. The first sign of the next table bounds nothing: behind the last table there
      // is none, for 2^64 is no Sign.
      const TableNumber table = TableOf(group.unique[begin]);
      const auto next = std::partition_point(group.unique.begin() + static_cast<ptrdiff_t>(begin), group.unique.end(),
                                             [table](Sign sign) { return TableOf(sign) == table; });
      const size_t end = static_cast<size_t>(next - group.unique.begin());
      TableRows part;
      part.table = table;
      part.dim = group.dim;
      part.signs = absl::MakeConstSpan(group.unique).subspan(begin, end - begin);
      part.occurrences = absl::MakeConstSpan(group.occurrences).subspan(begin, end - begin);
      if (values != nullptr) part.rows = absl::MakeSpan(values + begin * group.dim, (end - begin) * group.dim);
      tables->push_back(part);
      begin = end;
    }
  }
  std::sort(tables->begin(), tables->end(), [](const TableRows& a, const TableRows& b) { return a.table < b.table; });
}

// ---- The threads

struct Pipeline::State {
  using BatchRead = absl::StatusOr<std::unique_ptr<Batch>>;
  using StepPulled = absl::StatusOr<std::unique_ptr<StepBatch>>;
  struct Lane {
    Lane(Env* env, size_t capacity) : queue(env, capacity) {}
    std::unique_ptr<LaneReader> reader;  // read thread
    BoundedQueue<BatchRead> queue;       // read → pull; a null batch: the reader has no more
    std::atomic<uint64_t> asked{0};      // pull thread: the newest step that wants, or had, a batch of this lane
    Cursor cursor;                       // pull thread: end of the last batch handed out
    bool at_end = false;                 // pull thread
  };
  struct PushJob {
    std::unique_ptr<StepBatch> batch;
    PushClient::Terms terms;
    Decision decision;
  };

  explicit State(PipelineOptions given);

  void Read();
  void Pull();
  absl::Status PullSteps();
  absl::StatusOr<std::unique_ptr<StepBatch>> Assemble(uint64_t step, bool new_segment);
  absl::StatusOr<bool> AwaitRecords(StepBatch* batch);
  absl::StatusOr<std::unique_ptr<Batch>> Take(Lane* lane, bool new_segment, uint32_t epoch);
  std::unique_ptr<Batch> AtEnd(const Lane& lane, uint32_t epoch) const;
  absl::Status PullRows(StepBatch* batch);
  void PushAll();
  absl::Status PushSteps();
  void CloseAll();

  // Constant after construction.
  const PipelineOptions options;
  Env* const env;

  std::vector<std::unique_ptr<Lane>> lanes;
  const std::unique_ptr<Event> room;  // the read thread waits on it: a batch was taken, or all ends
  BoundedQueue<StepPulled> pulled;    // pull → trainer
  BoundedQueue<PushJob> pushes;       // trainer → push
  BoundedQueue<Decision> permits;     // push → pull
  std::atomic<bool> closing{false};
  std::atomic<int64_t> push_us{0};

  // The trainer's.
  StepClock clock;
  Times times;

  const std::unique_ptr<PullClient> puller;  // the pull thread's, but for Stop

  // The pull thread's.
  StepClock pull_clock;
  std::vector<std::vector<TableRows>> tables;  // [lanes], reused

  // The push thread's; written before it closes `pushes`, read after that.
  absl::Status push_status;

  std::unique_ptr<Thread> read_thread, pull_thread, push_thread;
};

Pipeline::State::State(PipelineOptions given)
    : options(std::move(given)),
      env(options.env),
      room(env->NewEvent()),
      pulled(env, options.clock.staleness + 1),
      pushes(env, options.clock.staleness + 2),
      permits(env, options.clock.staleness + 2),
      clock(options.clock),
      puller(std::make_unique<PullClient>(options.clients, kPortPull)),
      pull_clock(options.clock) {}

Pipeline::Pipeline(PipelineOptions options) {
  std::vector<PipelineOptions::Lane> lanes = std::move(options.lanes);
  options.lanes.clear();
  state_ = std::make_unique<State>(std::move(options));
  State* s = state_.get();
  for (PipelineOptions::Lane& given : lanes) {
    auto lane = std::make_unique<State::Lane>(s->env, std::max<size_t>(1, s->options.read_ahead_batches_max));
    lane->reader = std::move(given.reader);
    lane->cursor = given.cursor;
    lane->at_end = given.cursor.end_of_segment();
    lane->asked = s->options.clock.step;
    s->lanes.push_back(std::move(lane));
  }
  s->tables.resize(s->lanes.size());
  s->read_thread = s->env->StartThread("read", [s] { s->Read(); });
  s->pull_thread = s->env->StartThread("pull", [s] { s->Pull(); });
  s->push_thread = s->env->StartThread("push", [s] { s->PushAll(); });
}

Pipeline::~Pipeline() {
  state_->CloseAll();
  state_->read_thread.reset();
  state_->pull_thread.reset();
  state_->push_thread.reset();
}

void Pipeline::State::CloseAll() {
  closing = true;
  puller->Stop();
  for (auto& lane : lanes) lane->queue.Close();
  pulled.Close();
  pushes.Close();
  permits.Close();
  room->Notify();
  if (options.gate != nullptr) options.gate->Notify();
}

absl::StatusOr<std::unique_ptr<StepBatch>> Pipeline::Next() {
  State* s = state_.get();
  const int64_t begin_us = s->env->NowUs();
  std::optional<State::StepPulled> next = s->pulled.Pop();
  const int64_t waited_us = s->env->NowUs() - begin_us;
  if (!next.has_value()) {
    if (s->pushes.closed()) HEARTH_RETURN_IF_ERROR(s->push_status);
    return std::unique_ptr<StepBatch>();
  }
  if (next->ok()) {
    // The wait is shared out by what the pull thread itself was waiting for in this step.
    const int64_t input_us = (**next)->input_us;
    const int64_t all_us = std::max<int64_t>(1, input_us + (**next)->pull_us);
    const int64_t input_share_us = static_cast<int64_t>(static_cast<double>(waited_us) * input_us / all_us);
    s->times.wait_input_us += input_share_us;
    s->times.wait_pull_us += waited_us - input_share_us;
  }
  return *std::move(next);
}

absl::StatusOr<CutState> Pipeline::Finish(std::unique_ptr<StepBatch> step, const StepVerdict& verdict) {
  State* s = state_.get();
  const uint64_t number = step->step;
  State::PushJob push;
  push.decision = s->clock.Decide(number, verdict);
  push.batch = std::move(step);
  push.terms = {verdict.records, s->clock.NextCut(number), verdict.skip, verdict.time_s};
  CutState state;
  state.cut = push.terms.next_cut == number;
  state.epoch_ended = s->clock.EpochEndsAt(number);
  state.job_finished = s->clock.FinishedAt(number);
  state.stopping = s->clock.StopAt() == number;
  state.end = s->clock.end().step >= number ? s->clock.end() : SegmentEnd();
  if (!s->pushes.Push(std::move(push))) {
    HEARTH_RETURN_IF_ERROR(s->push_status);
    return absl::InternalError(absl::StrCat("step ", number, " finished after the pipeline's end"));
  }
  return state;
}

absl::Status Pipeline::Flush() {
  state_->pushes.Close();
  state_->push_thread.reset();
  return state_->push_status;
}

Pipeline::Times Pipeline::times() const {
  Times times = state_->times;
  times.push_us = state_->push_us;
  return times;
}

// Round-robin, passing over lanes whose queue is full: a lane that has run ahead into its next epoch must not hold up
// one that is still in this one.
void Pipeline::State::Read() {
  std::vector<bool> ended(lanes.size(), false);
  std::vector<TableRows> hinted;
  size_t open = lanes.size();
  while (open > 0 && !closing) {
    bool moved = false;
    for (size_t i = 0; i < lanes.size() && !closing; ++i) {
      if (ended[i] || lanes[i]->queue.size() >= std::max<size_t>(1, options.read_ahead_batches_max)) continue;
      BatchRead batch = lanes[i]->reader->Next();
      if (!batch.ok() || *batch == nullptr) {
        ended[i] = true;
        --open;
      } else if (options.prefetch && (*batch)->records > 0) {
        // The batch's step, as far as it is known: behind the one asked for and those that wait, later if an epoch
        // ends in between. The queue first: a batch that is taken meanwhile then counts twice, not never.
        const uint64_t waiting = lanes[i]->queue.size();
        const uint64_t step = lanes[i]->asked + waiting + 1;
        ListTables(batch->get(), RowsOf::kNothing, &hinted);
        const absl::Status sent = SendPrefetch(options.clients, step, hinted);
        if (!sent.ok()) batch = sent;
      }
      if (!lanes[i]->queue.Push(std::move(batch))) return;
      if (options.gate != nullptr) options.gate->Notify();
      moved = true;
    }
    if (!moved) room->WaitUntil(kNever);
  }
}

void Pipeline::State::Pull() {
  const absl::Status status = PullSteps();
  if (!status.ok()) pulled.Push(status);
  pulled.Close();
}

absl::Status Pipeline::State::PullSteps() {
  const uint64_t start = options.clock.step;
  const uint64_t permits_ahead = options.clock.staleness + uint64_t{1};
  for (uint64_t step = start + 1;; ++step) {
    if (step - start > permits_ahead) {
      const std::optional<Decision> permit = permits.Pop();
      if (!permit.has_value()) return absl::OkStatus();  // closed: the end was decided elsewhere
      HEARTH_CHECK(permit->step + permits_ahead == step, "permit of step ", permit->step, " for step ", step);
      pull_clock.Take(*permit);
    }
    const uint64_t stop = pull_clock.StopAt();
    if (stop != 0 && step > stop) return absl::OkStatus();
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<StepBatch> batch, Assemble(step, pull_clock.SegmentEndsAt(step - 1)));
    if (batch == nullptr) return absl::OkStatus();
    HEARTH_RETURN_IF_ERROR(PullRows(batch.get()));
    if (!pulled.Push(std::move(batch))) return absl::OkStatus();
  }
}

// Null: the pipeline is being closed.
absl::StatusOr<std::unique_ptr<StepBatch>> Pipeline::State::Assemble(uint64_t step, bool new_segment) {
  auto batch = std::make_unique<StepBatch>();
  batch->step = step;
  batch->view = pull_clock.View(step);
  const int64_t begin_us = env->NowUs();
  for (auto& lane : lanes) {
    lane->asked = step;
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> part, Take(lane.get(), new_segment, pull_clock.EpochOf(step)));
    if (part == nullptr) return std::unique_ptr<StepBatch>();
    batch->lanes.push_back(std::move(part));
  }
  HEARTH_ASSIGN_OR_RETURN(const bool made, AwaitRecords(batch.get()));
  if (!made) return std::unique_ptr<StepBatch>();
  for (auto& part : batch->lanes) part->step = step;
  batch->input_us = env->NowUs() - begin_us;
  return batch;
}

// Waits until the step is one that is made: with a record of this worker's lanes or of another's, or at their end.
// False: the pipeline is being closed.
absl::StatusOr<bool> Pipeline::State::AwaitRecords(StepBatch* batch) {
  if (options.gate == nullptr) return true;
  while (true) {
    const auto is_at_end = [](const auto& part) { return part->kind == Batch::Kind::kAtEnd; };
    const bool moves =
        std::any_of(batch->lanes.begin(), batch->lanes.end(), [](const auto& part) { return part->records > 0; }) ||
        std::all_of(batch->lanes.begin(), batch->lanes.end(), is_at_end);
    if (moves) {
      HEARTH_RETURN_IF_ERROR(options.gate->Moves(batch->step));
      return true;
    }
    HEARTH_ASSIGN_OR_RETURN(const bool joins, options.gate->Joins(batch->step));
    if (joins) return true;
    options.gate->WaitForNews();
    if (closing) return false;
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (batch->lanes[i]->kind != Batch::Kind::kIdle || lanes[i]->queue.size() == 0) continue;
      HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> part, Take(lanes[i].get(), false, batch->lanes[i]->epoch));
      if (part == nullptr) return false;
      batch->lanes[i] = std::move(part);
    }
  }
}

// A list of files that was closed while lanes came to the end of its last segment: those that came before it say that
// the epoch is over once more, behind the end that another lane's word made the epoch's.
bool IsLateEnd(const Batch* batch, uint32_t epoch) {
  return batch != nullptr && batch->kind == Batch::Kind::kAtEnd && batch->epoch + 1 == epoch;
}

absl::StatusOr<std::unique_ptr<Batch>> Pipeline::State::Take(Lane* lane, bool new_segment, uint32_t epoch) {
  if (new_segment) lane->at_end = false;
  if (lane->at_end) return AtEnd(*lane, epoch);
  std::unique_ptr<Batch> batch;
  // An idle batch says nothing once there is another behind it. Of those that are there now: the reader makes more.
  for (size_t left = std::max<size_t>(1, lane->queue.size()); left > 0;) {
    std::optional<BatchRead> read = lane->queue.Pop();
    room->Notify();
    if (!read.has_value()) return std::unique_ptr<Batch>();
    HEARTH_RETURN_IF_ERROR(read->status());
    batch = *std::move(*read);
    if (IsLateEnd(batch.get(), epoch)) continue;
    if (batch == nullptr || batch->kind != Batch::Kind::kIdle) break;
    --left;
  }
  if (batch == nullptr || batch->epoch != epoch || batch->lane != lane->cursor.lane()) {
    return absl::InternalError(
        absl::StrCat("lane ", lane->cursor.lane(), " in epoch ", epoch, ": its reader gave ",
                     batch == nullptr ? std::string("nothing")
                                      : absl::StrCat("a batch of lane ", batch->lane, ", epoch ", batch->epoch)));
  }
  lane->cursor = batch->cursor;
  lane->at_end = batch->kind == Batch::Kind::kAtEnd;
  return batch;
}

// What a lane brings after its end, until the segment's cut: nothing, at the place where it is.
std::unique_ptr<Batch> Pipeline::State::AtEnd(const Lane& lane, uint32_t epoch) const {
  auto batch = std::make_unique<Batch>();
  batch->kind = Batch::Kind::kAtEnd;
  batch->lane = lane.cursor.lane();
  batch->epoch = epoch;
  batch->cursor = lane.cursor;
  batch->groups.resize(options.group_dims.size());
  for (size_t g = 0; g < batch->groups.size(); ++g) {
    batch->groups[g].dim = options.group_dims[g];
    batch->groups[g].offsets = {0};
  }
  return batch;
}

absl::Status Pipeline::State::PullRows(StepBatch* batch) {
  const int64_t begin_us = env->NowUs();
  for (size_t i = 0; i < batch->lanes.size(); ++i) {
    Batch* lane = batch->lanes[i].get();
    ListTables(lane, RowsOf::kPull, &tables[i]);
    HEARTH_RETURN_IF_ERROR(puller->Send(lane->lane, batch->step, batch->view, tables[i]));
  }
  for (size_t i = 0; i < batch->lanes.size(); ++i) {
    HEARTH_RETURN_IF_ERROR(puller->Receive(batch->lanes[i]->lane, batch->step, absl::MakeSpan(tables[i])));
  }
  batch->pull_us = env->NowUs() - begin_us;
  for (size_t i = 0; i < batch->lanes.size() && options.pulled; ++i) {
    HEARTH_RETURN_IF_ERROR(options.pulled(batch->lanes[i].get()));
  }
  return absl::OkStatus();
}

void Pipeline::State::PushAll() {
  push_status = PushSteps();
  if (push_status.ok()) return;
  // The trainer learns of it in Finish, or in Next, wherever it is.
  pushes.Close();
  permits.Close();
  pulled.Close();
}

absl::Status Pipeline::State::PushSteps() {
  PushClient pusher(options.clients);
  std::vector<TableRows> parts;
  int64_t due_us = kNever;
  while (true) {
    const bool closed = pushes.closed();  // before Pop: what was queued ahead of Close is still taken
    std::optional<PushJob> push = pushes.Pop(due_us);
    if (!push.has_value() && closed) break;
    const int64_t begin_us = env->NowUs();
    if (push.has_value()) {
      for (auto& lane : push->batch->lanes) {
        if (push->terms.skip || lane->records == 0) {
          parts.clear();
        } else {
          ListTables(lane.get(), RowsOf::kPush, &parts);
        }
        HEARTH_RETURN_IF_ERROR(pusher.Push(lane->lane, push->batch->step, push->terms, parts));
      }
      permits.Push(push->decision);
      push_us += env->NowUs() - begin_us;
    }
    HEARTH_ASSIGN_OR_RETURN(due_us, pusher.Poll());
  }
  return closing ? absl::OkStatus() : pusher.Flush();
}

}  // namespace hearth
