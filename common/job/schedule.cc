#include "common/job/schedule.h"

#include <algorithm>
#include <cmath>

namespace hearth {
namespace {

constexpr double kPi = 3.14159265358979323846;

double Power(double base, uint64_t exponent) {
  double result = 1;
  for (double square = base; exponent != 0; exponent >>= 1, square *= square) {
    if (exponent & 1) result *= square;
  }
  return result;
}

// How far the decay has come, in [0, 1].
double Progress(const Schedule& schedule, uint64_t step) {
  if (step >= schedule.decay_steps()) return 1;
  return static_cast<double>(step - schedule.warmup_steps()) /
         static_cast<double>(schedule.decay_steps() - schedule.warmup_steps());
}

// From 1 down to the end fraction, where `left` falls from 1 to 0.
double Between(const Schedule& schedule, double left) {
  return schedule.end_fraction() + (1 - schedule.end_fraction()) * left;
}

// From the end of the warm-up on, where it is 1.
double Decay(const Schedule& schedule, uint64_t step) {
  const uint64_t warmup = schedule.warmup_steps();
  switch (schedule.kind()) {
    case Schedule::CONSTANT:
      return 1;
    case Schedule::STEP:
      return step == warmup ? 1 : Power(schedule.gamma(), (step - 1 - warmup) / schedule.step_every());
    case Schedule::COSINE:
      return Between(schedule, (1 + std::cos(kPi * Progress(schedule, step))) / 2);
    case Schedule::INVERSE_SQRT:
      return std::sqrt(static_cast<double>(std::max<uint64_t>(warmup, 1)) / static_cast<double>(step));
    case Schedule::POLYNOMIAL:
      return Between(schedule, std::pow(1 - Progress(schedule, step), schedule.power()));
  }
  return 1;
}

}  // namespace

double RateFactor(const Schedule& schedule, uint64_t step) {
  const uint64_t warmup = schedule.warmup_steps();
  if (step >= warmup) return Decay(schedule, step);
  const double risen = static_cast<double>(step) / static_cast<double>(warmup);
  return schedule.warmup_start() + (1 - schedule.warmup_start()) * risen;
}

double RateOf(const DenseOptimizer& optimizer, uint64_t step) {
  return optimizer.learning_rate() * RateFactor(optimizer.schedule(), step);
}

double RateOf(const Optimizer& optimizer, uint64_t step) {
  return optimizer.learning_rate() * RateFactor(optimizer.schedule(), step);
}

}  // namespace hearth
