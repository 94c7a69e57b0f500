// manifest.json of an export bundle and of a delta (docs/FORMATS.md).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/export/export.h"

namespace hearth {

// A text as JSON has it: a string, or {"base64": …} where its bytes are no UTF-8, which no JSON string can hold.
nlohmann::ordered_json TextJson(absl::string_view text);
// The document, 1 space a level. What is no UTF-8 and is for people alone (a name, a path) becomes U+FFFD.
std::string DumpJson(const nlohmann::ordered_json& json);

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
