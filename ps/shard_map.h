// What a server and its workers agree on: who owns which sign, which rank is who, and in what form values travel.
#pragma once

#include <cstdint>

#include "common/net/wire.h"
#include "common/proto/job.pb.h"
#include "embedding/sign.h"

namespace hearth {

// A pure function of the job's shards and the number of servers.
class ShardMap {
 public:
  // REQUIRES: 1 <= servers, 1 <= shards. A server may own nothing (servers > shards).
  ShardMap(uint32_t shards, uint32_t servers) : shards_(shards), servers_(servers) {}
  uint32_t shards() const { return shards_; }
  uint32_t servers() const { return servers_; }
  uint32_t ServerOfShard(uint32_t shard) const { return shard % servers_; }
  uint32_t ServerOf(Sign sign) const { return ServerOfShard(LogicalShardOf(sign, shards_)); }

 private:
  uint32_t shards_;
  uint32_t servers_;
};

// Ranks of the job: scheduler 0, then servers, then workers.
struct Ranks {
  int servers = 1;
  int workers = 1;
  int size() const { return 1 + servers + workers; }
  int scheduler() const { return 0; }
  int server(int index) const { return 1 + index; }
  int worker(int index) const { return 1 + servers + index; }
};

// Of the rows that training pulls and of gradients (training.wire). Rows for evaluation are float32 always.
inline Dtype WireDtypeOf(const Job& job) {
  return job.training().wire() == Wire::FLOAT16 ? Dtype::kFloat16 : Dtype::kFloat32;
}

}  // namespace hearth
