// Where a run evaluates its splits, and what it makes of their figures: the best snapshot, the end of a job that gets
// no better, what is good enough to be published. Pure: the scheduler and the workers ask the same functions of the
// same evaluations, and so agree without a word.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// The job's splits, by number, that are evaluated at the cut of `step`; `ends`: an epoch, or the job, ends there.
std::vector<int> SplitsDueAt(const Job& job, uint64_t step, bool ends);

// Whether the job asks for its best snapshot. A job with every default written out has an empty snapshot.best.
inline bool HasBest(const Job& job) { return job.snapshot().best().has_split(); }

// The figure of that split at `step`; `task` empty: the mean over the tasks that have one. Nothing where the split was
// not evaluated at that step, or the figure is undefined.
std::optional<double> FigureOf(const std::vector<Evaluation>& evaluations, uint64_t step, const std::string& split,
                               const std::string& task, Quality::Metric metric);

// Whether both jobs judge snapshots by the same figure of the same held-out records, as far as the jobs tell.
bool JudgeTheSame(const Job& before, const Job& now);

// The best so far, with what was evaluated at the cut of `step`. A figure that is undefined, or was not asked for,
// changes nothing; of equals the earlier one stays. Without snapshot.best: nothing.
std::optional<BestSnapshot> BestAfter(const Job& job, const std::optional<BestSnapshot>& before,
                                      const std::vector<Evaluation>& evaluations, uint64_t step);

// Whether a job ends here by training.stop_after_no_gain; and why, for people.
bool EndsWithoutGain(const Job& job, const std::optional<BestSnapshot>& best);
std::string WhyItEnded(const Job& job, const BestSnapshot& best);

// Of export.require, in what the evaluations at `step` fall short: one line each.
std::vector<std::string> UnmetRequirements(const Job& job, const std::vector<Evaluation>& evaluations, uint64_t step);

}  // namespace hearth
