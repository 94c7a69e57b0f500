#include "worker/profile.h"

#ifdef HEARTH_CUDA
#include <ATen/record_function.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <exception>
#include <filesystem>
#include <optional>
#include <set>
#endif

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace hearth {

#ifdef HEARTH_CUDA

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

struct StepProfile::Recording {
  std::optional<at::RecordFunction> step;  // names it in the trace
};

absl::StatusOr<std::unique_ptr<StepProfile>> StepProfile::Create(const Profile& profile, const std::string& path) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(std::filesystem::path(path).parent_path().string()));
  return std::unique_ptr<StepProfile>(new StepProfile(profile, path));
}

absl::Status StepProfile::Before(uint64_t step) {
  if (step < begin_ || step - begin_ >= steps_ || done_) return absl::OkStatus();
  try {
    if (recording_ == nullptr) {
      std::set<ActivityType> activities = {ActivityType::CPU};
      if (torch::cuda::is_available()) {
        activities.insert(ActivityType::CUDA);
        torch::cuda::synchronize();
      }
      const ProfilerConfig config(ProfilerState::KINETO);
      profiler::prepareProfiler(config, activities);
      profiler::enableProfiler(config, activities);
      recording_ = std::make_unique<Recording>();
    }
    recording_->step.emplace(at::RecordScope::USER_SCOPE);
    recording_->step->before(absl::StrCat("step ", step));
    return absl::OkStatus();
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("metrics.profile, step ", step, ": ", error.what()));
  }
}

absl::Status StepProfile::After(uint64_t step, bool last) {
  if (recording_ == nullptr) return absl::OkStatus();
  try {
    recording_->step.reset();
    if (step + 1 - begin_ < steps_ && !last) return absl::OkStatus();
    if (torch::cuda::is_available()) torch::cuda::synchronize();
    const auto result = profiler::disableProfiler();
    recording_.reset();
    done_ = true;
    // Torch writes to a name: one that is ours, made anew, and by then a link no more.
    const std::string aside = path_ + ".part";
    HEARTH_RETURN_IF_ERROR(OpenForWriting(aside, Writing::kReplace).status());
    result->save(aside);
    HEARTH_RETURN_IF_ERROR(RenamePath(aside, path_));
    spdlog::info("event=profiled first_step={} last_step={} path={}", begin_, step, Quoted(path_));
    return absl::OkStatus();
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("metrics.profile, step ", step, ": ", error.what()));
  }
}

#else

struct StepProfile::Recording {};

absl::StatusOr<std::unique_ptr<StepProfile>> StepProfile::Create(const Profile& profile, const std::string& path) {
  return absl::FailedPreconditionError(
      absl::StrCat("metrics.profile asks for ", profile.steps(), " steps in ", path,
                   ", and this build has no profiler; leave it out, or use a build by `scripts/build cuda`"));
}

absl::Status StepProfile::Before(uint64_t) { return absl::OkStatus(); }
absl::Status StepProfile::After(uint64_t, bool) { return absl::OkStatus(); }

#endif

StepProfile::StepProfile(const Profile& profile, const std::string& path)
    : begin_(profile.first_step()), steps_(profile.steps()), path_(path) {}
StepProfile::~StepProfile() = default;

}  // namespace hearth
