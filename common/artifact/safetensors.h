// safetensors files (docs/FORMATS.md, formats' own specification): u64 length n, n bytes of JSON padded so that 8 + n
// is a multiple of 8, then the tensors' bytes without holes. Free of Torch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace hearth {

struct NamedTensor {
  std::string name;
  std::string dtype;           // "F32", "F64", "I64", …
  std::vector<int64_t> shape;  // empty: a scalar
  absl::Span<const char>
      data;  // shape × width of dtype bytes, little-endian; into the writer's arrays or SafetensorsFile::bytes
};

using TensorMetadata = std::map<std::string, std::string>;

// A file in memory, checked: tensors in name order, views into `bytes`.
struct SafetensorsFile {
  std::string bytes;
  std::vector<NamedTensor> tensors;
  TensorMetadata metadata;

  const NamedTensor* Find(absl::string_view name) const;  // null: none
};

// Width of a dtype in bytes; 0: unknown.
int64_t BytesOfDtype(absl::string_view dtype);

// Writes aside, fsyncs, renames. Tensors are laid down in name order. InvalidArgument: two of one name, or a size that
// does not match its shape.
absl::Status WriteSafetensors(const std::string& path, std::vector<NamedTensor> tensors,
                              const TensorMetadata& metadata);

// Reads and checks a file: the header's length against the file, every shape × dtype against its place, no overlap, no
// hole, nothing behind the last. DataLoss names the path and the fault. Memory is bounded by the file's own length.
absl::StatusOr<SafetensorsFile> ReadSafetensors(const std::string& path);
// The same from bytes.
absl::StatusOr<SafetensorsFile> ParseSafetensors(std::string bytes, const std::string& name_for_errors);

// XXH3-64 over all tensors in name order: the bytes of the name, then those of the data. Over a dense.safetensors this
// is the snapshot's dense_hash (docs/FORMATS.md, "Model hash").
uint64_t HashTensors(absl::Span<const NamedTensor> tensors);

}  // namespace hearth
