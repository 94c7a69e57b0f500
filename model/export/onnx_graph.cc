#include "model/export/onnx_graph.h"

#include <onnx/checker.h>
#include <onnx/onnx_pb.h>
#include <onnx/shape_inference/implementation.h>

#include <exception>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace hearth {
namespace {

constexpr int64_t kIrVersion = 8;
constexpr int64_t kOpset = 17;
constexpr uint64_t kBytesMax = (uint64_t{1} << 31) - (1 << 20);  // protobuf's limit, with room for the nodes

void SetShape(onnx::ValueInfoProto* value, const std::string& name, int64_t width) {
  value->set_name(name);
  auto* type = value->mutable_type()->mutable_tensor_type();
  type->set_elem_type(onnx::TensorProto::FLOAT);
  type->mutable_shape()->add_dim()->set_dim_param("batch");
  type->mutable_shape()->add_dim()->set_dim_value(width);
}

void SetInt(onnx::NodeProto* node, const std::string& name, int64_t value) {
  auto* attribute = node->add_attribute();
  attribute->set_name(name);
  attribute->set_type(onnx::AttributeProto::INT);
  attribute->set_i(value);
}

}  // namespace

struct OnnxGraph::State {
  onnx::ModelProto model;
  onnx::GraphProto* graph = nullptr;
  uint64_t bytes = 0;
  int values = 0;
  std::map<std::vector<int64_t>, std::string> ints;  // constants, each once
};

OnnxGraph::OnnxGraph(const std::string& name) : state_(std::make_unique<State>()) {
  state_->model.set_ir_version(kIrVersion);
  state_->model.set_producer_name("hearth");
  auto* opset = state_->model.add_opset_import();
  opset->set_domain("");
  opset->set_version(kOpset);
  state_->graph = state_->model.mutable_graph();
  state_->graph->set_name(name);
}
OnnxGraph::~OnnxGraph() = default;

std::string OnnxGraph::Input(const std::string& name, int64_t width) {
  SetShape(state_->graph->add_input(), name, width);
  return name;
}

void OnnxGraph::Output(const std::string& value, const std::string& name, int64_t width) {
  auto* node = state_->graph->add_node();
  node->set_op_type("Identity");
  node->set_name(name);
  node->add_input(value);
  node->add_output(name);
  SetShape(state_->graph->add_output(), name, width);
}

std::string OnnxGraph::Floats(const std::string& name, const std::vector<int64_t>& shape,
                              absl::Span<const float> values) {
  auto* tensor = state_->graph->add_initializer();
  tensor->set_name(name);
  tensor->set_data_type(onnx::TensorProto::FLOAT);
  int64_t count = 1;
  for (const int64_t extent : shape) {
    tensor->add_dims(extent);
    count *= extent;
  }
  HEARTH_CHECK(count == static_cast<int64_t>(values.size()), "initializer ", name, " has another shape");
  state_->bytes += values.size() * sizeof(float);
  if (state_->bytes <= kBytesMax) tensor->set_raw_data(values.data(), values.size() * sizeof(float));
  return name;
}

std::string OnnxGraph::Ints(const std::vector<int64_t>& values) {
  std::string& name = state_->ints[values];
  if (!name.empty()) return name;
  name = absl::StrCat("constant.", state_->ints.size());
  auto* tensor = state_->graph->add_initializer();
  tensor->set_name(name);
  tensor->set_data_type(onnx::TensorProto::INT64);
  tensor->add_dims(static_cast<int64_t>(values.size()));
  tensor->set_raw_data(values.data(), values.size() * sizeof(int64_t));
  return name;
}

std::string OnnxGraph::Node(const std::string& op, const std::vector<std::string>& inputs) {
  auto* node = state_->graph->add_node();
  node->set_op_type(op);
  node->set_name(absl::StrCat(op, ".", state_->values));
  for (const std::string& input : inputs) node->add_input(input);
  node->add_output(absl::StrCat("value.", state_->values++));
  return node->output(0);
}

std::string OnnxGraph::Linear(const std::string& x, const std::string& weight, const std::string& bias) {
  const std::string y = bias.empty() ? Node("Gemm", {x, weight}) : Node("Gemm", {x, weight, bias});
  SetInt(state_->graph->mutable_node(state_->graph->node_size() - 1), "transB", 1);
  return y;
}

std::string OnnxGraph::MatMul(const std::string& x, const std::string& weight) { return Node("MatMul", {x, weight}); }
std::string OnnxGraph::Relu(const std::string& x) { return Node("Relu", {x}); }
std::string OnnxGraph::Sigmoid(const std::string& x) { return Node("Sigmoid", {x}); }
std::string OnnxGraph::Multiply(const std::string& a, const std::string& b) { return Node("Mul", {a, b}); }
std::string OnnxGraph::Add(const std::string& a, const std::string& b) { return Node("Add", {a, b}); }

std::string OnnxGraph::Softmax(const std::string& x) {
  const std::string y = Node("Softmax", {x});
  SetInt(state_->graph->mutable_node(state_->graph->node_size() - 1), "axis", -1);
  return y;
}

std::string OnnxGraph::Concat(const std::vector<std::string>& parts) {
  const std::string y = Node("Concat", parts);
  SetInt(state_->graph->mutable_node(state_->graph->node_size() - 1), "axis", 1);
  return y;
}

std::vector<std::string> OnnxGraph::Split(const std::string& x, int64_t parts) {
  if (parts == 1) return {x};
  std::vector<std::string> names = {Node("Split", {x})};
  auto* node = state_->graph->mutable_node(state_->graph->node_size() - 1);
  SetInt(node, "axis", -1);
  for (int64_t i = 1; i < parts; ++i) {
    names.push_back(absl::StrCat("value.", state_->values++));
    node->add_output(names.back());
  }
  return names;
}

std::string OnnxGraph::WeightedSum(const std::string& weights, const std::vector<std::string>& parts) {
  if (parts.size() == 1) return Multiply(weights, parts[0]);
  std::vector<std::string> stacked;  // [B, 1, D] each
  for (const std::string& part : parts) stacked.push_back(Node("Unsqueeze", {part, Ints({1})}));
  const std::string column = Node("Unsqueeze", {weights, Ints({2})});  // [B, n, 1]
  const std::string product = Multiply(Concat(stacked), column);       // [B, n, D]
  const std::string sum = Node("ReduceSum", {product, Ints({1})});
  SetInt(state_->graph->mutable_node(state_->graph->node_size() - 1), "keepdims", 0);
  return sum;
}

absl::StatusOr<std::string> OnnxGraph::Serialize(const std::map<std::string, std::string>& metadata) {
  if (state_->bytes > kBytesMax) {
    return absl::ResourceExhaustedError(absl::StrCat("the ONNX graph's weights take ", state_->bytes,
                                                     " bytes, protobuf holds 2 GiB; leave the formats onnx and triton "
                                                     "out"));
  }
  for (const auto& [key, value] : metadata) {
    auto* entry = state_->model.add_metadata_props();
    entry->set_key(key);
    entry->set_value(value);
  }
  try {
    onnx::checker::check_model(state_->model);
    onnx::ModelProto inferred = state_->model;
    onnx::ShapeInferenceOptions strict(/*check_type=*/true, /*strict_mode=*/1, /*data_prop=*/true);
    onnx::shape_inference::InferShapes(inferred, onnx::OpSchemaRegistry::Instance(), strict);
    onnx::checker::check_model(inferred);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("onnx refuses the graph: ", error.what()));
  }
  return state_->model.SerializeAsString();
}

}  // namespace hearth
