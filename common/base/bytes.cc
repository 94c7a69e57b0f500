#include "common/base/bytes.h"

#include <cstring>

namespace hearth {

Bytes Bytes::Clone() const {
  Bytes copy(size_);
  if (size_ > 0) std::memcpy(copy.data(), data(), size_);
  return copy;
}

}  // namespace hearth
