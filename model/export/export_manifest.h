// manifest.json of an export bundle and of a delta (docs/FORMATS.md).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/export/export.h"

namespace hearth {

// What a snapshot and its exported tables say. Without "parity", "files", and what makes it a delta.
nlohmann::ordered_json ExportManifest(const ExportSource& source, const ExportFormats& formats,
                                      const std::vector<ExportedTable>& tables);

// manifest.json of a bundle or delta, whose own checksum was verified. DataLoss where it is no object.
absl::StatusOr<nlohmann::ordered_json> ReadExportManifest(const std::string& folder);
// FailedPrecondition where the manifest does not say them (an older build's).
absl::StatusOr<ExportFormats> FormatsOf(const nlohmann::ordered_json& manifest, const std::string& folder);

// Lists the folder's files in `manifest`, writes it, and reads everything back. The number of files.
absl::StatusOr<size_t> FinishExport(nlohmann::ordered_json manifest, const std::string& folder);

}  // namespace hearth
