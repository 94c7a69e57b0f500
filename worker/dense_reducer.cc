#include "worker/dense_reducer.h"

#include <cstring>
#include <limits>

#include "common/status.h"
#include "worker/dense_optimizer.h"

namespace hearth {

// Fixed layout, the same on all workers of a job; its floats follow: mean [columns], m2 [columns].
struct DenseReducer::Tail {
  uint64_t records;
  uint64_t read;
  uint64_t bad;
  double moments_count;
  uint32_t at_end;
  uint32_t stop;
  uint32_t cut;
  uint32_t skip;
};

DenseReducer::DenseReducer(Collective* collective, uint32_t lanes, int64_t parameters, int64_t moment_columns,
                           double clip_norm)
    : collective_(collective),
      lanes_(lanes),
      columns_(static_cast<size_t>(moment_columns)),
      tail_bytes_(sizeof(Tail) + 2 * columns_ * sizeof(float)),
      clip_norm_(clip_norm),
      zeros_(static_cast<size_t>(parameters), 0.0f),
      sum_(static_cast<size_t>(parameters)),
      tails_(lanes * tail_bytes_),
      moments_(lanes) {}

absl::Status DenseReducer::Reduce(absl::Span<const LaneVote> votes, StepSum* sum) {
  own_tails_.resize(votes.size() * tail_bytes_);
  parts_.clear();
  for (size_t i = 0; i < votes.size(); ++i) {
    char* tail = own_tails_.data() + i * tail_bytes_;
    WriteTail(votes[i], tail);
    const std::vector<float>& gradient = votes[i].result != nullptr ? votes[i].result->gradient : zeros_;
    parts_.push_back({gradient, {tail, tail_bytes_}});
  }
  HEARTH_RETURN_IF_ERROR(
      collective_->SumParts(static_cast<int>(lanes_), parts_, absl::MakeSpan(sum_), absl::MakeSpan(tails_)));
  ReadTails(sum);
  sum->gradient = absl::MakeSpan(sum_);
  sum->trains = sum->verdict.records > 0 && !sum->verdict.skip;
  if (!sum->trains) return absl::OkStatus();
  sum->moments = PoolMoments(moments_);
  const float n = static_cast<float>(sum->verdict.records);
  for (float& g : sum_) g /= n;
  sum->gradient_norm = ClipNorm(sum->gradient, clip_norm_);
  // Lanes that are finite alone need not be so together, and Adam squares in float. The sums are the same everywhere.
  const bool finite = sum->gradient_norm * sum->gradient_norm <= std::numeric_limits<float>::max() &&
                      AllFinite(sum->moments.mean) && AllFinite(sum->moments.m2);
  sum->verdict.skip = !finite;
  sum->trains = finite;
  return absl::OkStatus();
}

void DenseReducer::WriteTail(const LaneVote& vote, char* out) const {
  Tail tail = {};
  tail.records = vote.records;
  tail.read = vote.read;
  tail.bad = vote.bad;
  tail.at_end = vote.at_end;
  tail.stop = vote.stop;
  tail.cut = vote.cut;
  std::memset(out, 0, tail_bytes_);
  if (vote.result != nullptr) {
    const BatchMoments& moments = vote.result->moments;
    tail.skip = !vote.result->finite;
    tail.moments_count = moments.count;
    HEARTH_CHECK(moments.mean.size() == moments.m2.size() && (moments.mean.size() == columns_ || moments.count == 0),
                 "moments of ", moments.mean.size(), " columns, the model has ", columns_);
    if (moments.mean.size() == columns_ && columns_ > 0) {
      std::memcpy(out + sizeof(Tail), moments.mean.data(), columns_ * sizeof(float));
      std::memcpy(out + sizeof(Tail) + columns_ * sizeof(float), moments.m2.data(), columns_ * sizeof(float));
    }
  }
  std::memcpy(out, &tail, sizeof(tail));
}

void DenseReducer::ReadTails(StepSum* sum) {
  sum->verdict = {};
  sum->verdict.all_at_end = true;
  sum->read = 0;
  sum->bad = 0;
  for (uint32_t lane = 0; lane < lanes_; ++lane) {
    const char* in = tails_.data() + lane * tail_bytes_;
    Tail tail;
    std::memcpy(&tail, in, sizeof(tail));
    sum->verdict.records += tail.records;
    sum->verdict.skip |= tail.skip != 0;
    sum->verdict.all_at_end &= tail.at_end != 0;
    sum->verdict.stop |= tail.stop != 0;
    sum->verdict.cut |= tail.cut != 0;
    sum->read += tail.read;
    sum->bad += tail.bad;
    BatchMoments& moments = moments_[lane];
    moments.count = tail.moments_count;
    moments.mean.resize(columns_);
    moments.m2.resize(columns_);
    if (columns_ == 0) continue;
    std::memcpy(moments.mean.data(), in + sizeof(Tail), columns_ * sizeof(float));
    std::memcpy(moments.m2.data(), in + sizeof(Tail) + columns_ * sizeof(float), columns_ * sizeof(float));
  }
}

}  // namespace hearth
