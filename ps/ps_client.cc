#include "ps/ps_client.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/half.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// A batch dealt to the servers that own its signs: for each server the rows' positions, ascending, so that its signs
// ascend too. Reused from batch to batch.
class Shares {
 public:
  struct Part {
    uint32_t table = 0;  // index into the tables
    absl::Span<const uint32_t> positions;
  };

  void Assign(const ShardMap& map, absl::Span<const TableRows> tables) {
    const uint32_t servers = map.servers();
    size_t total = 0;
    for (const TableRows& table : tables) total += table.signs.size();
    positions_.resize(total);
    parts_.resize(servers);
    for (auto& parts : parts_) parts.clear();
    size_t base = 0;
    for (uint32_t t = 0; t < tables.size(); ++t) {
      const absl::Span<const Sign> signs = tables[t].signs;
      owner_.resize(signs.size());
      next_.assign(servers, 0);
      for (size_t i = 0; i < signs.size(); ++i) ++next_[owner_[i] = map.ServerOf(signs[i])];
      for (uint32_t server = 0; server < servers; ++server) {
        const uint32_t count = next_[server];
        if (count > 0) parts_[server].push_back({t, {positions_.data() + base, count}});
        next_[server] = static_cast<uint32_t>(base);
        base += count;
      }
      for (size_t i = 0; i < signs.size(); ++i) positions_[next_[owner_[i]]++] = static_cast<uint32_t>(i);
    }
  }

  absl::Span<const Part> parts(uint32_t server) const { return parts_[server]; }

 private:
  std::vector<std::vector<Part>> parts_;  // [servers]
  std::vector<uint32_t> positions_;       // [all rows], by table, then server
  std::vector<uint32_t> owner_;           // scratch
  std::vector<uint32_t> next_;            // scratch
};

// Gathers one server's share into a message. Reused.
class Encoder {
 public:
  // `dtype` of the rows that go along; none: signs and occurrences alone.
  Bytes Encode(const Header& header, const Shares& split, uint32_t server, absl::Span<const TableRows> tables,
               std::optional<Dtype> dtype) {
    const absl::Span<const Shares::Part> parts = split.parts(server);
    size_t total = 0;
    for (const Shares::Part& part : parts) total += part.positions.size();
    signs_.resize(total);
    occurrences_.resize(total);
    sections_.clear();
    size_t base = 0;
    for (const Shares::Part& part : parts) {
      const TableRows& table = tables[part.table];
      const size_t count = part.positions.size();
      Section section;
      section.table = table.table;
      section.dim = table.dim;
      section.count = static_cast<uint32_t>(count);
      for (size_t i = 0; i < count; ++i) signs_[base + i] = table.signs[part.positions[i]];
      section.signs = {signs_.data() + base, count};
      if (!table.occurrences.empty()) {
        for (size_t i = 0; i < count; ++i) occurrences_[base + i] = table.occurrences[part.positions[i]];
        section.occurrences = {occurrences_.data() + base, count};
      }
      sections_.push_back(section);
      base += count;
    }
    if (!dtype.has_value()) return EncodeMessage(header, sections_);
    Bytes message = EncodeMessageInPlace(header, sections_, *dtype, &values_);
    for (size_t p = 0; p < parts.size(); ++p) {
      const TableRows& table = tables[parts[p].table];
      auto* halves = reinterpret_cast<uint16_t*>(values_[p]);  // [count, dim], either
      auto* floats = reinterpret_cast<float*>(values_[p]);
      for (uint32_t position : parts[p].positions) {
        const absl::Span<const float> row(table.rows.data() + size_t{position} * table.dim, table.dim);
        if (*dtype == Dtype::kFloat16) {
          ToHalf(row, halves);
          halves += table.dim;
        } else {
          std::memcpy(floats, row.data(), table.dim * sizeof(float));
          floats += table.dim;
        }
      }
    }
    return message;
  }

 private:
  std::vector<Sign> signs_;
  std::vector<uint32_t> occurrences_;
  std::vector<Section> sections_;
  std::vector<char*> values_;
};

void CheckShapes(absl::Span<const TableRows> tables, bool counted, bool with_rows) {
  for (const TableRows& table : tables) {
    const size_t count = table.signs.size();
    HEARTH_CHECK(table.occurrences.size() == count || (!counted && table.occurrences.empty()), "table ", table.table,
                 ": ", count, " signs, ", table.occurrences.size(), " occurrences");
    HEARTH_CHECK(!with_rows || table.rows.size() == count * table.dim, "table ", table.table, ": ", count,
                 " signs of dim ", table.dim, ", ", table.rows.size(), " floats");
  }
}

// The index of the server that sent a reply. Internal: it comes from elsewhere.
absl::StatusOr<uint32_t> ServerOfSender(const ClientOptions& options, const Address& from) {
  const int server = from.rank - options.ranks.server(0);
  if (server >= 0 && server < static_cast<int>(options.map.servers())) return static_cast<uint32_t>(server);
  return absl::InternalError(absl::StrCat("a reply from rank ", from.rank, ", which is no server"));
}

// When a message to one server is due again.
class Retry {
 public:
  void Sent(const ClientOptions& options, const Header& header, uint32_t server) {
    if (wait_us_ >= options.retry_us_max) {
      spdlog::info("event=waiting kind={} lane={} step={} server={}", static_cast<int>(header.kind), header.lane,
                   header.step, server);
    }
    wait_us_ = wait_us_ == 0 ? options.retry_us : std::min(2 * wait_us_, options.retry_us_max);
    due_us_ = options.env->NowUs() + wait_us_;
  }
  int64_t due_us() const { return due_us_; }

 private:
  int64_t wait_us_ = 0;
  int64_t due_us_ = 0;
};

}  // namespace

// ---- Pulls

struct PullClient::State {
  struct Awaited {
    bool asked = false;
    bool landed = false;  // its rows are in place
    Retry retry;
    Bytes reply;  // arrived before Receive asked for it
  };
  struct InFlight {
    Header header;  // of the pull
    Shares split;
    std::vector<Awaited> servers;
  };

  State(const ClientOptions& options, int port)
      : options(options),
        port(port),
        mailbox(options.transport->Open(port)),
        number(static_cast<uint64_t>(options.env->NowUs())) {}

  absl::Status Start(const Header& header, bool also_empty, absl::Span<const TableRows> tables) {
    HEARTH_CHECK(Find(header.kind, header.lane, header.step) == in_flight.size(), "lane ", header.lane, ", step ",
                 header.step, " pulled twice");
    std::unique_ptr<InFlight> pull;
    if (spare.empty()) {
      pull = std::make_unique<InFlight>();
    } else {
      pull = std::move(spare.back());
      spare.pop_back();
    }
    pull->header = header;
    pull->split.Assign(options.map, tables);
    pull->servers.clear();
    pull->servers.resize(options.map.servers());
    InFlight* started = pull.get();
    in_flight.push_back(std::move(pull));
    for (uint32_t server = 0; server < options.map.servers(); ++server) {
      Awaited& awaited = started->servers[server];
      awaited.asked = also_empty || !started->split.parts(server).empty();
      if (awaited.asked) HEARTH_RETURN_IF_ERROR(SendTo(started, server, tables));
    }
    return absl::OkStatus();
  }

  absl::Status SendTo(InFlight* pull, uint32_t server, absl::Span<const TableRows> tables) {
    pull->servers[server].retry.Sent(options, pull->header, server);
    Bytes message = encoder.Encode(pull->header, pull->split, server, tables, std::nullopt);
    return options.transport->Send(port, {options.ranks.server(server), kPortServer}, std::move(message));
  }

  // Waits for every server's part of in_flight[index] and lands it; takes in what arrives for others meanwhile.
  absl::Status Finish(size_t index, absl::Span<TableRows> tables) {
    InFlight* pull = in_flight[index].get();
    while (true) {
      int64_t due_us = kNever;
      const int64_t now_us = options.env->NowUs();
      for (uint32_t server = 0; server < pull->servers.size(); ++server) {
        Awaited& awaited = pull->servers[server];
        if (!awaited.reply.empty()) {
          HEARTH_RETURN_IF_ERROR(Land(*pull, server, tables));
          awaited.reply = Bytes();
          awaited.landed = true;
        }
        if (!awaited.asked || awaited.landed) continue;
        if (now_us >= awaited.retry.due_us()) HEARTH_RETURN_IF_ERROR(SendTo(pull, server, tables));
        due_us = std::min(due_us, awaited.retry.due_us());
      }
      if (due_us == kNever && AllLanded(*pull)) break;
      if (stopped) return absl::CancelledError("the pull is not waited for any more");
      std::optional<Message> message = mailbox->Receive(due_us);
      if (message.has_value() && !message->payload.empty()) HEARTH_RETURN_IF_ERROR(Accept(*std::move(message)));
    }
    spare.push_back(std::move(in_flight[index]));
    in_flight.erase(in_flight.begin() + static_cast<ptrdiff_t>(index));
    return absl::OkStatus();
  }

  static bool AllLanded(const InFlight& pull) {
    return std::all_of(pull.servers.begin(), pull.servers.end(), [](const Awaited& a) { return a.landed || !a.asked; });
  }

  // Puts a reply where it is awaited. A repeated one, or one to a pull long finished, is dropped.
  absl::Status Accept(Message message) {
    HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message.payload.span()));
    MessageKind asked;
    if (header.kind == MessageKind::kPullReply) {
      asked = MessageKind::kPull;
    } else if (header.kind == MessageKind::kReadOnlyReply) {
      asked = MessageKind::kReadOnlyPull;
    } else {
      return absl::InternalError(
          absl::StrCat("rank ", message.from.rank, " sent kind ", static_cast<int>(header.kind), " to a pull thread"));
    }
    HEARTH_ASSIGN_OR_RETURN(const uint32_t server, ServerOfSender(options, message.from));
    const size_t index = Find(asked, header.lane, header.step);
    if (index == in_flight.size()) return absl::OkStatus();
    Awaited& awaited = in_flight[index]->servers[server];
    if (awaited.asked && !awaited.landed && awaited.reply.empty()) awaited.reply = std::move(message.payload);
    return absl::OkStatus();
  }

  // Checks that the reply mirrors the pull and scatters its values.
  absl::Status Land(const InFlight& pull, uint32_t server, absl::Span<TableRows> tables) {
    const auto misfit = [&](absl::string_view cause) {
      return absl::InternalError(absl::StrCat("reply of server ", server, " (rank ", options.ranks.server(server),
                                              ") to lane ", pull.header.lane, ", step ", pull.header.step, ": ",
                                              cause));
    };
    auto decoded = DecodeMessage(pull.servers[server].reply.span());
    if (!decoded.ok()) return misfit(decoded.status().message());
    if (decoded->header.view != pull.header.view) {
      return misfit(absl::StrCat("view ", decoded->header.view, ", asked for ", pull.header.view));
    }
    const absl::Span<const Shares::Part> parts = pull.split.parts(server);
    if (decoded->sections.size() != parts.size()) {
      return misfit(absl::StrCat(decoded->sections.size(), " sections, asked for ", parts.size()));
    }
    for (size_t p = 0; p < parts.size(); ++p) {
      const Section& section = decoded->sections[p];
      TableRows& table = tables[parts[p].table];
      const size_t count = parts[p].positions.size();
      const bool halves = options.dtype == Dtype::kFloat16 && pull.header.kind == MessageKind::kPull;
      const size_t values = halves ? section.halves.size() : section.values.size();
      if (section.table != table.table || section.dim != table.dim || section.count != count ||
          values != count * table.dim) {
        return misfit(absl::StrCat("table ", section.table, ", dim ", section.dim, ", ", section.count, " rows, ",
                                   values, " floats; asked for table ", table.table, ", dim ", table.dim, ", ", count,
                                   " rows"));
      }
      size_t from = 0;
      for (uint32_t position : parts[p].positions) {
        float* const row = table.rows.data() + size_t{position} * table.dim;
        if (halves) {
          FromHalf(section.halves.subspan(from, table.dim), row);
        } else {
          std::memcpy(row, section.values.data() + from, table.dim * sizeof(float));
        }
        from += table.dim;
      }
    }
    return absl::OkStatus();
  }

  // Index of the pull; in_flight.size(): none. A handful are in flight.
  size_t Find(MessageKind kind, uint32_t lane, uint64_t step) const {
    size_t i = 0;
    for (; i < in_flight.size(); ++i) {
      const Header& header = in_flight[i]->header;
      if (header.kind == kind && header.lane == lane && header.step == step) break;
    }
    return i;
  }

  const ClientOptions options;
  const int port;
  Mailbox* const mailbox;
  uint64_t number;  // of the last read-only pull; begins at the clock, so that no reply to an earlier client fits
  std::vector<std::unique_ptr<InFlight>> in_flight;
  std::vector<std::unique_ptr<InFlight>> spare;
  Encoder encoder;
  std::atomic<bool> stopped{false};
};

void PullClient::Stop() {
  state_->stopped = true;
  state_->mailbox->Deliver(Message{});  // wakes
}

PullClient::PullClient(const ClientOptions& options, int port) : state_(std::make_unique<State>(options, port)) {}
PullClient::~PullClient() = default;

absl::Status PullClient::Send(uint32_t lane, uint64_t step, uint64_t view, absl::Span<const TableRows> tables) {
  CheckShapes(tables, /*counted=*/true, /*with_rows=*/false);
  Header header;
  header.kind = MessageKind::kPull;
  header.lane = lane;
  header.step = step;
  header.view = view;
  return state_->Start(header, /*also_empty=*/true, tables);
}

absl::Status PullClient::Receive(uint32_t lane, uint64_t step, absl::Span<TableRows> tables) {
  CheckShapes(tables, /*counted=*/true, /*with_rows=*/true);
  const size_t index = state_->Find(MessageKind::kPull, lane, step);
  HEARTH_CHECK(index < state_->in_flight.size(), "lane ", lane, ", step ", step, " received but never sent");
  return state_->Finish(index, tables);
}

absl::Status PullClient::ReadOnly(uint64_t view, absl::Span<TableRows> tables) {
  CheckShapes(tables, /*counted=*/false, /*with_rows=*/true);
  Header header;
  header.kind = MessageKind::kReadOnlyPull;
  header.step = ++state_->number;
  header.view = view;
  HEARTH_RETURN_IF_ERROR(state_->Start(header, /*also_empty=*/false, tables));
  return state_->Finish(state_->in_flight.size() - 1, tables);
}

// ---- Pushes

struct PushClient::State {
  struct Open {
    Header header;
    std::vector<Bytes> copy;   // [servers]; empty once acknowledged
    std::vector<Retry> retry;  // [servers]
    uint32_t waiting = 0;      // servers that have not acknowledged
  };

  explicit State(const ClientOptions& options) : options(options), mailbox(options.transport->Open(kPortPush)) {}

  absl::Status SendTo(Open* push, uint32_t server) {
    push->retry[server].Sent(options, push->header, server);
    return options.transport->Send(kPortPush, {options.ranks.server(server), kPortServer}, push->copy[server].Clone());
  }

  // Takes in what waits in the mailbox; waits for a first message until the deadline.
  absl::Status Drain(int64_t deadline_us) {
    while (auto message = mailbox->Receive(deadline_us)) {
      deadline_us = 0;
      HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message->payload.span()));
      if (header.kind != MessageKind::kPushAck) {
        return absl::InternalError(absl::StrCat("rank ", message->from.rank, " sent kind ",
                                                static_cast<int>(header.kind), " to a push thread"));
      }
      HEARTH_ASSIGN_OR_RETURN(const uint32_t server, ServerOfSender(options, message->from));
      for (auto push = open.begin(); push != open.end(); ++push) {
        if (push->header.lane != header.lane || push->header.step != header.step) continue;
        if (push->copy[server].empty()) break;  // acknowledged before
        push->copy[server] = Bytes();
        if (--push->waiting == 0) open.erase(push);
        break;
      }
    }
    return absl::OkStatus();
  }

  // Repeats what is overdue; the time when something will be.
  absl::StatusOr<int64_t> Repeat() {
    int64_t due_us = kNever;
    const int64_t now_us = options.env->NowUs();
    for (Open& push : open) {
      for (uint32_t server = 0; server < push.copy.size(); ++server) {
        if (push.copy[server].empty()) continue;
        if (now_us >= push.retry[server].due_us()) HEARTH_RETURN_IF_ERROR(SendTo(&push, server));
        due_us = std::min(due_us, push.retry[server].due_us());
      }
    }
    return due_us;
  }

  const ClientOptions options;
  Mailbox* const mailbox;
  std::deque<Open> open;  // in order of Push
  Shares split;
  Encoder encoder;
};

PushClient::PushClient(const ClientOptions& options) : state_(std::make_unique<State>(options)) {}
PushClient::~PushClient() = default;

absl::Status PushClient::Push(uint32_t lane, uint64_t step, const Terms& terms, absl::Span<const TableRows> tables) {
  State& state = *state_;
  if (terms.skip) tables = {};  // the clock alone moves
  CheckShapes(tables, /*counted=*/true, /*with_rows=*/true);
  HEARTH_RETURN_IF_ERROR(state.Drain(0));
  Header header;
  header.kind = MessageKind::kPush;
  header.lane = lane;
  header.step = step;
  header.flags = terms.skip ? kFlagSkip : 0;
  header.n = terms.n;
  header.next_cut = terms.next_cut;
  header.time_s = terms.time_s;
  const uint32_t servers = state.options.map.servers();
  state.split.Assign(state.options.map, tables);
  State::Open& push = state.open.emplace_back();
  push.header = header;
  push.copy.resize(servers);
  push.retry.resize(servers);
  push.waiting = servers;
  for (uint32_t server = 0; server < servers; ++server) {
    push.copy[server] = state.encoder.Encode(header, state.split, server, tables, state.options.dtype);
    HEARTH_RETURN_IF_ERROR(state.SendTo(&push, server));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> PushClient::Poll() {
  HEARTH_RETURN_IF_ERROR(state_->Drain(0));
  return state_->Repeat();
}

absl::Status PushClient::Flush() {
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(const int64_t due_us, Poll());
    if (due_us == kNever) return absl::OkStatus();
    HEARTH_RETURN_IF_ERROR(state_->Drain(due_us));
  }
}

// ---- Hints

absl::Status SendPrefetch(const ClientOptions& options, uint64_t step, absl::Span<const TableRows> tables) {
  CheckShapes(tables, /*counted=*/false, /*with_rows=*/false);
  Shares split;
  Encoder encoder;
  split.Assign(options.map, tables);
  Header header;
  header.kind = MessageKind::kPrefetch;
  header.step = step;
  for (uint32_t server = 0; server < options.map.servers(); ++server) {
    if (split.parts(server).empty()) continue;
    Bytes message = encoder.Encode(header, split, server, tables, std::nullopt);
    HEARTH_RETURN_IF_ERROR(
        options.transport->Send(kPortPrefetch, {options.ranks.server(server), kPortServer}, std::move(message)));
  }
  return absl::OkStatus();
}

}  // namespace hearth
