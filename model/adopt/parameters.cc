#include "model/adopt/parameters.h"

#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/env.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// What kind of array of a parameter it is; its name in a snapshot is the prefix and the parameter's own.
enum class Array { kWeights, kMean, kMoment };
constexpr std::pair<const char*, Array> kArrays[] = {{"", Array::kWeights},
                                                     {"ema.", Array::kMean},
                                                     {"optimizer.first_moment.", Array::kMoment},
                                                     {"optimizer.second_moment.", Array::kMoment}};
constexpr char kUpdates[] = "optimizer.updates";

// In [−1, 1), of the seed and the element alone.
double NoiseOf(uint64_t stream, uint64_t element) {
  return static_cast<double>(Mix64(stream + element) >> 11) * 0x1.0p-52 - 1;
}

class Filler {
 public:
  Filler(const ParameterMove& move, uint64_t seed, double noise)
      : move_(move), noise_(noise), stream_(SeedOf(seed, "adopt_copy/" + move.name)) {
    strides_.assign(move.old_shape.size(), 1);
    for (size_t i = move.old_shape.size(); i-- > 1;) strides_[i - 1] = strides_[i] * move.old_shape[i];
  }

  // born: what stands in `to` already, where the array has values of its own; else zeros.
  void Fill(const float* from, Array array, float* to) const {
    const int64_t elements = move_.Elements();
    std::vector<int64_t> at(move_.shape.size(), 0);
    for (int64_t element = 0; element < elements; ++element) {
      const size_t first = at.empty() ? 0 : static_cast<size_t>(at[0]);
      const int64_t source = SourceOf(at);
      if (source == kBornAt) {
        if (array == Array::kMoment) to[element] = 0;
      } else if (source == kZeros) {
        to[element] = 0;
      } else {
        float value = from[source];
        if (array != Array::kMoment) {
          if (!move_.noisy.empty() && move_.noisy[first])
            value *= static_cast<float>(1 + noise_ * NoiseOf(stream_, static_cast<uint64_t>(element)));
          if (!move_.less.empty()) value -= move_.less[first];
        }
        to[element] = value;
      }
      for (size_t i = at.size(); i-- > 0 && ++at[i] == move_.shape[i];) at[i] = 0;
    }
  }

 private:
  // The place in the old array, or what becomes of an element without one.
  int64_t SourceOf(const std::vector<int64_t>& at) const {
    int64_t source = 0;
    int64_t fate = 0;
    for (size_t i = 0; i < at.size(); ++i) {
      const std::vector<int64_t>& index = move_.index[i];
      const int64_t old = index.empty() ? at[i] : index[static_cast<size_t>(at[i])];
      if (old < 0) {
        if (fate == 0) fate = old;
      } else {
        source += old * strides_[i];
      }
    }
    return fate < 0 ? fate : source;
  }

  const ParameterMove& move_;
  const double noise_;
  const uint64_t stream_;
  std::vector<int64_t> strides_;
};

float* FloatsOf(const NamedTensor& tensor) { return reinterpret_cast<float*>(const_cast<char*>(tensor.data.data())); }

}  // namespace

absl::Status TakeOverParameters(const AdoptionPlan& plan, absl::Span<const NamedTensor> old, uint64_t seed,
                                absl::Span<const NamedTensor> places, double noise) {
  std::map<std::string, const NamedTensor*> saved;
  for (const NamedTensor& tensor : old) saved[tensor.name] = &tensor;
  std::map<std::string, const NamedTensor*> place_of;
  for (const NamedTensor& tensor : places) place_of[tensor.name] = &tensor;
  size_t known = 0;
  for (const ParameterMove& move : plan.parameters) {
    for (const auto& [prefix, array] : kArrays) {
      if (move.statistic && array != Array::kWeights) continue;
      const auto place = place_of.find(prefix + move.name);
      if (place == place_of.end() && array != Array::kWeights) continue;
      HEARTH_CHECK(place != place_of.end() && place->second->shape == move.shape && place->second->dtype == "F32",
                   "the plan's shape of ", move.name, " is not the model's");
      ++known;
      float* const to = FloatsOf(*place->second);
      const bool is_moment = array == Array::kMoment;
      const auto source = saved.find(prefix + move.from);
      if (move.from.empty() || (is_moment && !plan.dense_state)) {
        if (is_moment) std::memset(to, 0, place->second->data.size());
        continue;
      }
      if (source == saved.end() || source->second->shape != move.old_shape || source->second->dtype != "F32") {
        return absl::DataLossError(
            absl::StrCat("tensor ", prefix, move.from,
                         source == saved.end() ? " is missing" : " has another shape than its job's model",
                         "; use another snapshot"));
      }
      Filler(move, seed, noise).Fill(reinterpret_cast<const float*>(source->second->data.data()), array, to);
    }
  }
  const auto updates = place_of.find(kUpdates);
  if (updates != place_of.end()) {
    ++known;
    const auto source = saved.find(kUpdates);
    if (source == saved.end() || source->second->data.size() != updates->second->data.size())
      return absl::DataLossError(absl::StrCat("tensor ", kUpdates, " is missing; use another snapshot"));
    if (plan.dense_updates)
      std::memcpy(const_cast<char*>(updates->second->data.data()), source->second->data.data(), sizeof(int64_t));
  }
  HEARTH_CHECK(known == places.size(), "the plan knows ", known, " of the model's ", places.size(), " arrays");
  return absl::OkStatus();
}

}  // namespace hearth
