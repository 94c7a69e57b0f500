#include "scheduler/publisher.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/artifact/bundle.h"
#include "common/artifact/history.h"
#include "common/artifact/manifest.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/job/quality.h"

namespace hearth {
namespace {

constexpr uint32_t kTriesMax = 3;  // then a newer snapshot takes the place, and an end does not wait any more
constexpr int64_t kRetryUs = 1'000'000;
constexpr int64_t kRetryMostUs = 60'000'000;

}  // namespace

Publisher::Publisher(Options options, const std::vector<uint64_t>& committed, bool finished)
    : options_(std::move(options)), out_(JoinPath(options_.dir, "export")) {
  const absl::StatusOr<std::vector<std::string>> aside = SetAsideBeyond(out_, committed.empty() ? 0 : committed.back());
  absl::Status status = aside.status();
  const absl::StatusOr<History> history = ReadHistory(options_.dir);
  status.Update(history.status());
  if (history.ok() && history->newest_fork() != nullptr) forked_at_ = history->newest_fork()->back_to;
  if (status.ok()) {
    for (const std::string& name : *aside)
      spdlog::warn("event=published_set_aside as={} cause=\"beyond the snapshot\"", Quoted(name));
    status = Look();
  }
  if (!status.ok()) Fail(std::string(status.message()));
  tries_ = 0;
  retry_at_us_ = 0;
  const int64_t now_us = options_.env->NowUs();
  for (const uint64_t step : committed) {
    if (step <= tip() || !IsDue(step, finished && step == committed.back()) || Withholds(step)) continue;
    waiting_[step] = now_us;
  }
  // What the chain holds is not known then: a new full export of the newest one is sure to be no step back.
  if (!status.ok() && !waiting_.empty()) waiting_.erase(waiting_.begin(), std::prev(waiting_.end()));
  BoundWaiting();
}

bool Publisher::IsDue(uint64_t step, bool job_finished) const {
  return step > 0 && (job_finished || step % options_.job.export_().delta_every_steps() == 0);
}

bool Publisher::Withholds(uint64_t step) {
  if (options_.job.export_().require().empty()) return false;
  const absl::StatusOr<Manifest> manifest = ReadManifest(JoinPath(options_.dir, absl::StrCat("snapshots/", step)));
  std::vector<std::string> unmet;
  if (manifest.ok()) {
    unmet = UnmetRequirements(options_.job, {manifest->evaluation().begin(), manifest->evaluation().end()}, step);
  } else {
    unmet = {std::string(manifest.status().message())};
  }
  if (unmet.empty()) return false;
  ++figures_.withheld;
  figures_.withheld_reason = absl::StrCat("step ", step, ": ", absl::StrJoin(unmet, "; "));
  spdlog::warn("event=publication_withheld step={} reason={}", step, Quoted(absl::StrJoin(unmet, "; ")));
  return true;
}

void Publisher::Committed(uint64_t step, bool job_finished) {
  if (step <= tip() || !IsDue(step, job_finished) || Withholds(step)) return;
  waiting_.emplace(step, options_.env->NowUs());
  BoundWaiting();
}

void Publisher::BoundWaiting() {
  const size_t waiting_max = options_.job.export_().waiting_max() + (working() ? 1 : 0);
  while (waiting_.size() > waiting_max) {
    const auto oldest = working() ? std::next(waiting_.begin()) : waiting_.begin();
    spdlog::warn("event=publication_left_out step={} cause=\"export.waiting_max snapshots wait\"", oldest->first);
    ++figures_.left_out;
    waiting_.erase(oldest);
  }
}

bool Publisher::Poll() {
  if (working()) {
    const std::optional<int> code = child_->Poll();
    if (!code.has_value()) return false;
    Finish(*code);
    return true;
  }
  if (!waiting_.empty() && options_.env->NowUs() >= retry_at_us_) StartChild();
  return false;
}

bool Publisher::done() const { return !working() && (waiting_.empty() || tries_ >= kTriesMax); }

absl::Status Publisher::Look() {
  absl::StatusOr<std::vector<BundleLink>> chain = ReadNewestChain(out_);
  // What cannot be read, or cannot go on, is left behind for a new full export.
  needs_base_ = !chain.ok() || chain->size() > options_.job.export_().deltas_max();
  HEARTH_RETURN_IF_ERROR(chain.status());
  chain_ = *std::move(chain);
  needs_base_ |= chain_.empty() || (forked_at_.has_value() && chain_[0].base <= *forked_at_);
  waiting_.erase(waiting_.begin(), waiting_.upper_bound(tip()));
  return absl::OkStatus();
}

void Publisher::StartChild() {
  absl::Status status = RemoveAbandoned(out_, "");
  if (status.ok() && !chain_.empty()) status = RemoveAbandoned(DeltasFolder(out_, chain_[0].base), "");
  if (!status.ok()) return Fail(std::string(status.message()));
  child_step_ = waiting_.begin()->first;
  child_makes_delta_ = !needs_base_;
  std::vector<std::string> argv = {JoinPath(options_.programs, child_makes_delta_ ? "hearth-delta" : "hearth-export"),
                                   JoinPath(options_.dir, absl::StrCat("snapshots/", child_step_)), "--out"};
  if (child_makes_delta_) {
    argv.insert(argv.end(), {out_, "--since", absl::StrCat(tip())});
  } else {
    argv.insert(argv.end(), {JoinPath(out_, absl::StrCat(child_step_)), "--format", options_.job.export_().format()});
    // Without a split the golden records would come from a training log, which may be a stream.
    if (options_.job.split_size() == 0) argv.insert(argv.end(), {"--golden", "0"});
  }
  absl::StatusOr<std::unique_ptr<ChildProcess>> child =
      ChildProcess::Start(argv, JoinPath(options_.dir, "logs/export.log"));
  if (!child.ok()) return Fail(std::string(child.status().message()));
  child_ = *std::move(child);
}

void Publisher::Finish(int code) {
  child_.reset();
  const int64_t committed_us = waiting_.at(child_step_);
  const absl::Status status = Look();
  if (status.ok() && tip() == child_step_) {
    tries_ = 0;
    ++figures_.published;
    figures_.seconds = static_cast<double>(options_.env->NowUs() - committed_us) * 1e-6;
    spdlog::info("event=published step={} base={} seq={} seconds_since_commit={:.3f}", child_step_, chain_.back().base,
                 chain_.back().seq, figures_.seconds);
    return;
  }
  const std::string log = JoinPath(options_.dir, "logs/export.log");
  Fail(!status.ok() ? std::string(status.message())
       : code == 127
           ? absl::StrCat(options_.programs, "/hearth-export or hearth-delta: cannot be started; build all of Hearth")
           : absl::StrCat("publishing step ", child_step_, " ended with ", code, "; see ", log));
  // The chain does not fit the run, or is damaged: another try with it would end the same way.
  if (child_makes_delta_ && (code == kExitBadData || code == kExitConfig)) needs_base_ = true;
}

void Publisher::Fail(const std::string& reason) {
  ++figures_.failures;
  figures_.reason = reason;
  spdlog::error("event=publication_failed reason={}", Quoted(reason));
  retry_at_us_ = options_.env->NowUs() + std::min(kRetryMostUs, kRetryUs << std::min<uint32_t>(tries_, 16));
  if (++tries_ < kTriesMax || waiting_.size() < 2) return;
  ++figures_.left_out;
  waiting_.erase(waiting_.begin());
  tries_ = 0;
}

PublicationFigures Publisher::figures() const {
  PublicationFigures figures = figures_;
  if (!chain_.empty()) {
    figures.base = chain_.back().base;
    figures.seq = chain_.back().seq;
    figures.step = chain_.back().step;
  }
  figures.waiting = waiting_.size();
  return figures;
}

}  // namespace hearth
