// Facts about this process.
#pragma once

#include <cstdint>

namespace hearth {

uint64_t PeakRssBytes();  // the most memory it has held so far

}  // namespace hearth
