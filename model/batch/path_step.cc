#include "model/batch/path_step.h"

namespace hearth {

std::string PathStep(const std::string& name) {
  std::string step;
  for (char c : name) {
    if (c == '.') {
      step += "%2e";
    } else if (c == '%') {
      step += "%25";
    } else {
      step += c;
    }
  }
  return step.empty() ? "%" : step;
}

}  // namespace hearth
