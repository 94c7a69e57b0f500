#include "ps/shard.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/half.h"
#include "common/base/status.h"
#include "common/net/wire.h"
#include "embedding/memory_budget.h"
#include "ps/shard_map.h"

namespace hearth {
namespace {

constexpr uint64_t kMaintainRowsMax = 4096;  // looked at in one slice, per table

struct Decoded {
  Message message;
  DecodedMessage view;  // into message.payload, whose bytes do not move when the message does
};

// One lane's part of one step, from its pull's arrival until the step is applied.
struct Slot {
  std::optional<Decoded> pull;  // waits for its view
  bool answered = false;
  Bytes reply;                  // kept from the answer until the push
  std::optional<Decoded> push;  // held from its arrival until the step is applied
};

struct Lane {
  uint64_t run = 0;      // all pulls of steps <= run are answered: the unbroken run
  uint64_t highest = 0;  // the highest answered pull
};

// What all lanes' pushes of a step must agree on.
struct StepTerms {
  uint32_t pushes = 0;  // lanes whose push is here
  uint64_t n = 0;
  uint64_t next_cut = 0;
  bool skip = false;
  uint32_t time_s = 0;
};

const char* NameOf(MessageKind kind) {
  switch (kind) {
    case MessageKind::kPull:
      return "pull";
    case MessageKind::kPush:
      return "push";
    case MessageKind::kPrefetch:
      return "prefetch";
    case MessageKind::kReadOnlyPull:
      return "read-only pull";
    case MessageKind::kPullReply:
    case MessageKind::kPushAck:
    case MessageKind::kReadOnlyReply:
    case MessageKind::kControl:
    case MessageKind::kEvaluation:
      break;
  }
  return "message";
}

class ShardImpl : public Shard {
 public:
  ShardImpl(const ShardOptions& options, StoreIo* io, Reply reply, SaveCut save_cut)
      : options_(options),
        staleness_(options.job.training().staleness()),
        every_steps_(options.job.snapshot().every_steps()),
        window_(2 * staleness_ + 2),
        dtype_(WireDtypeOf(options.job)),
        // At staleness 0 a lane's view stands still until its push is here, so its pull can be answered again from the
        // tables.
        keep_replies_(staleness_ > 0 && options.rules.keep_replies),
        map_(options.job.training().shards(), options.servers),
        io_(io),
        reply_(std::move(reply)),
        save_cut_(std::move(save_cut)),
        applied_(options.step),
        last_cut_(options.step),
        lanes_(options.lanes, Lane{options.step, options.step}),
        slots_(window_ * options.lanes),
        terms_(window_) {}

  absl::Status OpenTables() {
    const auto share_of = [&](uint64_t whole) { return (whole + options_.servers - 1) / options_.servers; };
    const uint64_t bytes_max = share_of(options_.job.store().memory_bytes_max());
    for (int i = 0; i < options_.job.table_size(); ++i) {
      TableOptions table;
      table.config = options_.job.table(i);
      table.number = static_cast<TableNumber>(i + 1);
      table.seed = options_.job.seed();
      table.shards = options_.job.training().shards();
      if (bytes_max > 0) {
        table.memory_rows_max = MemoryBudget::RowsWithin(bytes_max, RowBytesOf(table.config));
      } else {
        table.memory_rows_max = std::max<uint64_t>(1, share_of(table.config.memory_rows_max()));
      }
      table.step = options_.step;
      if (!options_.clocks.empty()) table.clock = options_.clocks[static_cast<size_t>(i)];
      auto opened = EmbeddingTable::Open(table, io_);
      if (!opened.ok()) return Annotate(opened.status(), absl::StrCat("table ", table.config.name()));
      tables_.push_back(*std::move(opened));
    }
    parts_.resize(tables_.size());
    if (bytes_max == 0) return absl::OkStatus();
    std::vector<EmbeddingTable*> tables;
    for (const auto& table : tables_) tables.push_back(table.get());
    budget_ = std::make_unique<MemoryBudget>(bytes_max, std::move(tables));
    return budget_->Deal(/*may_give_back=*/true);
  }

  absl::Status Handle(Message message) override {
    HEARTH_RETURN_IF_ERROR(Dispatch(std::move(message)));
    return cutting_ ? ContinueCut(options_.cut_rows_max) : absl::OkStatus();
  }

  absl::StatusOr<bool> Idle() override {
    if (cutting_) {
      HEARTH_RETURN_IF_ERROR(ContinueCut(options_.cut_rows_max));
      return !cutting_ || !tables_[cut_table_]->CutWaits();
    }
    if (budget_ != nullptr) HEARTH_RETURN_IF_ERROR(budget_->Deal(/*may_give_back=*/true));
    bool more = false;
    for (auto& table : tables_) {
      HEARTH_ASSIGN_OR_RETURN(bool table_more, table->Maintain(applied_, kMaintainRowsMax));
      more |= table_more;
    }
    return more;
  }

  uint64_t applied_step() const override { return applied_; }

  absl::Status Cut() override {
    HEARTH_RETURN_IF_ERROR(BeginCut());
    return FinishCut();
  }

  void FillStats(std::vector<TableStats>* stats) const override;

 private:
  absl::Status Dispatch(Message message) {
    Decoded decoded{std::move(message), {}};
    auto view = DecodeMessage(decoded.message.payload.span());
    if (!view.ok()) return Annotate(view.status(), absl::StrCat("message from rank ", decoded.message.from.rank));
    decoded.view = *std::move(view);
    switch (decoded.view.header.kind) {
      case MessageKind::kPull:
        return HandlePull(std::move(decoded));
      case MessageKind::kPush:
        return HandlePush(std::move(decoded));
      case MessageKind::kPrefetch:
        return HandlePrefetch(std::move(decoded));
      case MessageKind::kReadOnlyPull:
        return HandleReadOnlyPull(std::move(decoded));
      case MessageKind::kPullReply:
      case MessageKind::kPushAck:
      case MessageKind::kReadOnlyReply:
      case MessageKind::kControl:
      case MessageKind::kEvaluation:
        break;
    }
    return Refuse(decoded, "a server does not take messages of this kind");
  }

  // ---- Cuts

  // Marks the moment. What came before of another cut goes first.
  absl::Status BeginCut() {
    const int64_t begin_us = options_.env->NowUs();
    HEARTH_RETURN_IF_ERROR(FinishCut());
    for (size_t i = 0; i < tables_.size(); ++i) HEARTH_RETURN_IF_ERROR(OfTable(i, tables_[i]->BeginCut(applied_)));
    cutting_ = true;
    cut_table_ = 0;
    cut_step_ = applied_;
    cut_stopped_us_ = options_.env->NowUs() - begin_us;
    return absl::OkStatus();
  }

  absl::Status ContinueCut(uint64_t rows_max, bool wait = false) {
    while (cut_table_ < tables_.size()) {
      const auto more = tables_[cut_table_]->ContinueCut(rows_max, wait);
      if (!more.ok()) return OfTable(cut_table_, more.status());
      if (*more) return absl::OkStatus();
      ++cut_table_;
    }
    // All is handed over, and while no table's cut has ended none hands over anything else.
    ServerAtCut report;
    std::vector<TableStats> stats;
    FillStats(&stats);
    uint64_t hash = 0;
    for (size_t i = 0; i < tables_.size(); ++i) {
      const TableCut cut = tables_[i]->EndCut();
      hash += cut.hash;
      stats[i].set_rows(cut.rows);
      if (cut.clock.has_time_s()) *stats[i].mutable_clock() = cut.clock;
      *report.add_table() = std::move(stats[i]);
    }
    report.set_step(cut_step_);
    report.set_rows_hash(hash);
    if (waits_since_us_ >= 0) cut_stopped_us_ += options_.env->NowUs() - waits_since_us_;
    waits_since_us_ = -1;
    report.set_stopped_us(static_cast<uint64_t>(cut_stopped_us_));
    cutting_ = false;
    return save_cut_(std::move(report));
  }

  absl::Status FinishCut() {
    while (cutting_) HEARTH_RETURN_IF_ERROR(ContinueCut(options_.cut_rows_max, /*wait=*/true));
    return absl::OkStatus();
  }

  // A step that would find no room beside a cut waits for it.
  absl::Status MakeWayFor(const std::vector<std::vector<PushPart>>& parts) {
    for (size_t i = 0; cutting_ && i < tables_.size(); ++i) {
      uint64_t signs = 0;
      for (const PushPart& part : parts[i]) signs += part.signs.size();
      if (tables_[i]->HasRoomFor(signs)) continue;
      waits_since_us_ = options_.env->NowUs();
      HEARTH_RETURN_IF_ERROR(FinishCut());
    }
    return absl::OkStatus();
  }

  absl::Status OfTable(size_t table, const absl::Status& status) const {
    return status.ok() ? status
                       : Annotate(status, absl::StrCat("table ", options_.job.table(static_cast<int>(table)).name()));
  }

  // ---- Pulls

  absl::Status HandlePull(Decoded pull) {
    HEARTH_RETURN_IF_ERROR(CheckClock(pull));
    HEARTH_RETURN_IF_ERROR(CheckSections(pull));
    const Header& header = pull.view.header;
    const uint64_t s = header.step;
    if (s <= applied_) return absl::OkStatus();  // repeated after its push
    // A worker sends the pull of s after its push of s − k − 1, which needed the answer to that step's pull.
    if (s > applied_ + window_) return Refuse(pull, absl::StrCat("too far ahead of applied step ", applied_));
    Slot& slot = SlotOf(header.lane, s);
    if (slot.push) return absl::OkStatus();  // repeated after its push
    if (slot.answered) return Repeat(slot, pull);
    if (slot.pull) return absl::OkStatus();  // repeated, still waiting
    if (header.view >= s || header.view + 1 + staleness_ < s) {
      return Refuse(pull, absl::StrCat("view ", header.view, " is impossible at staleness ", staleness_));
    }
    if (header.view < applied_) {
      return Refuse(pull, absl::StrCat("view ", header.view, " is gone, step ", applied_, " is applied"));
    }
    const bool now = header.view == applied_;
    slot.pull = std::move(pull);
    if (!now) return CheckWaiting(*slot.pull);
    HEARTH_RETURN_IF_ERROR(Answer(&slot));
    return Advance();
  }

  // The waiting pull of `slot`, whose view is applied.
  absl::Status Answer(Slot* slot) {
    Decoded pull = std::move(*slot->pull);
    slot->pull.reset();
    HEARTH_RETURN_IF_ERROR(CheckView(pull));
    const Header& header = pull.view.header;
    HEARTH_ASSIGN_OR_RETURN(Bytes reply, MakeReply(pull));
    if (keep_replies_) slot->reply = reply.Clone();
    slot->answered = true;
    Lane& lane = lanes_[header.lane];
    lane.highest = std::max(lane.highest, header.step);
    while (lane.run < applied_ + window_ && SlotOf(header.lane, lane.run + 1).answered) ++lane.run;
    return reply_(pull.message.from, std::move(reply));
  }

  absl::Status Repeat(const Slot& slot, const Decoded& pull) {
    if (!slot.reply.empty()) return reply_(pull.message.from, slot.reply.Clone());
    HEARTH_ASSIGN_OR_RETURN(Bytes reply, MakeReply(pull));
    return reply_(pull.message.from, std::move(reply));
  }

  absl::StatusOr<Bytes> MakeReply(const Decoded& pull) {
    const bool read_only = pull.view.header.kind == MessageKind::kReadOnlyPull;
    Header header;
    header.kind = read_only ? MessageKind::kReadOnlyReply : MessageKind::kPullReply;
    header.lane = pull.view.header.lane;
    header.step = pull.view.header.step;
    header.view = pull.view.header.view;
    std::vector<Section> sections;
    for (const Section& asked : pull.view.sections) {
      Section section;
      section.table = asked.table;
      section.dim = asked.dim;
      section.count = asked.count;
      sections.push_back(section);
    }
    const Dtype dtype = read_only ? Dtype::kFloat32 : dtype_;
    std::vector<char*> values;
    Bytes reply = EncodeMessageInPlace(header, sections, dtype, &values);
    // Expiry is judged with the step that the rows are for: the pull's own, or the cut that is evaluated.
    const uint64_t step = read_only ? header.view : header.step;
    for (size_t i = 0; i < sections.size(); ++i) {
      const Section& asked = pull.view.sections[i];
      if (asked.count == 0) continue;
      auto occurrences = read_only ? absl::Span<const uint32_t>() : asked.occurrences;
      if (dtype == Dtype::kFloat32) {
        auto* const rows = reinterpret_cast<float*>(values[i]);
        HEARTH_RETURN_IF_ERROR(tables_[asked.table - 1]->Pull(step, asked.signs, occurrences, rows));
      } else {
        rows_.resize(size_t{asked.count} * asked.dim);
        HEARTH_RETURN_IF_ERROR(tables_[asked.table - 1]->Pull(step, asked.signs, occurrences, rows_.data()));
        ToHalf(rows_, reinterpret_cast<uint16_t*>(values[i]));
      }
    }
    return reply;
  }

  absl::Status HandleReadOnlyPull(Decoded pull) {
    HEARTH_RETURN_IF_ERROR(CheckSections(pull));
    const uint64_t view = pull.view.header.view;
    if (options_.read_only && view != applied_)
      return Refuse(pull, absl::StrCat("this server has step ", applied_, " alone"));
    if (view < applied_) return absl::OkStatus();  // repeated after its answer: no step is applied during an evaluation
    if (view > applied_) {
      // An endpoint waits for one read-only pull at a time, so its newest replaces an older one.
      auto key = std::make_pair(pull.message.from.rank, pull.message.from.port);
      read_only_waiting_.insert_or_assign(key, std::move(pull));
      return absl::OkStatus();
    }
    HEARTH_ASSIGN_OR_RETURN(Bytes reply, MakeReply(pull));
    return reply_(pull.message.from, std::move(reply));
  }

  // ---- Pushes and the clock

  absl::Status HandlePush(Decoded push) {
    HEARTH_RETURN_IF_ERROR(CheckClock(push));
    HEARTH_RETURN_IF_ERROR(CheckSections(push));
    const Header header = push.view.header;
    const Address from = push.message.from;
    const uint64_t s = header.step;
    if (s > applied_) {
      if (s > applied_ + window_) return Refuse(push, absl::StrCat("too far ahead of applied step ", applied_));
      Slot& slot = SlotOf(header.lane, s);
      if (!slot.push) {
        if (!slot.answered) return Refuse(push, "its pull was never answered");
        HEARTH_RETURN_IF_ERROR(CheckTerms(push));
        slot.reply = Bytes();
        slot.push = std::move(push);
      }
    }
    Header ack;
    ack.kind = MessageKind::kPushAck;
    ack.lane = header.lane;
    ack.step = s;
    HEARTH_RETURN_IF_ERROR(reply_(from, EncodeMessage(ack, {})));
    return Advance();
  }

  // Applies what the rules allow, answering after each step what waited for it.
  absl::Status Advance() {
    while (MayApply(applied_ + 1)) {
      const bool cut = FirstCut(applied_ + 1) == applied_ + 1;
      HEARTH_RETURN_IF_ERROR(Apply(applied_ + 1));
      if (cut) {
        last_cut_ = applied_;
        HEARTH_RETURN_IF_ERROR(BeginCut());
      }
      HEARTH_RETURN_IF_ERROR(AnswerWaiting());
    }
    return absl::OkStatus();
  }

  // Conditions (a) and (c) of docs/PROTOCOL.md §2; (b) by counting up. (c) keeps open exactly the pulls whose view
  // is j − 1.
  bool MayApply(uint64_t j) const {
    if (terms_[j % window_].pushes < lanes_.size()) return false;
    uint64_t reach = j + staleness_;
    if (options_.rules.cut_in_condition_c) reach = std::min(reach, FirstCut(j));
    for (const Lane& lane : lanes_) {
      if ((options_.rules.unbroken_run ? lane.run : lane.highest) < reach) return false;
    }
    return true;
  }

  absl::Status Apply(uint64_t j) {
    const StepTerms terms = terms_[j % window_];
    // A cut once announced is announced by every push until it is reached.
    if (announced_cut_ >= j && (terms.next_cut == 0 || terms.next_cut > announced_cut_)) {
      return absl::InternalError(absl::StrCat("pushes of step ", j, " announce cut ", terms.next_cut,
                                              ", earlier ones announced ", announced_cut_, ": a worker has a bug"));
    }
    announced_cut_ = terms.next_cut;
    if (!terms.skip) {
      for (auto& parts : parts_) parts.clear();
      size_t widened = 0;
      for (uint32_t lane = 0; lane < lanes_.size(); ++lane) {
        for (const Section& section : SlotOf(lane, j).push->view.sections) {
          if (section.count == 0) continue;
          absl::Span<const float> gradients = section.values;
          if (dtype_ == Dtype::kFloat16) {
            if (widened == widened_.size()) widened_.emplace_back();
            std::vector<float>& wide = widened_[widened++];
            wide.resize(section.halves.size());
            FromHalf(section.halves, wide.data());
            gradients = wide;
          }
          parts_[section.table - 1].push_back({section.signs, section.occurrences, gradients});
        }
      }
      HEARTH_RETURN_IF_ERROR(MakeWayFor(parts_));
      if (budget_ != nullptr) HEARTH_RETURN_IF_ERROR(budget_->Deal(/*may_give_back=*/!cutting_));
      for (size_t i = 0; i < tables_.size(); ++i) HEARTH_RETURN_IF_ERROR(tables_[i]->Push(j, terms.n, parts_[i]));
      for (const auto& table : tables_) table->Tick(j, terms.time_s);
    }
    for (uint32_t lane = 0; lane < lanes_.size(); ++lane) SlotOf(lane, j) = Slot();
    terms_[j % window_] = StepTerms();
    applied_ = j;
    return absl::OkStatus();
  }

  absl::Status AnswerWaiting() {
    // Views of pulls beyond applied_ + 1 + k lie ahead.
    for (uint64_t s = applied_ + 1; s <= applied_ + 1 + staleness_; ++s) {
      for (uint32_t lane = 0; lane < lanes_.size(); ++lane) {
        Slot& slot = SlotOf(lane, s);
        if (!slot.pull) continue;
        HEARTH_RETURN_IF_ERROR(slot.pull->view.header.view == applied_ ? Answer(&slot) : CheckWaiting(*slot.pull));
      }
    }
    for (auto it = read_only_waiting_.begin(); it != read_only_waiting_.end();) {
      if (it->second.view.header.view > applied_) {
        ++it;
        continue;
      }
      Decoded pull = std::move(it->second);
      it = read_only_waiting_.erase(it);
      HEARTH_RETURN_IF_ERROR(HandleReadOnlyPull(std::move(pull)));
    }
    return absl::OkStatus();
  }

  // The first cut >= j, as far as the pushes of j say; UINT64_MAX: none known. REQUIRES: the pushes of j are here.
  uint64_t FirstCut(uint64_t j) const {
    uint64_t cut = FirstPlannedCut(j);
    uint64_t announced = terms_[j % window_].next_cut;
    return announced == 0 ? cut : std::min(cut, announced);
  }
  uint64_t FirstPlannedCut(uint64_t j) const {
    return every_steps_ == 0 ? UINT64_MAX : (j + every_steps_ - 1) / every_steps_ * every_steps_;
  }

  // The first cut after applied_, as far as applied pushes said.
  uint64_t NextKnownCut() const {
    const uint64_t planned = FirstPlannedCut(applied_ + 1);
    return announced_cut_ > applied_ ? std::min(planned, announced_cut_) : planned;
  }

  absl::Status HandlePrefetch(Decoded hint) {
    HEARTH_RETURN_IF_ERROR(CheckSections(hint));
    const uint64_t step = hint.view.header.step;
    if (step <= applied_) return absl::OkStatus();  // its pulls are long answered
    for (const Section& section : hint.view.sections) {
      HEARTH_RETURN_IF_ERROR(tables_[section.table - 1]->Prefetch(step, section.signs));
    }
    return absl::OkStatus();
  }

  // ---- Checks. Each returns Internal (a peer has a bug) with the sender, and what it sent.

  absl::Status Refuse(const Decoded& decoded, absl::string_view cause) const {
    const Header& header = decoded.view.header;
    return absl::InternalError(absl::StrCat(NameOf(header.kind), " (kind ", static_cast<int>(header.kind),
                                            ") from rank ", decoded.message.from.rank, ", lane ", header.lane,
                                            ", step ", header.step, ": ", cause));
  }

  absl::Status CheckClock(const Decoded& decoded) const {
    if (options_.read_only) return Refuse(decoded, "this server is read-only");
    if (decoded.view.header.lane >= lanes_.size()) {
      return Refuse(decoded, absl::StrCat("the job has ", lanes_.size(), " lanes"));
    }
    if (decoded.view.header.step == 0) return Refuse(decoded, "steps begin at 1");
    return absl::OkStatus();
  }

  // With the view applied, every cut that could lie between it and the pull's step is known (but for a second one right
  // behind).
  absl::Status CheckView(const Decoded& pull) const {
    const Header& header = pull.view.header;
    const uint64_t next_cut = NextKnownCut();
    const bool exact = header.view + 1 + staleness_ == header.step || header.view == last_cut_;
    if (exact && header.step <= next_cut) return absl::OkStatus();
    return Refuse(pull, absl::StrCat("view ", header.view, " is not this step's: last cut ", last_cut_, ", next cut ",
                                     next_cut == UINT64_MAX ? 0 : next_cut, ", staleness ", staleness_));
  }

  // A pull that would wait for ever: it passes over the tables as they are, for a cut that nobody announced. (Behind a
  // cut the next one is not known yet.)
  absl::Status CheckWaiting(const Decoded& pull) const {
    const Header& header = pull.view.header;
    if (header.step > applied_ + 1 + staleness_ || last_cut_ == applied_ || NextKnownCut() <= header.view) {
      return absl::OkStatus();
    }
    return Refuse(pull, absl::StrCat("view ", header.view, " is not this step's: no such cut, staleness ", staleness_));
  }

  absl::Status CheckSections(const Decoded& decoded) {
    const MessageKind kind = decoded.view.header.kind;
    const bool counted = kind == MessageKind::kPull || kind == MessageKind::kPush;
    seen_.assign(tables_.size(), false);
    for (const Section& section : decoded.view.sections) {
      if (section.table == 0 || section.table > tables_.size()) {
        return Refuse(decoded, absl::StrCat("table ", section.table, " is not in the job"));
      }
      const auto table = [&] { return absl::StrCat("table ", options_.job.table(section.table - 1).name(), ": "); };
      if (seen_[section.table - 1]) return Refuse(decoded, absl::StrCat(table(), "twice"));
      seen_[section.table - 1] = true;
      const uint32_t dim = options_.job.table(section.table - 1).dim();
      if (section.dim != dim)
        return Refuse(decoded, absl::StrCat(table(), "dim ", section.dim, ", the job says ", dim));
      if (section.count == 0) continue;
      if (section.signs.size() != section.count) return Refuse(decoded, absl::StrCat(table(), "no signs"));
      if (counted && section.occurrences.size() != section.count) {
        return Refuse(decoded, absl::StrCat(table(), "no occurrences"));
      }
      const size_t values = dtype_ == Dtype::kFloat16 ? section.halves.size() : section.values.size();
      if (kind == MessageKind::kPush && values != size_t{section.count} * dim) {
        return Refuse(decoded, absl::StrCat(table(), "no gradients"));
      }
      if (std::find(section.occurrences.begin(), section.occurrences.end(), 0u) != section.occurrences.end()) {
        return Refuse(decoded, absl::StrCat(table(), "a sign that does not occur"));
      }
      // Signs ascend, so the ends speak for all.
      if (TableOf(section.signs.front()) != section.table || TableOf(section.signs.back()) != section.table) {
        return Refuse(decoded, absl::StrCat(table(), "signs of another table"));
      }
      if (map_.servers() == 1) continue;
      for (Sign sign : section.signs) {
        if (map_.ServerOf(sign) != options_.server) {
          return Refuse(decoded, absl::StrCat(table(), "sign ", sign, " belongs to server ", map_.ServerOf(sign),
                                              ", this is ", options_.server));
        }
      }
    }
    return absl::OkStatus();
  }

  // The reduction gave every lane the same n, next cut, skip and time. Takes the push into the step's count.
  absl::Status CheckTerms(const Decoded& push) {
    const Header& header = push.view.header;
    const bool skip = (header.flags & kFlagSkip) != 0;
    if (header.next_cut != 0 && header.next_cut < header.step) {
      return Refuse(push, absl::StrCat("next cut ", header.next_cut, " lies behind"));
    }
    if (header.n == 0 && !skip) {
      for (const Section& section : push.view.sections) {
        if (section.count > 0) return Refuse(push, "gradients of a step without records");
      }
    }
    StepTerms& terms = terms_[header.step % window_];
    if (terms.pushes > 0 && (terms.n != header.n || terms.next_cut != header.next_cut || terms.skip != skip ||
                             terms.time_s != header.time_s)) {
      return Refuse(push, absl::StrCat("n ", header.n, ", next cut ", header.next_cut, ", skip ", skip, ", time ",
                                       header.time_s, " differ from another lane's n ", terms.n, ", next cut ",
                                       terms.next_cut, ", skip ", terms.skip, ", time ", terms.time_s));
    }
    terms = {terms.pushes + 1, header.n, header.next_cut, skip, header.time_s};
    return absl::OkStatus();
  }

  // REQUIRES: applied_ < step <= applied_ + window_.
  Slot& SlotOf(uint32_t lane, uint64_t step) { return slots_[lane * window_ + step % window_]; }

  const ShardOptions options_;
  const uint64_t staleness_;    // k
  const uint64_t every_steps_;  // planned cuts; 0: none
  // Answered pulls, hence pushes, reach applied + k + 1; each push frees one permit, so pulls reach k + 1 further.
  const uint64_t window_;
  const Dtype dtype_;  // of values, but for read-only pulls
  const bool keep_replies_;
  const ShardMap map_;
  StoreIo* const io_;
  const Reply reply_;
  const SaveCut save_cut_;

  std::vector<std::unique_ptr<EmbeddingTable>> tables_;  // [table number - 1]
  std::unique_ptr<MemoryBudget> budget_;                 // where one is for all of them
  uint64_t applied_;
  uint64_t last_cut_;           // <= applied_
  uint64_t announced_cut_ = 0;  // by the pushes of applied_; 0: none
  bool cutting_ = false;
  size_t cut_table_ = 0;  // those before it are copied
  uint64_t cut_step_ = 0;
  int64_t cut_stopped_us_ = 0;
  int64_t waits_since_us_ = -1;  // for the cut, a step that has no room beside it
  std::vector<Lane> lanes_;
  std::vector<Slot> slots_;                                   // [lanes, window_]: a ring of steps for each lane
  std::vector<StepTerms> terms_;                              // [window_]
  std::map<std::pair<int, int>, Decoded> read_only_waiting_;  // by sender
  std::vector<std::vector<PushPart>> parts_;                  // scratch of Apply
  std::deque<std::vector<float>> widened_;                    // the same, where gradients came as halves
  std::vector<float> rows_;                                   // scratch of MakeReply
  std::vector<bool> seen_;                                    // scratch of CheckSections
};

void ShardImpl::FillStats(std::vector<TableStats>* stats) const {
  stats->clear();
  std::vector<uint64_t> weights;
  double weight_sum = 0;
  for (size_t i = 0; i < tables_.size(); ++i) {
    const Table& config = options_.job.table(i);
    const EmbeddingTableStats from = tables_[i]->stats();
    TableStats to;
    to.set_name(config.name());
    to.set_rows(from.rows);
    to.set_rows_in_memory(from.rows_in_memory);
    to.set_rows_spilled(from.rows_spilled);
    to.set_rows_expired(from.rows_expired);
    to.set_rows_admitted(from.rows_admitted);
    to.set_gradients_dropped(from.gradients_dropped);
    to.set_rows_non_finite(from.rows_non_finite);
    to.set_memory_hits(from.memory_hits);
    to.set_memory_misses(from.memory_misses);
    to.set_bytes_memory(from.bytes_memory);
    to.set_rows_prefetched(from.rows_prefetched);
    to.set_prefetch_hits(from.prefetch_hits);
    stats->push_back(std::move(to));
    weights.push_back(from.rows * RowBytesOf(config));
    weight_sum += static_cast<double>(weights.back());
  }
  const double disk_bytes = static_cast<double>(io_->store()->DiskBytes());
  for (size_t i = 0; i < weights.size(); ++i) {
    double share = weight_sum > 0 ? static_cast<double>(weights[i]) / weight_sum : 0;
    (*stats)[i].set_bytes_disk(static_cast<uint64_t>(disk_bytes * share));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Shard>> Shard::Open(const ShardOptions& options, StoreIo* io, Reply reply,
                                                   SaveCut save_cut) {
  HEARTH_CHECK(options.servers >= 1 && options.server < options.servers, "server ", options.server, " of ",
               options.servers);
  if (options.lanes == 0) return absl::InvalidArgumentError("training.lanes: 0; a job has at least one lane");
  auto shard = std::make_unique<ShardImpl>(options, io, std::move(reply), std::move(save_cut));
  HEARTH_RETURN_IF_ERROR(shard->OpenTables());
  return std::unique_ptr<Shard>(std::move(shard));
}

}  // namespace hearth
