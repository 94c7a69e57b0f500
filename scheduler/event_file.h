// TensorBoard's event files (docs/FORMATS.md): DIR/tb/events.out.tfevents.<seconds>.<host>, one for each start of a
// process.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/proto/event.pb.h"

namespace hearth {

struct Scalar {
  std::string tag;  // "train/loss", "auc/<task>", "perf/samples_per_s"
  float value = 0;
};

// Not thread-safe: the thread that reports owns it.
class EventFile {
 public:
  // Makes the folder and a new file in it. wall_us: Env::WallUs(). first_step: the first that this process writes; what
  // other files of the folder hold of it and of later steps is void, and TensorBoard hides it (SessionLog START).
  static absl::StatusOr<std::unique_ptr<EventFile>> Create(const std::string& folder, int64_t wall_us,
                                                           int64_t first_step);
  // One event with these scalars, written through to the kernel. Non-finite values are left out: they would hide a
  // curve.
  absl::Status Write(int64_t wall_us, int64_t step, absl::Span<const Scalar> scalars);
  const std::string& path() const { return path_; }

 private:
  EventFile(std::string path, OwnedFile file) : path_(std::move(path)), file_(std::move(file)) {}
  absl::Status Append(int64_t wall_us, TensorBoardEvent event);

  const std::string path_;
  const OwnedFile file_;
};

// One event as a file holds it, a TFRecord: length, its checksum, data, its checksum.
std::string EncodeRecord(const TensorBoardEvent& event);

// CRC-32C (Castagnoli), and the rotated form that TFRecord frames carry.
uint32_t Crc32c(absl::string_view bytes);
uint32_t MaskedCrc32c(absl::string_view bytes);

}  // namespace hearth
