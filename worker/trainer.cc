#include "worker/trainer.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/safetensors.h"
#include "common/status.h"
#include "model/diagnostics.h"
#include "worker/dense_optimizer.h"

namespace hearth {
namespace {

constexpr const char* kFirstMoment = "optimizer.first_moment.";
constexpr const char* kSecondMoment = "optimizer.second_moment.";
constexpr const char* kUpdates = "optimizer.updates";

template <typename T>
torch::Tensor View(const std::vector<T>& values, at::IntArrayRef shape, torch::ScalarType type) {
  return torch::from_blob(const_cast<T*>(values.data()), shape, torch::TensorOptions(type));
}

absl::Span<const char> BytesOf(const void* data, size_t bytes) { return {static_cast<const char*>(data), bytes}; }

const char* DtypeOf(const torch::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::kFloat32:
      return "F32";
    case torch::kFloat64:
      return "F64";
    case torch::kInt64:
      return "I64";
    default:
      return "";  // refused by WriteSafetensors
  }
}

}  // namespace

struct Trainer::State {
  struct Parameter {
    std::string name;
    torch::Tensor tensor;  // a view of `computed`
    int64_t offset = 0;
    std::vector<int64_t> shape;
  };
  struct Buffer {
    std::string name;
    torch::Tensor tensor;  // the model's
    torch::Tensor host;    // what snapshots read and write; unless apart the same
  };
  State(const Job& job, std::shared_ptr<MultiTaskModel> model, int gpu);

  template <typename T>
  torch::Tensor Input(const std::vector<T>& values, at::IntArrayRef shape, torch::ScalarType type) const;
  torch::Tensor Features(const Batch& batch, std::vector<torch::Tensor>* leaves);
  torch::Tensor Pooled(const Batch& batch, size_t group, const torch::Tensor& rows);
  void PointGradients(LaneResult* result);
  void FetchGradients(const std::vector<torch::Tensor>& leaves, Batch* batch, LaneResult* result);
  absl::Status SendToDevice();
  std::vector<NamedTensor> Tensors();

  // Constant after construction.
  const bool apart;  // the model computes with copies of the host's arrays: always on a GPU
  const torch::Device device;
  const Job job;
  const FeatureLayout layout;
  std::vector<std::vector<bool>> mean_bag;  // [groups][bags] pooled by mean
  std::vector<bool> has_mean;               // [groups]
  torch::Tensor task_weights;               // [T]

  std::shared_ptr<MultiTaskModel> model;
  torch::Tensor flat;      // [parameters] all parameters side by side, in name order: on the host, what is updated
  torch::Tensor computed;  // [parameters] what the model computes with: `flat`, or where apart its copy
  torch::Tensor gradient;  // [parameters] where apart: what backward adds into, before it is fetched
  std::vector<Parameter> parameters;
  std::vector<Buffer> buffers;  // in name order
  DenseUpdater updater;
  int64_t updates = 0;  // the updater's count, where a NamedTensor can point at it
};

Trainer::State::State(const Job& given, std::shared_ptr<MultiTaskModel> given_model, int gpu)
    : apart(gpu != kNoGpu),
      device(gpu < 0 ? torch::Device(torch::kCPU) : torch::Device(torch::kCUDA, static_cast<int8_t>(gpu))),
      job(given),
      layout(MakeFeatureLayout(given)),
      model(std::move(given_model)),
      updater(given.training().dense_optimizer(), model->ParameterCount()) {
  for (const FeatureLayout::Group& group : layout.groups) {
    std::vector<bool> mean;
    for (const int slot : group.slots) mean.push_back(job.slot(slot).pooling() == Slot::MEAN);
    has_mean.push_back(std::find(mean.begin(), mean.end(), true) != mean.end());
    mean_bag.push_back(std::move(mean));
  }
  std::vector<float> weights;
  for (const Task& task : job.task()) weights.push_back(static_cast<float>(task.weight()));
  task_weights = torch::tensor(weights).to(device);

  torch::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) parameters.push_back({item.key(), item.value(), 0, {}});
  const auto by_name = [](const Parameter& a, const Parameter& b) { return a.name < b.name; };
  std::sort(parameters.begin(), parameters.end(), by_name);
  flat = torch::empty({model->ParameterCount()}, torch::kFloat32);
  int64_t offset = 0;
  for (Parameter& parameter : parameters) {
    parameter.offset = offset;
    parameter.shape = parameter.tensor.sizes().vec();
    flat.narrow(0, offset, parameter.tensor.numel()).view(parameter.shape).copy_(parameter.tensor);
    offset += parameter.tensor.numel();
  }
  HEARTH_CHECK(offset == flat.numel(), "parameters of ", offset, " elements, the model counts ", flat.numel());
  computed = apart ? flat.to(device, torch::kFloat32, /*non_blocking=*/false, /*copy=*/true) : flat;
  if (apart) gradient = torch::empty_like(computed);
  for (Parameter& parameter : parameters) {
    parameter.tensor.set_data(computed.narrow(0, parameter.offset, parameter.tensor.numel()).view(parameter.shape));
  }
  for (auto& item : model->named_buffers()) {
    if (!item.value().defined()) continue;
    torch::Tensor host = item.value();
    if (apart) {
      host = host.clone();
      item.value().set_data(item.value().to(device));
    }
    buffers.push_back({item.key(), item.value(), host});
  }
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.name < b.name; });
}

Trainer::Trainer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Trainer::~Trainer() = default;

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const Job& job, const std::vector<double>& base_rates,
                                                         int gpu) {
  // Torch's pool must be sized before the first operation uses it.
  torch::set_num_threads(static_cast<int>(std::max<uint32_t>(1, job.training().threads())));
  try {
    return Wrap(job, MakeModel(MakeModelSpec(job, base_rates)), gpu);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("building the model: ", error.what()));
  }
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Wrap(const Job& job, std::shared_ptr<MultiTaskModel> model, int gpu) {
  try {
    // The same bits again on the same kind of GPU.
    if (gpu >= 0) at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
    return std::unique_ptr<Trainer>(new Trainer(std::make_unique<State>(job, std::move(model), gpu)));
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("laying out the model: ", error.what()));
  }
}

int64_t Trainer::parameters() const { return state_->flat.numel(); }
int64_t Trainer::moment_columns() const { return state_->model->batch_norm_columns(); }
absl::Span<const float> Trainer::weights() const {
  return {state_->flat.data_ptr<float>(), static_cast<size_t>(state_->flat.numel())};
}

// ---- A step

// An array of the batch where the model computes: itself, or a copy; to a GPU through pinned memory, without waiting.
template <typename T>
torch::Tensor Trainer::State::Input(const std::vector<T>& values, at::IntArrayRef shape, torch::ScalarType type) const {
  const torch::Tensor view = View(values, shape, type);
  if (!apart) return view;
  return device.is_cpu() ? view.clone() : view.pin_memory().to(device, /*non_blocking=*/true);
}

// The group's rows pooled by bag: rows [unique, dim] → [records, slots · dim].
torch::Tensor Trainer::State::Pooled(const Batch& batch, size_t group, const torch::Tensor& rows) {
  const RowGroup& g = batch.groups[group];
  const int64_t slots = static_cast<int64_t>(layout.groups[group].slots.size());
  const int64_t dim = g.dim;
  const int64_t bags = slots * batch.records;
  const torch::Tensor indices = Input(g.row_of, {static_cast<int64_t>(g.row_of.size())}, torch::kInt64);
  const torch::Tensor offsets = Input(g.offsets, {bags + 1}, torch::kInt64);
  torch::Tensor pooled = std::get<0>(at::embedding_bag(rows, indices, offsets, /*scale_grad_by_freq=*/false, /*mode=*/0,
                                                       /*sparse=*/false, /*per_sample_weights=*/{},
                                                       /*include_last_offset=*/true));  // [slots · records, dim]
  if (has_mean[group]) {
    torch::Tensor scale = torch::ones({bags, 1}, torch::kFloat32);
    float* factor = scale.data_ptr<float>();
    for (int64_t bag = 0; bag < bags; ++bag) {
      const int64_t values = g.offsets[bag + 1] - g.offsets[bag];
      if (values > 1 && mean_bag[group][static_cast<size_t>(bag / batch.records)]) {
        factor[bag] = 1.0f / static_cast<float>(values);
      }
    }
    pooled = pooled * scale.to(device);
  }
  return pooled.view({slots, batch.records, dim}).permute({1, 0, 2}).reshape({batch.records, slots * dim});
}

// v [B, V]. With `leaves` each group's rows are a leaf; unless apart its gradient accumulates in group.gradients.
torch::Tensor Trainer::State::Features(const Batch& batch, std::vector<torch::Tensor>* leaves) {
  std::vector<torch::Tensor> columns;
  for (size_t i = 0; i < batch.groups.size(); ++i) {
    const RowGroup& group = batch.groups[i];
    const int64_t unique = static_cast<int64_t>(group.unique.size());
    const int64_t dim = group.dim;
    if (unique == 0) {
      const int64_t slots = static_cast<int64_t>(layout.groups[i].slots.size());
      columns.push_back(
          torch::zeros({batch.records, slots * dim}, torch::TensorOptions(torch::kFloat32).device(device)));
      continue;
    }
    torch::Tensor rows = Input(group.rows, {unique, dim}, torch::kFloat32);
    if (leaves != nullptr) {
      rows.requires_grad_(true);
      if (!apart) rows.mutable_grad() = View(group.gradients, {unique, dim}, torch::kFloat32);
      leaves->push_back(rows);
    }
    columns.push_back(Pooled(batch, i, rows));
  }
  if (job.dense_size() > 0) columns.push_back(Input(batch.dense, {batch.records, job.dense_size()}, torch::kFloat32));
  return columns.size() == 1 ? columns[0] : torch::cat(columns, 1);
}

// Backward adds each parameter's gradient into its place in the lane's flat array, or where apart in `gradient`.
void Trainer::State::PointGradients(LaneResult* result) {
  result->gradient.assign(static_cast<size_t>(flat.numel()), 0.0f);
  const torch::Tensor all = apart ? gradient.zero_() : View(result->gradient, {flat.numel()}, torch::kFloat32);
  for (Parameter& parameter : parameters) {
    parameter.tensor.mutable_grad() = all.narrow(0, parameter.offset, parameter.tensor.numel()).view(parameter.shape);
  }
}

// To where the reduction and the pushes read; from a GPU through pinned memory: all copies, then one wait.
void Trainer::State::FetchGradients(const std::vector<torch::Tensor>& leaves, Batch* batch, LaneResult* result) {
  std::vector<std::pair<torch::Tensor, std::vector<float>*>> fetched;
  const auto fetch = [&](const torch::Tensor& from, std::vector<float>* to) {
    if (!from.defined()) return;  // nothing came back to it: stays zero
    HEARTH_CHECK(static_cast<size_t>(from.numel()) == to->size(), "a gradient of another size");
    const auto options = torch::TensorOptions(torch::kFloat32).pinned_memory(!device.is_cpu());
    fetched.emplace_back(torch::empty(from.sizes(), options).copy_(from, /*non_blocking=*/true), to);
  };
  fetch(gradient, &result->gradient);
  size_t leaf = 0;
  for (RowGroup& group : batch->groups) {
    if (!group.unique.empty()) fetch(leaves[leaf++].grad(), &group.gradients);
  }
  if (!device.is_cpu()) torch::cuda::synchronize(device.index());
  for (const auto& [arrived, to] : fetched) std::copy_n(arrived.data_ptr<float>(), to->size(), to->data());
}

absl::Status Trainer::Train(Batch* batch, LaneResult* result) {
  State* s = state_.get();
  HEARTH_CHECK(batch->records > 0, "lane ", batch->lane, " trains nothing");
  const int64_t tasks = s->job.task_size();
  try {
    s->PointGradients(result);
    for (RowGroup& group : batch->groups) group.gradients.assign(group.unique.size() * group.dim, 0.0f);
    std::vector<torch::Tensor> leaves;
    const torch::Tensor v = s->Features(*batch, &leaves);
    const torch::Tensor logits = s->model->Forward(v, Phase::kTrain, &result->moments);  // [B, T]
    const torch::Tensor loss =
        MultiTaskLoss(logits, s->Input(batch->labels, {batch->records, tasks}, torch::kFloat32),
                      s->Input(batch->mask, {batch->records, tasks}, torch::kFloat32), s->task_weights);
    loss.backward();
    if (s->apart) s->FetchGradients(leaves, batch, result);
    const torch::Tensor plain = logits.detach().to(torch::kCPU).contiguous();
    result->logits.assign(plain.data_ptr<float>(), plain.data_ptr<float>() + plain.numel());
    const float total = loss.item<float>();
    result->finite = AllFinite({&total, 1}) && AllFinite(result->gradient) && AllFinite(result->moments.mean) &&
                     AllFinite(result->moments.m2);
  } catch (const std::exception& error) {
    return absl::InternalError(
        absl::StrCat("step ", batch->step, ", lane ", batch->lane, ", ", batch->records, " records: ", error.what()));
  }
  for (const RowGroup& group : batch->groups) {
    result->finite = result->finite && AllFinite(group.gradients);
  }
  return absl::OkStatus();
}

absl::Status Trainer::Apply(absl::Span<const float> gradient, const BatchMoments& pooled) {
  State* s = state_.get();
  HEARTH_CHECK(static_cast<int64_t>(gradient.size()) == s->flat.numel(), "gradient of ", gradient.size(), " elements");
  try {
    torch::NoGradGuard no_grad;
    s->updater.Update(s->flat.data_ptr<float>(), gradient.data());
    if (s->apart) s->computed.copy_(s->flat);
    s->model->UpdateRunningStatistics(pooled);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("dense update: ", error.what()));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Trainer::Predict(const Batch& batch) {
  State* s = state_.get();
  if (batch.records == 0) return std::vector<float>();
  try {
    torch::NoGradGuard no_grad;
    const torch::Tensor logits = s->model->Forward(s->Features(batch, nullptr), Phase::kEvaluate, nullptr)
                                     .to(torch::kCPU)
                                     .contiguous();  // [B, T]
    return std::vector<float>(logits.data_ptr<float>(), logits.data_ptr<float>() + logits.numel());
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("evaluation of ", batch.records, " records: ", error.what()));
  }
}

absl::StatusOr<Evaluation::Diagnostics> Trainer::Diagnose(const std::vector<std::unique_ptr<Batch>>& batches,
                                                          int64_t records_max) {
  State* s = state_.get();
  const int64_t tasks = s->job.task_size();
  std::vector<std::string> names;
  for (const Task& task : s->job.task()) names.push_back(task.name());
  try {
    std::vector<torch::Tensor> features, labels, masks;
    for (const auto& batch : batches) {
      features.push_back(s->Features(*batch, nullptr));
      labels.push_back(View(batch->labels, {batch->records, tasks}, torch::kFloat32));
      masks.push_back(View(batch->mask, {batch->records, tasks}, torch::kFloat32));
    }
    const auto head = [records_max](const std::vector<torch::Tensor>& parts) {
      const torch::Tensor all = torch::cat(parts, 0);
      return all.narrow(0, 0, std::min(all.size(0), records_max));
    };
    const torch::Tensor v = head(features);  // [records, V]
    Evaluation::Diagnostics diagnostics =
        ToMessage(hearth::Diagnose(s->model.get(), names, v, head(labels).to(v.device()), head(masks).to(v.device())));
    diagnostics.set_records(static_cast<uint32_t>(v.size(0)));
    return diagnostics;
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("diagnostics of ", batches.size(), " batches: ", error.what()));
  }
}

// ---- Snapshots

// All state by name. Pointers into this object: good until it changes.
std::vector<NamedTensor> Trainer::State::Tensors() {
  std::vector<NamedTensor> tensors;
  const auto add = [&tensors](std::string name, const std::vector<int64_t>& shape, const float* data, int64_t count) {
    tensors.push_back({std::move(name), "F32", shape, BytesOf(data, static_cast<size_t>(count) * sizeof(float))});
  };
  const bool moments = !updater.first_moment().empty();
  for (const Parameter& parameter : parameters) {
    const int64_t count = parameter.tensor.numel();
    add(parameter.name, parameter.shape, flat.data_ptr<float>() + parameter.offset, count);
    if (!moments) continue;
    add(kFirstMoment + parameter.name, parameter.shape, updater.first_moment().data() + parameter.offset, count);
    add(kSecondMoment + parameter.name, parameter.shape, updater.second_moment().data() + parameter.offset, count);
  }
  for (const Buffer& buffer : buffers) {
    const torch::Tensor& host = buffer.host;
    if (apart) host.copy_(buffer.tensor);
    HEARTH_CHECK(host.is_contiguous(), "buffer ", buffer.name, " is not contiguous");
    tensors.push_back({buffer.name, DtypeOf(host), host.sizes().vec(), BytesOf(host.data_ptr(), host.nbytes())});
  }
  updates = updater.updates();
  tensors.push_back({kUpdates, "I64", {}, BytesOf(&updates, sizeof(updates))});
  return tensors;
}

// After the host's arrays were written.
absl::Status Trainer::State::SendToDevice() {
  if (!apart) return absl::OkStatus();
  try {
    torch::NoGradGuard no_grad;
    computed.copy_(flat);
    for (Buffer& buffer : buffers) buffer.tensor.copy_(buffer.host);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("restored model to the GPU: ", error.what()));
  }
  return absl::OkStatus();
}

uint64_t Trainer::Hash() { return HashTensors(state_->Tensors()); }

absl::StatusOr<uint64_t> Trainer::Save(const std::string& path, uint64_t step) {
  std::vector<NamedTensor> tensors = state_->Tensors();
  const uint64_t hash = HashTensors(tensors);
  TensorMetadata metadata;
  metadata["format"] = "hearth.dense.1";
  metadata["step"] = absl::StrCat(step);
  metadata["updates"] = absl::StrCat(state_->updates);
  metadata["dense_hash"] = absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
  HEARTH_RETURN_IF_ERROR(WriteSafetensors(path, std::move(tensors), metadata));
  return hash;
}

absl::Status Trainer::Restore(const std::string& path) {
  State* s = state_.get();
  HEARTH_ASSIGN_OR_RETURN(const SafetensorsFile file, ReadSafetensors(path));
  const std::vector<NamedTensor> places = s->Tensors();
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
  // All fit: now nothing can stop half-way. The places are this trainer's own arrays.
  for (const NamedTensor& place : places) {
    const NamedTensor* saved = file.Find(place.name);
    if (!place.data.empty()) std::memcpy(const_cast<char*>(place.data.data()), saved->data.data(), place.data.size());
  }
  s->updater.set_updates(s->updates);
  HEARTH_RETURN_IF_ERROR(s->SendToDevice());
  const auto hash = file.metadata.find("dense_hash");
  if (hash == file.metadata.end() || hash->second != absl::StrCat(absl::Hex(Hash(), absl::kZeroPad16))) {
    return absl::DataLossError(
        absl::StrCat(path, ": its dense_hash is not that of its tensors; take another snapshot"));
  }
  return absl::OkStatus();
}

}  // namespace hearth
