// KvStore over RocksDB. No WAL: the snapshot is the unit of durability. The only file that includes RocksDB is
// rocksdb_store.cc.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedding/kv_store.h"

namespace hearth {

struct RocksDbOptions {
  uint64_t block_cache_bytes = uint64_t{64} << 20;
  uint64_t write_buffer_bytes = uint64_t{64} << 20;
  uint64_t disk_bytes_max = 0;       // SstFileManager cap; 0: none
  uint64_t disk_free_bytes_min = 0;  // Write and Checkpoint refuse below this (Debian's RocksDB aborts on a full disk)
};

// Opens or creates. ResourceExhausted, DataLoss or Unavailable name path and cause.
absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStore(const std::string& path, const RocksDbOptions& options);
// An existing checkpoint, for reading alone: Write and Checkpoint are FailedPrecondition. Leaves no file behind in it.
absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStoreReadOnly(const std::string& path);
// Checks every block checksum of an existing checkpoint.
absl::Status VerifyRocksDbStore(const std::string& path);

// The same contract over a std::map, for tests; Checkpoint writes one file that OpenMapStore reads back.
std::unique_ptr<KvStore> MakeMapStore();
absl::StatusOr<std::unique_ptr<KvStore>> OpenMapStore(const std::string& path);

}  // namespace hearth
