#include "model/export/export.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/artifact/snapshot_hold.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "embedding/snapshot_reader.h"
#include "model/batch/batch.h"
#ifdef HEARTH_ONNX
#include "model/export/export_onnx.h"
#endif

namespace hearth {
namespace {

constexpr int kTritonBatchMax = 4096;

#ifdef HEARTH_ONNX
constexpr bool kHasOnnx = true;
#else
constexpr bool kHasOnnx = false;
#endif

bool IsPlain(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
}

std::string Quoted(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

std::string TritonConfig(const Job& job) {
  const int width = MakeFeatureLayout(job).width;
  std::string text = absl::StrFormat(
      "name: %s\nbackend: \"onnxruntime\"\nmax_batch_size: %d\n"
      "input [ { name: \"features\" data_type: TYPE_FP32 dims: [ %d ] } ]\n",
      Quoted(ExportModelName(job)), kTritonBatchMax, width);
  for (const Task& task : job.task()) {
    absl::StrAppendFormat(&text, "output [ { name: %s data_type: TYPE_FP32 dims: [ 1 ] } ]\n",
                          Quoted("p_" + task.name()));
  }
  absl::StrAppendFormat(&text,
                        "version_policy: { latest { num_versions: 1 } }\n"
                        "instance_group [ { kind: KIND_AUTO count: 1 } ]\n"
                        "dynamic_batching { }\n"
                        "model_warmup [ { name: \"zeros\" batch_size: 1 inputs { key: \"features\" value: { "
                        "data_type: TYPE_FP32 dims: [ %d ] zero_data: true } } } ]\n",
                        width);
  return text;
}

// Without what only training reads. Where the job says so a weight is its running mean, as in evaluations.
std::vector<NamedTensor> ServingTensors(const Job& job, const SafetensorsFile& dense) {
  const bool mean_serves = job.training().dense_optimizer().ema_serves();
  std::vector<NamedTensor> weights;
  for (const NamedTensor& tensor : dense.tensors) {
    if (tensor.name.rfind("optimizer.", 0) == 0 || tensor.name.rfind("ema.", 0) == 0) continue;
    const NamedTensor* mean = mean_serves ? dense.Find("ema." + tensor.name) : nullptr;
    weights.push_back(tensor);
    if (mean != nullptr) weights.back().data = mean->data;
  }
  return weights;
}

}  // namespace

absl::StatusOr<ExportFormats> ParseExportFormats(absl::string_view text) {
  ExportFormats formats;
  for (const absl::string_view name : absl::StrSplit(text, ',')) {
    const bool all = name == "all";
    const bool needs_onnx = all || name == "onnx" || name == "triton";
    if (needs_onnx && !kHasOnnx) {
      return absl::InvalidArgumentError(
          "--format: this build has no ONNX; install libonnx-dev and build again, or name "
          "hps,npy,safetensors,int8");
    }
    if (!all && !needs_onnx && name != "hps" && name != "npy" && name != "safetensors" && name != "int8") {
      return absl::InvalidArgumentError(absl::StrCat("--format: there is no \"", name,
                                                     "\"; there are all, onnx, triton, hps, npy, safetensors, int8"));
    }
    formats.onnx |= needs_onnx;
    formats.triton |= all || name == "triton";
    formats.hps |= all || name == "hps" || name == "int8";
    formats.npy |= all || name == "npy";
    formats.safetensors |= all || name == "safetensors";
    formats.int8 |= all || name == "int8";
  }
  return formats;
}

absl::StatusOr<ExportSource> OpenExportSource(const std::string& snapshot, const std::string& data_dir, bool best) {
  HEARTH_ASSIGN_OR_RETURN(HeldSnapshot held, best ? HoldBestSnapshot(snapshot, SnapshotCheck::kChecksums)
                                                  : HoldNewestSnapshot(snapshot, SnapshotCheck::kChecksums));
  ExportSource source;
  source.folder = std::move(held.folder);
  source.manifest = std::move(held.manifest);
  source.hold = std::move(held.hold);
  HEARTH_ASSIGN_OR_RETURN(source.job, ParseJob(source.manifest.job(), JoinPath(source.folder, "MANIFEST")));
  HEARTH_RETURN_IF_ERROR(CheckTables(source.folder, source.job));
  if (!data_dir.empty()) source.job.set_data_dir(std::filesystem::absolute(data_dir).string());
  HEARTH_ASSIGN_OR_RETURN(source.dense, ReadSafetensors(JoinPath(source.folder, "dense.safetensors")));
  std::vector<NamedTensor> weights = ServingTensors(source.job, source.dense);
  source.dense.tensors = std::move(weights);  // they view source.dense.bytes, which stays on the heap where it is
  return source;
}

std::string ExportModelName(const Job& job) {
  std::string name;
  for (const char c : job.name()) name += IsPlain(c) ? c : '_';
  return name.empty() ? "hearth" : name;
}

std::string OnnxPath(const ExportSource& source, const std::string& folder) {
  return JoinPath(folder,
                  absl::StrCat("triton/", ExportModelName(source.job), "/", source.manifest.step(), "/model.onnx"));
}

std::string ExportTableFolder(const std::string& table) {
  std::string folder;
  for (const char c : table) {
    if (IsPlain(c)) {
      folder += c;
    } else {
      absl::StrAppendFormat(&folder, "%%%02x", static_cast<unsigned char>(c));
    }
  }
  return folder.empty() ? "%" : folder;
}

absl::Status ExportDense(const ExportSource& source, const ExportFormats& formats, const std::string& folder) {
  std::map<std::string, std::string> metadata;
  metadata["format"] = "hearth.export.1";
  metadata["model"] = ExportModelName(source.job);
  metadata["train_step"] = absl::StrCat(source.manifest.step());
  metadata["config_hash"] = absl::StrFormat("%016x", JobHash(source.job));
  metadata["model_hash"] = absl::StrFormat("%016x", source.manifest.model_hash());
  if (formats.safetensors) {
    HEARTH_RETURN_IF_ERROR(WriteSafetensors(JoinPath(folder, "dense.safetensors"), source.dense.tensors, metadata));
  }
#ifdef HEARTH_ONNX
  if (formats.onnx) {
    const std::filesystem::path path = OnnxPath(source, folder);
    const std::string model = path.parent_path().parent_path().string();
    HEARTH_ASSIGN_OR_RETURN(const std::string graph, MakeOnnxModel(source.job, source.dense, metadata));
    HEARTH_RETURN_IF_ERROR(MakeDirectories(path.parent_path().string()));
    HEARTH_RETURN_IF_ERROR(WriteFileAtomically(path.string(), graph));
    if (formats.triton) {
      HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(model, "config.pbtxt"), TritonConfig(source.job)));
    }
  }
#endif
  return absl::OkStatus();
}

}  // namespace hearth
