// The world behind a generated log: who there is, what they are like, and the true probability of each behaviour. Every
// value is a function of (seed, kind, id), so an id space of any size needs no memory, and of plain arithmetic, so the
// bits are the same on every machine.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/base/env.h"
#include "common/proto/generator.pb.h"

namespace hearth {

// exp and log from additions and multiplications alone, within 2e-15 relative: libm's last bits differ between
// machines.
double PortableExp(double x);
double PortableLog(double x);  // REQUIRES: x > 0

// Draws ranks 1..count with probability proportional to rank^-exponent, exactly, in constant time and memory
// (rejection-inversion, Hörmann and Derflinger 1996).
class ZipfSampler {
 public:
  ZipfSampler(uint64_t count, double exponent);  // REQUIRES: count > 0, exponent >= 0
  uint64_t Draw(Random* random) const;
  // The same, as an id in 1..count: popular ids lie anywhere.
  uint64_t DrawId(Random* random) const;

 private:
  double Integral(double x) const;  // of x^-exponent
  double IntegralInverse(double y) const;

  const uint64_t count_;
  const double exponent_;
  uint64_t stride_ = 1;  // rank → id: a walk that visits each id once
  double low_ = 0, high_ = 0, shortcut_ = 0;
};

struct UserAttributes {
  uint32_t activity = 0;  // 0..4
  uint32_t age = 0;       // 0..7; 0: unknown
  uint32_t register_days = 0;
};
struct VideoAttributes {
  uint64_t author = 0;
  std::vector<uint64_t> tags;  // distinct
  uint32_t type = 0;           // 0..3
  uint32_t duration_ms = 0;
};
struct Impression {
  uint64_t user = 0, video = 0;
  uint32_t hour = 0, tab = 0, position = 0;
};

class HiddenModel {
 public:
  explicit HiddenModel(const GeneratorSpec& spec);  // REQUIRES: FaultsOfSpec(spec) is empty

  UserAttributes User(uint64_t id) const;
  void Video(uint64_t id, VideoAttributes* video) const;

  // Record number `index` of the log that `stream` names; ms_of_day gives its hour.
  Impression Draw(Random* random, uint32_t ms_of_day) const;
  // The true probability of each task, [tasks].
  void Probabilities(const Impression& impression, const UserAttributes& user, const VideoAttributes& video,
                     absl::Span<double> probabilities) const;

  // What an average impression looks like, from the sample that the biases were fitted on.
  struct Moments {
    double duration_mean = 0, duration_deviation = 0, register_days_mean = 0, register_days_deviation = 0;
  };
  const Moments& moments() const { return moments_; }

 private:
  enum Kind { kUser, kVideo, kAuthor, kTag, kTab, kHour, kActivity, kAge, kType };

  // Taste of one entity: [tasks] biases (one part shared by all tasks, one by a category, one a task's own), then
  // [factors].
  void AddTaste(Kind kind, uint64_t id, double weight, absl::Span<double> biases, double factor_weight,
                absl::Span<double> factors) const;
  void Scores(const Impression& impression, const UserAttributes& user, const VideoAttributes& video,
              absl::Span<double> scores) const;
  void FitBiases(const GeneratorSpec& spec);

  const uint64_t seed_;
  const size_t tasks_, factors_;
  const uint32_t tabs_, tags_max_;
  const double scale_, interaction_;
  const ZipfSampler users_, videos_, authors_, tags_;
  std::vector<size_t> category_of_;  // [tasks]
  size_t categories_ = 0;
  std::vector<double> interaction_weight_;                 // [tasks, factors]
  std::vector<double> duration_weight_, position_weight_;  // [tasks]
  std::vector<double> bias_;                               // [tasks]
  Moments moments_;
};

}  // namespace hearth
