#include "embedding/rocksdb_store.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "rocksdb/cache.h"
#include "rocksdb/compaction_filter.h"
#include "rocksdb/db.h"
#include "rocksdb/filter_policy.h"
#include "rocksdb/listener.h"
#include "rocksdb/options.h"
#include "rocksdb/sst_file_manager.h"
#include "rocksdb/sst_file_writer.h"
#include "rocksdb/table.h"
#include "rocksdb/utilities/checkpoint.h"
#include "rocksdb/write_batch.h"

namespace hearth {
namespace {

constexpr size_t kKeyBytes = 12;
constexpr size_t kBatchBytesMax = size_t{1} << 20;
constexpr uint64_t kReadAheadBytes = uint64_t{2} << 20;
constexpr int kBloomBitsPerKey = 10;
// Small: a row is read alone, and its block's checksum with it. Few rows from one restart point to the next.
constexpr uint64_t kBlockBytes = 1024;
constexpr int kRestartKeys = 4;
constexpr int kOpenFilesMax = 4096;
constexpr int kSortedRunsMax = 12;  // from which on they are merged
constexpr uint64_t kReadOnlyCacheBytes = uint64_t{64} << 20;
constexpr size_t kFileBytesMin = size_t{256} << 10;  // a write of more ascending rows is a sorted file of its own

// shard then sign, both big-endian: the order of bytes is the order of keys.
void EncodeKey(KvKey key, char* out) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<char>(key.shard >> (24 - 8 * i));
  for (int i = 0; i < 8; ++i) out[4 + i] = static_cast<char>(key.sign >> (56 - 8 * i));
}

KvKey DecodeKey(const rocksdb::Slice& bytes) {
  KvKey key;
  for (int i = 0; i < 4; ++i) key.shard = key.shard << 8 | static_cast<uint8_t>(bytes[i]);
  for (int i = 0; i < 8; ++i) key.sign = key.sign << 8 | static_cast<uint8_t>(bytes[4 + i]);
  return key;
}

absl::Status ToStatus(const rocksdb::Status& status, const std::string& path, absl::string_view doing) {
  if (status.ok()) return absl::OkStatus();
  const std::string cause = absl::StrCat(path, ": ", doing, ": ", status.ToString());
  if (status.IsNoSpace() || status.subcode() == rocksdb::Status::SubCode::kSpaceLimit) {
    return absl::ResourceExhaustedError(absl::StrCat(
        cause, "; free disk space or raise snapshot.disk_bytes_max, then resume from the newest snapshot"));
  }
  // A file that a RocksDB MANIFEST names and the folder lacks comes as "IO error: No such file": damage, not a bad
  // disk.
  if (status.IsCorruption() || status.subcode() == rocksdb::Status::SubCode::kPathNotFound) {
    return absl::DataLossError(absl::StrCat(cause, "; the store is damaged: use an older snapshot"));
  }
  return absl::UnavailableError(absl::StrCat(cause, "; check the disk and the folder's permissions"));
}

// RocksDB's warnings go where all others go; without a logger of ours it would write a LOG file into a checkpoint.
class WarningLogger final : public rocksdb::Logger {
 public:
  WarningLogger() : rocksdb::Logger(rocksdb::InfoLogLevel::ERROR_LEVEL) {}
  using rocksdb::Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    char line[512];
    std::vsnprintf(line, sizeof(line), format, arguments);
    spdlog::warn("event=rocksdb message={}", Quoted(line));
  }
};

// What running compactions may add to the disk before their inputs go: as many bytes as these have, at most.
class CompactionWatch final : public rocksdb::EventListener {
 public:
  void OnCompactionBegin(rocksdb::DB*, const rocksdb::CompactionJobInfo& job) override { bytes_ += InputBytes(job); }
  void OnCompactionCompleted(rocksdb::DB*, const rocksdb::CompactionJobInfo& job) override {
    bytes_ -= InputBytes(job);
  }
  uint64_t bytes() const { return bytes_; }
  void NoneRuns() { bytes_ = 0; }  // whatever was counted

 private:
  // From the files' properties, which are the same before and after; the files themselves may be gone.
  static uint64_t InputBytes(const rocksdb::CompactionJobInfo& job) {
    uint64_t bytes = 0;
    for (const std::string& file : job.input_files) {
      const auto found = job.table_properties.find(file);
      if (found == job.table_properties.end()) continue;
      bytes += found->second->data_size + found->second->index_size + found->second->filter_size;
    }
    return bytes;
  }
  std::atomic<uint64_t> bytes_{0};
};

// Leaves out what the store's owner says is dead.
class DeadFilter final : public rocksdb::CompactionFilter {
 public:
  explicit DeadFilter(const std::function<bool(KvKey, absl::string_view)>& dead) : dead_(dead) {}
  bool Filter(int, const rocksdb::Slice& key, const rocksdb::Slice& value, std::string*, bool*) const override {
    return key.size() == kKeyBytes && dead_(DecodeKey(key), {value.data(), value.size()});
  }
  const char* Name() const override { return "hearth.dead"; }

 private:
  const std::function<bool(KvKey, absl::string_view)>& dead_;
};

rocksdb::Options MakeOptions(const RocksDbOptions& options) {
  rocksdb::BlockBasedTableOptions table;
  if (options.block_cache_bytes > 0) {
    table.block_cache = rocksdb::NewLRUCache(options.block_cache_bytes);
    table.cache_index_and_filter_blocks = true;  // bounded by the cache like everything else
    table.cache_index_and_filter_blocks_with_high_priority = true;
    table.pin_l0_filter_and_index_blocks_in_cache = true;
  } else {
    table.no_block_cache = true;
  }
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(kBloomBitsPerKey));
  table.format_version = 5;
  table.block_size = kBlockBytes;
  table.block_restart_interval = kRestartKeys;
  rocksdb::Options result;
  result.allow_mmap_reads = options.block_cache_bytes == 0;
  result.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  result.compression = rocksdb::kNoCompression;  // trained floats do not compress
  result.write_buffer_size = options.write_buffer_bytes;
  // Rows leave memory in sorted files that all span the whole range of keys. Merging such files a few at a time writes
  // each row some log(files) times; levels would write it ten times a level.
  result.compaction_style = rocksdb::kCompactionStyleUniversal;
  result.level0_file_num_compaction_trigger = kSortedRunsMax;
  result.level0_slowdown_writes_trigger = 4 * kSortedRunsMax;
  result.level0_stop_writes_trigger = 8 * kSortedRunsMax;
  result.compaction_options_universal.allow_trivial_move = true;
  result.max_background_jobs = static_cast<int>(options.compaction_threads) + 1;  // and one that flushes
  result.max_open_files = kOpenFilesMax;
  result.skip_stats_update_on_db_open = true;
  result.skip_checking_sst_file_sizes_on_db_open = true;  // the snapshot's list of files was checked
  result.memtable_whole_key_filtering = true;  // most signs asked for and not found are in no memtable either
  result.memtable_prefix_bloom_size_ratio = 0.1;
  result.avoid_flush_during_shutdown = true;  // what no checkpoint holds does not outlive the process
  result.max_bgerror_resume_count = 0;        // an error stays one until the process starts again
  result.info_log = std::make_shared<WarningLogger>();
  return result;
}

// Whoever reads a checkpoint goes through it once, beside others: not by mapping it, which would count as his memory.
RocksDbOptions ReadOnlyOptions() {
  RocksDbOptions options;
  options.block_cache_bytes = kReadOnlyCacheBytes;
  return options;
}

class RocksDbStore final : public KvStore {
 public:
  RocksDbStore(std::string path, RocksDbOptions options, bool read_only)
      : path_(std::move(path)), options_(options), read_only_(read_only) {}

  absl::Status Open();

  absl::Status MultiGet(absl::Span<const KvKey> keys, KvValues* values) override;
  absl::Status Write(absl::Span<const KvWrite> writes) override;
  absl::Status Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) override;
  absl::Status Checkpoint(const std::string& path) override;
  uint64_t DiskBytes() override;

  absl::Status VerifyBlocks() { return ToStatus(db_->VerifyChecksum(), path_, "verifying block checksums"); }

 private:
  uint64_t UnflushedBytes() const;
  // Debian's RocksDB aborts the process on a really full disk: refuse while there is room for what is already promised,
  // and tell RocksDB how far its compactions may go.
  absl::Status CheckSpace(uint64_t bytes);
  absl::Status LetWritesOvertakeCompactions();
  absl::Status WriteBatch(rocksdb::WriteBatch* batch);
  absl::Status WriteFile(absl::Span<const KvWrite> writes, uint64_t bytes);

  const std::string path_;
  const RocksDbOptions options_;
  const bool read_only_;
  std::shared_ptr<rocksdb::SstFileManager> files_;
  const std::shared_ptr<CompactionWatch> compactions_ = std::make_shared<CompactionWatch>();
  std::unique_ptr<DeadFilter> dead_;  // outlives db_
  std::unique_ptr<rocksdb::DB> db_;
  uint64_t files_written_ = 0;
  bool writes_wait_ = true;  // for compactions that are far behind
};

absl::Status RocksDbStore::Open() {
  rocksdb::Options options = MakeOptions(options_);
  rocksdb::DB* db = nullptr;
  if (read_only_) {
    if (!PathExists(JoinPath(path_, "CURRENT"))) {
      return absl::DataLossError(absl::StrCat(path_, ": holds no store (no file CURRENT); use an older snapshot"));
    }
    const rocksdb::Status status = rocksdb::DB::OpenForReadOnly(options, path_, &db);
    db_.reset(db);
    return ToStatus(status, path_, "opening read-only");
  }
  HEARTH_RETURN_IF_ERROR(MakeDirectories(path_));
  rocksdb::Status made;
  files_.reset(rocksdb::NewSstFileManager(rocksdb::Env::Default(), options.info_log, "", 0, true, &made));
  HEARTH_RETURN_IF_ERROR(ToStatus(made, path_, "opening"));
  files_->SetCompactionBufferSize(2 * options_.write_buffer_bytes);  // what a flush beside a compaction writes
  options.sst_file_manager = files_;
  options.listeners.push_back(compactions_);
  if (options_.dead) {
    dead_ = std::make_unique<DeadFilter>(options_.dead);
    options.compaction_filter = dead_.get();
  }
  options.create_if_missing = true;
  // Whoever serves goes before who merges, where cores are scarce.
  static_cast<void>(rocksdb::Env::Default()->LowerThreadPoolCPUPriority(rocksdb::Env::LOW, rocksdb::CpuPriority::kLow));
  const rocksdb::Status status = rocksdb::DB::Open(options, path_, &db);
  db_.reset(db);
  return ToStatus(status, path_, "opening");
}

absl::Status RocksDbStore::MultiGet(absl::Span<const KvKey> keys, KvValues* values) {
  const size_t count = keys.size();
  values->Reset(count);
  if (count == 0) return absl::OkStatus();
  std::vector<uint32_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<uint32_t>(i);
  if (!std::is_sorted(keys.begin(), keys.end())) {
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });
  }
  std::vector<char> bytes(count * kKeyBytes);
  std::vector<rocksdb::Slice> slices(count);
  for (size_t j = 0; j < count; ++j) {
    EncodeKey(keys[order[j]], bytes.data() + j * kKeyBytes);
    slices[j] = rocksdb::Slice(bytes.data() + j * kKeyBytes, kKeyBytes);
  }
  std::vector<rocksdb::PinnableSlice> results(count);
  std::vector<rocksdb::Status> statuses(count);
  db_->MultiGet(rocksdb::ReadOptions(), db_->DefaultColumnFamily(), count, slices.data(), results.data(),
                statuses.data(), true);
  for (size_t j = 0; j < count; ++j) {
    if (statuses[j].IsNotFound()) continue;
    HEARTH_RETURN_IF_ERROR(ToStatus(statuses[j], path_, "reading"));
    values->Set(order[j], {results[j].data(), results[j].size()});
  }
  return absl::OkStatus();
}

// Bytes of keys and values that ascend, with nothing to remove; 0 where they do not.
size_t SortedBytes(absl::Span<const KvWrite> writes) {
  size_t bytes = 0;
  for (size_t i = 0; i < writes.size(); ++i) {
    if (writes[i].remove || (i > 0 && !(writes[i - 1].key < writes[i].key))) return 0;
    bytes += kKeyBytes + writes[i].value.size();
  }
  return bytes;
}

absl::Status RocksDbStore::Write(absl::Span<const KvWrite> writes) {
  if (read_only_) return absl::FailedPreconditionError(absl::StrCat(path_, ": is open for reading alone"));
  if (const size_t bytes = SortedBytes(writes); bytes >= kFileBytesMin) return WriteFile(writes, bytes);
  rocksdb::WriteBatch batch;
  char key[kKeyBytes];
  for (const KvWrite& write : writes) {
    EncodeKey(write.key, key);
    const rocksdb::Slice slice(key, kKeyBytes);
    HEARTH_RETURN_IF_ERROR(ToStatus(
        write.remove ? batch.Delete(slice) : batch.Put(slice, rocksdb::Slice(write.value.data(), write.value.size())),
        path_, "writing"));
    if (batch.GetDataSize() >= kBatchBytesMax) HEARTH_RETURN_IF_ERROR(WriteBatch(&batch));
  }
  return batch.Count() == 0 ? absl::OkStatus() : WriteBatch(&batch);
}

// Past the write buffer: ten times as fast, and the readers' filters are made on the way.
absl::Status RocksDbStore::WriteFile(absl::Span<const KvWrite> writes, uint64_t bytes) {
  HEARTH_RETURN_IF_ERROR(CheckSpace(bytes + bytes / 8));
  const std::string file = JoinPath(path_, absl::StrCat("writing-", ++files_written_, ".sst"));
  const auto made = [&]() -> rocksdb::Status {
    rocksdb::SstFileWriter writer(rocksdb::EnvOptions(), db_->GetOptions());
    rocksdb::Status status = writer.Open(file);
    char key[kKeyBytes];
    constexpr size_t kAhead = 8;  // values lie in the order in which they came
    for (size_t i = 0; i < writes.size(); ++i) {
      if (!status.ok()) return status;
      const KvWrite& write = writes[i];
      if (i + kAhead < writes.size()) {
        const absl::string_view ahead = writes[i + kAhead].value;
        for (size_t at = 0; at < std::min<size_t>(ahead.size(), 256); at += 64) __builtin_prefetch(ahead.data() + at);
      }
      EncodeKey(write.key, key);
      status = writer.Put(rocksdb::Slice(key, kKeyBytes), rocksdb::Slice(write.value.data(), write.value.size()));
    }
    if (status.ok()) status = writer.Finish();
    if (!status.ok()) return status;
    rocksdb::IngestExternalFileOptions options;
    options.move_files = true;
    options.write_global_seqno = false;  // a file may be shared with a snapshot: it is never changed
    return db_->IngestExternalFile({file}, options);
  }();
  if (!made.ok()) static_cast<void>(RemoveTree(file));
  return ToStatus(made, path_, "writing a sorted file");
}

absl::Status RocksDbStore::WriteBatch(rocksdb::WriteBatch* batch) {
  HEARTH_RETURN_IF_ERROR(CheckSpace(batch->GetDataSize()));
  rocksdb::WriteOptions options;
  options.disableWAL = true;
  const rocksdb::Status status = db_->Write(options, batch);  // a failed flush or compaction shows here too
  batch->Clear();
  return ToStatus(status, path_, "writing");
}

uint64_t RocksDbStore::UnflushedBytes() const {
  uint64_t bytes = 0;
  db_->GetIntProperty(rocksdb::DB::Properties::kCurSizeAllMemTables, &bytes);
  return bytes;
}

absl::Status RocksDbStore::CheckSpace(uint64_t bytes) {
  if (options_.disk_bytes_max == 0 && options_.disk_free_bytes_min == 0) return absl::OkStatus();
  uint64_t free = 0, used = 0, allowed = 0, pending = 0, wanted = 0;
  while (true) {
    if (options_.disk_free_bytes_min > 0) {
      HEARTH_ASSIGN_OR_RETURN(free, DiskFreeBytes(path_));
    }
    used = DiskBytes();
    allowed = DiskBytesAllowed(options_, used, free);
    // RocksDB's own watch does not see files that it did not write.
    const uint64_t unseen = used - std::min(used, files_->GetTotalSize());
    files_->SetMaxAllowedSpaceUsage(std::max<uint64_t>(1, allowed - std::min(allowed, unseen)));  // 0: no bound
    pending = UnflushedBytes() + bytes;
    wanted = used + pending;
    const uint64_t compacting = compactions_->bytes();
    if (compacting == 0 || wanted > allowed || wanted + compacting <= allowed) break;
    // It fits, but not beside what a compaction is writing: wait until that one has removed its inputs.
    HEARTH_RETURN_IF_ERROR(ToStatus(db_->PauseBackgroundWork(), path_, "waiting for a compaction"));
    compactions_->NoneRuns();
    HEARTH_RETURN_IF_ERROR(ToStatus(db_->ContinueBackgroundWork(), path_, "going on after a compaction"));
  }
  if (allowed < 2 * wanted) HEARTH_RETURN_IF_ERROR(LetWritesOvertakeCompactions());
  if (wanted <= allowed) return absl::OkStatus();
  if (options_.disk_bytes_max > 0 && wanted > options_.disk_bytes_max) {
    return absl::ResourceExhaustedError(absl::StrCat(
        path_, ": ", used, " bytes on disk and ", pending, " to be written exceed the cap of ", options_.disk_bytes_max,
        " bytes; raise snapshot.disk_bytes_max or let rows expire (expire_after_steps, expire_after_hours)"));
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      path_, ": ", free, " bytes are free on this disk, of which ", options_.disk_free_bytes_min,
      " must stay free (snapshot.disk_free_bytes_min); ", pending, " to be written are more than the share of one of ",
      options_.disk_sharers, " writers in the rest; free disk space"));
}

// With less room than everything rewritten would take, RocksDB may put a compaction off for ever. A write that waited
// for it would, too; so writes go on, and meet the bound's error.
absl::Status RocksDbStore::LetWritesOvertakeCompactions() {
  if (!writes_wait_) return absl::OkStatus();
  writes_wait_ = false;
  return ToStatus(db_->SetOptions({{"level0_slowdown_writes_trigger", "1073741824"},
                                   {"level0_stop_writes_trigger", "1073741824"},
                                   {"soft_pending_compaction_bytes_limit", "0"},
                                   {"hard_pending_compaction_bytes_limit", "0"}}),
                  path_, "changing options");
}

absl::Status RocksDbStore::Scan(KvKey first, KvKey last, const std::function<bool(KvKey, absl::string_view)>& visit) {
  char from[kKeyBytes], to[kKeyBytes];
  EncodeKey(first, from);
  EncodeKey(last, to);
  const rocksdb::Slice end(to, kKeyBytes);
  rocksdb::ReadOptions options;
  options.iterate_upper_bound = &end;
  options.fill_cache = false;  // a scan must not drive the hot blocks out
  // No further than the range goes: scans of a small table's share of each logical shard are many.
  uint64_t range_bytes = 0;
  const rocksdb::Range range(rocksdb::Slice(from, kKeyBytes), end);
  HEARTH_RETURN_IF_ERROR(ToStatus(db_->GetApproximateSizes(rocksdb::SizeApproximationOptions(),
                                                           db_->DefaultColumnFamily(), &range, 1, &range_bytes),
                                  path_, "measuring"));
  options.readahead_size = std::min(kReadAheadBytes, range_bytes);
  const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(options));
  for (it->Seek(rocksdb::Slice(from, kKeyBytes)); it->Valid(); it->Next()) {
    if (it->key().size() != kKeyBytes) {
      return absl::DataLossError(absl::StrCat(path_, ": a key of ", it->key().size(), " bytes; not a store of Hearth"));
    }
    if (!visit(DecodeKey(it->key()), absl::string_view(it->value().data(), it->value().size()))) break;
  }
  return ToStatus(it->status(), path_, "scanning");
}

absl::Status RocksDbStore::Checkpoint(const std::string& path) {
  if (read_only_) return absl::FailedPreconditionError(absl::StrCat(path_, ": is open for reading alone"));
  if (PathExists(path)) return absl::FailedPreconditionError(absl::StrCat(path, ": exists already; remove it first"));
  HEARTH_RETURN_IF_ERROR(CheckSpace(0));
  rocksdb::Checkpoint* made = nullptr;
  HEARTH_RETURN_IF_ERROR(ToStatus(rocksdb::Checkpoint::Create(db_.get(), &made), path_, "making a checkpoint"));
  const std::unique_ptr<rocksdb::Checkpoint> checkpoint(made);
  // 0: always flushes first; without a WAL the rows in the write buffer are nowhere else.
  return ToStatus(checkpoint->CreateCheckpoint(path, 0), path, "making a checkpoint");
}

uint64_t RocksDbStore::DiskBytes() {
  uint64_t bytes = 0;
  db_->GetIntProperty(rocksdb::DB::Properties::kTotalSstFilesSize, &bytes);
  return files_ == nullptr ? bytes : std::max(bytes, files_->GetTotalSize());
}

}  // namespace

uint64_t DiskBytesAllowed(const RocksDbOptions& options, uint64_t used_bytes, uint64_t free_bytes) {
  uint64_t allowed = options.disk_bytes_max > 0 ? options.disk_bytes_max : UINT64_MAX;
  if (options.disk_free_bytes_min > 0) {
    const uint64_t spare = free_bytes - std::min(free_bytes, options.disk_free_bytes_min);
    allowed = std::min(allowed, used_bytes + spare / options.disk_sharers);
  }
  return allowed;
}

// A record in a block: three lengths, of which the value's takes two bytes from 128 on; the key with RocksDB's own 8
// bytes, of which records that ascend share the shard and the table's number (kSharedKeyBytes) but for the first of
// kRestartKeys, whose place takes 4 bytes; the value. A block of some kBlockBytes has a checksum behind it.
constexpr uint64_t kSharedKeyBytes = 5;
constexpr uint64_t kBlockTailBytes = 12;   // of a block itself
constexpr uint64_t kBlockIndexBytes = 24;  // its last key and its place, in the index

uint64_t RecordsBytesFor(uint64_t records, uint64_t value_bytes) {
  return records * (3 + (value_bytes >= 128 ? 1 : 0) + kKeyBytes + 8 - kSharedKeyBytes + value_bytes) +
         records / kRestartKeys * (kSharedKeyBytes + 4);
}

uint64_t StoreIndexBytesFor(uint64_t records, uint64_t value_bytes) {
  return records * kBloomBitsPerKey / 8 + RecordsBytesFor(records, value_bytes) / kBlockBytes * kBlockIndexBytes;
}

uint64_t StoreBytesFor(uint64_t records, uint64_t value_bytes) {
  constexpr uint64_t kOwnFilesBytes = 16 << 10;  // RocksDB's MANIFEST, OPTIONS and properties
  const uint64_t bytes = RecordsBytesFor(records, value_bytes);
  return kOwnFilesBytes + bytes + bytes / kBlockBytes * kBlockTailBytes + StoreIndexBytesFor(records, value_bytes);
}

absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStore(const std::string& path, const RocksDbOptions& options) {
  auto store = std::make_unique<RocksDbStore>(path, options, false);
  HEARTH_RETURN_IF_ERROR(store->Open());
  return store;
}

absl::StatusOr<std::unique_ptr<KvStore>> OpenRocksDbStoreReadOnly(const std::string& path) {
  auto store = std::make_unique<RocksDbStore>(path, ReadOnlyOptions(), true);
  HEARTH_RETURN_IF_ERROR(store->Open());
  return store;
}

absl::Status VerifyRocksDbStore(const std::string& path) {
  RocksDbStore store(path, ReadOnlyOptions(), true);
  HEARTH_RETURN_IF_ERROR(store.Open());
  return store.VerifyBlocks();
}

}  // namespace hearth
