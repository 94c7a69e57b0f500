// A small ONNX graph, node by node: opset 17, ir_version 8, weights as little-endian raw data (docs/FORMATS.md, "Export
// bundle"). Free of Torch. Private to the export.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace hearth {

// Values are named; every method returns the name of its result. Shapes below leave the batch out: [B, …].
class OnnxGraph {
 public:
  explicit OnnxGraph(const std::string& name);
  ~OnnxGraph();

  std::string Input(const std::string& name, int64_t width);
  void Output(const std::string& value, const std::string& name, int64_t width);
  // Weights. `name` is unique in the graph.
  std::string Floats(const std::string& name, const std::vector<int64_t>& shape, absl::Span<const float> values);

  // x [B, in] · weight [out, in]ᵀ + bias [out]; bias may be empty.
  std::string Linear(const std::string& x, const std::string& weight, const std::string& bias);
  std::string MatMul(const std::string& x, const std::string& weight);  // weight [in, out]
  std::string Relu(const std::string& x);
  std::string Sigmoid(const std::string& x);
  std::string Softmax(const std::string& x);  // over the last axis
  std::string Multiply(const std::string& a, const std::string& b);
  std::string Add(const std::string& a, const std::string& b);
  std::string Concat(const std::vector<std::string>& parts);            // of [B, n_i]
  std::vector<std::string> Split(const std::string& x, int64_t parts);  // into equal parts of the last axis
  std::string Swish(const std::string& x) { return Multiply(x, Sigmoid(x)); }
  // Σ_e weights[:, e] · parts[e]; weights [B, n], parts [B, D] each.
  std::string WeightedSum(const std::string& weights, const std::vector<std::string>& parts);

  // The checked model: onnx's checker and strict shape inference have passed, and every output has its shape. Internal
  // where they object (an error of this program); ResourceExhausted past protobuf's 2 GiB.
  absl::StatusOr<std::string> Serialize(const std::map<std::string, std::string>& metadata);

 private:
  struct State;
  std::string Ints(const std::vector<int64_t>& values);
  std::string Node(const std::string& op, const std::vector<std::string>& inputs);
  std::unique_ptr<State> state_;
};

}  // namespace hearth
