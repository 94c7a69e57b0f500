#include "model/export/onnx_run.h"

#include <onnx/onnx_pb.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using Shape = std::vector<int64_t>;

int64_t CountOf(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

// Either floats, or integers (the constants that name axes).
struct Tensor {
  Shape shape;
  std::vector<float> floats;
  std::vector<int64_t> ints;
};

absl::Status Unfit(absl::string_view what) {
  return absl::InternalError(absl::StrCat("the graph cannot be run: ", what));
}

absl::StatusOr<Tensor> ReadInitializer(const onnx::TensorProto& from) {
  Tensor tensor;
  tensor.shape.assign(from.dims().begin(), from.dims().end());
  const bool is_float = from.data_type() == onnx::TensorProto::FLOAT;
  const size_t width = is_float ? sizeof(float) : sizeof(int64_t);
  const int64_t count = CountOf(tensor.shape);
  if ((!is_float && from.data_type() != onnx::TensorProto::INT64) || count < 0 ||
      from.raw_data().size() != static_cast<size_t>(count) * width) {
    return Unfit(absl::StrCat("initializer ", from.name(), " has another type or size than its shape"));
  }
  tensor.floats.resize(is_float ? static_cast<size_t>(count) : 0);
  tensor.ints.resize(is_float ? 0 : static_cast<size_t>(count));
  void* const to = is_float ? static_cast<void*>(tensor.floats.data()) : static_cast<void*>(tensor.ints.data());
  if (count > 0) std::memcpy(to, from.raw_data().data(), from.raw_data().size());
  return tensor;
}

class Runner {
 public:
  explicit Runner(const onnx::GraphProto& graph) : graph_(graph) {}

  absl::Status Run(absl::Span<const float> features, int64_t rows) {
    if (graph_.input_size() != 1 || rows < 1 || features.size() % static_cast<size_t>(rows) != 0) {
      return Unfit("it does not have one input of that many rows");
    }
    Tensor& input = values_[graph_.input(0).name()];
    input.shape = {rows, static_cast<int64_t>(features.size()) / rows};
    input.floats.assign(features.begin(), features.end());
    for (const onnx::TensorProto& initializer : graph_.initializer()) {
      HEARTH_ASSIGN_OR_RETURN(values_[initializer.name()], ReadInitializer(initializer));
    }
    for (const onnx::NodeProto& node : graph_.node()) {
      const absl::Status status = RunNode(node);
      if (!status.ok()) return Annotate(status, absl::StrCat(node.op_type(), " ", node.name()));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::map<std::string, std::vector<float>>> TakeOutputs(int64_t rows) {
    std::map<std::string, std::vector<float>> outputs;
    for (const onnx::ValueInfoProto& output : graph_.output()) {
      const auto found = values_.find(output.name());
      if (found == values_.end() || found->second.shape != Shape{rows, 1}) {
        return Unfit(absl::StrCat("output ", output.name(), " is no column of ", rows, " rows"));
      }
      outputs[output.name()] = std::move(found->second.floats);
    }
    return outputs;
  }

 private:
  absl::Status RunNode(const onnx::NodeProto& node) {
    std::vector<const Tensor*> in;
    for (const std::string& name : node.input()) {
      const auto found = values_.find(name);
      if (found == values_.end()) return Unfit(absl::StrCat("value ", name, " is used before it is made"));
      in.push_back(&found->second);
    }
    std::vector<Tensor> out(static_cast<size_t>(node.output_size()));
    HEARTH_RETURN_IF_ERROR(Compute(node, in, &out));
    for (int i = 0; i < node.output_size(); ++i) values_[node.output(i)] = std::move(out[static_cast<size_t>(i)]);
    return absl::OkStatus();
  }

  // The attributes must be exactly these.
  static absl::Status CheckAttributes(const onnx::NodeProto& node, const std::map<std::string, int64_t>& expected) {
    std::map<std::string, int64_t> found;
    for (const onnx::AttributeProto& attribute : node.attribute()) found[attribute.name()] = attribute.i();
    return found == expected ? absl::OkStatus() : Unfit("it has other attributes");
  }

  static absl::Status Compute(const onnx::NodeProto& node, const std::vector<const Tensor*>& in,
                              std::vector<Tensor>* out) {
    const std::string& op = node.op_type();
    if (out->empty()) return Unfit("it has no output");
    Tensor* const y = &(*out)[0];
    const auto takes = [&](size_t inputs, size_t outputs) { return in.size() == inputs && out->size() == outputs; };
    if (op == "Gemm" && (takes(2, 1) || takes(3, 1))) {
      HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {{"transB", 1}}));
      return Product(*in[0], *in[1], /*transposed=*/true, in.size() == 3 ? in[2] : nullptr, y);
    }
    if (op == "Concat" && !in.empty() && out->size() == 1) {
      HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {{"axis", 1}}));
      return Concat(in, y);
    }
    if (op == "Split" && in.size() == 1) {
      HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {{"axis", -1}}));
      return Split(*in[0], out);
    }
    if (op == "Softmax" && takes(1, 1)) {
      HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {{"axis", -1}}));
      return Softmax(*in[0], y);
    }
    if (op == "ReduceSum" && takes(2, 1)) {
      HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {{"keepdims", 0}}));
      return ReduceSum(*in[0], *in[1], y);
    }
    static const auto* const without_attributes =
        new std::set<std::string>{"MatMul", "Mul", "Add", "Unsqueeze", "Relu", "Sigmoid", "Identity"};
    if (without_attributes->count(op) > 0) HEARTH_RETURN_IF_ERROR(CheckAttributes(node, {}));
    if (op == "MatMul" && takes(2, 1)) return Product(*in[0], *in[1], /*transposed=*/false, nullptr, y);
    if (op == "Mul" && takes(2, 1))
      return Pairwise(
          *in[0], *in[1], [](float a, float b) { return a * b; }, y);
    if (op == "Add" && takes(2, 1))
      return Pairwise(
          *in[0], *in[1], [](float a, float b) { return a + b; }, y);
    if (op == "Unsqueeze" && takes(2, 1)) return Unsqueeze(*in[0], *in[1], y);
    if (takes(1, 1) && (op == "Relu" || op == "Sigmoid" || op == "Identity")) {
      *y = *in[0];
      for (float& x : y->floats) {
        if (op == "Relu") x = std::max(x, 0.0f);
        if (op == "Sigmoid") x = 1.0f / (1.0f + std::exp(-x));
      }
      return absl::OkStatus();
    }
    return Unfit(absl::StrCat("there is no such operator with ", in.size(), " inputs and ", out->size(), " outputs"));
  }

  // a [B, K] times b [K, N], or [N, K] where it is transposed, plus bias [N].
  static absl::Status Product(const Tensor& a, const Tensor& b, bool transposed, const Tensor* bias, Tensor* y) {
    if (a.shape.size() != 2 || b.shape.size() != 2 || a.shape[1] != b.shape[transposed ? 1 : 0]) {
      return Unfit("the factors do not fit");
    }
    const size_t rows = static_cast<size_t>(a.shape[0]), depth = static_cast<size_t>(a.shape[1]);
    const size_t columns = static_cast<size_t>(b.shape[transposed ? 0 : 1]);
    if (bias != nullptr && bias->floats.size() != columns) return Unfit("the bias does not fit");
    y->shape = {a.shape[0], static_cast<int64_t>(columns)};
    y->floats.resize(rows * columns);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < columns; ++c) {
        float sum = 0;
        for (size_t k = 0; k < depth; ++k) {
          sum += a.floats[r * depth + k] * b.floats[transposed ? c * depth + k : k * columns + c];
        }
        y->floats[r * columns + c] = bias != nullptr ? sum + bias->floats[c] : sum;
      }
    }
    return absl::OkStatus();
  }

  // Extents are counted from the last; an extent of 1 is repeated.
  template <typename Operation>
  static absl::Status Pairwise(const Tensor& a, const Tensor& b, const Operation& operation, Tensor* y) {
    const size_t rank = std::max(a.shape.size(), b.shape.size());
    const auto extent = [rank](const Shape& shape, size_t axis) {
      return axis + shape.size() < rank ? int64_t{1} : shape[axis + shape.size() - rank];
    };
    for (size_t axis = 0; axis < rank; ++axis) {
      const int64_t of_a = extent(a.shape, axis), of_b = extent(b.shape, axis);
      if (of_a != of_b && of_a != 1 && of_b != 1) {
        return Unfit(absl::StrCat("shapes [", absl::StrJoin(a.shape, ", "), "] and [", absl::StrJoin(b.shape, ", "),
                                  "] do not go together"));
      }
      y->shape.push_back(of_a == 1 ? of_b : of_a);
    }
    const int64_t count = CountOf(y->shape);
    y->floats.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, at_a = 0, at_b = 0, step_a = 1, step_b = 1;
      for (size_t axis = rank; axis-- > 0;) {
        const int64_t at = rest % y->shape[axis];
        rest /= y->shape[axis];
        if (extent(a.shape, axis) != 1) at_a += at * step_a;
        if (extent(b.shape, axis) != 1) at_b += at * step_b;
        step_a *= extent(a.shape, axis);
        step_b *= extent(b.shape, axis);
      }
      y->floats[static_cast<size_t>(i)] =
          operation(a.floats[static_cast<size_t>(at_a)], b.floats[static_cast<size_t>(at_b)]);
    }
    return absl::OkStatus();
  }

  static absl::Status Softmax(const Tensor& x, Tensor* y) {
    if (x.shape.empty()) return Unfit("it has no axis");
    *y = x;
    const size_t width = static_cast<size_t>(x.shape.back());
    for (size_t begin = 0; width > 0 && begin < y->floats.size(); begin += width) {
      float* const row = y->floats.data() + begin;
      const float highest = *std::max_element(row, row + width);
      float sum = 0;
      for (size_t i = 0; i < width; ++i) sum += row[i] = std::exp(row[i] - highest);
      for (size_t i = 0; i < width; ++i) row[i] /= sum;
    }
    return absl::OkStatus();
  }

  // Along axis 1.
  static absl::Status Concat(const std::vector<const Tensor*>& parts, Tensor* y) {
    y->shape = parts[0]->shape;
    if (y->shape.size() < 2) return Unfit("it has no axis 1");
    y->shape[1] = 0;
    for (const Tensor* part : parts) {
      Shape other = part->shape;
      if (other.size() != y->shape.size()) return Unfit("its parts have other ranks");
      y->shape[1] += std::exchange(other[1], y->shape[1]);
      if (other[0] != y->shape[0] || !std::equal(other.begin() + 2, other.end(), y->shape.begin() + 2)) {
        return Unfit("its parts have other shapes");
      }
    }
    for (int64_t row = 0; row < y->shape[0]; ++row) {
      for (const Tensor* part : parts) {
        const size_t width = part->floats.size() / static_cast<size_t>(y->shape[0]);
        const auto begin = part->floats.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(row) * width);
        y->floats.insert(y->floats.end(), begin, begin + static_cast<std::ptrdiff_t>(width));
      }
    }
    return absl::OkStatus();
  }

  // The last axis into equal parts.
  static absl::Status Split(const Tensor& x, std::vector<Tensor>* parts) {
    const int64_t count = static_cast<int64_t>(parts->size());
    if (x.shape.empty() || x.shape.back() % count != 0) return Unfit("its last axis has no equal parts");
    const size_t width = static_cast<size_t>(x.shape.back() / count);
    for (Tensor& part : *parts) {
      part.shape = x.shape;
      part.shape.back() = static_cast<int64_t>(width);
    }
    for (size_t at = 0; width > 0 && at < x.floats.size();) {
      for (Tensor& part : *parts) {
        part.floats.insert(part.floats.end(), x.floats.begin() + static_cast<std::ptrdiff_t>(at),
                           x.floats.begin() + static_cast<std::ptrdiff_t>(at + width));
        at += width;
      }
    }
    return absl::OkStatus();
  }

  static absl::Status Unsqueeze(const Tensor& x, const Tensor& axes, Tensor* y) {
    if (axes.ints.size() != 1 || axes.ints[0] < 0 || axes.ints[0] > static_cast<int64_t>(x.shape.size())) {
      return Unfit("its axis does not fit");
    }
    *y = x;
    y->shape.insert(y->shape.begin() + static_cast<std::ptrdiff_t>(axes.ints[0]), 1);
    return absl::OkStatus();
  }

  static absl::Status ReduceSum(const Tensor& x, const Tensor& axes, Tensor* y) {
    if (axes.ints.size() != 1 || axes.ints[0] < 0 || axes.ints[0] >= static_cast<int64_t>(x.shape.size())) {
      return Unfit("its axis does not fit");
    }
    const size_t axis = static_cast<size_t>(axes.ints[0]);
    size_t before = 1, behind = 1;
    for (size_t i = 0; i < axis; ++i) before *= static_cast<size_t>(x.shape[i]);
    for (size_t i = axis + 1; i < x.shape.size(); ++i) behind *= static_cast<size_t>(x.shape[i]);
    const size_t extent = static_cast<size_t>(x.shape[axis]);
    y->shape = x.shape;
    y->shape.erase(y->shape.begin() + static_cast<std::ptrdiff_t>(axis));
    y->floats.assign(before * behind, 0.0f);
    for (size_t b = 0; b < before; ++b) {
      for (size_t e = 0; e < extent; ++e) {
        for (size_t i = 0; i < behind; ++i) y->floats[b * behind + i] += x.floats[(b * extent + e) * behind + i];
      }
    }
    return absl::OkStatus();
  }

  const onnx::GraphProto& graph_;
  std::map<std::string, Tensor> values_;
};

}  // namespace

absl::StatusOr<std::map<std::string, std::vector<float>>> RunOnnxModel(absl::string_view model,
                                                                       absl::Span<const float> features, int64_t rows) {
  onnx::ModelProto parsed;
  if (!parsed.ParseFromArray(model.data(), static_cast<int>(model.size()))) return Unfit("it is no ONNX model");
  Runner runner(parsed.graph());
  HEARTH_RETURN_IF_ERROR(runner.Run(features, rows));
  return runner.TakeOutputs(rows);
}

}  // namespace hearth
