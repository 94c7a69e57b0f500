// A network that does less than MPI promises.
#pragma once

#include <cstdint>
#include <memory>

#include "common/net/transport.h"

namespace hearth {

// Weather: wraps a transport and loses, repeats and reorders what it sends, by a seeded generator.
// Rates are probabilities in [0, 1]. `base` outlives it.
struct Weather {
  uint64_t seed = 1;
  double lose = 0;
  double repeat = 0;
  double reorder = 0;  // holds a message back until some later Send
};
std::unique_ptr<Transport> MakeFaultyTransport(Transport* base, Weather weather);

}  // namespace hearth
