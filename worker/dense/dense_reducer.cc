#include "worker/dense/dense_reducer.h"

#include <cstddef>
#include <cstring>
#include <limits>

#include "common/base/status.h"
#include "model/batch/batch.h"
#include "worker/step/dense_optimizer.h"

namespace hearth {

// Its floats follow: mean [columns], m2 [columns].
struct StepTail::Fixed {
  uint64_t records;
  uint64_t read;
  uint64_t bad;
  double moments_count;
  uint32_t at_end;
  uint32_t last;
  uint32_t stop;
  uint32_t cut;
  uint32_t skip;
  uint32_t time_s;
};

StepTail::StepTail(uint32_t lanes, int64_t moment_columns)
    : lanes_(lanes),
      columns_(static_cast<size_t>(moment_columns)),
      bytes_(sizeof(Fixed) + 2 * columns_ * sizeof(float)),
      moments_(lanes) {
  static_assert(sizeof(Fixed) == kVoteBytes);
}

size_t StepTail::skip_offset() { return offsetof(Fixed, skip); }
size_t StepTail::moments_offset() { return sizeof(Fixed); }

void StepTail::Write(const LaneVote& vote, bool finite, double moments_count, const BatchMoments* moments,
                     char* out) const {
  Fixed fixed = {};
  fixed.records = vote.records;
  fixed.read = vote.read;
  fixed.bad = vote.bad;
  fixed.moments_count = moments_count;
  fixed.at_end = vote.at_end;
  fixed.last = vote.last;
  fixed.stop = vote.stop;
  fixed.cut = vote.cut;
  fixed.skip = !finite;
  fixed.time_s = vote.time_s;
  std::memset(out, 0, bytes_);
  std::memcpy(out, &fixed, sizeof(fixed));
  if (moments == nullptr || columns_ == 0 || moments_count == 0) return;
  HEARTH_CHECK(moments->mean.size() == columns_ && moments->m2.size() == columns_, "moments of ", moments->mean.size(),
               " columns, the model has ", columns_);
  std::memcpy(out + sizeof(Fixed), moments->mean.data(), columns_ * sizeof(float));
  std::memcpy(out + sizeof(Fixed) + columns_ * sizeof(float), moments->m2.data(), columns_ * sizeof(float));
}

void StepTail::Read(const char* tails, StepSum* sum) {
  sum->verdict = {};
  sum->verdict.all_at_end = true;
  sum->read = 0;
  sum->bad = 0;
  times_s_.clear();
  for (uint32_t lane = 0; lane < lanes_; ++lane) {
    const char* in = tails + lane * bytes_;
    Fixed fixed;
    std::memcpy(&fixed, in, sizeof(fixed));
    sum->verdict.records += fixed.records;
    sum->verdict.skip |= fixed.skip != 0;
    sum->verdict.all_at_end &= fixed.at_end != 0;
    sum->verdict.last |= fixed.last != 0;
    sum->verdict.stop |= fixed.stop != 0;
    sum->verdict.cut |= fixed.cut != 0;
    if (fixed.time_s != 0) times_s_.push_back(fixed.time_s);
    sum->read += fixed.read;
    sum->bad += fixed.bad;
    BatchMoments& moments = moments_[lane];
    moments.count = fixed.moments_count;
    moments.mean.resize(columns_);
    moments.m2.resize(columns_);
    if (columns_ == 0) continue;
    std::memcpy(moments.mean.data(), in + sizeof(Fixed), columns_ * sizeof(float));
    std::memcpy(moments.m2.data(), in + sizeof(Fixed) + columns_ * sizeof(float), columns_ * sizeof(float));
  }
  sum->verdict.time_s = LowerMedian(&times_s_);
  sum->trains = sum->verdict.records > 0 && !sum->verdict.skip;
  if (sum->trains) sum->moments = PoolMoments(moments_);
}

void StepTail::Judge(double gradient_norm, StepSum* sum) {
  sum->gradient_norm = gradient_norm;
  const bool finite = gradient_norm * gradient_norm <= std::numeric_limits<float>::max() &&
                      AllFinite(sum->moments.mean) && AllFinite(sum->moments.m2);
  sum->verdict.skip = !finite;
  sum->trains = finite;
}

DenseReducer::DenseReducer(Collective* collective, uint32_t lanes, int64_t parameters, int64_t moment_columns,
                           double clip_norm)
    : collective_(collective),
      lanes_(lanes),
      clip_norm_(clip_norm),
      tail_(lanes, moment_columns),
      zeros_(static_cast<size_t>(parameters), 0.0f),
      sum_(static_cast<size_t>(parameters)),
      tails_(lanes * tail_.bytes()) {}

absl::Status DenseReducer::Reduce(absl::Span<const LaneVote> votes, StepSum* sum) {
  own_tails_.resize(votes.size() * tail_.bytes());
  parts_.clear();
  for (size_t i = 0; i < votes.size(); ++i) {
    char* tail = own_tails_.data() + i * tail_.bytes();
    const LaneResult* const result = votes[i].result;
    if (result != nullptr) {
      tail_.Write(votes[i], result->finite, result->moments.count, &result->moments, tail);
    } else {
      tail_.Write(votes[i], /*finite=*/true, 0, nullptr, tail);
    }
    parts_.push_back({result != nullptr ? result->gradient : zeros_, {tail, tail_.bytes()}});
  }
  HEARTH_RETURN_IF_ERROR(
      collective_->SumParts(static_cast<int>(lanes_), parts_, absl::MakeSpan(sum_), absl::MakeSpan(tails_)));
  tail_.Read(tails_.data(), sum);
  sum->gradient = absl::MakeSpan(sum_);
  if (!sum->trains) return absl::OkStatus();
  const float n = static_cast<float>(sum->verdict.records);
  for (float& g : sum_) g /= n;
  StepTail::Judge(ClipNorm(sum->gradient, clip_norm_), sum);
  return absl::OkStatus();
}

}  // namespace hearth
