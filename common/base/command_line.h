// What every program of ours does with its command line. Header-only, so that the library needs no CLI11.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <sstream>
#include <string>

#include "common/base/output_file.h"
#include "common/base/report.h"
#include "common/base/status.h"

namespace hearth {

// After app.parse has thrown: --help and --version on standard output (0, or 74 where it cannot be written), what is
// wrong with the command line on standard error (64).
inline int ExitOfParse(const CLI::App& app, const CLI::ParseError& error) {
  std::ostringstream out, complaint;
  const int code = app.exit(error, out, complaint);
  std::fputs(complaint.str().c_str(), stderr);
  return code == 0 ? Finish(app.get_name(), WriteStandardOutput(out.str())) : static_cast<int>(kExitUsage);
}

}  // namespace hearth
