// Names of the job as steps of a parameter's path, "level2.task.<step>.gate.weight".
#pragma once

#include <string>

namespace hearth {

// A name of the job as one step of a path: never empty, without dots, and different for different names.
std::string PathStep(const std::string& name);

}  // namespace hearth
