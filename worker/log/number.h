// A number as a log writes it: read in one place for labels, features, expressions and ids, compared and computed with
// so that 64-bit integers stay what they are. docs/EXPRESSIONS.md has the rules in words.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/strings/string_view.h"

namespace hearth {

// Missing, an integer from -2^63 to 2^64 - 1, or a real, which is never NaN. 16 bytes, passed by value.
class Number {
 public:
  Number() = default;  // missing
  static Number OfNatural(uint64_t value) { return Number(Kind::kNatural, value); }
  static Number OfTruth(bool value) { return OfNatural(value ? 1 : 0); }
  // The nearest real where the integers end.
  static Number OfInteger(__int128 value);
  static Number OfReal(double value) {  // NaN: missing
    if (value != value) return Number();
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return Number(Kind::kReal, bits);
  }

  bool missing() const { return kind_ == Kind::kMissing; }
  bool integer() const { return kind_ == Kind::kNatural || kind_ == Kind::kNegative; }
  // The nearest double; NaN where missing.
  double ToDouble() const {
    switch (kind_) {
      case Kind::kMissing:
        break;
      case Kind::kNatural:
        return static_cast<double>(bits_);
      case Kind::kNegative:
        return static_cast<double>(static_cast<int64_t>(bits_));
      case Kind::kReal:
        return real();
    }
    return std::numeric_limits<double>::quiet_NaN();
  }
  // REQUIRES: integer().
  __int128 ToInteger() const {
    return kind_ == Kind::kNatural ? static_cast<__int128>(bits_) : static_cast<__int128>(static_cast<int64_t>(bits_));
  }
  // Not missing, and not 0.
  bool True() const { return kind_ == Kind::kReal ? real() != 0 : bits_ != 0 && !missing(); }

 private:
  enum class Kind : uint64_t { kMissing, kNatural, kNegative, kReal };
  Number(Kind kind, uint64_t bits) : kind_(kind), bits_(bits) {}
  double real() const {
    double value;
    std::memcpy(&value, &bits_, sizeof(value));
    return value;
  }

  Kind kind_ = Kind::kMissing;
  uint64_t bits_ = 0;  // of a uint64_t, an int64_t below 0, a double
};

enum class NumberText { kNumber, kMissing, kUnreadable };
// What Python's float() reads, and no more: white space around it, a sign, digits, a point, an exponent. Digits alone
// are an integer as far as 64 bits go. Too small for a double is 0. kMissing: nothing but white space, or nan (as
// NumPy writes what is missing). kUnreadable: anything else, infinities, and what is too large for a double.
NumberText ReadNumber(absl::string_view text, Number* number);

// Exact, also between an integer and a real. Less than, equal to, greater than 0 as a is to b. REQUIRES: none missing.
int Compare(Number a, Number b);

// Missing where an operand is. Integers give an integer; a result beyond them the nearest real. Without rest an
// integer division gives an integer. A real division by 0 is an infinity, 0 / 0 and x % 0 are missing.
Number Add(Number a, Number b);
Number Subtract(Number a, Number b);
Number Multiply(Number a, Number b);
Number Divide(Number a, Number b);
Number Modulo(Number a, Number b);  // the sign of a
Number Negate(Number a);

// As an id is written: integers exactly, a whole real below 2^53 without a point, other reals in their shortest form.
// REQUIRES: not missing. The view points into buffer.
absl::string_view TextOf(Number number, char (&buffer)[40]);

// The whole number from 0 that this is, however it was written (7, 7.0, 7e0); false where it is none.
bool ToNatural(Number number, uint64_t* value);

}  // namespace hearth
