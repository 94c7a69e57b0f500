// The parts of an export bundle, read back by readers of our own making.
#include "model/export/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "absl/strings/str_cat.h"
#include "common/artifact/bundle.h"
#include "common/base/env.h"
#include "common/base/file.h"
#include "model/multi_task_model.h"
#ifdef HEARTH_ONNX
#include <onnx/onnx_pb.h>

#include "model/export/export_onnx.h"
#include "model/export/onnx_run.h"
#endif

namespace hearth {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

#ifdef HEARTH_ONNX

Job SmallJob(Model::Kind kind, bool home_expert, uint32_t few) {
  Job job;
  Table* table = job.add_table();
  table->set_name("t");
  table->set_dim(5);
  for (const char* name : {"a", "b"}) {
    Slot* slot = job.add_slot();
    slot->set_name(name);
    slot->set_table("t");
  }
  job.add_dense()->set_name("x");
  const std::pair<const char*, const char*> tasks[] = {{"click", "watch"}, {"like", "inter"}, {"long.view", "watch"}};
  for (const auto& [name, category] : tasks) {
    Task* task = job.add_task();
    task->set_name(name);
    task->set_category(category);
  }
  Model* model = job.mutable_model();
  model->set_kind(kind);
  model->set_home_expert(home_expert);
  model->set_shared_experts_1(few);
  model->set_category_experts_1(few + 1);
  model->set_shared_experts_2(few);
  model->set_category_experts_2(few);
  model->set_task_experts_2(few);
  model->set_hidden_1(7);
  model->set_hidden_2(6);
  model->set_width_1(5);
  model->set_width_2(4);
  model->set_gate_subspaces(few);
  model->set_gate_rank_1(3);
  model->set_gate_rank_2(2);
  model->set_tower_hidden(6);
  model->set_experts(few + 2);
  return job;
}

Tensor Noise(const Tensor& like, uint64_t seed) {
  Tensor noise = torch::empty(like.sizes(), torch::kFloat32);
  Random random(seed);
  for (int64_t i = 0; i < noise.numel(); ++i) noise.data_ptr<float>()[i] = static_cast<float>(random.Uniform() - 0.5);
  return noise;
}

// The model's weights as a file, moved away from their special start; buffers stay positive.
SafetensorsFile WeightsOf(MultiTaskModel* model) {
  torch::NoGradGuard no_grad;
  std::vector<NamedTensor> tensors;
  const auto add = [&](const std::string& name, Tensor tensor, double least) {
    tensor.add_(Noise(tensor, SeedOf(3, name)) + least);
    tensors.push_back(
        {name, "F32", tensor.sizes().vec(), {static_cast<const char*>(tensor.data_ptr()), tensor.nbytes()}});
  };
  for (auto& item : model->named_parameters()) add(item.key(), item.value(), 0);
  for (auto& item : model->named_buffers()) add(item.key(), item.value(), 0.6);
  const std::string path = JoinPath(testing::TempDir(), absl::StrCat("export_test-", getpid(), ".safetensors"));
  EXPECT_TRUE(WriteSafetensors(path, tensors, {}).ok());
  return ReadSafetensors(path).value();
}

Tensor TensorOf(const onnx::TensorProto& proto) {
  const std::vector<int64_t> shape(proto.dims().begin(), proto.dims().end());
  const auto type = proto.data_type() == onnx::TensorProto::INT64 ? torch::kInt64 : torch::kFloat32;
  const Tensor tensor = torch::empty(shape, type);
  EXPECT_EQ(proto.raw_data().size(), tensor.nbytes()) << proto.name();
  std::memcpy(tensor.data_ptr(), proto.raw_data().data(), tensor.nbytes());
  return tensor;
}

int64_t IntOf(const onnx::NodeProto& node, const std::string& name, int64_t otherwise) {
  for (const auto& attribute : node.attribute()) {
    if (attribute.name() == name) return attribute.i();
  }
  return otherwise;
}

// The graph, node by node, by ONNX's definitions.
std::map<std::string, Tensor> Interpret(const onnx::GraphProto& graph, const Tensor& features) {
  std::map<std::string, Tensor> values = {{graph.input(0).name(), features}};
  for (const auto& tensor : graph.initializer()) values[tensor.name()] = TensorOf(tensor);
  for (const auto& node : graph.node()) {
    std::vector<Tensor> in;
    for (const std::string& name : node.input()) in.push_back(values.at(name));
    Tensor out;
    const std::string& op = node.op_type();
    if (op == "Gemm") {
      out = torch::matmul(in[0], IntOf(node, "transB", 0) == 1 ? in[1].t() : in[1]);
      if (in.size() > 2) out = out + in[2];
    } else if (op == "MatMul") {
      out = torch::matmul(in[0], in[1]);
    } else if (op == "Relu") {
      out = torch::relu(in[0]);
    } else if (op == "Sigmoid") {
      out = torch::sigmoid(in[0]);
    } else if (op == "Softmax") {
      out = torch::softmax(in[0], IntOf(node, "axis", -1));
    } else if (op == "Mul") {
      out = in[0] * in[1];
    } else if (op == "Add") {
      out = in[0] + in[1];
    } else if (op == "Concat") {
      out = torch::cat(in, IntOf(node, "axis", 0));
    } else if (op == "Unsqueeze") {
      out = in[0].unsqueeze(in[1].item<int64_t>());
    } else if (op == "ReduceSum") {
      out = in[0].sum(in[1].item<int64_t>(), IntOf(node, "keepdims", 1) != 0);
    } else if (op == "Identity") {
      out = in[0];
    } else if (op == "Split") {
      const std::vector<Tensor> parts = in[0].chunk(node.output_size(), IntOf(node, "axis", 0));
      for (int i = 0; i < node.output_size(); ++i) values[node.output(i)] = parts[i];
      continue;
    } else {
      ADD_FAILURE() << "an operator that the test does not know: " << op;
    }
    values[node.output(0)] = out;
  }
  return values;
}

TEST(ExportOnnx, EveryModelsGraphComputesTheModelsProbabilities) {
  const std::pair<Model::Kind, bool> kinds[] = {{Model::HOME, false},
                                                {Model::MMOE, false},
                                                {Model::MMOE, true},
                                                {Model::SHARED_BOTTOM, false},
                                                {Model::SHARED_BOTTOM, true}};
  for (const auto& [kind, home_expert] : kinds) {
    for (const uint32_t few : {1u, 2u, 3u}) {
      const Job job = SmallJob(kind, home_expert, few);
      const auto model = MakeModel(MakeModelSpec(job, {0.4, 0.1, 0.2}));
      const SafetensorsFile weights = WeightsOf(model.get());
      const auto text = MakeOnnxModel(job, weights, {{"train_step", "7"}});
      ASSERT_TRUE(text.ok()) << text.status();
      onnx::ModelProto proto;
      ASSERT_TRUE(proto.ParseFromString(*text));
      EXPECT_EQ(proto.ir_version(), 8);
      EXPECT_EQ(proto.opset_import(0).version(), 17);
      EXPECT_EQ(proto.metadata_props(0).key() + "=" + proto.metadata_props(0).value(), "train_step=7");
      ASSERT_EQ(proto.graph().input_size(), 1);
      EXPECT_EQ(proto.graph().input(0).name(), "features");
      const auto& shape = proto.graph().input(0).type().tensor_type().shape();
      EXPECT_EQ(shape.dim(0).dim_param(), "batch");
      EXPECT_EQ(shape.dim(1).dim_value(), 11);

      torch::NoGradGuard no_grad;
      const Tensor v = 2 * Noise(torch::empty({9, 11}), 5);
      const Tensor expected = torch::sigmoid(model->Forward(v, Phase::kEvaluate, nullptr));
      const auto values = Interpret(proto.graph(), v);
      const auto own = RunOnnxModel(*text, {v.data_ptr<float>(), static_cast<size_t>(v.numel())}, 9);
      ASSERT_TRUE(own.ok()) << own.status();
      ASSERT_EQ(own->size(), static_cast<size_t>(job.task_size()));
      ASSERT_EQ(proto.graph().output_size(), job.task_size());
      for (int t = 0; t < job.task_size(); ++t) {
        const std::string name = "p_" + job.task(t).name();
        EXPECT_EQ(proto.graph().output(t).name(), name);
        const Tensor p = values.at(name);
        ASSERT_EQ(p.sizes(), (std::vector<int64_t>{9, 1}));
        EXPECT_LT((p - expected.narrow(1, t, 1)).abs().max().item<double>(), 2e-6) << Model::Kind_Name(kind) << few;
        ASSERT_EQ(own->at(name).size(), 9u);
        for (int64_t i = 0; i < 9; ++i) {
          EXPECT_NEAR(own->at(name)[i], p[i][0].item<float>(), 2e-6) << Model::Kind_Name(kind) << few;
        }
      }
      EXPECT_GT((expected.amax(0) - expected.amin(0)).min().item<double>(), 1e-4)
          << "all the same: the test is too easy";
    }
  }
}

TEST(ExportOnnx, AGraphThatTheExporterCannotRunIsRefused) {
  const Job job = SmallJob(Model::SHARED_BOTTOM, false, 1);
  const auto model = MakeModel(MakeModelSpec(job, {0.4, 0.1, 0.2}));
  const std::string good = MakeOnnxModel(job, WeightsOf(model.get()), {}).value();
  const std::vector<float> features(22, 0.5f);
  ASSERT_TRUE(RunOnnxModel(good, features, 2).ok());
  const auto expect_refused = [&](const std::function<void(onnx::GraphProto*)>& change, const char* why) {
    onnx::ModelProto proto;
    ASSERT_TRUE(proto.ParseFromString(good));
    change(proto.mutable_graph());
    const absl::Status status = RunOnnxModel(proto.SerializeAsString(), features, 2).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << why;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  };
  expect_refused([](onnx::GraphProto* graph) { graph->mutable_node(0)->set_op_type("Conv"); }, "no such operator");
  expect_refused([](onnx::GraphProto* graph) { graph->mutable_node(0)->mutable_attribute(0)->set_i(0); }, "attributes");
  expect_refused([](onnx::GraphProto* graph) { graph->mutable_node(0)->set_input(0, "nowhere"); }, "nowhere");
  expect_refused([](onnx::GraphProto* graph) { graph->mutable_initializer(0)->set_dims(0, 1); }, "initializer");
  EXPECT_EQ(RunOnnxModel(good, {features.data(), 20}, 2).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(RunOnnxModel("no model", features, 2).status().code(), absl::StatusCode::kInternal);
}

TEST(ExportOnnx, WeightsOfAnotherModelAreRefusedByName) {
  const Job job = SmallJob(Model::HOME, false, 2);
  const auto model = MakeModel(MakeModelSpec(job, {0.4, 0.1, 0.2}));
  const SafetensorsFile weights = WeightsOf(model.get());
  Job other = job;
  other.mutable_model()->set_hidden_2(9);
  const auto refused = MakeOnnxModel(other, weights, {});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("level2.shared.expert.hidden_weight"));
}

#endif  // HEARTH_ONNX

TEST(ExportRows, Int8IsOffByHalfAStepAtMost) {
  Random random(4);
  for (const size_t dim : {size_t{1}, size_t{3}, size_t{16}}) {
    for (int round = 0; round < 200; ++round) {
      std::vector<float> row(dim), back(dim);
      for (float& x : row) x = static_cast<float>(round == 0 ? 0.25 : random.Uniform() * 4 - 1);
      std::string bytes(QuantizedBytes(dim), '\0');
      QuantizeRow(row, bytes.data());
      DequantizeRow(bytes.data(), absl::MakeSpan(back));
      float scale;
      std::memcpy(&scale, bytes.data() + dim, sizeof(scale));
      for (size_t i = 0; i < dim; ++i) EXPECT_LE(std::fabs(back[i] - row[i]), 0.5001f * scale + 1e-6f);
    }
  }
}

TEST(ExportRows, NpyHeadersAreAsNumpyWritesThem) {
  const std::string header = NpyHeader("<f4", 12345678901, 16);
  EXPECT_EQ(header.size(), 128u);
  EXPECT_EQ(header.substr(0, 10), std::string("\x93NUMPY\x01\x00\x76\x00", 10));
  EXPECT_EQ(header.substr(10, 68), "{'descr': '<f4', 'fortran_order': False, 'shape': (12345678901, 16),");
  EXPECT_EQ(header.back(), '\n');
  EXPECT_THAT(NpyHeader("<u8", 0, 0), HasSubstr("'shape': (0,), }"));
}

TEST(ExportFormats, AnUnknownFormatIsNamed) {
  const auto some = ParseExportFormats("npy,int8");
  ASSERT_TRUE(some.ok());
  EXPECT_TRUE(some->npy && some->int8 && some->hps) << "int8 needs its keys";
  EXPECT_FALSE(some->onnx || some->triton || some->safetensors);
  for (const char* bad : {"", "npy,", "pickle", "ALL"}) {
    EXPECT_EQ(ParseExportFormats(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Bundle, AnyChangeIsFound) {
  const std::string folder = JoinPath(testing::TempDir(), absl::StrCat("export_test_bundle-", getpid()));
  ASSERT_TRUE(RemoveTree(folder).ok());
  ASSERT_TRUE(MakeDirectories(JoinPath(folder, "a")).ok());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "a/x"), "abc").ok());
  const auto files = DescribeBundle(folder);
  ASSERT_TRUE(files.ok());
  ASSERT_EQ(files->size(), 1u);
  EXPECT_EQ((*files)[0].path, "a/x");
  EXPECT_EQ((*files)[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");  // FIPS 180-2
  const std::string manifest =
      "{\"files\": [{\"path\": \"a/x\", \"bytes\": 3, \"sha256\": \"" + (*files)[0].sha256 + "\"}]}";
  ASSERT_TRUE(WriteBundleManifest(folder, manifest).ok());
  EXPECT_TRUE(VerifyBundle(folder).ok()) << VerifyBundle(folder).status();
  const auto expect_found = [&](const char* name) {
    const auto verified = VerifyBundle(folder);
    EXPECT_EQ(verified.status().code(), absl::StatusCode::kDataLoss) << name;
    EXPECT_THAT(std::string(verified.status().message()), HasSubstr(name));
  };
  for (const char* name : {"a/x", "manifest.json", "manifest.json.sha256"}) {
    const std::string path = JoinPath(folder, name);
    const std::string good = ReadFile(path).value();
    std::string bad = good;
    bad[bad.size() / 2] ^= 1;
    ASSERT_TRUE(WriteFileAtomically(path, bad).ok());
    expect_found(std::string(name) == "a/x" ? "a/x" : "manifest.json");
    ASSERT_TRUE(RemoveTree(path).ok());
    expect_found(name);
    ASSERT_TRUE(WriteFileAtomically(path, good).ok());
  }
  ASSERT_TRUE(WriteFileAtomically(JoinPath(folder, "stray"), "").ok());
  expect_found("stray");
}

}  // namespace
}  // namespace hearth
