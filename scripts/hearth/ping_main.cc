// hearth-ping: two ranks under mpirun that send each other a mebibyte a few times, and look at what came, then eight
// bytes. `hearth doctor` and `hearth plan --calibrate` start it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/command_line.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/net/mpi_runtime.h"

namespace hearth {
namespace {

constexpr size_t kBytes = size_t{1} << 20;
constexpr int kRounds = 20;

absl::StatusOr<std::string> Ping(MpiRuntime* runtime) {
  const int rank = runtime->transport()->rank();
  if (runtime->transport()->size() != 2) {
    return absl::FailedPreconditionError(
        absl::StrCat("MPI started ", runtime->transport()->size(),
                     " ranks that know each other, and the ping has 2; mpirun and the program's MPI library differ"));
  }
  const auto shortest_us = [&](size_t bytes) -> absl::StatusOr<int64_t> {
    int64_t shortest = kNever;
    for (int round = 0; round < kRounds; ++round) {
      const std::string mine(bytes, static_cast<char>(1 + round + 100 * rank));
      std::string theirs(bytes, '\0');
      const int64_t start_us = Env::Real()->NowUs();
      HEARTH_RETURN_IF_ERROR(
          runtime->Exchange({{1 - rank, {mine.data(), mine.size()}}}, {{1 - rank, {&theirs[0], theirs.size()}}}));
      shortest = std::min(shortest, Env::Real()->NowUs() - start_us);
      if (theirs != std::string(bytes, static_cast<char>(1 + round + 100 * (1 - rank)))) {
        return absl::InternalError("what came is not what was sent");
      }
    }
    return shortest;
  };
  HEARTH_ASSIGN_OR_RETURN(const int64_t mebibyte_us, shortest_us(kBytes));
  HEARTH_ASSIGN_OR_RETURN(const int64_t word_us, shortest_us(sizeof(uint64_t)));
  if (rank != 0) return std::string();
  return absl::StrFormat("two ranks swap a mebibyte in %d us, 8 bytes in %d us\n", mebibyte_us, word_us);
}

int Main(int argc, char** argv) {
  CLI::App app("Two ranks that send each other something. Started by `hearth doctor`.", "hearth-ping");
  app.set_version_flag("--version", BuildCommit());
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitOfParse(app, error);
  }
  absl::StatusOr<std::unique_ptr<MpiRuntime>> runtime = MpiRuntime::Start(Env::Real());
  if (!runtime.ok()) return Finish("hearth-ping", runtime.status());
  return Finish("hearth-ping", Ping(runtime->get()));
}

}  // namespace
}  // namespace hearth

int main(int argc, char** argv) { return hearth::Main(argc, argv); }
