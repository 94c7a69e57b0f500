#include "worker/dense/dense_replica.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/version.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/safetensors.h"
#include "common/base/status.h"
#include "model/diagnostics.h"
#include "worker/dense/dense_model.h"

namespace hearth {
namespace {

// f's value, or what Torch threw in it.
template <typename F>
auto Guarded(absl::string_view what, const F& f) -> absl::StatusOr<decltype(f())> {
  try {
    return f();
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat(what, ": ", error.what()));
  }
}

// The process, and the calling thread.
void BecomeReadyFor(int gpu) {
  // Current, or a call that names no device opens a context on GPU 0, too.
  c10::impl::VirtualGuardImpl(torch::kCUDA).setDevice({torch::kCUDA, static_cast<int8_t>(gpu)});
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);  // the same bits on the same kind of GPU
#if TORCH_VERSION_MAJOR >= 2
  at::globalContext().setDeterministicFillUninitializedMemory(false);  // a launch for each array, for nothing
  at::globalContext().setAllowBF16ReductionCuBLAS(false);              // bfloat16 factors, float32 sums
#endif
}

}  // namespace

DenseReplica::DenseReplica(std::unique_ptr<DenseModel> model) : model_(std::move(model)) {}
DenseReplica::~DenseReplica() = default;

absl::StatusOr<std::unique_ptr<DenseReplica>> DenseReplica::Create(const Job& job,
                                                                   const std::vector<double>& base_rates,
                                                                   const DevicePlan& device) {
  // Torch's pool must be sized before the first operation uses it.
  torch::set_num_threads(static_cast<int>(std::max<uint32_t>(1, job.training().threads())));
  const auto build = [&] {
    ModelSpec spec = MakeModelSpec(job, base_rates);
    if (device.bf16) spec.products = torch::kBFloat16;
    return MakeModel(spec);
  };
  HEARTH_ASSIGN_OR_RETURN(auto model, Guarded("building the model", build));
  return Wrap(job, std::move(model), device.gpu);
}

absl::StatusOr<std::unique_ptr<DenseReplica>> DenseReplica::Wrap(const Job& job, std::shared_ptr<MultiTaskModel> model,
                                                                 int gpu) {
  const auto lay_out = [&] {
    if (gpu >= 0) BecomeReadyFor(gpu);
    return std::make_unique<DenseModel>(job, std::move(model), gpu);
  };
  HEARTH_ASSIGN_OR_RETURN(auto dense, Guarded("laying out the model", lay_out));
  return std::unique_ptr<DenseReplica>(new DenseReplica(std::move(dense)));
}

int64_t DenseReplica::parameters() const { return model_->model()->ParameterCount(); }
int64_t DenseReplica::moment_columns() const { return model_->model()->batch_norm_columns(); }

// ---- Evaluation

absl::StatusOr<std::vector<float>> DenseReplica::Predict(const Batch& batch) {
  if (batch.records == 0) return std::vector<float>();
  return Guarded(absl::StrCat("evaluation of ", batch.records, " records"), [&] {
    const torch::Tensor logits = model_->Evaluate(batch).to(torch::kCPU).contiguous();  // [B, T]
    return std::vector<float>(logits.data_ptr<float>(), logits.data_ptr<float>() + logits.numel());
  });
}

absl::StatusOr<Evaluation::Diagnostics> DenseReplica::Diagnose(const std::vector<std::unique_ptr<Batch>>& batches,
                                                               int64_t records_max) {
  std::vector<std::string> names;
  for (const Task& task : model_->job().task()) names.push_back(task.name());
  return Guarded(absl::StrCat("diagnostics of ", batches.size(), " batches"), [&] {
    const DenseModel::Serving serving(model_.get());
    std::vector<torch::Tensor> features, labels, masks;
    for (const auto& batch : batches) {
      const DenseInput input = model_->InputOf(*batch);
      features.push_back(model_->Features(input, batch->records));
      labels.push_back(input.labels);
      masks.push_back(input.mask);
    }
    const auto head = [records_max](const std::vector<torch::Tensor>& parts) {
      const torch::Tensor all = torch::cat(parts, 0);
      return all.narrow(0, 0, std::min(all.size(0), records_max));
    };
    const torch::Tensor v = head(features);  // [records, V]
    Evaluation::Diagnostics diagnostics =
        ToMessage(hearth::Diagnose(model_->model(), names, v, head(labels), head(masks)));
    diagnostics.set_records(static_cast<uint32_t>(v.size(0)));
    return diagnostics;
  });
}

// ---- Snapshots

absl::StatusOr<uint64_t> DenseReplica::Hash() {
  return Guarded("hash of the dense model", [&] { return HashTensors(model_->Tensors()); });
}

absl::StatusOr<bool> DenseReplica::Finite() {
  return Guarded("check of the dense model", [&] {
    const torch::Tensor weights = model_->weights().to(torch::kCPU);
    return AllFinite({weights.data_ptr<float>(), static_cast<size_t>(weights.numel())});
  });
}

absl::StatusOr<uint64_t> DenseReplica::Save(const std::string& path, uint64_t step) {
  HEARTH_ASSIGN_OR_RETURN(std::vector<NamedTensor> tensors,
                          Guarded("dense model for a snapshot", [&] { return model_->Tensors(); }));
  const uint64_t hash = HashTensors(tensors);
  TensorMetadata metadata;
  metadata["format"] = "hearth.dense.1";
  metadata["step"] = absl::StrCat(step);
  metadata["updates"] = absl::StrCat(model_->updates());
  metadata["dense_hash"] = absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
  HEARTH_RETURN_IF_ERROR(WriteSafetensors(path, std::move(tensors), metadata));
  return hash;
}

absl::Status DenseReplica::Overwrite(bool mean, const Write& write) {
  const auto own_places = [&] {
    model_->KeepMean(mean);
    return model_->Tensors();
  };
  HEARTH_ASSIGN_OR_RETURN(const std::vector<NamedTensor> places, Guarded("dense model's places", own_places));
  HEARTH_RETURN_IF_ERROR(write(places));
  return Guarded("written dense model",
                 [&] {
                   model_->Restored();
                   return true;
                 })
      .status();
}

absl::Status DenseReplica::Restore(const std::string& path) {
  HEARTH_ASSIGN_OR_RETURN(const SafetensorsFile file, ReadSafetensors(path));
  // As the file is: one without it may come from before the job asked for it, and one with it from before it left off.
  const bool has_mean = std::any_of(file.tensors.begin(), file.tensors.end(),
                                    [](const NamedTensor& tensor) { return DenseModel::IsMean(tensor.name); });
  const auto own_places = [&] {
    model_->KeepMean(has_mean);
    return model_->Tensors();
  };
  HEARTH_ASSIGN_OR_RETURN(const std::vector<NamedTensor> places, Guarded("dense model before a restore", own_places));
  if (file.tensors.size() != places.size()) {
    return absl::DataLossError(absl::StrCat(path, ": ", file.tensors.size(), " tensors, this job's model has ",
                                            places.size(), "; it was written by another job"));
  }
  for (const NamedTensor& place : places) {
    const NamedTensor* saved = file.Find(place.name);
    if (saved == nullptr || saved->dtype != place.dtype || saved->shape != place.shape) {
      return absl::DataLossError(absl::StrCat(path, ": tensor ", place.name,
                                              saved == nullptr ? " is missing" : " has another shape",
                                              "; it was written by another job"));
    }
  }
  // All fit: now nothing can stop half-way. The places are the model's own arrays.
  for (const NamedTensor& place : places) {
    const NamedTensor* saved = file.Find(place.name);
    if (!place.data.empty()) std::memcpy(const_cast<char*>(place.data.data()), saved->data.data(), place.data.size());
  }
  const auto take = [&] {
    model_->Restored();
    return HashTensors(model_->Tensors());
  };
  HEARTH_ASSIGN_OR_RETURN(const uint64_t restored, Guarded("restored dense model", take));
  const auto hash = file.metadata.find("dense_hash");
  if (hash == file.metadata.end() || hash->second != absl::StrCat(absl::Hex(restored, absl::kZeroPad16))) {
    return absl::DataLossError(
        absl::StrCat(path, ": its dense_hash is not that of its tensors; take another snapshot"));
  }
  return absl::OkStatus();
}

}  // namespace hearth
