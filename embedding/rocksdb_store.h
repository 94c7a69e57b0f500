// KvStore over RocksDB. No WAL: the snapshot is the unit of durability. The only file that includes RocksDB is
// rocksdb_store.cc.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedding/kv_store.h"

namespace hearth {

struct RocksDbOptions {
  // Above 0: RocksDB's own cache. 0: files are mapped, and the operating system's page cache is the cache.
  uint64_t block_cache_bytes = 0;
  uint64_t write_buffer_bytes = uint64_t{64} << 20;
  uint32_t compaction_threads = 1;
  // A record that nobody will read again, by the time that this says so: compactions leave it out. Called by any
  // thread.
  std::function<bool(KvKey key, absl::string_view value)> dead;
  uint64_t disk_bytes_max = 0;       // cap on the folder; 0: none
  uint64_t disk_free_bytes_min = 0;  // stays free on the disk (Debian's RocksDB aborts on a full one); 0: no guard
  uint32_t disk_sharers = 1;  // that write to that disk: each takes at most its share of what is free beyond that
};

// What a store may come to that uses `used_bytes` now, on a disk with `free_bytes` free. UINT64_MAX: no bound. Writes,
// checkpoints and RocksDB's own flushes and compactions keep to it; it is looked at again before every write.
uint64_t DiskBytesAllowed(const RocksDbOptions& options, uint64_t used_bytes, uint64_t free_bytes);

// What a store takes on the disk that holds so many records of value_bytes once, within some percent: RocksDB's format
// of sorted files as this one sets it. For plans.
uint64_t StoreBytesFor(uint64_t records, uint64_t value_bytes);
// What reading it has RocksDB look at again and again: each file's index of blocks and its filter of keys. In the page
// cache where files are mapped, in RocksDB's own where it has one.
uint64_t StoreIndexBytesFor(uint64_t records, uint64_t value_bytes);

// Opens or creates. ResourceExhausted, DataLoss or Unavailable name path and cause.
absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStore(const std::string& path, const RocksDbOptions& options);
// An existing checkpoint, for reading alone: Write and Checkpoint are FailedPrecondition. Leaves no file behind in it.
absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStoreReadOnly(const std::string& path);
// Checks every block checksum of an existing checkpoint.
absl::Status VerifyRocksDbStore(const std::string& path);

}  // namespace hearth
