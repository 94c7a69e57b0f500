// Servers and lanes on one thread, between them a bag of messages from which a seeded generator draws the next to
// deliver, lose or repeat. Shard is bytes in, bytes out: the same seed gives the same run, and a dead-lock is a number
// of draws without news.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/net/transport.h"
#include "common/net/wire.h"
#include "ps/shard.h"
#include "ps/shard_map.h"
#include "tests/embedding/map_store.h"
#include "tests/ps/plan.h"

namespace hearth {

struct ClusterWeather {
  double lose = 0;
  double repeat = 0;
};

// What a server saved at a cut.
using SavedRows = std::vector<std::pair<KvKey, std::string>>;

class Cluster {
 public:
  Cluster(const Plan& plan, const Reference& reference, uint32_t servers, uint64_t seed, ClusterWeather weather,
          ShardOptions::Rules rules = {})
      : plan_(plan),
        reference_(reference),
        map_(plan.job().training().shards(), servers),
        random_(seed),
        weather_(weather),
        rules_(rules),
        servers_(servers),
        lanes_(plan.lanes) {}

  // Starts from the cut `step` with these rows, dealt anew.
  void Start(uint64_t step, const SavedRows& rows) {
    started_ = trained_ = step;
    for (Lane& lane : lanes_) lane.pulled = lane.pushed = step;
    for (uint32_t i = 0; i < servers_.size(); ++i) {
      Server& server = servers_[i];
      server.store = MakeMapStore();
      std::vector<KvWrite> writes;
      for (const auto& [key, value] : rows) {
        if (map_.ServerOfShard(key.shard) == i) writes.push_back({key, value, false});
      }
      Note(server.store->Write(writes));
      ShardOptions options;
      options.job = plan_.job();
      options.lanes = plan_.lanes;
      options.server = i;
      options.servers = map_.servers();
      options.step = step;
      options.rules = rules_;
      options.cut_rows_max = 1 + random_.Below(3);  // so that steps go on beside a cut
      server.io = std::make_unique<StoreIo>(Env::Real(), server.store.get(), 0);
      auto shard = Shard::Open(
          options, server.io.get(),
          [this, i](Address to, Bytes bytes) {
            wire_.push_back({i, false, to, std::move(bytes)});
            return absl::OkStatus();
          },
          [this, i](const ServerAtCut& report) { return SaveCut(i, report); });
      if (!shard.ok()) return Note(shard.status());
      server.shard = *std::move(shard);
    }
  }

  // Runs until every server has applied `until` (a cut), or something is wrong. Empty: all is well.
  std::string Run(uint64_t until) {
    until_ = until;
    uint64_t last_news = 0;
    for (uint64_t quiet = 0; fault_.empty() && !Done(); ++quiet) {
      Act();
      if (news_ != last_news) quiet = 0;
      last_news = news_;
      if (quiet > 4000) Note(absl::DeadlineExceededError("dead-lock"));
    }
    for (const Server& server : servers_) {  // cuts that are still being copied
      for (bool more = fault_.empty(); more;) {
        const auto idle = server.shard->Idle();
        Note(idle.status());
        more = idle.ok() && *idle;
      }
    }
    if (fault_.empty()) CheckCuts();
    return fault_;
  }

  // Sum over the servers of what they report at their last cut.
  uint64_t rows_hash() const {
    uint64_t sum = 0;
    for (const Server& server : servers_) sum += server.hash_at_cut;
    return sum;
  }
  SavedRows saved() const {
    SavedRows all;
    for (const Server& server : servers_) all.insert(all.end(), server.saved.begin(), server.saved.end());
    return all;
  }
  uint64_t repeats_answered() const { return repeats_answered_; }

 private:
  struct Server {
    std::unique_ptr<KvStore> store;
    std::unique_ptr<StoreIo> io;
    std::unique_ptr<Shard> shard;
    uint64_t hash_at_cut = 0;
    SavedRows saved;
    std::vector<uint64_t> cuts;
  };
  struct Exchange {  // a pull or a push of one lane and step
    uint64_t step = 0;
    std::vector<bool> answered;  // [servers]
    LaneBatch batch;
    bool complete() const { return std::find(answered.begin(), answered.end(), false) == answered.end(); }
  };
  struct Lane {
    uint64_t pulled = 0;  // the last pull sent
    uint64_t pushed = 0;  // the last push sent
    std::vector<Exchange> pulls;
    std::vector<Exchange> pushes;
  };
  struct InFlight {
    uint32_t server = 0;
    bool to_server = false;
    Address worker;
    Bytes bytes;
  };

  void Note(const absl::Status& status) {
    if (!status.ok() && fault_.empty()) fault_ = std::string(status.message());
  }
  bool Done() const {
    for (const Server& server : servers_) {
      if (server.shard->applied_step() < until_) return false;
    }
    return true;
  }
  // Every server has saved at every cut, once, in order.
  void CheckCuts() {
    std::vector<uint64_t> expected;
    for (uint64_t cut : plan_.CutsKnownAt(plan_.steps)) {
      if (cut > started_ && cut <= until_) expected.push_back(cut);
    }
    for (const Server& server : servers_) {
      if (server.cuts != expected) Note(absl::DataLossError("a cut was missed or saved twice"));
    }
  }
  bool HasAll(const Lane& lane, uint64_t step) const {
    for (const Exchange& pull : lane.pulls) {
      if (pull.step == step) return pull.complete();
    }
    return false;
  }

  absl::Status SaveCut(uint32_t i, const ServerAtCut& report) {
    Server& server = servers_[i];
    const uint64_t step = report.step();
    if (!plan_.IsCut(step)) return absl::InternalError(absl::StrCat("saves at step ", step, ", which is no cut"));
    server.cuts.push_back(step);
    server.hash_at_cut = report.rows_hash();
    server.saved.clear();
    return server.store->Scan({0, 0}, {map_.shards(), 0}, [&](KvKey key, absl::string_view value) {
      server.saved.emplace_back(key, std::string(value));
      return true;
    });
  }

  void Act() {
    const uint64_t what = random_.Below(100);
    Lane& lane = lanes_[random_.Below(lanes_.size())];
    const uint32_t l = static_cast<uint32_t>(&lane - lanes_.data());
    if (what < 40) return Deliver();
    if (what < 55) return SendPull(l);
    if (what < 70) return Train();
    if (what < 85) return SendPush(l);
    if (what < 90) {
      auto more = servers_[random_.Below(servers_.size())].shard->Idle();
      return Note(more.status());
    }
    // A repeat of whatever is unanswered; more of them when nothing else moves.
    if (what < 93 || wire_.empty()) Resend(l);
  }

  void SendPull(uint32_t l) {
    Lane& lane = lanes_[l];
    // k + 1 permits; nothing beyond the cut that this run ends with.
    if (lane.pulled >= std::min(lane.pushed + plan_.staleness + 1, until_)) return;
    Exchange pull;
    pull.step = ++lane.pulled;
    pull.answered.assign(servers_.size(), false);
    pull.batch = plan_.MakeBatch(l, pull.step);
    for (uint32_t i = 0; i < servers_.size(); ++i) Put(i, l, MakePull(l, pull, i));
    if (random_.Below(3) == 0) {
      for (uint32_t i = 0; i < servers_.size(); ++i) Put(i, l, MakeMessage(MessageKind::kPrefetch, l, pull, i, {}));
    }
    lane.pulls.push_back(std::move(pull));
    ++news_;
  }

  // The reduction: one step of all lanes at once.
  void Train() {
    const uint64_t step = trained_ + 1;
    for (const Lane& lane : lanes_) {
      if (!HasAll(lane, step)) return;
    }
    for (uint32_t l = 0; l < lanes_.size(); ++l) {
      Lane& lane = lanes_[l];
      auto pull = std::find_if(lane.pulls.begin(), lane.pulls.end(), [&](const Exchange& e) { return e.step == step; });
      Exchange push = std::move(*pull);
      lane.pulls.erase(pull);
      plan_.Train(l, step, &push.batch);
      push.answered.assign(servers_.size(), false);
      lane.pushes.push_back(std::move(push));
    }
    trained_ = step;
    ++news_;
  }

  void SendPush(uint32_t l) {
    Lane& lane = lanes_[l];
    if (lane.pushed >= trained_) return;
    ++lane.pushed;
    for (const Exchange& push : lane.pushes) {
      if (push.step != lane.pushed) continue;
      for (uint32_t i = 0; i < servers_.size(); ++i) Put(i, l, MakePush(l, push, i));
    }
    ++news_;
  }

  void Resend(uint32_t l) {
    Lane& lane = lanes_[l];
    for (const Exchange& pull : lane.pulls) {
      for (uint32_t i = 0; i < servers_.size(); ++i) {
        if (!pull.answered[i] && random_.Below(2) == 0) Put(i, l, MakePull(l, pull, i));
      }
    }
    for (const Exchange& push : lane.pushes) {
      for (uint32_t i = 0; i < servers_.size() && push.step <= lane.pushed; ++i) {
        if (!push.answered[i] && random_.Below(2) == 0) Put(i, l, MakePush(l, push, i));
      }
    }
  }

  void Put(uint32_t server, uint32_t lane, Bytes bytes) {
    wire_.push_back(InFlight{server, true, Address{static_cast<int>(100 + lane), kPortPull}, std::move(bytes)});
  }

  void Deliver() {
    if (wire_.empty()) return;
    const size_t drawn = random_.Below(wire_.size());
    if (random_.Uniform() < weather_.repeat) {
      InFlight copy{wire_[drawn].server, wire_[drawn].to_server, wire_[drawn].worker, wire_[drawn].bytes.Clone()};
      wire_.push_back(std::move(copy));
    }
    InFlight message = std::move(wire_[drawn]);
    std::swap(wire_[drawn], wire_.back());
    wire_.pop_back();
    if (random_.Uniform() < weather_.lose) return;
    if (!message.to_server) return Accept(message);
    Shard* shard = servers_[message.server].shard.get();
    const uint64_t before = shard->applied_step();
    Note(shard->Handle({message.worker, std::move(message.bytes)}));
    if (shard->applied_step() != before) ++news_;
  }

  // A worker takes in a reply or an acknowledgement.
  void Accept(const InFlight& message) {
    auto decoded = DecodeMessage(message.bytes.span());
    if (!decoded.ok()) return Note(decoded.status());
    const Header& header = decoded->header;
    Lane& lane = lanes_[header.lane];
    const bool ack = header.kind == MessageKind::kPushAck;
    for (Exchange& exchange : ack ? lane.pushes : lane.pulls) {
      if (exchange.step != header.step) continue;
      if (exchange.answered[message.server]) {
        ++repeats_answered_;
        return;
      }
      exchange.answered[message.server] = true;
      ++news_;
      if (!ack) Land(*decoded, message.server, &exchange);
      return;
    }
  }

  void Land(const DecodedMessage& reply, uint32_t server, Exchange* pull) {
    size_t next = 0;  // section
    for (uint32_t t = 0; t < kTables; ++t) {
      TableBatch& table = pull->batch[t];
      size_t row = 0;  // of the section
      for (size_t i = 0; i < table.signs.size(); ++i) {
        if (map_.ServerOf(table.signs[i]) != server) continue;
        std::copy_n(reply.sections.at(next).values.begin() + row * kDims[t], kDims[t],
                    table.rows.begin() + i * kDims[t]);
        ++row;
      }
      if (row > 0) ++next;
    }
    if (!pull->complete()) return;
    const LaneBatch expected = reference_.Pull(reply.header.lane, pull->step);
    for (uint32_t t = 0; t < kTables; ++t) {
      if (SameBits(expected[t].rows, pull->batch[t].rows)) continue;
      Note(absl::DataLossError(
          absl::StrCat("wrong rows: lane ", reply.header.lane, ", step ", pull->step, ", table ", t + 1)));
    }
  }

  Bytes MakePull(uint32_t l, const Exchange& pull, uint32_t server) {
    Header header;
    header.view = plan_.View(pull.step);
    return MakeMessage(MessageKind::kPull, l, pull, server, header);
  }
  Bytes MakePush(uint32_t l, const Exchange& push, uint32_t server) {
    Header header;
    header.n = plan_.Records(push.step);
    header.next_cut = plan_.NextCut(push.step);
    header.flags = plan_.Skip(push.step) ? kFlagSkip : 0;
    return MakeMessage(MessageKind::kPush, l, push, server, header);
  }
  Bytes MakeMessage(MessageKind kind, uint32_t l, const Exchange& exchange, uint32_t server, Header header) {
    header.kind = kind;
    header.lane = l;
    header.step = exchange.step;
    LaneBatch share(kTables);
    std::vector<Section> sections;
    for (uint32_t t = 0; t < kTables; ++t) {
      const TableBatch& table = exchange.batch[t];
      for (size_t i = 0; i < table.signs.size(); ++i) {
        if (map_.ServerOf(table.signs[i]) != server) continue;
        share[t].signs.push_back(table.signs[i]);
        share[t].occurrences.push_back(table.occurrences[i]);
        share[t].rows.insert(share[t].rows.end(), &table.rows[i * kDims[t]], &table.rows[i * kDims[t]] + kDims[t]);
      }
      if (share[t].signs.empty()) continue;
      Section section;
      section.table = t + 1;
      section.dim = kDims[t];
      section.count = static_cast<uint32_t>(share[t].signs.size());
      section.signs = share[t].signs;
      section.occurrences = share[t].occurrences;
      if (kind == MessageKind::kPush) section.values = share[t].rows;
      sections.push_back(section);
    }
    return EncodeMessage(header, sections);
  }

  const Plan plan_;
  const Reference& reference_;
  const ShardMap map_;
  Random random_;
  const ClusterWeather weather_;
  const ShardOptions::Rules rules_;
  std::vector<Server> servers_;
  std::vector<Lane> lanes_;
  std::vector<InFlight> wire_;
  uint64_t started_ = 0;
  uint64_t trained_ = 0;
  uint64_t until_ = 0;
  uint64_t news_ = 0;  // counts everything that brings the run forward
  uint64_t repeats_answered_ = 0;
  std::string fault_;
};

}  // namespace hearth
