// The parts of an export bundle that come from a snapshot alone (docs/FORMATS.md, "Export bundle"): graph, weights,
// rows, features. What needs a log, and the rename that makes it a bundle, is worker/bundle/export_bundle.h. Free of
// Torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/artifact/safetensors.h"
#include "common/artifact/snapshot_hold.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct ExportFormats {
  bool onnx = false;         // triton/<model>/<version>/model.onnx
  bool triton = false;       // config.pbtxt beside it; implies onnx
  bool hps = false;          // embeddings/<table>/key, emb_vector
  bool npy = false;          // embeddings/<table>/keys.npy, values.npy
  bool safetensors = false;  // dense.safetensors
  bool int8 = false;         // embeddings/<table>/rows.i8; implies hps
};
// "all", or names of the fields above with commas between. InvalidArgument names an unknown one, or one that this build
// cannot write.
absl::StatusOr<ExportFormats> ParseExportFormats(absl::string_view text);

// A snapshot the checksum of whose every file was verified; its rows are when they are read (ExportTables).
struct ExportSource {
  std::string folder;
  Manifest manifest;
  Job job;
  SafetensorsFile dense;  // without the optimizer's state
  SnapshotHold hold;      // so that a run that goes on does not remove it meanwhile
};
// `snapshot`: its folder, or a run's, whose newest whole one it is. data_dir: instead of the job's, where its files
// moved; empty: the job's. NotFound, DataLoss.
absl::StatusOr<ExportSource> OpenExportSource(const std::string& snapshot, const std::string& data_dir,
                                              bool best = false);

// The job's name as Triton and file systems take it.
std::string ExportModelName(const Job& job);
// Where ExportDense writes the graph in a bundle's folder.
std::string OnnxPath(const ExportSource& source, const std::string& folder);
// A table's folder under embeddings/.
std::string ExportTableFolder(const std::string& table);

absl::Status ExportDense(const ExportSource& source, const ExportFormats& formats, const std::string& folder);
// features.json and job.txtpb.
absl::Status ExportFeatures(const ExportSource& source, const std::string& folder);
absl::Status ExportSideTables(const ExportSource& source, const std::string& folder);

// sign → weights [dim] of those signs that have a row.
using ExportedRows = absl::flat_hash_map<uint64_t, std::vector<float>>;
struct ExportedTable {
  std::string name;
  uint32_t dim = 0;
  uint64_t rows = 0;
  uint64_t weights_hash = 0;  // over its rows (docs/FORMATS.md, "Export bundle")
};
// Streams all rows, memory bounded by a few buffers; DataLoss where they are not those of the MANIFEST. Of the signs
// that are keys of *wanted, fills in the weights; signs without a row are erased from it.
absl::StatusOr<std::vector<ExportedTable>> ExportTables(const ExportSource& source, const ExportFormats& formats,
                                                        const std::string& folder, ExportedRows* wanted);

// FBGEMM's fused row-wise int8: dim × u8, float scale, float bias; x ≈ q · scale + bias.
void QuantizeRow(absl::Span<const float> row, char* out);
void DequantizeRow(const char* row, absl::Span<float> out);
inline size_t QuantizedBytes(size_t dim) { return dim + 2 * sizeof(float); }

// A .npy 1.0 header: 128 bytes for any shape. columns 0: one dimension.
std::string NpyHeader(absl::string_view descr, uint64_t rows, uint64_t columns);

}  // namespace hearth
