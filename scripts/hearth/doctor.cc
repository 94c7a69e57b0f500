#include "scripts/hearth/doctor.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "scripts/hearth/relay.h"
#include "scripts/hearth/supervise.h"

namespace hearth {

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kMemoryBytesMin = 1024 * kMiB;  // a worker with LibTorch takes some 300 MiB before it has rows
constexpr uint64_t kDiskBytesMin = 1024 * kMiB;
constexpr uint64_t kSharedBytesMin = 32 * kMiB;  // Open MPI: some 4 MiB a rank
constexpr int64_t kVersionUsMax = 30 * 1000000;
constexpr int64_t kPollUs = 5000;
constexpr uint64_t kTextBytesMax = 1 << 20;

}  // namespace

absl::StatusOr<Ran> RunFor(const std::vector<std::string>& argv, int64_t us_max) {
  HEARTH_ASSIGN_OR_RETURN(const auto folder, TemporaryFolder::Make("hearth-doctor"));
  const std::string log = JoinPath(folder->path(), "output");
  absl::StatusOr<std::unique_ptr<ChildProcess>> child = ChildProcess::Start(argv, log);
  std::optional<int> code;
  if (child.ok()) {
    const std::unique_ptr<Event> event = Env::Real()->NewEvent();
    const int64_t deadline_us = Env::Real()->NowUs() + us_max;
    while (!(code = (*child)->Poll()) && Env::Real()->NowUs() < deadline_us)
      event->WaitUntil(Env::Real()->NowUs() + kPollUs);
  }
  const std::string text = ReadFile(log, kTextBytesMax).value_or("");
  HEARTH_RETURN_IF_ERROR(child.status());
  if (!code) {
    return absl::DeadlineExceededError(absl::StrCat("did not end within ", us_max / 1000000, " s"));
  }
  return Ran{*code, text};
}

namespace {

std::string FirstLine(absl::string_view text) {
  return std::string(absl::StripAsciiWhitespace(text.substr(0, text.find('\n'))));
}

void LetRootRunMpi() {
  for (const char* name : {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}) setenv(name, "1", 0);
}

std::string FindOnPath(const std::string& program) {
  if (absl::StrContains(program, '/')) return access(program.c_str(), X_OK) == 0 ? program : "";
  const char* path = std::getenv("PATH");
  for (const absl::string_view folder : absl::StrSplit(path == nullptr ? "" : path, ':', absl::SkipEmpty())) {
    const std::string found = JoinPath(folder, program);
    if (access(found.c_str(), X_OK) == 0) return found;
  }
  return "";
}

std::string InMiB(uint64_t bytes) { return absl::StrCat(bytes / kMiB, " MiB"); }

// The number behind a name in /proc/meminfo, in bytes.
uint64_t MemoryOf(absl::string_view name) {
  const std::string text = ReadFile("/proc/meminfo", kTextBytesMax).value_or("");
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::StartsWith(line, name)) continue;
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    uint64_t kb = 0;
    if (words.size() >= 2 && absl::SimpleAtoi(words[1], &kb)) return kb * 1024;
  }
  return 0;
}

// A control group's number; nothing where there is no limit.
std::optional<uint64_t> LimitIn(const std::string& path) {
  uint64_t bytes = 0;
  const absl::StatusOr<std::string> text = ReadFile(path, kTextBytesMax);
  if (!text.ok() || !absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &bytes)) return std::nullopt;
  return bytes;
}

Finding Fine(const std::string& what, const std::string& text) { return {what, true, text}; }
Finding Fault(const std::string& what, const std::string& text) { return {what, false, text}; }

Finding CheckMpi(const std::string& mpirun) {
  if (mpirun.empty()) return Fault("mpi", "mpirun is not on PATH; install Open MPI: scripts/setup");
  const absl::StatusOr<Ran> ran = RunFor({mpirun, "--version"}, kVersionUsMax);
  if (!ran.ok()) return Fault("mpi", absl::StrCat(mpirun, " --version: ", std::string(ran.status().message())));
  const std::string version = FirstLine(ran->text);
  if (!absl::StrContains(version, "Open MPI")) {
    return Fault("mpi", absl::StrCat(mpirun, " says \"", version,
                                     "\", and Hearth is built with Open MPI; put its mpirun first on PATH"));
  }
  return Fine("mpi", absl::StrCat(version, ", ", mpirun));
}

}  // namespace

absl::StatusOr<std::string> PingRanks(const DoctorOptions& options) {
  LetRootRunMpi();
  const std::string mpirun = FindOnPath(options.programs.mpirun);
  const std::string ping = JoinPath(options.programs.folder, "hearth-ping");
  if (mpirun.empty() || access(ping.c_str(), X_OK) != 0) {
    return absl::FailedPreconditionError("not tried: see mpi and programs");
  }
  std::vector<std::string> argv = {mpirun, "--oversubscribe", "--bind-to", "none"};
  if (!options.hostfile.empty()) argv.insert(argv.end(), {"--hostfile", options.hostfile, "--map-by", "node"});
  argv.insert(argv.end(), {"-np", "2", ping});
  const absl::StatusOr<Ran> ran = RunFor(argv, options.ping_us_max);
  const char* const remedy =
      "; look at MPI's interfaces (OMPI_MCA_oob_tcp_if_include, OMPI_MCA_btl_tcp_if_include), "
      "at the hosts' names and at ssh without a password";
  if (!ran.ok()) {
    return absl::UnavailableError(absl::StrCat("two ranks: ", std::string(ran.status().message()), remedy));
  }
  MpirunFilter filter;
  std::string text;
  filter.Take(ran->text, &text);
  filter.Finish(&text);
  if (ran->code == 0) return FirstLine(text);
  const std::string reason = RefusalOf(filter);
  return absl::UnavailableError(absl::StrCat("two ranks: ", reason.empty() ? FirstLine(ran->text) : reason, " (",
                                             DescribeEnd(ran->code), ")", remedy));
}

namespace {

Finding CheckPing(const DoctorOptions& options) {
  const absl::StatusOr<std::string> line = PingRanks(options);
  return line.ok() ? Fine("ping", *line) : Fault("ping", std::string(line.status().message()));
}

void CheckPrograms(const std::string& folder, std::vector<Finding>* findings) {
  std::string fine;
  for (const char* name : {"hearth-scheduler", "hearth-ps", "hearth-worker", "hearth-export", "hearth-score",
                           "hearth-delta", "hearth-ping"}) {
    const std::string path = JoinPath(folder, name);
    if (access(path.c_str(), X_OK) != 0) {
      findings->push_back(
          Fault("programs", absl::StrCat(path, ": ", std::strerror(errno), "; build it: scripts/build")));
      continue;
    }
    if (absl::EndsWith(name, "-ping")) continue;  // the ping tells
    const absl::StatusOr<Ran> ran = RunFor({path, "--version"}, kVersionUsMax);
    if (ran.ok() && ran->code == 0) {
      absl::StrAppend(&fine, fine.empty() ? "" : ", ", name);
      continue;
    }
    findings->push_back(Fault(
        "libraries", absl::StrCat(path, ": ", ran.ok() ? FirstLine(ran->text) : std::string(ran.status().message()),
                                  "; install what is missing (scripts/setup), or build for this machine")));
  }
  if (!fine.empty()) findings->push_back(Fine("programs", absl::StrCat("start, with all their libraries: ", fine)));
}

Finding CheckCores() {
  const uint32_t cores = UsableCores();
  std::string quota;
  const std::vector<std::string> words =
      absl::StrSplit(ReadFile("/sys/fs/cgroup/cpu.max", kTextBytesMax).value_or("max"), absl::ByAnyChar(" \n"));
  uint64_t share = 0, period = 0;
  if (words.size() >= 2 && absl::SimpleAtoi(words[0], &share) && absl::SimpleAtoi(words[1], &period) && period > 0)
    quota = absl::StrFormat(", of which this control group may use %.1f", static_cast<double>(share) / period);
  return Fine("cores",
              absl::StrCat(cores, quota, "; a worker a core is fastest: --np-worker ", std::max(1u, cores / 2)));
}

Finding CheckMemory() {
  uint64_t bytes = MemoryOf("MemAvailable:");
  const std::optional<uint64_t> limit = LimitIn("/sys/fs/cgroup/memory.max");
  const uint64_t used = LimitIn("/sys/fs/cgroup/memory.current").value_or(0);
  if (limit) bytes = std::min(bytes, *limit > used ? *limit - used : 0);
  if (bytes < kMemoryBytesMin) {
    return Fault("memory", absl::StrCat(InMiB(bytes), " are free, and less than ", InMiB(kMemoryBytesMin),
                                        " are too few for a job; end other programs, or take another machine"));
  }
  return Fine("memory", absl::StrCat(InMiB(bytes), " free"));
}

Finding CheckRoom(const std::string& what, const std::string& folder, uint64_t bytes_min, const std::string& remedy) {
  const absl::StatusOr<uint64_t> bytes = DiskFreeBytes(folder);
  if (!bytes.ok()) return Fault(what, absl::StrCat(std::string(bytes.status().message()), remedy));
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    return Fault(what, absl::StrCat(folder, ": may not be written: ", std::strerror(errno), remedy));
  if (*bytes < bytes_min)
    return Fault(what,
                 absl::StrCat(folder, ": ", InMiB(*bytes), " are free, ", InMiB(bytes_min), " are needed", remedy));
  return Fine(what, absl::StrCat(folder, ": ", InMiB(*bytes), " free"));
}

// Why nobody can listen there; 0: any port. Empty: one can.
std::string WhyNotListen(int port) {
  const int socket_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket_fd < 0) return std::strerror(errno);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int on = 1;
  setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  std::string why;
  if (bind(socket_fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 || listen(socket_fd, 1) != 0)
    why = std::strerror(errno);
  close(socket_fd);
  return why;
}

Finding CheckPorts(const DoctorOptions& options) {
  if (const std::string why = WhyNotListen(0); !why.empty()) {
    return Fault("ports", absl::StrCat("127.0.0.1: no port can be listened on: ", why,
                                       "; bring the loopback interface up: ip link set lo up"));
  }
  if (options.prometheus_port == 0) return Fine("ports", "MPI finds its own; metrics need none unless a job says so");
  for (int port = options.prometheus_port; port < options.prometheus_port + options.ranks; ++port) {
    const std::string why = port > 65535 ? "there is no such port" : WhyNotListen(port);
    if (why.empty()) continue;
    return Fault("ports", absl::StrCat("127.0.0.1:", port, ": ", why, "; give metrics.prometheus_port another number"));
  }
  return Fine("ports", absl::StrCat(options.prometheus_port, " to ", options.prometheus_port + options.ranks - 1,
                                    " are free on 127.0.0.1"));
}

Finding CheckGpus(bool built_for_gpus) {
  int gpus = 0;
  while (PathExists(absl::StrCat("/dev/nvidia", gpus))) ++gpus;
  if (gpus == 0) return Fine("gpu", "none; jobs train on the CPU");
  if (!built_for_gpus) return Fine("gpu", absl::StrCat(gpus, ", which this build does not use: scripts/build cuda"));
  return Fine("gpu", absl::StrCat(gpus, "; a job takes them unless training.device says CPU"));
}

}  // namespace

std::vector<Finding> Diagnose(const DoctorOptions& options) {
  LetRootRunMpi();
  std::vector<Finding> findings;
  const std::string mpirun = FindOnPath(options.programs.mpirun);
  findings.push_back(CheckMpi(mpirun));
  CheckPrograms(options.programs.folder, &findings);
  findings.push_back(CheckPing(options));
  findings.push_back(CheckCores());
  findings.push_back(CheckMemory());
  findings.push_back(CheckRoom("disk", options.out, kDiskBytesMin, "; give --out a folder with room"));
  const char* tmp = std::getenv("TMPDIR");
  findings.push_back(CheckRoom("tmp", tmp != nullptr && *tmp != 0 ? tmp : "/tmp", 64 * kMiB, "; set TMPDIR"));
  findings.push_back(CheckRoom("shm", "/dev/shm", kSharedBytesMin, "; a container gets more by --shm-size=1g"));
  findings.push_back(CheckPorts(options));
  findings.push_back(CheckGpus(options.built_for_gpus));
  return findings;
}

std::string DescribeFindings(const std::vector<Finding>& findings) {
  std::string text;
  for (const Finding& finding : findings)
    absl::StrAppendFormat(&text, "%-6s %-10s %s\n", finding.fine ? "ok" : "FAULT", finding.what, finding.text);
  return text;
}

bool AllFine(const std::vector<Finding>& findings) {
  return std::all_of(findings.begin(), findings.end(), [](const Finding& finding) { return finding.fine; });
}

}  // namespace hearth
