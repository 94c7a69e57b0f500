#include "ps/ps_server.h"

#include <filesystem>
#include <optional>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/control_message.h"
#include "common/net/wire.h"
#include "embedding/rocksdb_store.h"
#include "embedding/snapshot_reader.h"

namespace hearth {
namespace {

constexpr char kSortedTableSuffix[] = ".sst";
constexpr int64_t kShowUs = 1'000'000;  // between two looks at the tables for Prometheus

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

// The checkpoint `from` as a store to go on with in the folder `to`: sorted tables are never changed and so may be
// shared, all else is copied. The next checkpoint then has only what is new to write.
absl::Status CloneCheckpoint(const std::string& from, const std::string& to) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(from));
  for (const std::string& name : names) {
    const std::string source = JoinPath(from, name);
    const std::string target = JoinPath(to, name);
    std::error_code error;
    if (absl::EndsWith(name, kSortedTableSuffix)) {
      std::filesystem::create_hard_link(source, target, error);
      if (!error) continue;  // another file system, else
    }
    std::filesystem::copy_file(source, target, error);
    if (!error) continue;
    const std::string text = absl::StrCat(source, ": cannot copy to ", target, ": ", error.message());
    return error == std::errc::no_space_on_device ? absl::ResourceExhaustedError(text) : absl::UnavailableError(text);
  }
  return absl::OkStatus();
}

}  // namespace

PsServer::PsServer(PsServerOptions options)
    : options_(std::move(options)),
      index_(static_cast<uint32_t>(options_.transport->rank() - options_.ranks.server(0))),
      name_(absl::StrCat("ps-", index_)),
      live_(JoinPath(options_.live_dir.empty() ? JoinPath(options_.dir, "live") : options_.live_dir, name_)),
      mailbox_(options_.transport->Open(kPortServer)),
      metrics_(options_.job, options_.transport->rank()) {
  HEARTH_CHECK(index_ < static_cast<uint32_t>(options_.ranks.servers), "rank ", options_.transport->rank());
}

PsServer::~PsServer() = default;

absl::Status PsServer::Run() {
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
  shard.read_only = start.read_only();
  const auto reply = [this](Address to, Bytes message) {
    return options_.transport->Send(kPortServer, to, std::move(message));
  };
  HEARTH_ASSIGN_OR_RETURN(shard_,
                          Shard::Open(shard, store_.get(), reply, [this](uint64_t step) { return SaveCut(step); }));
  if (start.snapshot().empty() && !start.read_only()) HEARTH_RETURN_IF_ERROR(SaveCut(start.step()));
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
  HEARTH_RETURN_IF_ERROR(RemoveTree(live_));
  HEARTH_RETURN_IF_ERROR(MakeDirectories(live_));
  RocksDbOptions rocksdb;
  rocksdb.disk_bytes_max = options_.job.snapshot().disk_bytes_max();
  rocksdb.disk_free_bytes_min = options_.job.snapshot().disk_free_bytes_min();
  rocksdb.disk_sharers = static_cast<uint32_t>(options_.ranks.servers);
  const std::string& folder = start.snapshot();
  if (folder.empty()) {
    HEARTH_ASSIGN_OR_RETURN(store_, OpenRocksDbStore(live_, rocksdb));
    return absl::OkStatus();
  }
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
  const bool same_shards = manifest.servers() == map.servers();
  if (same_shards) HEARTH_RETURN_IF_ERROR(CloneCheckpoint(JoinPath(folder, name_), live_));
  HEARTH_ASSIGN_OR_RETURN(store_, OpenRocksDbStore(live_, rocksdb));
  if (same_shards) return absl::OkStatus();
  return RestoreShards(
      folder, manifest, [&](uint32_t shard) { return map.ServerOfShard(shard) == index_; }, store_.get());
}

absl::Status PsServer::Serve() {
  bool upkeep = true;  // more may be left to do
  int64_t show_us = options_.job.metrics().prometheus_port() == 0 ? kNever : 0;
  std::vector<TableStats> stats;
  while (true) {
    std::optional<Message> message = mailbox_->Receive(upkeep ? 0 : show_us);
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

// Everything is written and on disk before the scheduler hears of it.
absl::Status PsServer::SaveCut(uint64_t step) {
  const int64_t begin_us = options_.env->NowUs();
  const std::string snapshots = JoinPath(options_.dir, "snapshots");
  const std::string snapshot = JoinPath(snapshots, absl::StrCat(step));
  const std::string folder = JoinPath(snapshot, name_);
  Control control;
  ServerAtCut* report = control.mutable_server_at_cut();
  HEARTH_RETURN_IF_ERROR(MakeDirectories(snapshot));
  HEARTH_RETURN_IF_ERROR(RemoveTree(folder));
  HEARTH_RETURN_IF_ERROR(shard_->Snapshot(step, report));
  HEARTH_RETURN_IF_ERROR(store_->Checkpoint(folder));
  HEARTH_ASSIGN_OR_RETURN(std::vector<FileEntry> files, DescribeCheckpoint(snapshot));
  uint64_t bytes = 0;
  for (FileEntry& file : files) {
    HEARTH_RETURN_IF_ERROR(FsyncPath(JoinPath(snapshot, file.path())));
    bytes += file.bytes();
    *report->add_file() = std::move(file);
  }
  for (const std::string& path : {folder, snapshot, snapshots}) HEARTH_RETURN_IF_ERROR(FsyncPath(path));
  report->set_peak_rss_bytes(PeakRssBytes());
  spdlog::info("event=cut step={} files={} bytes={} seconds={:.3f} rows_hash={:016x}", step, report->file_size(), bytes,
               static_cast<double>(options_.env->NowUs() - begin_us) * 1e-6, report->rows_hash());
  return SendControl(control);
}

// Length and checksum of every file of this server in `snapshot`. A sorted table never changes and its name is never
// used again in a live store, so what the last checkpoint held is not read a second time.
absl::StatusOr<std::vector<FileEntry>> PsServer::DescribeCheckpoint(const std::string& snapshot) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(JoinPath(snapshot, name_)));
  std::vector<FileEntry> files;
  std::map<std::string, Saved> saved;
  for (const std::string& name : names) {
    const std::string path = JoinPath(name_, name);
    const bool sorted_table = absl::EndsWith(name, kSortedTableSuffix);
    const auto known = saved_.find(name);
    if (sorted_table && known != saved_.end()) {
      HEARTH_ASSIGN_OR_RETURN(const uint64_t bytes, FileBytes(JoinPath(snapshot, path)));
      if (bytes == known->second.bytes) {
        FileEntry& file = files.emplace_back();
        file.set_path(path);
        file.set_bytes(bytes);
        file.set_xxh3(known->second.xxh3);
        saved.insert(*known);
        continue;
      }
    }
    HEARTH_ASSIGN_OR_RETURN(const std::vector<FileEntry> described, DescribeFiles(snapshot, {path}));
    for (const FileEntry& file : described) {
      if (sorted_table) saved[name] = {file.bytes(), file.xxh3()};
      files.push_back(file);
    }
  }
  saved_ = std::move(saved);
  return files;
}

absl::Status PsServer::SendControl(const Control& control) {
  return SendToScheduler(options_.transport, options_.ranks, control);
}

absl::Status SendFailed(Transport* transport, const Ranks& ranks, const absl::Status& status) {
  return SendToScheduler(transport, ranks, FailedControl(status));
}

}  // namespace hearth
