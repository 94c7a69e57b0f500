#include "scripts/hearth/hidden_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <string>

#include "common/base/status.h"

namespace hearth {
namespace {

constexpr size_t kTasksMax = 256;
constexpr size_t kFactorsMax = 256;
constexpr int kFitRecords = 65536;
constexpr uint32_t kMsOfDay = 86400000;
constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 bits: its multiples here are exact
constexpr double kLn2Low = 1.90821492927058770002e-10;

// Shares of the logits' variance, of what the user × video product leaves.
constexpr double kUserShare = 0.24, kVideoShare = 0.16, kAuthorShare = 0.14, kTagShare = 0.12, kTabShare = 0.08;
constexpr double kHourShare = 0.03, kActivityShare = 0.06, kAgeShare = 0.03, kTypeShare = 0.04;
constexpr double kDurationShare = 0.08, kPositionShare = 0.02;
// Parts of a taste: a share for all tasks, for a category, for the task alone; squares add up to one.
constexpr double kSharedPart = 0.6, kCategoryPart = 0.6, kOwnPart = 0.52915;

// (exp(x) − 1) / x and log(1 + x) / x, smooth at 0.
double ExpM1Over(double x) {
  if (std::fabs(x) > 1e-4) return (PortableExp(x) - 1) / x;
  return 1 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24)));
}
double Log1POver(double x) {
  if (std::fabs(x) > 1e-4) return PortableLog(1 + x) / x;
  return 1 - x * (0.5 - x * (1.0 / 3 - x * 0.25));
}

// Mean 0, variance 1, from 64 random bits: the sum of four uniforms.
double NormalOf(uint64_t bits) {
  const double sum =
      static_cast<double>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return (sum * (1.0 / 65536) - 2.0 + 2.0 / 65536) * 1.7320508075688772;
}

double Sigmoid(double x) { return 1 / (1 + PortableExp(-x)); }

}  // namespace

double PortableExp(double x) {
  if (x > 700) x = 700;
  if (x < -700) return 0;
  const double k = std::floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - k * kLn2High) - k * kLn2Low;
  static constexpr double kInverse[] = {0,       1.0,     1.0 / 2, 1.0 / 3,  1.0 / 4,  1.0 / 5,  1.0 / 6,
                                        1.0 / 7, 1.0 / 8, 1.0 / 9, 1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13};
  double sum = 1;
  for (int i = 13; i > 0; --i) sum = 1 + sum * r * kInverse[i];
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return sum * power;
}

double PortableLog(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);  // exact
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  const double s = (m - 1) / (m + 1);
  const double s2 = s * s;
  double sum = 0;
  for (int i = 21; i > 0; i -= 2) sum = sum * s2 + 1.0 / i;
  return exponent * kLn2High + (2 * s * sum + exponent * kLn2Low);
}

ZipfSampler::ZipfSampler(uint64_t count, double exponent) : count_(count), exponent_(exponent) {
  stride_ = std::max<uint64_t>(1, static_cast<uint64_t>(static_cast<double>(count) * 0.6180339887));
  while (std::gcd(stride_, count_) != 1) ++stride_;
  low_ = Integral(1.5) - 1;
  high_ = Integral(static_cast<double>(count) + 0.5);
  shortcut_ = 2 - IntegralInverse(Integral(2.5) - PortableExp(-exponent_ * PortableLog(2)));
}

double ZipfSampler::Integral(double x) const {
  const double log_x = PortableLog(x);
  return ExpM1Over((1 - exponent_) * log_x) * log_x;
}

double ZipfSampler::IntegralInverse(double y) const {
  const double t = std::max(y * (1 - exponent_), -1 + 1e-15);
  return PortableExp(Log1POver(t) * y);
}

uint64_t ZipfSampler::Draw(Random* random) const {
  if (exponent_ == 0) return 1 + random->Below(count_);
  for (;;) {
    const double u = high_ + random->Uniform() * (low_ - high_);
    const double x = IntegralInverse(u);
    const double rank = std::min(std::max(std::floor(x + 0.5), 1.0), static_cast<double>(count_));
    if (rank - x <= shortcut_ || u >= Integral(rank + 0.5) - PortableExp(-exponent_ * PortableLog(rank))) {
      return static_cast<uint64_t>(rank);
    }
  }
}

uint64_t ZipfSampler::DrawId(Random* random) const {
  return 1 + static_cast<uint64_t>(static_cast<unsigned __int128>(Draw(random) - 1) * stride_ % count_);
}

HiddenModel::HiddenModel(const GeneratorSpec& spec)
    : seed_(SeedOf(spec.seed(), "hidden_model")),
      tasks_(spec.task_size()),
      factors_(spec.factors()),
      tabs_(spec.tabs()),
      tags_max_(spec.tags_max()),
      scale_(spec.logit_deviation() * std::sqrt(1 - spec.interaction_share())),
      interaction_(spec.logit_deviation() * std::sqrt(spec.interaction_share())),
      users_(spec.user().count(), spec.user().zipf()),
      videos_(spec.video().count(), spec.video().zipf()),
      authors_(spec.author().count(), spec.author().zipf()),
      tags_(spec.tag().count(), spec.tag().zipf()) {
  HEARTH_CHECK(tasks_ <= kTasksMax && factors_ <= kFactorsMax);
  std::map<std::string, size_t> numbers;
  for (const GeneratorTask& task : spec.task()) {
    category_of_.push_back(numbers.emplace(task.category(), numbers.size()).first->second);
  }
  categories_ = numbers.size();
  const uint64_t seed = SeedOf(spec.seed(), "hidden_task_weights");
  for (size_t t = 0; t < tasks_; ++t) {
    Random own(Mix64(seed + t)), category(Mix64(seed ^ Mix64(category_of_[t] + 1)));
    for (size_t f = 0; f < factors_; ++f) {
      interaction_weight_.push_back(0.8 * NormalOf(category.Next()) + 0.6 * NormalOf(own.Next()));
    }
    duration_weight_.push_back(0.8 * NormalOf(category.Next()) + 0.6 * NormalOf(own.Next()));
    position_weight_.push_back(-0.5 - 0.5 * own.Uniform());
  }
  FitBiases(spec);
}

UserAttributes HiddenModel::User(uint64_t id) const {
  Random random(Mix64(seed_ ^ Mix64(id * 16 + 1)));
  UserAttributes user;
  user.activity = static_cast<uint32_t>(std::min(random.Below(5), random.Below(6)));
  user.age = random.Below(100) < 3 ? 0 : 1 + static_cast<uint32_t>(random.Below(7));
  user.register_days = static_cast<uint32_t>(PortableExp(random.Uniform() * 7.6));  // 1 .. 1998, log-uniform
  return user;
}

void HiddenModel::Video(uint64_t id, VideoAttributes* video) const {
  Random random(Mix64(seed_ ^ Mix64(id * 16 + 2)));
  video->author = authors_.DrawId(&random);
  video->type = static_cast<uint32_t>(random.Below(4));
  video->duration_ms = static_cast<uint32_t>(PortableExp(9.9 + 0.7 * NormalOf(random.Next())));  // about 20 s
  video->tags.clear();
  for (uint64_t left = random.Below(tags_max_ + 1); left > 0; --left) {
    const uint64_t tag = tags_.DrawId(&random);
    if (std::find(video->tags.begin(), video->tags.end(), tag) == video->tags.end()) video->tags.push_back(tag);
  }
}

Impression HiddenModel::Draw(Random* random, uint32_t ms_of_day) const {
  Impression impression;
  impression.user = users_.DrawId(random);
  impression.video = videos_.DrawId(random);
  impression.hour = ms_of_day / 3600000;
  impression.tab = static_cast<uint32_t>(std::min(random->Below(tabs_), random->Below(tabs_)));
  impression.position = 1 + static_cast<uint32_t>(random->Below(20));
  return impression;
}

void HiddenModel::AddTaste(Kind kind, uint64_t id, double weight, absl::Span<double> biases, double factor_weight,
                           absl::Span<double> factors) const {
  uint64_t state = Mix64(seed_ ^ Mix64(id * 16 + 3 + kind));
  const double shared = kSharedPart * NormalOf(Mix64(state++));
  double category[kTasksMax];
  for (size_t c = 0; c < categories_; ++c) category[c] = shared + kCategoryPart * NormalOf(Mix64(state++));
  for (size_t t = 0; t < biases.size(); ++t) {
    biases[t] += weight * (category[category_of_[t]] + kOwnPart * NormalOf(Mix64(state++)));
  }
  for (double& factor : factors) factor += factor_weight * NormalOf(Mix64(state++));
}

void HiddenModel::Scores(const Impression& impression, const UserAttributes& user, const VideoAttributes& video,
                         absl::Span<double> scores) const {
  std::fill(scores.begin(), scores.end(), 0.0);
  double user_factors[kFactorsMax] = {0}, video_factors[kFactorsMax] = {0};
  const absl::Span<double> p(user_factors, factors_), q(video_factors, factors_);
  const absl::Span<double> none;
  AddTaste(kUser, impression.user, scale_ * std::sqrt(kUserShare), scores, 1, p);
  AddTaste(kVideo, impression.video, scale_ * std::sqrt(kVideoShare), scores, 0.6, q);
  AddTaste(kAuthor, video.author, scale_ * std::sqrt(kAuthorShare), scores, 0.8, q);
  const double tag_weight = video.tags.empty() ? 0 : scale_ * std::sqrt(kTagShare / video.tags.size());
  for (const uint64_t tag : video.tags) AddTaste(kTag, tag, tag_weight, scores, 0, none);
  AddTaste(kTab, impression.tab, scale_ * std::sqrt(kTabShare), scores, 0, none);
  AddTaste(kHour, impression.hour, scale_ * std::sqrt(kHourShare), scores, 0, none);
  AddTaste(kActivity, user.activity, scale_ * std::sqrt(kActivityShare), scores, 0, none);
  AddTaste(kAge, user.age, scale_ * std::sqrt(kAgeShare), scores, 0, none);
  AddTaste(kType, video.type, scale_ * std::sqrt(kTypeShare), scores, 0, none);
  const double duration = (PortableLog(video.duration_ms) - 9.9) / 0.7;
  const double position = (impression.position - 10.5) / 5.77;
  for (size_t t = 0; t < tasks_; ++t) {
    double product = 0;
    for (size_t f = 0; f < factors_; ++f) product += interaction_weight_[t * factors_ + f] * p[f] * q[f];
    scores[t] += interaction_ * product / std::sqrt(static_cast<double>(factors_));
    scores[t] += scale_ * (std::sqrt(kDurationShare) * duration_weight_[t] * duration +
                           std::sqrt(kPositionShare) * position_weight_[t] * position);
  }
}

void HiddenModel::Probabilities(const Impression& impression, const UserAttributes& user, const VideoAttributes& video,
                                absl::Span<double> probabilities) const {
  Scores(impression, user, video, probabilities);
  for (size_t t = 0; t < tasks_; ++t) probabilities[t] = Sigmoid(probabilities[t] + bias_[t]);
}

// Each bias is where the mean probability over a sample is the rate that was asked for.
void HiddenModel::FitBiases(const GeneratorSpec& spec) {
  std::vector<double> scores(tasks_ * kFitRecords);  // [kFitRecords, tasks]
  double duration[2] = {0, 0}, register_days[2] = {0, 0};
  Random random(SeedOf(spec.seed(), "bias_fit"));
  VideoAttributes video;
  for (int i = 0; i < kFitRecords; ++i) {
    const Impression impression = Draw(&random, static_cast<uint32_t>(random.Below(kMsOfDay)));
    const UserAttributes user = User(impression.user);
    Video(impression.video, &video);
    Scores(impression, user, video, absl::MakeSpan(scores.data() + i * tasks_, tasks_));
    duration[0] += video.duration_ms;
    duration[1] += static_cast<double>(video.duration_ms) * video.duration_ms;
    register_days[0] += user.register_days;
    register_days[1] += static_cast<double>(user.register_days) * user.register_days;
  }
  moments_.duration_mean = duration[0] / kFitRecords;
  moments_.register_days_mean = register_days[0] / kFitRecords;
  moments_.duration_deviation =
      std::sqrt(std::max(1.0, duration[1] / kFitRecords - moments_.duration_mean * moments_.duration_mean));
  moments_.register_days_deviation = std::sqrt(
      std::max(1.0, register_days[1] / kFitRecords - moments_.register_days_mean * moments_.register_days_mean));
  for (size_t t = 0; t < tasks_; ++t) {
    double low = -40, high = 40;
    for (int round = 0; round < 30; ++round) {
      const double middle = (low + high) / 2;
      double sum = 0;
      for (int i = 0; i < kFitRecords; ++i) sum += Sigmoid(scores[i * tasks_ + t] + middle);
      (sum > spec.task(static_cast<int>(t)).positive_rate() * kFitRecords ? high : low) = middle;
    }
    bias_.push_back((low + high) / 2);
  }
}

}  // namespace hearth
