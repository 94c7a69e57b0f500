#include "ps/ps_server.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/control_message.h"
#include "common/net/wire.h"
#include "embedding/snapshot_reader.h"

namespace hearth {
namespace {

constexpr int64_t kShowUs = 1'000'000;  // between two looks at the tables for Prometheus
constexpr Address kSaved{-1, 0};        // "from" the saver: a cut is on disk
constexpr Address kWritten{-1, 1};      // "from" the store's writer: what waited for it may go on
constexpr Address kVerified{-1, 2};     // "from" the verifier: it has come to an end
constexpr int64_t kPauseUs = 100'000;   // it looks so often whether it is to leave
// For a server of before that is being ended: mpirun kills at once what does not end within seconds.
constexpr int64_t kLockWaitUs = 20'000'000;

absl::Status SendToScheduler(Transport* transport, const Ranks& ranks, Control control) {
  control.set_from_role("ps");
  control.set_from_index(static_cast<uint32_t>(transport->rank() - ranks.server(0)));
  return transport->Send(kPortServer, {ranks.scheduler(), kPortScheduler}, EncodeControl(control));
}

// The control message, or nothing where it is of the data plane.
absl::StatusOr<std::optional<Control>> ControlOf(const Message& message, MessageKind* kind) {
  HEARTH_ASSIGN_OR_RETURN(const Header header, DecodeHeader(message.payload.span()));
  *kind = header.kind;
  if (header.kind != MessageKind::kControl) return std::optional<Control>();
  std::optional<Control> control = ParseControl(message.payload.span());
  if (!control) {
    return absl::InternalError(absl::StrCat("rank ", message.from.rank, " sent a control message that does not parse"));
  }
  return control;
}

}  // namespace

PsServer::PsServer(PsServerOptions options)
    : options_(std::move(options)),
      index_(static_cast<uint32_t>(options_.transport->rank() - options_.ranks.server(0))),
      name_(absl::StrCat("ps-", index_)),
      snapshots_(JoinPath(options_.dir, "snapshots")),
      live_(JoinPath(options_.live_dir.empty() ? JoinPath(options_.dir, "live") : options_.live_dir, name_)),
      cuts_(live_ + "-cuts"),
      mailbox_(options_.transport->Open(kPortServer)),
      saved_horizons_(static_cast<size_t>(options_.job.table_size())),
      metrics_(options_.job, options_.transport->rank()) {
  HEARTH_CHECK(index_ < static_cast<uint32_t>(options_.ranks.servers), "rank ", options_.transport->rank());
}

// The store's threads hold what they work on.
PsServer::~PsServer() { EndThreads(); }

void PsServer::EndThreads() {
  leaving_ = true;
  verifier_.reset();
  shard_.reset();
  io_.reset();
  saver_.reset();
}

absl::Status PsServer::RemoveWorkingStore() {
  EndThreads();
  store_.reset();
  for (const std::string& path : {live_, cuts_}) HEARTH_RETURN_IF_ERROR(RemoveTree(path));
  if (lock_ != nullptr) lock_->Remove();
  return absl::OkStatus();
}

// What the folder of the run is locked by is not known here: two hearths may have been started on two hosts, or one be
// gone and its server not.
absl::Status PsServer::LockWorkingStore() {
  const std::string path = live_ + ".lock";
  auto lock = FileLock::Take(options_.env, path, 0);
  if (absl::IsFailedPrecondition(lock.status())) {
    spdlog::warn("event=working_store_held seconds_max={} cause={}", kLockWaitUs / 1'000'000,
                 Quoted(lock.status().message()));
    lock = FileLock::Take(options_.env, path, kLockWaitUs);
  }
  if (absl::IsFailedPrecondition(lock.status())) {
    return absl::FailedPreconditionError(absl::StrCat(
        live_, ": cannot be this server's working store (", lock.status().message(),
        "); two servers would destroy each other's rows: wait for that one's run, stop it, or give another --live"));
  }
  HEARTH_RETURN_IF_ERROR(lock.status());
  lock_ = *std::move(lock);
  return absl::OkStatus();
}

absl::Status PsServer::Run() {
  if (!options_.live_dir.empty()) HEARTH_RETURN_IF_ERROR(LockWorkingStore());
  HEARTH_RETURN_IF_ERROR(metrics_.Serve(options_.job.metrics()));
  Control hello;
  hello.mutable_hello()->set_job_hash(JobHash(options_.job));
  HEARTH_RETURN_IF_ERROR(SendControl(hello));
  while (true) {
    std::optional<Message> message = mailbox_->Receive(kNever);
    if (!message) continue;
    MessageKind kind;
    HEARTH_ASSIGN_OR_RETURN(const std::optional<Control> control, ControlOf(*message, &kind));
    if (!control || (!control->has_start_server() && !control->has_goodbye())) {
      return absl::InternalError(
          absl::StrCat("rank ", message->from.rank, " sent a message before this server was started"));
    }
    if (control->has_goodbye()) return absl::OkStatus();
    HEARTH_RETURN_IF_ERROR(Start(control->start_server()));
    return Serve();
  }
}

absl::Status PsServer::Start(const StartServer& start) {
  HEARTH_RETURN_IF_ERROR(Restore(start));
  ShardOptions shard;
  shard.job = options_.job;
  shard.lanes = options_.job.training().lanes();
  shard.server = index_;
  shard.servers = static_cast<uint32_t>(options_.ranks.servers);
  shard.step = start.step();
  shard.clocks = clocks_;
  shard.read_only = start.read_only();
  const auto reply = [this](Address to, Bytes message) {
    return options_.transport->Send(kPortServer, to, std::move(message));
  };
  shard.env = options_.env;
  HEARTH_ASSIGN_OR_RETURN(
      shard_, Shard::Open(shard, io_.get(), reply, [this](ServerAtCut report) { return SaveCut(std::move(report)); }));
  if (start.snapshot().empty() && !start.read_only()) {
    HEARTH_RETURN_IF_ERROR(shard_->Cut());
    HEARTH_RETURN_IF_ERROR(TellOfCut(/*wait=*/true));
  }
  std::vector<TableStats> stats;
  shard_->FillStats(&stats);
  Control ready;
  uint64_t rows = 0;
  for (const TableStats& table : stats) rows += table.rows();
  ready.mutable_server_ready()->set_rows(rows);
  spdlog::info("event=ready step={} rows={} read_only={} snapshot={}", start.step(), rows, start.read_only(),
               Quoted(start.snapshot()));
  return SendControl(ready);
}

// A fresh live store with this server's logical shards of the snapshot.
absl::Status PsServer::Restore(const StartServer& start) {
  for (const std::string& path : {live_, cuts_}) HEARTH_RETURN_IF_ERROR(RemoveTree(path));
  for (const std::string& path : {live_, snapshots_}) HEARTH_RETURN_IF_ERROR(MakeDirectories(path));
  links_ = CanLinkFiles(live_, snapshots_);
  disk_.disk_free_bytes_min = options_.job.snapshot().disk_free_bytes_min();
  // Stores write, and who copies cuts: to another disk, but where one has two mount points.
  const bool copies_beside_store = !links_ && OnOneFileSystem(live_, snapshots_);
  disk_.disk_sharers = static_cast<uint32_t>(options_.ranks.servers) * (copies_beside_store ? 2 : 1);
  const std::string& folder = start.snapshot();
  SetHorizons({}, start.step());
  if (folder.empty()) return OpenStore();
  HEARTH_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(folder));
  const ShardMap map(options_.job.training().shards(), static_cast<uint32_t>(options_.ranks.servers));
  if (manifest.step() != start.step()) {
    return absl::DataLossError(
        absl::StrCat(folder, ": MANIFEST is of step ", manifest.step(), ", asked for ", start.step()));
  }
  if (manifest.shards() != map.shards()) {
    return absl::FailedPreconditionError(absl::StrCat(folder, ": saved with training.shards ", manifest.shards(),
                                                      ", the job says ", map.shards(),
                                                      "; it is fixed at the first start"));
  }
  for (const TableStats& table : manifest.table()) clocks_.push_back(table.clock());
  clocks_.resize(static_cast<size_t>(options_.job.table_size()));
  SetHorizons(manifest.table(), start.step());
  const bool same_shards = manifest.servers() == map.servers();
  std::vector<FileEntry> rows;  // files of this server's, as the MANIFEST has them
  if (same_shards) {
    for (const FileEntry& file : manifest.file()) {
      if (absl::StartsWith(file.path(), name_ + "/") && HoldsRows(file.path())) rows.push_back(file);
    }
    saved_in_ = JoinPath(folder, name_);
    HEARTH_ASSIGN_OR_RETURN(const std::set<std::string> shared, CloneCheckpoint(saved_in_, live_));
    Remember(rows);
    // A copy is on the disk when the next snapshot, which has a link to it, has synced it.
    for (auto file = saved_.begin(); links_ && file != saved_.end();) {
      file = shared.count(file->first) > 0 ? std::next(file) : saved_.erase(file);
    }
  }
  HEARTH_RETURN_IF_ERROR(OpenStore());
  if (same_shards) {
    if (!start.read_only()) VerifyInBackground(folder, std::move(rows));
    return absl::OkStatus();
  }
  return RestoreShards(
      folder, manifest, [&](uint32_t shard) { return map.ServerOfShard(shard) == index_; }, store_.get());
}

// The checkpoint `from` as a store to go on with in the folder `to`: sorted tables are never changed and so may be
// shared, all else is copied. The next checkpoint then has only what is new to write.
// Returns the names of the files that are shared.
absl::StatusOr<std::set<std::string>> PsServer::CloneCheckpoint(const std::string& from, const std::string& to) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(from));
  std::set<std::string> shared;
  for (const std::string& name : names) {
    const std::string source = JoinPath(from, name);
    const std::string target = JoinPath(to, name);
    if (HoldsRows(name) && LinkFile(source, target).ok()) {
      shared.insert(name);
    } else {
      HEARTH_RETURN_IF_ERROR(Copy(source, target));
    }
  }
  return shared;
}

// Within `disk_`, like the store's own files. Where a snapshot is made of names of those, on their disk, the store has
// counted them.
absl::Status PsServer::Copy(const std::string& from, const std::string& to) {
  if (!links_ && disk_.disk_free_bytes_min > 0) {
    HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(from));
    HEARTH_ASSIGN_OR_RETURN(const uint64_t free, DiskFreeBytes(std::filesystem::path(to).parent_path().string()));
    if (bytes > DiskBytesAllowed(disk_, 0, free)) {
      return absl::ResourceExhaustedError(absl::StrCat(
          to, ": ", free, " bytes are free on this disk, of which ", disk_.disk_free_bytes_min,
          " must stay free (snapshot.disk_free_bytes_min); ", bytes, " to be copied from ", from,
          " are more than the share of one of ", disk_.disk_sharers, " writers in the rest; free disk space"));
    }
  }
  return CopyFile(from, to);
}

void PsServer::SetHorizons(const google::protobuf::RepeatedPtrField<TableStats>& stats, uint64_t step) {
  const std::vector<uint64_t> horizons = HorizonsOf(options_.job, stats, step);
  for (size_t i = 0; i < horizons.size(); ++i) saved_horizons_[i] = horizons[i];
}

absl::Status PsServer::OpenStore() {
  const Store& config = options_.job.store();
  const uint32_t cores = UsableCores();
  RocksDbOptions rocksdb = disk_;
  rocksdb.disk_bytes_max = options_.job.snapshot().disk_bytes_max();
  rocksdb.block_cache_bytes = config.block_cache_bytes();
  rocksdb.compaction_threads =
      config.compaction_threads() > 0 ? config.compaction_threads() : std::clamp(cores / 4, 1u, 4u);
  rocksdb.dead = [this](KvKey key, absl::string_view value) {
    return IsExpiredRecord(key, value, [this](TableNumber table) -> uint64_t {
      return table <= saved_horizons_.size() ? saved_horizons_[table - 1].load() : 0;
    });
  };
  HEARTH_ASSIGN_OR_RETURN(store_, OpenRocksDbStore(live_, rocksdb));
  saver_ = std::make_unique<TaskPool>(options_.env, "save", 1);
  io_ =
      std::make_unique<StoreIo>(options_.env, store_.get(),
                                config.read_threads() > 0 ? config.read_threads() : std::clamp(cores, 2u, 16u), [this] {
                                  mailbox_->Deliver({kWritten, Bytes()});
                                });
  return absl::OkStatus();
}

absl::Status PsServer::Serve() {
  bool upkeep = true;  // more may be left to do
  int64_t show_us = options_.job.metrics().prometheus_port() == 0 ? kNever : 0;
  std::vector<TableStats> stats;
  while (true) {
    std::optional<Message> message;
    if (!early_.empty()) {
      message = std::move(early_.front());
      early_.pop_front();
    } else {
      message = mailbox_->Receive(upkeep ? 0 : show_us);
    }
    if (options_.env->NowUs() >= show_us) {
      shard_->FillStats(&stats);
      metrics_.Show(shard_->applied_step(), stats);
      metrics_.ShowRefused(options_.transport->refused());
      show_us = options_.env->NowUs() + kShowUs;
    }
    if (!message) {
      HEARTH_ASSIGN_OR_RETURN(upkeep, shard_->Idle());
      continue;
    }
    upkeep = true;
    if (message->from == kWritten) continue;
    if (message->from == kVerified) {
      HEARTH_RETURN_IF_ERROR(verified_);
      continue;
    }
    if (message->from == kSaved) {
      HEARTH_RETURN_IF_ERROR(TellOfCut(/*wait=*/false));
      continue;
    }
    MessageKind kind;
    HEARTH_ASSIGN_OR_RETURN(const std::optional<Control> control, ControlOf(*message, &kind));
    if (!control) {
      metrics_.Count(kind);
      HEARTH_RETURN_IF_ERROR(shard_->Handle(*std::move(message)));
    } else if (control->has_goodbye()) {
      spdlog::info("event=goodbye step={} code={} reason={}", shard_->applied_step(), control->goodbye().exit_code(),
                   Quoted(control->goodbye().reason()));
      return absl::OkStatus();
    } else {
      return absl::InternalError(absl::StrCat("rank ", message->from.rank, " sent a control message of kind ",
                                              static_cast<int>(control->kind_case()), " to a running server"));
    }
  }
}

// The rows are in the hands of the store's writer. Behind them it makes the copy, and another thread describes it,
// while this one serves on: everything is on disk before the scheduler hears of it. One cut is on its way at a time, so
// that no more lies on the disks than plans say; where they are slower than cuts come, training keeps their pace.
absl::Status PsServer::SaveCut(ServerAtCut report) {
  const int64_t begin_us = options_.env->NowUs();
  if (saving_ != nullptr && !saving_->done) {
    spdlog::warn("event=cut_waits step={} for={}", report.step(), saving_->report.step());
  }
  HEARTH_RETURN_IF_ERROR(TellOfCut(/*wait=*/true));
  saving_ = std::make_unique<Saving>();
  Saving* const saving = saving_.get();
  saving->report = std::move(report);
  saving->begin_us = options_.env->NowUs();
  saving->report.set_stopped_us(saving->report.stopped_us() + static_cast<uint64_t>(saving->begin_us - begin_us));
  io_->Then([this, saving](const absl::Status& written) {
    saving->status = written.ok() ? CopyStore(saving->report) : written;
    saver_->Run([this, saving] {
      if (saving->status.ok()) saving->status = Describe(saving);
      saving->done = true;
      mailbox_->Deliver({kSaved, Bytes()});
    });
  });
  return absl::OkStatus();
}

absl::Status PsServer::CopyStore(const ServerAtCut& cut) {
  const uint64_t step = cut.step();
  const std::string folder = links_ ? SavedFolder(step) : JoinPath(cuts_, absl::StrCat(step));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(std::filesystem::path(folder).parent_path()));
  HEARTH_RETURN_IF_ERROR(RemoveTree(folder));
  HEARTH_RETURN_IF_ERROR(store_->Checkpoint(folder));
  SetHorizons(cut.table(), step);
  return absl::OkStatus();
}

absl::Status PsServer::Describe(Saving* saving) {
  ServerAtCut* report = &saving->report;
  const uint64_t step = report->step();
  const std::string snapshot = JoinPath(snapshots_, absl::StrCat(step));
  if (!links_) HEARTH_RETURN_IF_ERROR(BringCheckpoint(JoinPath(cuts_, absl::StrCat(step)), SavedFolder(step)));
  if (options_.job.snapshot().verify_hash()) HEARTH_RETURN_IF_ERROR(CheckHash(*report));
  HEARTH_ASSIGN_OR_RETURN(std::vector<FileEntry> files, DescribeCheckpoint(snapshot));
  uint64_t bytes = 0;
  for (FileEntry& file : files) {
    bytes += file.bytes();
    *report->add_file() = std::move(file);
  }
  HEARTH_RETURN_IF_ERROR(FsyncPath(snapshots_));
  report->set_peak_rss_bytes(PeakRssBytes());
  report->set_rows_verified(rows_verified_);
  spdlog::info("event=cut step={} files={} bytes={} seconds={:.3f} stopped_ms={:.1f} rows_hash={:016x}", report->step(),
               report->file_size(), bytes, static_cast<double>(options_.env->NowUs() - saving->begin_us) * 1e-6,
               static_cast<double>(report->stopped_us()) * 1e-3, report->rows_hash());
  return absl::OkStatus();
}

absl::Status PsServer::CheckHash(const ServerAtCut& report) {
  const std::string folder = SavedFolder(report.step());
  HEARTH_ASSIGN_OR_RETURN(const uint64_t hash, HashServerRows(folder, options_.job, report, index_,
                                                              static_cast<uint32_t>(options_.ranks.servers)));
  if (hash == report.rows_hash()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      folder, ": its rows hash to ", absl::Hex(hash, absl::kZeroPad16), ", the sums kept while training say ",
      absl::Hex(report.rows_hash(), absl::kZeroPad16), " (snapshot.verify_hash): a fault of Hearth's"));
}

// From a disk of the server's own. What the last snapshot has as well is a name more of the file there: only what is
// new is copied.
absl::Status PsServer::BringCheckpoint(const std::string& from, const std::string& to) {
  HEARTH_RETURN_IF_ERROR(RemoveTree(to));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(to));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(from));
  for (const std::string& name : names) {
    if (saved_.count(name) > 0 && LinkFile(JoinPath(saved_in_, name), JoinPath(to, name)).ok()) continue;
    saved_.erase(name);
    HEARTH_RETURN_IF_ERROR(Copy(JoinPath(from, name), JoinPath(to, name)));
  }
  return RemoveTree(from);
}

// Once the cut that is on its way has arrived; `wait`: until then.
absl::Status PsServer::TellOfCut(bool wait) {
  if (saving_ == nullptr) return absl::OkStatus();
  while (wait && !saving_->done) {
    Message message = *mailbox_->Receive(kNever);
    if (message.from == kVerified) HEARTH_RETURN_IF_ERROR(verified_);  // at once: the disk may hang
    if (message.from.rank >= 0) early_.push_back(std::move(message));
  }
  if (!saving_->done) return absl::OkStatus();
  HEARTH_RETURN_IF_ERROR(saving_->status);
  Control control;
  *control.mutable_server_at_cut() = std::move(saving_->report);
  saving_.reset();
  return SendControl(control);
}

void PsServer::VerifyInBackground(const std::string& folder, std::vector<FileEntry> files) {
  rows_verified_ = false;
  verifier_ = std::make_unique<TaskPool>(options_.env, "verify", 1);
  verifier_->Run([this, folder, files = std::move(files)] {
    const auto leaving = [this] { return leaving_.load(); };
    const std::unique_ptr<Event> pause = options_.env->NewEvent();
    const int64_t begin_us = options_.env->NowUs();
    uint64_t bytes = 0;
    for (const FileEntry& file : files) {
      const int64_t file_us = options_.env->NowUs();
      const std::string path = JoinPath(folder, file.path());
      absl::StatusOr<uint64_t> hash = HashFile(path, leaving);
      if (absl::IsNotFound(hash.status())) {  // the snapshot has been removed since; the store may have the file still
        hash = HashFile(JoinPath(live_, std::filesystem::path(path).filename().string()), leaving);
      }
      if (leaving_) return;
      if (!hash.ok()) {  // the disk's affair, or the file is gone: no finding about the rows
        if (!absl::IsNotFound(hash.status())) {
          spdlog::warn("event=rows_not_read path={} cause={}", Quoted(path), Quoted(hash.status().message()));
        }
        continue;
      }
      if (*hash != file.xxh3()) {
        verified_ = absl::DataLossError(absl::StrCat(path, ": checksum is ", absl::Hex(*hash, absl::kZeroPad16),
                                                     ", MANIFEST says ", absl::Hex(file.xxh3(), absl::kZeroPad16),
                                                     "; the job goes back to the newest snapshot that is whole"));
      }
      if (!verified_.ok()) break;
      bytes += file.bytes();
      // A quarter of a disk's time, at most.
      const int64_t until_us = options_.env->NowUs() + 3 * (options_.env->NowUs() - file_us);
      while (!leaving_ && options_.env->NowUs() < until_us) {
        pause->WaitUntil(std::min(until_us, options_.env->NowUs() + kPauseUs));
      }
    }
    if (verified_.ok()) {
      rows_verified_ = true;
      spdlog::info("event=rows_verified snapshot={} files={} bytes={} seconds={:.1f}", Quoted(folder), files.size(),
                   bytes, static_cast<double>(options_.env->NowUs() - begin_us) * 1e-6);
    }
    mailbox_->Deliver({kVerified, Bytes()});
  });
}

// Length and checksum of every file of this server in `snapshot`. A sorted table never changes and its name is never
// used again in a live store, so what the last checkpoint held is neither read nor synced a second time.
absl::StatusOr<std::vector<FileEntry>> PsServer::DescribeCheckpoint(const std::string& snapshot) {
  const std::string folder = JoinPath(snapshot, name_);
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(folder));
  std::vector<FileEntry> files;
  std::vector<std::string> others;
  for (const std::string& name : names) {
    const auto known = saved_.find(name);
    if (known != saved_.end()) {
      HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(JoinPath(folder, name)));
      if (bytes == known->second.bytes()) {
        files.push_back(known->second);
        continue;
      }
    }
    others.push_back(JoinPath(name_, name));
  }
  HEARTH_ASSIGN_OR_RETURN(std::vector<FileEntry> described, DescribeFiles(snapshot, others));
  std::move(described.begin(), described.end(), std::back_inserter(files));
  Remember(files);
  saved_in_ = folder;
  return files;
}

void PsServer::Remember(absl::Span<const FileEntry> files) {
  saved_.clear();
  for (const FileEntry& file : files) {
    absl::string_view name = file.path();
    if (absl::ConsumePrefix(&name, name_ + "/") && HoldsRows(name)) saved_.emplace(name, file);
  }
}

absl::Status PsServer::SendControl(const Control& control) {
  return SendToScheduler(options_.transport, options_.ranks, control);
}

absl::Status SendFailed(Transport* transport, const Ranks& ranks, const absl::Status& status) {
  return SendToScheduler(transport, ranks, FailedControl(status));
}

}  // namespace hearth
