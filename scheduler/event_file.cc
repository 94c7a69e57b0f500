#include "scheduler/event_file.h"

#include <array>
#include <cerrno>
#include <cmath>
#include <utility>

#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr const char* kVersion = "brain.Event:2";

template <typename T>
void PutRaw(T value, std::string* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table;
  for (uint32_t i = 0; i < table.size(); ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
    table[i] = crc;
  }
  return table;
}

}  // namespace

uint32_t Crc32c(absl::string_view bytes) {
  static const std::array<uint32_t, 256> table = MakeCrcTable();
  uint32_t crc = ~0u;
  for (char byte : bytes) crc = table[(crc ^ static_cast<uint8_t>(byte)) & 0xff] ^ crc >> 8;
  return ~crc;
}

uint32_t MaskedCrc32c(absl::string_view bytes) {
  const uint32_t crc = Crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

std::string EncodeRecord(const TensorBoardEvent& event) {
  const std::string data = event.SerializeAsString();
  std::string record;
  PutRaw(static_cast<uint64_t>(data.size()), &record);
  PutRaw(MaskedCrc32c(record), &record);
  record += data;
  PutRaw(MaskedCrc32c(data), &record);
  return record;
}

absl::StatusOr<std::unique_ptr<EventFile>> EventFile::Create(const std::string& folder, int64_t wall_us,
                                                             int64_t first_step) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(folder));
  const std::string stem = JoinPath(folder, absl::StrCat("events.out.tfevents.", wall_us / 1'000'000, ".", HostName()));
  // A process that starts twice within a second takes the next name; both files belong to the run.
  constexpr int kNamesMax = 100;
  for (int number = 0; number < kNamesMax; ++number) {
    const std::string path = number == 0 ? stem : absl::StrCat(stem, ".", number);
    absl::StatusOr<OwnedFile> file = OpenForWriting(path, Writing::kNew);
    if (absl::IsAlreadyExists(file.status())) continue;
    if (!file.ok()) return file.status();
    std::unique_ptr<EventFile> events(new EventFile(path, *std::move(file)));
    TensorBoardEvent version;
    version.set_file_version(kVersion);
    HEARTH_RETURN_IF_ERROR(events->Append(wall_us, std::move(version)));
    TensorBoardEvent start;
    start.set_step(first_step);
    start.mutable_session_log()->set_status(TensorBoardEvent::SessionLog::START);
    HEARTH_RETURN_IF_ERROR(events->Append(wall_us, std::move(start)));
    return events;
  }
  return absl::UnavailableError(absl::StrCat(stem, ": and ", kNamesMax, " more files exist; empty the folder"));
}

absl::Status EventFile::Write(int64_t wall_us, int64_t step, absl::Span<const Scalar> scalars) {
  TensorBoardEvent event;
  event.set_step(step);
  for (const Scalar& scalar : scalars) {
    if (!std::isfinite(scalar.value)) continue;
    TensorBoardEvent::Summary::Value* const value = event.mutable_summary()->add_value();
    value->set_tag(scalar.tag);
    value->set_simple_value(scalar.value);
  }
  return event.has_summary() ? Append(wall_us, std::move(event)) : absl::OkStatus();
}

absl::Status EventFile::Append(int64_t wall_us, TensorBoardEvent event) {
  event.set_wall_time(static_cast<double>(wall_us) * 1e-6);
  const std::string record = EncodeRecord(event);
  if (std::fwrite(record.data(), 1, record.size(), file_.get()) == record.size() && std::fflush(file_.get()) == 0) {
    return absl::OkStatus();
  }
  return ErrorOf(errno, "cannot write", path_);
}

}  // namespace hearth
