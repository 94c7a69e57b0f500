#include "embedding/sign.h"

#include <xxhash.h>

namespace hearth {

uint64_t HashId(absl::string_view text, uint64_t salt) {
  return XXH3_64bits_withSeed(text.data(), text.size(), salt) & kIdMask;
}

uint64_t SaltOf(absl::string_view text) { return XXH3_64bits(text.data(), text.size()); }

}  // namespace hearth
