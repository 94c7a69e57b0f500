// Runs the graphs that onnx_graph.h writes, so that an exporter compares what it wrote with the trainer before anybody
// serves it. Free of Torch, of ONNX Runtime, and of the code that writes graphs: it reads the bytes of the file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace hearth {

// The graph's outputs by name, [rows] each. `features` [rows, width] are its one input. One operator after the other in
// float32, sums in the order of their terms; Gemm, MatMul, Relu, Sigmoid, Softmax, Mul, Add, Concat, Split, Unsqueeze,
// ReduceSum, Identity as opset 17 defines them, with the attributes that onnx_graph.cc sets. Internal: another operator
// or attribute, or shapes that do not fit. Not fast.
absl::StatusOr<std::map<std::string, std::vector<float>>> RunOnnxModel(absl::string_view model,
                                                                       absl::Span<const float> features, int64_t rows);

}  // namespace hearth
