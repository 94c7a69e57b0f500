#include "model/export/export_onnx.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "model/batch/batch.h"
#include "model/batch/path_step.h"
#include "model/export/onnx_graph.h"

namespace hearth {
namespace {

using Names = std::vector<std::string>;
using Shape = std::vector<int64_t>;

// The model's parts, each as in layers.cc. A missing tensor is remembered and told at the end.
class Writer {
 public:
  Writer(const Job& job, const SafetensorsFile& dense)
      : job_(job), model_(job.model()), dense_(dense), graph_("hearth") {}

  absl::StatusOr<std::string> Write(const std::map<std::string, std::string>& metadata) {
    width_ = MakeFeatureLayout(job_).width;
    const std::string features = graph_.Input("features", width_);
    switch (model_.kind()) {
      case Model::HOME:
        Home(features);
        break;
      case Model::MMOE:
        Mmoe(features);
        break;
      case Model::SHARED_BOTTOM:
        SharedBottom(features);
        break;
    }
    HEARTH_RETURN_IF_ERROR(status_);
    return graph_.Serialize(metadata);
  }

 private:
  // [count] values of a tensor of this shape; zeros, and an error, where there is none.
  std::vector<float> Values(const std::string& name, const Shape& shape) {
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    std::vector<float> values(static_cast<size_t>(count));
    const NamedTensor* tensor = dense_.Find(name);
    if (tensor == nullptr || tensor->dtype != "F32" || tensor->shape != shape) {
      if (status_.ok()) {
        status_ = absl::DataLossError(absl::StrCat("dense.safetensors: tensor ", name,
                                                   tensor == nullptr ? " is missing" : " has another shape",
                                                   "; it was written by another job"));
      }
      return values;
    }
    std::memcpy(values.data(), tensor->data.data(), values.size() * sizeof(float));
    return values;
  }
  std::string Weight(const std::string& name, const Shape& shape) {
    return graph_.Floats(name, shape, Values(name, shape));
  }
  std::string Affine(const std::string& x, const std::string& path, int64_t in, int64_t out) {
    const std::string weight = Weight(path + ".weight", {out, in});  // one after the other: their order is the file's
    return graph_.Linear(x, weight, Weight(path + ".bias", {out}));
  }

  // v ⊙ Σ_l softmax(mix)_l · 2 σ(v B_l A_l)
  std::string FeatureGate(const std::string& v, const std::string& path, int64_t width, int64_t rank) {
    const int64_t subspaces = model_.gate_subspaces();
    const std::vector<float> up = Values(path + ".up", {subspaces, rank, width});
    const Names low = graph_.Split(graph_.Linear(v, Weight(path + ".down", {subspaces * rank, width}), ""), subspaces);
    if (two_.empty()) two_ = graph_.Floats("two", {1}, {2.0f});
    const std::string doubled = graph_.Multiply(graph_.Softmax(Affine(v, path + ".mix", width, subspaces)), two_);
    const Names mix = graph_.Split(doubled, subspaces);
    std::string sum;
    for (int64_t l = 0; l < subspaces; ++l) {
      const auto part =
          absl::MakeConstSpan(up).subspan(static_cast<size_t>(l * rank * width), static_cast<size_t>(rank * width));
      const std::string matrix = graph_.Floats(absl::StrCat(path, ".up.", l), {rank, width}, part);
      const std::string gated = graph_.Multiply(mix[l], graph_.Sigmoid(graph_.MatMul(low[l], matrix)));
      sum = sum.empty() ? gated : graph_.Add(sum, gated);
    }
    return graph_.Multiply(v, sum);
  }

  // One output [B, out] an expert.
  Names Experts(const std::string& x, const std::string& path, int64_t count, int64_t in, int64_t hidden, int64_t out,
                bool home) {
    const std::string first = Weight(path + ".hidden_weight", {count * hidden, in});
    const std::string wide = graph_.Relu(graph_.Linear(x, first, Weight(path + ".hidden_bias", {count * hidden})));
    const Names hiddens = graph_.Split(wide, count);
    std::vector<float> weight = Values(path + ".output_weight", {count, out, hidden});
    std::vector<float> bias;
    if (home) {
      Fold(path, count * out, hidden, &weight, &bias);
    } else {
      bias = Values(path + ".output_bias", {count * out});
    }
    Names outputs;
    for (int64_t k = 0; k < count; ++k) {
      const auto w =
          absl::MakeConstSpan(weight).subspan(static_cast<size_t>(k * out * hidden), static_cast<size_t>(out * hidden));
      const auto b = absl::MakeConstSpan(bias).subspan(static_cast<size_t>(k * out), static_cast<size_t>(out));
      const std::string second = graph_.Floats(absl::StrCat(path, ".output_weight.", k), {out, hidden}, w);
      const std::string y =
          graph_.Linear(hiddens[k], second, graph_.Floats(absl::StrCat(path, ".output_bias.", k), {out}, b));
      outputs.push_back(home ? graph_.Swish(y) : graph_.Relu(y));
    }
    return outputs;
  }

  // BatchNorm with its running statistics, after a layer without bias, as that layer's weight and bias.
  void Fold(const std::string& path, int64_t columns, int64_t hidden, std::vector<float>* weight,
            std::vector<float>* bias) {
    const std::vector<float> gain = Values(path + ".norm_weight", {columns});
    const std::vector<float> shift = Values(path + ".norm_bias", {columns});
    const std::vector<float> mean = Values(path + ".running_mean", {columns});
    const std::vector<float> variance = Values(path + ".running_var", {columns});
    for (int64_t c = 0; c < columns; ++c) {
      const double scale = gain[c] / std::sqrt(static_cast<double>(variance[c]) + model_.batch_norm_epsilon());
      for (int64_t i = 0; i < hidden; ++i) {
        float& w = (*weight)[static_cast<size_t>(c * hidden + i)];
        w = static_cast<float>(w * scale);
      }
      bias->push_back(static_cast<float>(shift[c] - mean[c] * scale));
    }
  }

  std::string Mixture(const std::string& gate_logits, const Names& experts) {
    return graph_.WeightedSum(graph_.Softmax(gate_logits), experts);
  }
  std::string SelfGate(const std::string& logits, const Names& own) {
    return own.size() == 1 ? graph_.Multiply(graph_.Sigmoid(logits), own[0]) : Mixture(logits, own);
  }

  void Tower(const std::string& h, const Task& task, int64_t width) {
    const std::string path = "tower." + PathStep(task.name());
    const std::string hidden = graph_.Relu(Affine(h, path + ".hidden", width, model_.tower_hidden()));
    const std::string logit = Affine(hidden, path + ".output", model_.tower_hidden(), 1);
    graph_.Output(graph_.Sigmoid(logit), "p_" + task.name(), 1);
  }

  void SharedBottom(const std::string& v) {
    const Names bottom = Experts(v, "bottom", 1, width_, model_.hidden_1(), model_.width_1(), model_.home_expert());
    for (const Task& task : job_.task()) Tower(bottom[0], task, model_.width_1());
  }

  void Mmoe(const std::string& v) {
    const int64_t n = model_.experts();
    const Names experts = Experts(v, "expert", n, width_, model_.hidden_1(), model_.width_1(), model_.home_expert());
    for (const Task& task : job_.task()) {
      Tower(Mixture(Affine(v, "gate." + PathStep(task.name()), width_, n), experts), task, model_.width_1());
    }
  }

  Names Level1Experts(const std::string& v, const std::string& path, int64_t count) {
    return Experts(FeatureGate(v, path + ".feature_gate", width_, model_.gate_rank_1()), path + ".expert", count,
                   width_, model_.hidden_1(), model_.width_1(), /*home=*/true);
  }
  Names Level2Experts(const std::string& z, const std::string& path, int64_t count) {
    return Experts(FeatureGate(z, path + ".feature_gate", model_.width_1(), model_.gate_rank_2()), path + ".expert",
                   count, model_.width_1(), model_.hidden_2(), model_.width_2(), /*home=*/true);
  }
  std::string Level1Mixture(const std::string& v, const std::string& path, const Names& visible, const Names& own) {
    const int64_t n = static_cast<int64_t>(visible.size());
    const int64_t m = static_cast<int64_t>(own.size());
    return graph_.Add(Mixture(Affine(v, path + ".gate", width_, n), visible),
                      SelfGate(Affine(v, path + ".self", width_, m), own));
  }

  void Home(const std::string& v) {
    Names categories;  // first appearance order, as in MakeModelSpec
    std::vector<size_t> category_of;
    for (const Task& task : job_.task()) {
      size_t c = 0;
      while (c < categories.size() && categories[c] != task.category()) ++c;
      if (c == categories.size()) categories.push_back(task.category());
      category_of.push_back(c);
    }
    const Names shared_1 = Level1Experts(v, "level1.shared", model_.shared_experts_1());
    Names everything = shared_1;
    Names z;
    for (const std::string& category : categories) {
      const std::string path = "level1.category." + PathStep(category);
      const Names own = Level1Experts(v, path, model_.category_experts_1());
      Names visible = shared_1;
      visible.insert(visible.end(), own.begin(), own.end());
      everything.insert(everything.end(), own.begin(), own.end());
      z.push_back(Level1Mixture(v, path, visible, own));
    }
    const std::string z_shared = Level1Mixture(v, "level1.shared", everything, shared_1);

    const Names shared_2 = Level2Experts(z_shared, "level2.shared", model_.shared_experts_2());
    std::vector<Names> category_2;
    for (size_t c = 0; c < categories.size(); ++c) {
      category_2.push_back(
          Level2Experts(z[c], "level2.category." + PathStep(categories[c]), model_.category_experts_2()));
    }
    for (int t = 0; t < job_.task_size(); ++t) {
      const size_t c = category_of[t];
      const std::string path = "level2.task." + PathStep(job_.task(t).name());
      const Names own = Level2Experts(z[c], path, model_.task_experts_2());
      Names visible = shared_2;
      visible.insert(visible.end(), category_2[c].begin(), category_2[c].end());
      visible.insert(visible.end(), own.begin(), own.end());
      const std::string gate = Affine(graph_.Concat({z[c], z_shared}), path + ".gate", 2 * int64_t{model_.width_1()},
                                      static_cast<int64_t>(visible.size()));
      const std::string self = Affine(z[c], path + ".self", model_.width_1(), static_cast<int64_t>(own.size()));
      Tower(graph_.Add(Mixture(gate, visible), SelfGate(self, own)), job_.task(t), model_.width_2());
    }
  }

  const Job& job_;
  const Model& model_;
  const SafetensorsFile& dense_;
  OnnxGraph graph_;
  absl::Status status_;
  int64_t width_ = 0;
  std::string two_;  // the constant 2, once it is in the graph
};

}  // namespace

absl::StatusOr<std::string> MakeOnnxModel(const Job& job, const SafetensorsFile& dense,
                                          const std::map<std::string, std::string>& metadata) {
  return Writer(job, dense).Write(metadata);
}

}  // namespace hearth
