#include "common/base/version.h"
namespace hearth {
std::string BuildCommit() { return HEARTH_COMMIT; }
}  // namespace hearth
