// Whole servers over RocksDB, the scheduler and the workers played by the test.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "common/net/wire.h"
#include "embedding/rocksdb_store.h"
#include "ps/ps_client.h"
#include "ps/ps_server.h"
#include "tests/embedding/failing_disk.h"
#include "tests/ps/plan.h"

namespace hearth {

inline std::string NewFolder(const std::string& name) {
  static std::atomic<int> next{0};
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("ps_server_", name, "_", getpid(), "_", ++next));
  HEARTH_CHECK(RemoveTree(folder).ok() && MakeDirectories(folder).ok());
  return folder;
}

// P servers on threads, from Hello to Goodbye. With a `disk`, what they report must be synced there. `live`: live_dir.
class Servers {
 public:
  Servers(const Job& job, const std::string& dir, int servers, const FailingDisk* disk = nullptr,
          const std::string& live = "")
      : job_(job), dir_(dir), disk_(disk), hub_(Env::Real(), 2 + servers) {
    ranks_.servers = servers;
    statuses_.resize(servers);
    for (int i = 0; i < servers; ++i) {
      threads_.push_back(Env::Real()->StartThread("ps", [this, i, live] {
        PsServerOptions options;
        options.env = Env::Real();
        options.transport = hub_.transport(ranks_.server(i));
        options.job = job_;
        options.ranks = ranks_;
        options.dir = dir_;
        options.live_dir = live;
        PsServer server(std::move(options));
        statuses_[i] = server.Run();
        if (statuses_[i].ok()) return;
        HEARTH_CHECK(SendFailed(hub_.transport(ranks_.server(i)), ranks_, statuses_[i]).ok());
        LetClientsGo();
      }));
    }
    for (int i = 0; i < servers; ++i) {
      const Control hello = Next();
      EXPECT_TRUE(hello.has_hello()) << hello.DebugString();
      EXPECT_EQ(hello.from_role(), "ps");
      EXPECT_EQ(hello.hello().job_hash(), JobHash(job_));
    }
  }
  ~Servers() { Stop(); }

  Control Next() {
    auto message = hub_.transport(0)->Open(kPortScheduler)->Receive(kNever);
    const absl::Span<const char> body = OpaqueBody(message->payload.span());
    Control control;
    HEARTH_CHECK(control.ParseFromArray(body.data(), static_cast<int>(body.size())));
    return control;
  }
  void Tell(const Control& control) {
    Header header;
    header.kind = MessageKind::kControl;
    const std::string body = control.SerializeAsString();
    for (int i = 0; i < ranks_.servers; ++i) {
      const Bytes message = EncodeOpaque(header, {body.data(), body.size()});
      HEARTH_CHECK(hub_.transport(0)->Send(kPortScheduler, {ranks_.server(i), kPortServer}, message.Clone()).ok());
    }
  }
  void Start(uint64_t step, const std::string& snapshot, bool read_only = false) {
    Control control;
    control.mutable_start_server()->set_step(step);
    control.mutable_start_server()->set_snapshot(snapshot);
    control.mutable_start_server()->set_read_only(read_only);
    Tell(control);
  }
  // Every server's answer, of one kind.
  std::vector<Control> Gather(bool (Control::*has)() const) {
    std::vector<Control> all;
    while (static_cast<int>(all.size()) < ranks_.servers) {
      all.push_back(Next());
      EXPECT_TRUE((all.back().*has)()) << all.back().DebugString();
    }
    return all;
  }
  // Until all are ready, or what the first to fail said.
  absl::Status WaitUntilReady() {
    for (int ready = 0; ready < ranks_.servers; ++ready) {
      const Control control = Next();
      if (control.has_failed()) return absl::AbortedError(control.failed().reason());
      EXPECT_TRUE(control.has_server_ready()) << control.DebugString();
    }
    return absl::OkStatus();
  }
  // The parts of cut `step` as a committed snapshot: its folder, or what the first server to fail said.
  absl::StatusOr<std::string> Commit(uint64_t step) {
    Manifest manifest;
    manifest.set_schema(1);
    manifest.set_step(step);
    manifest.set_job(PrintJob(job_));
    manifest.set_lanes(job_.training().lanes());
    for (uint32_t lane = 0; lane < manifest.lanes(); ++lane) manifest.add_lane()->mutable_cursor()->set_lane(lane);
    manifest.set_shards(job_.training().shards());
    manifest.set_servers(static_cast<uint32_t>(ranks_.servers));
    const std::string snapshots = JoinPath(dir_, "snapshots");
    const std::string folder = JoinPath(snapshots, absl::StrCat(step));
    uint64_t hash = 0;
    for (int parts = 0; parts < ranks_.servers; ++parts) {
      const Control control = Next();
      if (control.has_failed()) return absl::AbortedError(control.failed().reason());
      EXPECT_TRUE(control.has_server_at_cut()) << control.DebugString();
      const ServerAtCut& part = control.server_at_cut();
      EXPECT_EQ(part.step(), step);
      EXPECT_EQ(part.table_size(), job_.table_size());
      EXPECT_GT(part.peak_rss_bytes(), 0u);
      EXPECT_TRUE(part.has_stopped_us());
      for (const FileEntry& file : part.file()) {
        *manifest.add_file() = file;
        EXPECT_TRUE(disk_ == nullptr || disk_->IsSynced(JoinPath(folder, file.path()))) << file.path();
      }
      for (const std::string& path : {JoinPath(folder, absl::StrCat("ps-", control.from_index())), snapshots}) {
        EXPECT_TRUE(disk_ == nullptr || disk_->IsSynced(path)) << path;
      }
      hash += part.rows_hash();
    }
    EXPECT_TRUE(disk_ == nullptr || disk_->IsSynced(folder));
    manifest.set_rows_hash(hash);
    HEARTH_RETURN_IF_ERROR(CommitManifest(folder, manifest));
    committed_ = step;
    return folder;
  }
  void Stop() {
    if (threads_.empty()) return;
    Control control;
    control.mutable_goodbye()->set_exit_code(0);
    Tell(control);
    threads_.clear();  // joins
  }

  // One worker with all lanes, from the cut `from` to the cut `to`; commits every cut on the way, or leaves that to the
  // caller. Returns the last one's folder, or what the first server to fail said.
  absl::StatusOr<std::string> Train(const Plan& plan, const Reference& reference, uint64_t from, uint64_t to,
                                    bool commit = true) {
    PullClient pulls(Client(), kPortPull);
    const ClientOfServers held(this, &pulls);
    PushClient pushes(Client());
    std::map<std::pair<uint64_t, uint32_t>, LaneBatch> in_flight;
    std::string folder;
    uint64_t sent = from;
    for (uint64_t step = from + 1; step <= to; ++step) {
      for (; sent < std::min(to, step + plan.staleness); ++sent) {
        for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
          LaneBatch& batch = in_flight[{sent + 1, lane}];
          batch = plan.MakeBatch(lane, sent + 1);
          HEARTH_CHECK(pulls.Send(lane, sent + 1, plan.View(sent + 1), RowsOf(&batch)).ok());
        }
      }
      for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        LaneBatch& batch = in_flight[{step, lane}];
        std::vector<TableRows> tables = RowsOf(&batch);
        const absl::Status received = pulls.Receive(lane, step, absl::MakeSpan(tables));
        if (absl::IsCancelled(received)) return Failure();
        HEARTH_CHECK(received.ok(), "pull: ", received.ToString());
        const LaneBatch expected = reference.Pull(lane, step);
        for (uint32_t t = 0; t < kTables; ++t) {
          EXPECT_TRUE(SameBits(batch[t].rows, expected[t].rows))
              << "lane " << lane << ", step " << step << ", table " << t + 1;
        }
        plan.Train(lane, step, &batch);
      }
      for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        LaneBatch& batch = in_flight[{step, lane}];
        HEARTH_CHECK(
            pushes.Push(lane, step, {plan.Records(step), plan.NextCut(step), plan.Skip(step)}, RowsOf(&batch)).ok());
        in_flight.erase({step, lane});
      }
      if (commit && plan.IsCut(step)) {
        HEARTH_ASSIGN_OR_RETURN(folder, Commit(step));
      }
    }
    HEARTH_CHECK(pushes.Flush().ok());
    return folder;
  }
  ClientOptions Client() {
    ClientOptions options;
    options.env = Env::Real();
    options.transport = hub_.transport(ranks_.worker(0));
    options.map = ShardMap(job_.training().shards(), static_cast<uint32_t>(ranks_.servers));
    options.ranks = ranks_;
    return options;
  }
  static std::vector<TableRows> RowsOf(LaneBatch* batch) {
    std::vector<TableRows> tables;
    for (uint32_t t = 0; t < kTables; ++t) {
      TableBatch& table = (*batch)[t];
      tables.push_back({t + 1, kDims[t], table.signs, table.occurrences, absl::MakeSpan(table.rows)});
    }
    return tables;
  }
  const std::vector<absl::Status>& statuses() const { return statuses_; }
  uint64_t committed() const { return committed_; }  // step of the newest commit

 private:
  // A client that waits no longer once a server has failed.
  class ClientOfServers {
   public:
    ClientOfServers(Servers* servers, PullClient* client) : servers_(servers) { servers_->Hold(client); }
    ~ClientOfServers() { servers_->Hold(nullptr); }

   private:
    Servers* const servers_;
  };
  void Hold(PullClient* client) {
    std::lock_guard<std::mutex> lock(mutex_);
    client_ = client;
    if (client_ != nullptr && failed_) client_->Stop();
  }
  void LetClientsGo() {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;
    if (client_ != nullptr) client_->Stop();
  }
  absl::Status Failure() {
    while (true) {
      const Control control = Next();
      if (control.has_failed()) return absl::AbortedError(control.failed().reason());
    }
  }

  const Job job_;
  const std::string dir_;
  const FailingDisk* const disk_;
  Ranks ranks_;
  InProcessHub hub_;
  uint64_t committed_ = 0;
  std::mutex mutex_;
  PullClient* client_ = nullptr;  // guarded by mutex_
  bool failed_ = false;           // guarded by mutex_
  std::vector<absl::Status> statuses_;
  std::vector<std::unique_ptr<Thread>> threads_;
};

// Libraries that a sanitizer does not see into make their statics on first use: here, before there are threads.
class PsServerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    spdlog::info("event=first_use");
    const std::string folder = NewFolder("first_use");
    auto store = OpenRocksDbStore(JoinPath(folder, "live"), RocksDbOptions());
    HEARTH_CHECK(store.ok() && (*store)->Checkpoint(JoinPath(folder, "saved")).ok());
  }
};

inline Plan MakeServerPlan(uint64_t steps = 18) {
  Plan plan = Plan::Make(5, 2, 1, steps);
  plan.every_steps = 6;
  plan.asks = {plan.steps - plan.staleness};
  plan.ids = 60;
  plan.signs_max = 25;
  return plan;
}

}  // namespace hearth
