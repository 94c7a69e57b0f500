#include "scheduler/event_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "common/base/file.h"
#include "common/base/process.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// Protobuf's wire format, as much as an Event needs: field numbers are written out beside each call.
enum WireType { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

void PutVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void PutKey(int field, WireType type, std::string* out) { PutVarint(static_cast<uint64_t>(field << 3 | type), out); }

template <typename T>
void PutRaw(T value, std::string* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void PutBytes(int field, absl::string_view bytes, std::string* out) {
  PutKey(field, kLengthDelimited, out);
  PutVarint(bytes.size(), out);
  out->append(bytes.data(), bytes.size());
}

std::string EventAt(double wall_seconds) {
  std::string event;
  PutKey(1, kFixed64, &event);  // wall_time
  PutRaw(wall_seconds, &event);
  return event;
}

// TFRecord: length, its checksum, data, its checksum.
std::string Framed(const std::string& data) {
  std::string record;
  PutRaw(static_cast<uint64_t>(data.size()), &record);
  PutRaw(MaskedCrc32c(record), &record);
  record += data;
  PutRaw(MaskedCrc32c(data), &record);
  return record;
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

std::string EncodeVersionRecord(double wall_seconds) {
  std::string event = EventAt(wall_seconds);
  PutBytes(3, "brain.Event:2", &event);  // file_version
  return Framed(event);
}

std::string EncodeScalarsRecord(double wall_seconds, int64_t step, absl::Span<const Scalar> scalars) {
  std::string summary;
  for (const Scalar& scalar : scalars) {
    std::string value;
    PutBytes(1, scalar.tag, &value);  // tag
    PutKey(2, kFixed32, &value);      // simple_value
    PutRaw(scalar.value, &value);
    PutBytes(1, value, &summary);  // value
  }
  std::string event = EventAt(wall_seconds);
  PutKey(2, kVarint, &event);  // step
  PutVarint(static_cast<uint64_t>(step), &event);
  PutBytes(5, summary, &event);  // summary
  return Framed(event);
}

absl::StatusOr<std::unique_ptr<EventFile>> EventFile::Create(const std::string& folder, int64_t wall_us) {
  HEARTH_RETURN_IF_ERROR(MakeDirectories(folder));
  const std::string stem = JoinPath(folder, absl::StrCat("events.out.tfevents.", wall_us / 1'000'000, ".", HostName()));
  // A process that starts twice within a second takes the next name; both files belong to the run.
  constexpr int kNamesMax = 100;
  for (int number = 0; number < kNamesMax; ++number) {
    const std::string path = number == 0 ? stem : absl::StrCat(stem, ".", number);
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0 && errno == EEXIST) continue;
    std::FILE* const file = fd < 0 ? nullptr : fdopen(fd, "wb");
    if (file == nullptr) {
      const int error = errno;
      if (fd >= 0) close(fd);
      return absl::UnavailableError(absl::StrCat(path, ": cannot open: ", std::strerror(error)));
    }
    std::unique_ptr<EventFile> events(new EventFile(path, file));
    HEARTH_RETURN_IF_ERROR(events->Append(EncodeVersionRecord(static_cast<double>(wall_us) * 1e-6)));
    return events;
  }
  return absl::UnavailableError(absl::StrCat(stem, ": and ", kNamesMax, " more files exist; empty the folder"));
}

EventFile::~EventFile() { std::fclose(file_); }

absl::Status EventFile::Write(int64_t wall_us, int64_t step, absl::Span<const Scalar> scalars) {
  std::vector<Scalar> finite;
  for (const Scalar& scalar : scalars) {
    if (std::isfinite(scalar.value)) finite.push_back(scalar);
  }
  if (finite.empty()) return absl::OkStatus();
  return Append(EncodeScalarsRecord(static_cast<double>(wall_us) * 1e-6, step, finite));
}

absl::Status EventFile::Append(const std::string& record) {
  if (std::fwrite(record.data(), 1, record.size(), file_) == record.size() && std::fflush(file_) == 0) {
    return absl::OkStatus();
  }
  const std::string text = absl::StrCat(path_, ": cannot write: ", std::strerror(errno));
  return errno == ENOSPC ? absl::ResourceExhaustedError(text) : absl::UnavailableError(text);
}

}  // namespace hearth
