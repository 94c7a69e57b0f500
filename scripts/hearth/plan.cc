#include "scripts/hearth/plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "common/net/wire.h"
#include "embedding/embedding_table.h"
#include "embedding/memory_budget.h"
#include "embedding/rocksdb_store.h"
#include "embedding/row_index.h"
#include "embedding/row_record.h"
#include "model/adopt/parameter_shapes.h"
#include "model/batch/batch.h"
#include "ps/shard_map.h"
#include "worker/collective/lane_sum.h"
#include "worker/step/step_verdict.h"

namespace hearth {
namespace {

// Processes without rows and parameters, as Linux counts their resident memory.
constexpr double kServerBytes = 50 << 20;
constexpr double kSchedulerBytes = 24 << 20;
constexpr double kWorkerBytes = 190 << 20;           // LibTorch's code that a CPU's steps touch
constexpr double kPayingOff = 1.1;                   // largest over mean share, from which on it is worth a warning
constexpr double kProofBytes = sizeof(Header::tag);  // beside each buffer of an exchange
// Of rank 0, about: a file of rows in the MANIFEST, and a lane.
constexpr double kFileEntryBytes = 40;
constexpr double kLaneStateBytes = 400;
constexpr double kTensorEntryBytes = 110;      // of a tensor in the header of dense.safetensors
constexpr double kFilesOfStore = 16;           // 12 sorted runs at most, and RocksDB's own
constexpr double kMergedFileBytes = 64 << 20;  // RocksDB's target_file_size_base: a merged run is many files
// Multiply-adds a second of a worker's thread in the towers (docs/PERFORMANCE.md: 48 GFLOP/s are 24).
constexpr double kDenseMultiplyAdds = 20e9;

// What the job's model has, by its modules.
struct Dense {
  double parameters = 0;
  double moment_columns = 0;
  double multiply_adds = 0;  // a record, forward: each weight of a matrix once
  double outputs = 0;        // a record: floats that layers give
  double tensors = 0;        // arrays of parameters
};

Dense DenseOf(const Job& job) {
  Dense dense;
  dense.outputs = MakeFeatureLayout(job).width;
  for (const ParameterModule& module : ModulesOf(job)) {
    for (const Parameter& parameter : module.parameters) {
      double size = 1;
      for (const ParameterAxis& axis : parameter.axes) size *= static_cast<double>(axis.size);
      if (parameter.statistic) {
        dense.moment_columns += size / 2;  // a mean and a variance
        continue;
      }
      dense.parameters += size;
      ++dense.tensors;
      (parameter.axes.size() > 1 ? dense.multiply_adds : dense.outputs) += size;
      // A feature gate gives as many columns as it takes.
      if (parameter.leaf == "up") dense.outputs += 2 * static_cast<double>(parameter.axes.back().size);
    }
  }
  return dense;
}

// What one lane's messages of a step take to one server, and from it.
struct LaneBytes {
  double prefetch = 0, pull = 0, reply = 0, push = 0, acknowledgement = 0;
  double to_server() const { return prefetch + pull + push; }
  double from_server() const { return reply + acknowledgement; }
};

class Planner {
 public:
  explicit Planner(const PlanInput& input)
      : in_(input),
        job_(input.job),
        lanes_(job_.training().lanes()),
        staleness_(job_.training().staleness()),
        dense_(DenseOf(job_)) {}

  Plan Make() {
    PlanShares();
    plan_.dense_parameters = static_cast<uint64_t>(dense_.parameters);
    plan_.ranks = {Scheduler(), Server(), Worker("worker 0", 0)};
    if (in_.workers > 1) plan_.ranks.push_back(Worker("other workers", in_.workers - 1));
    if (in_.nodes > 1) PlanNode();
    PlanTime();
    Assume();
    return std::move(plan_);
  }

 private:
  uint32_t Batch() const { return job_.training().batch_size(); }
  double LaneRecords() const { return static_cast<double>(Batch()) / lanes_; }
  uint32_t LanesOfWorker(uint32_t worker) const {
    return static_cast<uint32_t>(
        LanesOf(static_cast<int>(lanes_), static_cast<int>(in_.workers), static_cast<int>(worker)));
  }

  void PlanShares() {
    const uint32_t shards = job_.training().shards();
    const ShardMap map(shards, in_.servers);
    std::vector<uint32_t> held(in_.servers, 0);
    for (uint32_t shard = 0; shard < shards; ++shard) ++held[map.ServerOfShard(shard)];
    plan_.shards_largest = *std::max_element(held.begin(), held.end());
    mean_ = 1.0 / in_.servers;
    largest_ = static_cast<double>(plan_.shards_largest) / shards;
    plan_.largest_over_mean = largest_ / mean_;
    if (plan_.largest_over_mean <= kPayingOff) return;
    plan_.warnings.push_back(absl::StrFormat(
        "training.shards: %d logical shards on %d servers give one server %.2f times the mean load; set "
        "training.shards to a "
        "multiple of %d before the first start (from then on only `hearth adopt` deals rows anew), or take a number of "
        "servers that divides %d",
        shards, in_.servers, plan_.largest_over_mean, in_.servers, shards));
  }

  // Of a server's share, and of the largest one.
  template <typename F>
  PlanFigure OfServer(const std::string& what, const std::string& how, const F& bytes) const {
    PlanFigure figure;
    figure.what = what;
    figure.how = how;
    figure.value = bytes(mean_, mean_ * job_.training().shards());
    figure.largest = bytes(largest_, static_cast<double>(plan_.shards_largest));
    return figure;
  }
  static PlanFigure Same(const std::string& what, double value, const std::string& how) {
    return {what, value, value, false, how};
  }
  static PlanFigure AtMost(PlanFigure figure) {
    figure.at_most = true;
    return figure;
  }

  // ---- Messages

  LaneBytes BytesOfLane(double share) const {
    LaneBytes bytes;
    bytes.pull = bytes.reply = bytes.push = bytes.acknowledgement = sizeof(Header);
    double some = 1;  // probability that none of the signs is the server's
    for (int t = 0; t < job_.table_size(); ++t) {
      const double signs = in_.tables[static_cast<size_t>(t)].signs / lanes_;
      const double there = 1 - std::pow(1 - share, signs);
      some *= 1 - there;
      const auto section = [&](bool asks, bool with_values) {
        const auto values = with_values ? std::make_optional(WireDtypeOf(job_)) : std::nullopt;
        const uint32_t dim = job_.table(t).dim();
        const double frame = static_cast<double>(SectionBytesFor(dim, 0, asks, asks, values));
        constexpr uint64_t kMany = 1024;  // no padding
        const double a_row = (static_cast<double>(SectionBytesFor(dim, kMany, asks, asks, values)) - frame) / kMany;
        return there * frame + share * signs * a_row;
      };
      bytes.prefetch += section(true, false);
      bytes.pull += section(true, false);
      bytes.reply += section(false, true);
      bytes.push += section(true, true);
    }
    bytes.prefetch += (1 - some) * sizeof(Header);
    return bytes;
  }

  // Bytes that a worker sends in the reduction of a step.
  double ReductionBytes(uint32_t worker) const {
    if (in_.workers < 2) return 0;
    const double peers = in_.workers - 1.0;
    const double slice = dense_.parameters / in_.workers * sizeof(float);
    return peers * (LanesOfWorker(worker) * (slice + TailBytes()) + kProofBytes + slice + kProofBytes);
  }
  double ReductionBytesFromOthers(uint32_t worker) const {
    if (in_.workers < 2) return 0;
    const double slice = dense_.parameters / in_.workers * sizeof(float);
    return (lanes_ - LanesOfWorker(worker)) * (slice + TailBytes()) + (in_.workers - 1.0) * (slice + 2 * kProofBytes);
  }
  double TailBytes() const { return kVoteBytes + 2 * dense_.moment_columns * sizeof(float); }

  std::vector<PlanFigure> ServerNetwork() const {
    return {OfServer("bytes sent", "replies with rows, acknowledgements: of each lane",
                     [&](double share, double) { return lanes_ * BytesOfLane(share).from_server(); }),
            OfServer("bytes received", "prefetches, pulls and pushes: of each lane",
                     [&](double share, double) { return lanes_ * BytesOfLane(share).to_server(); }),
            Same("messages sent", 2.0 * lanes_, "2 a lane"), Same("messages received", 3.0 * lanes_, "3 a lane")};
  }

  std::vector<PlanFigure> WorkerNetwork(uint32_t worker) const {
    const double lanes = LanesOfWorker(worker);
    const double exchanged = 4.0 * (in_.workers - 1);
    const LaneBytes bytes = BytesOfLane(mean_);
    return {Same("bytes sent", lanes * in_.servers * bytes.to_server() + ReductionBytes(worker),
                 "its lanes' messages to all servers, and its part of the reduction"),
            Same("bytes received", lanes * in_.servers * bytes.from_server() + ReductionBytesFromOthers(worker),
                 "rows from all servers, and the others' parts of the reduction"),
            Same("messages sent", 3 * lanes * in_.servers + exchanged, "3 a lane and server, 4 a worker"),
            Same("messages received", 2 * lanes * in_.servers + exchanged, "2 a lane and server, 4 a worker")};
  }

  // ---- Ranks

  PlanRank Scheduler() const {
    PlanRank rank;
    rank.name = "scheduler";
    double rows = 0;
    for (int t = 0; t < job_.table_size(); ++t) {
      rows += static_cast<double>(StoreBytesFor(RowsOf(t, 1), RowBytesOf(job_.table(t))));
    }
    const double files = in_.servers * kFilesOfStore + rows / kMergedFileBytes;
    const double manifest = files * kFileEntryBytes + lanes_ * kLaneStateBytes;
    rank.memory = {Same("the process", kSchedulerBytes, "built-in"),
                   AtMost(Same("a MANIFEST being made", 3 * manifest, "files of all servers, lanes"))};
    rank.disk = {Same("a MANIFEST", manifest, absl::StrFormat("%.0f files of all servers, and the lanes", files))};
    rank.network = {Same("messages received a second", in_.workers, "Progress: a step needs none")};
    return rank;
  }

  PlanRank Server() {
    PlanRank rank;
    rank.name = "server";
    rank.count = in_.servers;
    for (int t = 0; t < job_.table_size(); ++t) rank.memory.push_back(TableMemoryOf(t));
    rank.memory.push_back(OfServer("messages held", "a push, a pull and a kept reply of each lane and step in flight",
                                   [&](double share, double) {
                                     const LaneBytes bytes = BytesOfLane(share);
                                     return lanes_ * (staleness_ + 1.0) * (bytes.pull + bytes.push + bytes.reply);
                                   }));
    rank.memory.push_back(Same("the process", kServerBytes, "built-in"));
    if (const uint64_t cache = job_.store().block_cache_bytes(); cache > 0) {
      rank.memory.push_back(Same("RocksDB's block cache", static_cast<double>(cache), "store.block_cache_bytes"));
    }
    rank.memory.push_back(
        AtMost(Same("RocksDB's memtables", 2.0 * static_cast<double>(RocksDbOptions().write_buffer_bytes),
                    "two; rows go past them")));
    const auto records = [&](uint64_t (*bytes_for)(uint64_t, uint64_t)) {
      return [this, bytes_for](double share, double) {
        double bytes = 0;
        for (int t = 0; t < job_.table_size(); ++t) {
          bytes += static_cast<double>(bytes_for(RowsOf(t, share), RowBytesOf(job_.table(t))));
        }
        return bytes;
      };
    };
    rank.memory.push_back(AtMost(OfServer("page cache for the store's indices",
                                          "blocks' indices and keys' filters, where rows are read from disk",
                                          records(StoreIndexBytesFor))));
    const PlanFigure once = OfServer("rows, once", "what one snapshot holds after a merge", records(StoreBytesFor));
    PlanFigure live = once, worst = once;
    live.what = "a store before a merge";
    live.how = "RocksDB merges all when what is newer is twice the oldest run";
    worst.what = "worst case";
    worst.how = "(snapshot.keep + 2) times: everything changes between two snapshots";
    for (double* bytes : {&live.value, &live.largest}) *bytes *= 3;
    for (double* bytes : {&worst.value, &worst.largest}) *bytes *= job_.snapshot().keep() + 2.0;
    const PlanFigure cut = OfServer(
        "written at a cut", "rows that snapshot.every_steps steps change, no row twice", [this](double share, double) {
          double bytes = 0;
          for (int t = 0; t < job_.table_size(); ++t) {
            bytes += static_cast<double>(StoreBytesFor(ChangedOf(t, share), RowBytesOf(job_.table(t))));
          }
          return bytes;
        });
    rank.disk = {once, AtMost(cut), AtMost(live), AtMost(worst)};
    rank.network = ServerNetwork();
    return rank;
  }

  // Rows of a table on a server with that share.
  uint64_t RowsOf(int table, double share) const {
    return static_cast<uint64_t>(std::ceil(in_.tables[static_cast<size_t>(table)].rows * share));
  }

  // Rows of it that change from cut to cut.
  uint64_t ChangedOf(int table, double share) const {
    const double steps = job_.snapshot().every_steps();
    const double changed = in_.tables[static_cast<size_t>(table)].signs * share * steps;
    return static_cast<uint64_t>(std::min(changed, static_cast<double>(RowsOf(table, share))));
  }

  TableMemory MemoryWithin(int table, double share, double shards, uint64_t memory_rows_max) const {
    TableOptions options;
    options.config = job_.table(table);
    options.number = static_cast<TableNumber>(table + 1);
    options.shards = job_.training().shards();
    options.memory_rows_max = memory_rows_max;
    return EmbeddingTable::MemoryFor(options, RowsOf(table, share), ChangedOf(table, share),
                                     static_cast<uint32_t>(std::lround(shards)));
  }
  TableMemory MemoryOf(int table, double share, double shards) const {
    const auto of_server = [&](uint64_t whole) { return (whole + in_.servers - 1) / in_.servers; };
    uint64_t rows_max = std::max<uint64_t>(1, of_server(job_.table(table).memory_rows_max()));
    if (const uint64_t bytes = of_server(job_.store().memory_bytes_max()); bytes > 0) {
      rows_max = RowsOfBudget(table, share, static_cast<double>(bytes));
    }
    return MemoryWithin(table, share, shards, rows_max);
  }

  // As MemoryBudget deals where all tables are read alike: those that fit stay whole, the others share what is left.
  uint64_t RowsOfBudget(int table, double share, double bytes) const {
    std::vector<std::pair<double, int>> needs;  // of all rows
    for (int t = 0; t < job_.table_size(); ++t) {
      const uint64_t all = std::max<uint64_t>(1, RowsOf(t, share));
      needs.emplace_back(static_cast<double>(MemoryWithin(t, share, 0, all + all / 8).bytes), t);
    }
    std::sort(needs.begin(), needs.end());
    const auto row_bytes = [&](int t) { return RowBytesOf(job_.table(t)) + RowIndex::kRowBytes; };
    for (size_t i = 0; i < needs.size(); ++i) {
      const auto [need, t] = needs[i];
      const double part = bytes / static_cast<double>(needs.size() - i);
      bytes -= std::min(need, part);
      if (t != table) continue;
      const uint64_t all = std::max<uint64_t>(1, RowsOf(t, share));
      if (need <= part) return all + all / 8;
      const TableMemory none = MemoryWithin(t, share, 0, 1);  // filters and buffers
      return MemoryBudget::RowsWithin(static_cast<uint64_t>(std::max(1.0, part - static_cast<double>(none.bytes))),
                                      row_bytes(t));
    }
    return 1;
  }

  // Of the rows of the server with the largest share. Each server keeps as many, whatever its share.
  double ShareInMemory(int table) const {
    const uint64_t rows = RowsOf(table, largest_);
    return rows == 0 ? 1 : static_cast<double>(MemoryOf(table, largest_, 0).rows_in_memory) / static_cast<double>(rows);
  }

  PlanFigure TableMemoryOf(int table) {
    const std::string& name = job_.table(table).name();
    if (const double share = ShareInMemory(table); share < 1) {
      plan_.warnings.push_back(
          absl::StrFormat("table \"%s\": %.3g %% of the rows of the fullest server fit into memory; the "
                          "others are read from disk ahead of their pull",
                          name, 100 * share));
    }
    const TableMemory memory = MemoryOf(table, mean_, 0);
    return OfServer(
        absl::StrCat("table ", name),
        absl::StrFormat("%d bytes a row; index, sets of changed rows; filters %.3g MB, buffers of cuts %.3g MB",
                        RowBytesOf(job_.table(table)), 1e-6 * static_cast<double>(memory.filter_bytes),
                        1e-6 * static_cast<double>(memory.write_bytes)),
        [&](double share, double shards) { return static_cast<double>(MemoryOf(table, share, shards).bytes); });
  }

  PlanRank Worker(const std::string& name, uint32_t worker) const {
    PlanRank rank;
    rank.name = name;
    rank.count = worker == 0 ? 1 : in_.workers - 1;
    const double lanes = LanesOfWorker(worker);
    const DenseOptimizer& optimizer = job_.training().dense_optimizer();
    const double state = optimizer.kind() == DenseOptimizer::SGD ? 0 : 2;
    const double mean_weights = optimizer.ema_decay() > 0 ? 1 : 0;
    const double exchanged =
        in_.workers < 2 ? 0 : (lanes * (in_.workers - 1) + (lanes_ - lanes)) / static_cast<double>(in_.workers);
    const double arrays = 3 + lanes + state + mean_weights + exchanged;
    rank.memory = {
        Same("the process", kWorkerBytes, "built-in: LibTorch's code on a CPU"),
        Same("dense parameters", dense_.parameters * sizeof(float) * arrays,
             absl::StrFormat("%.0f parameters, %.1f arrays: weights, sum, zeros, optimizer's %.0f, a gradient a "
                             "lane, the reduction's",
                             dense_.parameters, arrays, state)),
        Same("activations", LaneRecords() * dense_.outputs * 3 * sizeof(float),
             "roughly: three arrays for what each layer gives, of one lane at a time")};
    double signs_bytes = 0, rows_bytes = 0;
    for (int t = 0; t < job_.table_size(); ++t) {
      const double signs = in_.tables[static_cast<size_t>(t)].signs / lanes_ * lanes;
      signs_bytes += signs * (sizeof(Sign) + sizeof(uint32_t));
      rows_bytes += signs * job_.table(t).dim() * 2 * sizeof(float);
    }
    signs_bytes += LaneRecords() * lanes * (job_.slot_size() + job_.dense_size() + 2 * job_.task_size()) * sizeof(Sign);
    const double ahead = job_.training().read_ahead_batches_max();
    rank.memory.push_back(Same("batches", (ahead + 1) * signs_bytes + (staleness_ + 2.0) * (signs_bytes + rows_bytes),
                               "read ahead; with rows and gradients of staleness + 2 steps"));
    const LaneBytes bytes = BytesOfLane(mean_);
    rank.memory.push_back(Same("messages in flight",
                               lanes * in_.servers * (staleness_ + 1.0) * (bytes.push + bytes.reply),
                               "pushes until they are acknowledged, replies until they are in place"));
    if (worker == 0 && job_.split_size() > 0) {
      rank.memory.push_back(AtMost(Same("an evaluation, a million records", 1e6 * (60 + 5.0 * job_.task_size()),
                                        "60 + 5 a task for each record of a split, on worker 0 alone")));
    }
    if (worker == 0) {
      rank.disk = {
          Same("dense.safetensors, a snapshot",
               (dense_.parameters * sizeof(float) + dense_.tensors * kTensorEntryBytes) * (1 + state + mean_weights),
               "weights and the optimizer's arrays")};
    }
    rank.network = WorkerNetwork(worker);
    return rank;
  }

  // ---- Nodes

  void PlanNode() {
    const auto ceil_of = [&](uint32_t ranks) { return std::ceil(static_cast<double>(ranks) / in_.nodes); };
    const double servers = ceil_of(in_.servers), workers = ceil_of(in_.workers);
    const PlanRank& server = plan_.ranks[1];
    const PlanRank& worker = plan_.ranks[2];
    const auto both = [&](auto pick) { return servers * pick(server) + workers * pick(worker); };
    const double off_node = (in_.nodes - 1.0) / in_.nodes;
    plan_.node = {
        Same("servers", servers, "dealt round"),
        Same("workers", workers, "dealt round"),
        Same("memory, bytes", both([](const PlanRank& r) { return SumOf(r.memory, false, true); }),
             "of servers with the largest share"),
        AtMost(Same("memory at most, bytes", both([](const PlanRank& r) { return SumOf(r.memory, true, true); }),
                    "with all buffers full")),
        AtMost(Same("disk of its servers, worst case, bytes", servers * server.disk.back().largest, "")),
        Same("bytes sent a step", off_node * both([](const PlanRank& r) { return r.network[0].largest; }),
             "to other nodes"),
        Same("bytes received a step", off_node * both([](const PlanRank& r) { return r.network[1].largest; }),
             "from other nodes")};
  }

  // ---- Time

  // A row of a table by the rates of the nearest kind, in the proportion of the bytes that are touched.
  double RowNs(const Table& table, double RowRates::*rate) const {
    const RowRates* nearest = &in_.rates.rows.front();
    double least = 1e18;
    for (const RowRates& one : in_.rates.rows) {
      const double distance = std::abs(std::log(static_cast<double>(one.dim) / table.dim())) +
                              (one.optimizer == table.optimizer().kind() ? 0 : 0.01) +
                              (one.weights == table.weights() ? 0 : 0.001);
      if (distance < least) {
        least = distance;
        nearest = &one;
      }
    }
    Table of_rate = table;
    of_rate.set_dim(nearest->dim);
    of_rate.set_weights(nearest->weights);
    const double scale = static_cast<double>(RowBytesOf(table)) / static_cast<double>(RowBytesOf(of_rate));
    return nearest->*rate * scale;
  }

  void PlanTime() {
    double pull = 0, push = 0, miss = 0;
    for (int t = 0; t < job_.table_size(); ++t) {
      const PlanTable& table = in_.tables[static_cast<size_t>(t)];
      const double signs = table.signs * largest_;
      const double cold = 1 - ShareInMemory(t);
      pull += signs * RowNs(job_.table(t), &RowRates::pull_ns) * 1e-9;
      push += signs *
              (RowNs(job_.table(t), &RowRates::push_ns) + table.fresh * RowNs(job_.table(t), &RowRates::insert_ns)) *
              1e-9;
      miss += signs * (1 - table.fresh) * cold * RowNs(job_.table(t), &RowRates::miss_ns) * 1e-9;
    }
    const PlanRates& rates = in_.rates;
    const LaneBytes largest = BytesOfLane(largest_), mean = BytesOfLane(mean_);
    const double own = LanesOfWorker(0);
    // A transfer is as long as its busiest end.
    const auto transfer = [&](double of_server, double of_worker) {
      return std::max(lanes_ * of_server, own * in_.servers * of_worker) / rates.bytes_per_s;
    };
    const double latency = rates.latency_us * 1e-6;
    const double pull_way = 2 * latency + transfer(largest.pull, mean.pull) + transfer(largest.reply, mean.reply);
    const double push_way = latency + transfer(largest.push, mean.push);
    const double dense = own * LaneRecords() / rates.dense_records_per_s;
    const double reduce =
        in_.workers < 2 ? 0
                        : 2 * latency + std::max(ReductionBytes(0), ReductionBytesFromOthers(0)) / rates.bytes_per_s;
    const double read = rates.read_records_per_s > 0 ? own * LaneRecords() / rates.read_records_per_s : 0;
    const double chain = pull_way + pull + dense + reduce + push_way + push;

    std::vector<PlanFigure> stages = {
        Same("table work of a server", pull + push, "pulls and pushes of the largest share, on its serving thread"),
        Same("dense step of a worker", dense + reduce, "forward, backward, and the sum over workers"),
        Same("a server's link", lanes_ * std::max(largest.to_server(), largest.from_server()) / rates.bytes_per_s,
             "the busier direction"),
        Same("a worker's link",
             (own * in_.servers * std::max(mean.to_server(), mean.from_server()) + ReductionBytes(0)) /
                 rates.bytes_per_s,
             "the busier direction"),
        Same("from pull to push, over the steps in flight", chain / (staleness_ + 1.0),
             absl::StrFormat("pull %.2f ms, dense %.2f, reduction %.2f, push %.2f; staleness %d overlaps %d steps",
                             1e3 * (pull_way + pull), 1e3 * dense, 1e3 * reduce, 1e3 * (push_way + push), staleness_,
                             staleness_ + 1))};
    if (miss > 0) {
      const uint32_t readers = job_.store().read_threads() > 0 ? job_.store().read_threads()
                                                               : std::clamp(rates.cores, 2u, 16u);  // as PsServer has
      stages.push_back(
          Same("rows from disk", miss / readers,
               absl::StrFormat("by %d readers of the store, ahead of the pull, page cache warm; upper bound: "
                               "ids drawn uniformly",
                               readers)));
    }
    if (read > 0) stages.push_back(Same("reading the log", read, "a worker's reader, ahead of the step"));
    if (in_.nodes > 1) {
      stages.push_back(Same("a node's link", std::max(plan_.node[5].value, plan_.node[6].value) / rates.bytes_per_s,
                            "the busier direction"));
    }
    if (rates.cores > 0) {
      if (const double ranks = std::ceil((1.0 + in_.servers + in_.workers) / in_.nodes); ranks > rates.cores + 1) {
        plan_.warnings.push_back(
            absl::StrFormat("%.0f ranks on a node of %d cores take turns, and MPI's polling takes some of each turn: a "
                            "step takes longer "
                            "than this says",
                            ranks, rates.cores));
      }
      const double servers = std::ceil(static_cast<double>(in_.servers) / in_.nodes);
      const double workers = std::ceil(static_cast<double>(in_.workers) / in_.nodes);
      const double moved = lanes_ * (mean.to_server() + mean.from_server()) / rates.bytes_per_s;
      const double server = (pull + push) * mean_ / largest_ + miss + moved;
      const double worker = (dense * job_.training().threads() + read + reduce) * lanes_ / own / in_.workers +
                            moved * in_.servers / in_.workers;
      stages.push_back(Same("a node's cores", (servers * server + workers * worker) / rates.cores,
                            absl::StrFormat("all work of its ranks over %d cores", rates.cores)));
    }
    for (const PlanFigure& stage : stages) {
      if (stage.value <= plan_.step_seconds) continue;
      plan_.step_seconds = stage.value;
      plan_.bound = stage.what;
    }
    plan_.records_per_s = plan_.step_seconds > 0 ? Batch() / plan_.step_seconds : 0;
    plan_.stages = std::move(stages);
  }

  void Assume() {
    for (int t = 0; t < job_.table_size(); ++t) {
      const PlanTable& table = in_.tables[static_cast<size_t>(t)];
      plan_.assumptions.push_back(
          absl::StrFormat("table %s: %.0f rows (%s), %.0f signs a step (%s), %.0f %% of them new", job_.table(t).name(),
                          table.rows, table.rows_from, table.signs, table.signs_from, 100 * table.fresh));
    }
    plan_.assumptions.push_back(absl::StrCat("rates of rows: ", in_.rates.rows_from));
    plan_.assumptions.push_back(absl::StrFormat("network: %.2f GB/s a direction between two ranks, %.0f us: %s",
                                                in_.rates.bytes_per_s * 1e-9, in_.rates.latency_us,
                                                in_.rates.wire_from));
    plan_.assumptions.push_back(absl::StrFormat("dense step: %.0f records/s a worker: %s",
                                                in_.rates.dense_records_per_s, in_.rates.dense_from));
    plan_.assumptions.push_back(absl::StrFormat(
        "a full step of %d records; those of this log have %.0f %% of that on average, for batches end where pieces do",
        Batch(), 100 * in_.fill));
    if (lanes_ > 1) {
      plan_.assumptions.push_back(absl::StrFormat(
          "rates of pushes are of one lane's signs; a server merges those of %d lanes, which is not counted", lanes_));
    }
    plan_.assumptions.push_back("nothing is skipped; evaluations and cuts are not in a step's time");
    plan_.assumptions.push_back(
        "network: of a step; messages with their headers and proofs, without those of MPI and TCP");
    for (const Table& table : job_.table()) {
      if (table.admission().count_min() <= 1 || table.admission().counter() == Admission::BLOOM) continue;
      plan_.assumptions.push_back(absl::StrCat("table ", table.name(),
                                               ": signs that are counted and have no row yet are to be in its rows: in "
                                               "memory they take as much"));
    }
  }

  const PlanInput& in_;
  const Job& job_;
  const uint32_t lanes_;
  const uint32_t staleness_;
  const Dense dense_;
  double mean_ = 1;     // share of the rows of a server
  double largest_ = 1;  // and of the one with most logical shards
  Plan plan_;
};

}  // namespace

PlanRates BuiltInRates(const Job& job) {
  PlanRates rates;
  RowRates row;  // docs/PERFORMANCE.md, "The memory tier"
  row.dim = 16;
  row.optimizer = Optimizer::ROWWISE_ADAGRAD;
  row.pull_ns = 45;
  row.push_ns = 71;
  row.insert_ns = 150;
  row.miss_ns = 3700;
  rates.rows = {row};
  rates.bytes_per_s = 1.2e9;  // 10 GbE, or two ranks of one host
  rates.latency_us = 30;
  const Dense dense = DenseOf(job);
  rates.dense_records_per_s = kDenseMultiplyAdds * job.training().threads() / std::max(3 * dense.multiply_adds, 1.0);
  rates.rows_from = "built-in, not calibrated: a 2.6 GHz x86-64 core with AVX-512";
  rates.wire_from = "built-in, not calibrated";
  rates.dense_from = absl::StrFormat(
      "built-in, not calibrated: %.0f multiply-adds a record forward, three times that with the way back",
      dense.multiply_adds);
  return rates;
}

double SumOf(const std::vector<PlanFigure>& figures, bool at_most, bool largest) {
  double sum = 0;
  for (const PlanFigure& figure : figures) {
    if (!figure.at_most || at_most) sum += largest ? figure.largest : figure.value;
  }
  return sum;
}

Plan MakePlan(const PlanInput& input) {
  HEARTH_CHECK(input.tables.size() == static_cast<size_t>(input.job.table_size()), "tables: ", input.tables.size());
  HEARTH_CHECK(!input.rates.rows.empty() && input.workers <= input.job.training().lanes(), "workers ", input.workers);
  return Planner(input).Make();
}

}  // namespace hearth
