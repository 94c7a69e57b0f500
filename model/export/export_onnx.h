// The ONNX graph of every model that Hearth trains (docs/FORMATS.md, "Export bundle"): written out from the job and the
// weights by name, in the form for serving (BatchNorm folded into the layer before it). Free of Torch.
#pragma once

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "common/artifact/safetensors.h"
#include "common/proto/job.pb.h"

namespace hearth {

// Input "features" FLOAT [batch, V]; for each task an output "p_<task>" FLOAT [batch, 1], a probability. `dense` holds
// parameters and running statistics under MakeModel's names (DataLoss where one is missing or has another shape).
absl::StatusOr<std::string> MakeOnnxModel(const Job& job, const SafetensorsFile& dense,
                                          const std::map<std::string, std::string>& metadata);

}  // namespace hearth
