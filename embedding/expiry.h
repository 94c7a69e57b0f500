// When rows expire: by steps, or by the log's own time. docs/PROTOCOL.md §4, "Expiry".
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

// A table's rule; at most one of the two is set (ValidateJob).
struct ExpiryRule {
  uint32_t steps = 0;
  uint32_t hours = 0;

  static ExpiryRule Of(const Table& table) { return {table.expire_after_steps(), table.expire_after_hours()}; }
  bool never() const { return steps == 0 && hours == 0; }
  bool by_time() const { return hours > 0; }
  // One number for either, as stores keep it.
  uint32_t code() const { return by_time() ? kByTime | hours : steps; }
  static ExpiryRule OfCode(uint32_t code) {
    return code & kByTime ? ExpiryRule{0, code & ~kByTime} : ExpiryRule{code, 0};
  }
  bool operator==(const ExpiryRule& other) const { return code() == other.code(); }
  bool operator!=(const ExpiryRule& other) const { return !(*this == other); }

 private:
  static constexpr uint32_t kByTime = uint32_t{1} << 31;  // ValidateJob keeps expire_after_steps below it
};

// A step's horizon is what its expiry is judged with: a record that was touched last before it is expired. Horizons
// never fall.
//
// By steps it follows from the step alone. By time it follows from the steps' times up to the last one applied. The
// clock takes them in as they come, never falls, and goes on by at most a 16th of the rule's hours a step: times that
// are far ahead for a step or two end no rows, and a gap in the log is caught up with. Until it has set a second mark
// it begins anew with a time that is more than a 16th before it. Each 64th of the hours it sets a mark, and a horizon
// is always a mark: so a horizon's rows are few sums (RowSums), and a row lives for the hours at least, for a 64th and
// what its own step moved the clock at most longer.
class Expiry {
 public:
  // saved: the clock as a cut kept it, by whatever hours; empty where that went by steps.
  explicit Expiry(ExpiryRule rule, const LogClock& saved = {});

  const ExpiryRule& rule() const { return rule_; }
  // By time: of the last applied step, whatever `step` is.
  uint64_t HorizonAt(uint64_t step) const {
    if (rule_.by_time()) return horizon_;
    return rule_.steps > 0 && step > rule_.steps ? step - rule_.steps : 0;
  }
  // Of the counting filters, each as long as a row lives without being touched. Never falls, either.
  uint32_t GenerationAt(uint64_t step) const;
  // That many count at once.
  uint32_t generations() const { return rule_.never() ? 1 : 2; }

  // The time of step `step`, seconds since 1970, once it is applied. 0: it has none. True: a mark was set behind it.
  // REQUIRES: steps ascend.
  bool Tick(uint64_t step, uint32_t time_s);

  // The horizon at which about a quarter of the rows' life has gone by since `step`: for upkeep.
  uint64_t QuarterAfter(uint64_t step) const;
  // The horizons that may come, ascending, and the one that is.
  std::vector<uint64_t> Marks() const;
  // For a cut. Empty where the rule is not by time.
  LogClock clock() const;

  // DataLoss where no Expiry gave it.
  static absl::Status Check(const LogClock& saved);

 private:
  struct Mark {
    uint64_t before_step;  // what was touched last before this step
    uint32_t time_s;       // was touched at this time or earlier
  };
  uint64_t span_s() const { return uint64_t{rule_.hours} * 3600; }
  void MoveHorizon();

  ExpiryRule rule_;
  uint32_t time_s_ = 0;  // of the clock; 0: no step had one
  uint32_t first_time_s_ = 0;
  uint64_t horizon_ = 0;
  std::vector<Mark> marks_;  // ascending; of those that the horizon has reached the newest alone
};

// The horizon that a snapshot's rows of a table are judged with.
inline uint64_t HorizonOf(const Table& table, const LogClock& saved, uint64_t step) {
  return Expiry(ExpiryRule::Of(table), saved).HorizonAt(step);
}

}  // namespace hearth
