#include "worker/log/number.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "common/base/status.h"

namespace hearth {

namespace {

constexpr double kExactIntegerMax = 0x1.0p53;
constexpr __int128 kIntegerMin = -(static_cast<__int128>(1) << 63);
constexpr __int128 kIntegerMax = (static_cast<__int128>(1) << 64) - 1;
constexpr size_t kPlainBytesMax = 20;
constexpr size_t kExactDigitsMax = 15;  // an integer of so many is exact as a double, and so is 10 to this power
constexpr double kPowersOfTen[kExactDigitsMax + 1] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                                      1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// digit* . digit* exponent?, with a digit before the exponent: what from_chars takes, but for its inf, nan and sign.
bool IsDecimal(absl::string_view text) {
  size_t i = 0, digits = 0;
  for (; i < text.size() && IsDigit(text[i]); ++i) ++digits;
  if (i < text.size() && text[i] == '.') ++i;
  for (; i < text.size() && IsDigit(text[i]); ++i) ++digits;
  if (digits == 0) return false;
  if (i == text.size()) return true;
  if (text[i] != 'e' && text[i] != 'E') return false;
  ++i;
  if (i < text.size() && (text[i] == '+' || text[i] == '-')) ++i;
  if (i == text.size()) return false;
  for (; i < text.size(); ++i) {
    if (!IsDigit(text[i])) return false;
  }
  return true;
}

// Whether a decimal that no double holds is too small, rather than too large: where its first digit that is not 0
// stands, with the exponent.
bool IsTiny(absl::string_view decimal) {
  const size_t e = decimal.find_first_of("eE");
  const absl::string_view digits = decimal.substr(0, e);
  const size_t point = std::min(digits.find('.'), digits.size());
  const size_t first = digits.find_first_of("123456789");
  if (first == absl::string_view::npos) return true;
  const int64_t place = static_cast<int64_t>(point) - static_cast<int64_t>(first);  // above 0: before the point
  if (e == absl::string_view::npos) return place <= 0;
  absl::string_view exponent = decimal.substr(e + 1);
  const bool negative = exponent[0] == '-';
  if (exponent[0] == '-' || exponent[0] == '+') exponent.remove_prefix(1);
  while (exponent.size() > 1 && exponent[0] == '0') exponent.remove_prefix(1);
  if (exponent.size() > 15) return negative;  // no record has so many digits before it
  int64_t value = 0;
  for (const char c : exponent) value = value * 10 + (c - '0');
  return place + (negative ? -value : value) <= 0;
}

// Most numbers: -digits or -digits.digits, and few of them. One division of two exact doubles is rounded once, so it
// gives the nearest double, as from_chars does.
bool ReadPlain(absl::string_view text, Number* number) {
  const bool negative = text[0] == '-';
  uint64_t value = 0;
  size_t i = negative ? 1 : 0, digits = 0;
  for (; i < text.size() && IsDigit(text[i]); ++i, ++digits) value = value * 10 + static_cast<uint64_t>(text[i] - '0');
  if (i == text.size()) {
    if (digits == 0 || digits > kExactDigitsMax + 3 || (negative && value == 0)) return false;
    *number = negative ? Number::OfInteger(-static_cast<__int128>(value)) : Number::OfNatural(value);
    return true;
  }
  if (text[i] != '.') return false;
  const size_t before = digits;
  for (++i; i < text.size() && IsDigit(text[i]); ++i, ++digits)
    value = value * 10 + static_cast<uint64_t>(text[i] - '0');
  if (i < text.size() || digits == 0 || digits > kExactDigitsMax) return false;
  const double real = static_cast<double>(value) / kPowersOfTen[digits - before];
  *number = Number::OfReal(negative ? -real : real);
  return true;
}

}  // namespace

Number Number::OfInteger(__int128 value) {
  if (value < kIntegerMin || value > kIntegerMax) return OfReal(static_cast<double>(value));
  return Number(value < 0 ? Kind::kNegative : Kind::kNatural, static_cast<uint64_t>(value));
}

NumberText ReadNumber(absl::string_view text, Number* number) {
  *number = Number();
  if (!text.empty() && text.size() <= kPlainBytesMax && ReadPlain(text, number)) return NumberText::kNumber;
  text = absl::StripAsciiWhitespace(text);
  if (text.empty()) return NumberText::kMissing;
  const bool negative = text[0] == '-';
  if (text[0] == '-' || text[0] == '+') text.remove_prefix(1);
  if (absl::EqualsIgnoreCase(text, "nan")) return NumberText::kMissing;
  if (!IsDecimal(text)) return NumberText::kUnreadable;
  uint64_t natural = 0;
  const char* const end = text.data() + text.size();
  const auto whole = std::from_chars(text.data(), end, natural);
  // -0 stays the real that it is.
  if (whole.ec == std::errc() && whole.ptr == end && !(negative && natural == 0)) {
    const __int128 value = negative ? -static_cast<__int128>(natural) : static_cast<__int128>(natural);
    *number = Number::OfInteger(value);
    return NumberText::kNumber;
  }
  double value = 0;
  if (std::from_chars(text.data(), end, value).ec != std::errc()) {
    if (!IsTiny(text)) return NumberText::kUnreadable;
    value = 0;
  }
  *number = Number::OfReal(negative ? -value : value);
  return NumberText::kNumber;
}

int Compare(Number a, Number b) {
  const auto order = [](auto x, auto y) { return x < y ? -1 : x > y ? 1 : 0; };
  if (a.integer() && b.integer()) return order(a.ToInteger(), b.ToInteger());
  // Rounding to a double keeps the order, so only equal ones need a second look.
  if (const int rounded = order(a.ToDouble(), b.ToDouble()); rounded != 0 || a.integer() == b.integer()) return rounded;
  if (!a.integer()) return -Compare(b, a);
  const double real = b.ToDouble();
  if (real >= 0x1.0p64) return -1;
  const double whole = std::trunc(real);
  const int by_whole = order(a.ToInteger(), static_cast<__int128>(whole));
  return by_whole != 0 ? by_whole : order(whole, real);
}

Number Add(Number a, Number b) {
  if (a.integer() && b.integer()) return Number::OfInteger(a.ToInteger() + b.ToInteger());
  return Number::OfReal(a.ToDouble() + b.ToDouble());
}

Number Subtract(Number a, Number b) {
  if (a.integer() && b.integer()) return Number::OfInteger(a.ToInteger() - b.ToInteger());
  return Number::OfReal(a.ToDouble() - b.ToDouble());
}

Number Multiply(Number a, Number b) {
  __int128 product;
  if (a.integer() && b.integer() && !__builtin_mul_overflow(a.ToInteger(), b.ToInteger(), &product)) {
    return Number::OfInteger(product);
  }
  return Number::OfReal(a.ToDouble() * b.ToDouble());
}

Number Divide(Number a, Number b) {
  if (a.integer() && b.integer() && b.True() && a.ToInteger() % b.ToInteger() == 0) {
    return Number::OfInteger(a.ToInteger() / b.ToInteger());
  }
  return Number::OfReal(a.ToDouble() / b.ToDouble());
}

Number Modulo(Number a, Number b) {
  if (a.integer() && b.integer() && b.True()) return Number::OfInteger(a.ToInteger() % b.ToInteger());
  return Number::OfReal(std::fmod(a.ToDouble(), b.ToDouble()));
}

Number Negate(Number a) {
  if (a.integer() && a.True()) return Number::OfInteger(-a.ToInteger());
  return Number::OfReal(-a.ToDouble());
}

absl::string_view TextOf(Number number, char (&buffer)[40]) {
  HEARTH_CHECK(!number.missing());
  char* const end = buffer + sizeof(buffer);
  std::to_chars_result written;
  if (number.integer()) {
    const __int128 value = number.ToInteger();
    written = value < 0 ? std::to_chars(buffer, end, static_cast<int64_t>(value))
                        : std::to_chars(buffer, end, static_cast<uint64_t>(value));
  } else {
    const double value = number.ToDouble();
    const bool whole = value == std::floor(value) && std::fabs(value) < kExactIntegerMax;
    written = whole ? std::to_chars(buffer, end, static_cast<int64_t>(value)) : std::to_chars(buffer, end, value);
  }
  return absl::string_view(buffer, static_cast<size_t>(written.ptr - buffer));
}

bool ToNatural(Number number, uint64_t* value) {
  if (number.integer()) {
    *value = static_cast<uint64_t>(number.ToInteger());
    return number.ToInteger() >= 0;
  }
  const double real = number.ToDouble();  // NaN where missing
  if (!(real >= 0 && real < kExactIntegerMax && real == std::floor(real))) return false;
  *value = static_cast<uint64_t>(real);
  return true;
}

}  // namespace hearth
