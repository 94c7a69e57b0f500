// What a job will need and take on so many servers and workers, before anything is started: memory, disk, bytes and
// messages a step, and the time of a step. Pure formulas. Where a size is code's own, that code tells it:
//
//   rows in memory      EmbeddingTable::MemoryFor: RowArena, RowIndex, SlotSet, SignFilter and CountingBloom
//   rows on disk        StoreBytesFor (embedding/rocksdb_store.h): RocksDB's sorted files as the store sets them
//   messages            Header and SectionBytesFor (common/net/wire.h), sent as ps/ps_client.cc and ps/shard.cc do
//   the reduction       MpiCollective::SumParts: parts of slices there, sums of slices back; kVoteBytes and moments
//   parameters          ModulesOf (model/adopt/parameter_shapes.h)
//   shares of servers   ShardMap: logical shard i is on server i mod P
//
// What no code tells (a process without rows, rates of a machine) is a constant here, named in the plan's assumptions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/proto/job.pb.h"

namespace hearth {

// What is expected of a table, and where the number comes from, in words.
struct PlanTable {
  double rows = 0;   // that live at the time that is planned for
  double signs = 0;  // pulled a step: distinct signs of each lane's batch, added over lanes
  double fresh = 0;  // share of them that has no row yet
  std::string rows_from;
  std::string signs_from;
};

// Nanoseconds a row of such a table, on one core.
struct RowRates {
  uint32_t dim = 16;
  Optimizer::Kind optimizer = Optimizer::ADAGRAD;
  double pull_ns = 0;
  double push_ns = 0;
  double insert_ns = 0;  // beyond a push's
  double miss_ns = 0;    // brought from the store, page cache warm
  Table::Weights weights = Table::FLOAT32;
};

struct PlanRates {
  std::vector<RowRates> rows;  // at least one; the nearest one is scaled by a row's bytes
  double bytes_per_s = 0;      // between two ranks, one direction
  double latency_us = 0;
  double dense_records_per_s = 0;  // of one worker
  double read_records_per_s = 0;   // of a worker's reader; 0: not known, and left out
  uint32_t cores = 0;              // of a node; 0: as many as it needs
  std::string rows_from, wire_from, dense_from;
};
// Of a machine class, for who has measured nothing. Dense by the model's multiply-adds.
PlanRates BuiltInRates(const Job& job);

struct PlanInput {
  Job job;  // effective, lanes filled in
  uint32_t servers = 1;
  uint32_t workers = 1;
  uint32_t nodes = 1;             // ranks are dealt round them
  std::vector<PlanTable> tables;  // one each of the job's
  double fill = 1;                // records of the mean step over batch_size: batches end where pieces of the log do
  PlanRates rates;
};

struct PlanFigure {
  std::string what;
  double value = 0;      // of a server: one with the mean share of the rows
  double largest = 0;    // of a server: the one with the largest share
  bool at_most = false;  // a bound that is seldom reached; left out of a rank's first sum
  std::string how;
};

struct PlanRank {
  std::string name;
  uint32_t count = 1;
  std::vector<PlanFigure> memory;   // bytes
  std::vector<PlanFigure> disk;     // bytes; each a state of its own, not to be added up
  std::vector<PlanFigure> network;  // a step: bytes sent, bytes received, messages sent, messages received
};

struct Plan {
  uint32_t shards_largest = 0;   // logical shards of the server with most of them
  double largest_over_mean = 1;  // and so its share of the rows
  uint64_t dense_parameters = 0;
  std::vector<PlanRank> ranks;     // scheduler, server, worker 0, other workers
  std::vector<PlanFigure> node;    // the fullest node: ranks, memory, disk and bytes off it; none where there is one
  std::vector<PlanFigure> stages;  // seconds of a step
  double step_seconds = 0;
  double records_per_s = 0;
  std::string bound;  // the stage that bounds it
  std::vector<std::string> warnings;
  std::vector<std::string> assumptions;
};

// REQUIRES: a valid job; as many tables as it has; servers, workers, nodes >= 1; workers <= lanes.
Plan MakePlan(const PlanInput& input);

// With what is at most so much, too, or without; of the server with the largest share, or with the mean one.
double SumOf(const std::vector<PlanFigure>& figures, bool at_most, bool largest);

}  // namespace hearth
