#include "worker/dense/dense_model.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

constexpr const char* kFirstMoment = "optimizer.first_moment.";
constexpr const char* kSecondMoment = "optimizer.second_moment.";
constexpr const char* kUpdates = "optimizer.updates";
constexpr const char* kMean = "ema.";
constexpr int64_t kAlignedFloats = 32;  // fast kernels of a GPU read 16 bytes at once, and its memory comes by 128

template <typename T>
torch::Tensor ViewOf(const std::vector<T>& values, at::IntArrayRef shape, torch::ScalarType type) {
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

DenseModel::DenseModel(const Job& job, std::shared_ptr<MultiTaskModel> model, int gpu)
    : off_host_(gpu != kNoGpu),
      device_(gpu < 0 ? torch::Device(torch::kCPU) : torch::Device(torch::kCUDA, static_cast<int8_t>(gpu))),
      job_(job),
      layout_(MakeFeatureLayout(job)),
      model_(std::move(model)),
      updater_(job.training().dense_optimizer(), 0) {
  for (const FeatureLayout::Group& group : layout_.groups) {
    std::vector<bool> mean;
    for (const int slot : group.slots) mean.push_back(job.slot(slot).pooling() == Slot::MEAN);
    has_mean_.push_back(std::find(mean.begin(), mean.end(), true) != mean.end());
    mean_bag_.push_back(std::move(mean));
  }
  std::vector<float> weights;
  for (const Task& task : job.task()) weights.push_back(static_cast<float>(task.weight()));
  task_weights_ = torch::tensor(weights).to(device_);

  torch::NoGradGuard no_grad;
  for (const auto& item : model_->named_parameters()) parameters_.push_back({item.key(), item.value(), 0, {}});
  const auto by_name = [](const auto& a, const auto& b) { return a.name < b.name; };
  std::sort(parameters_.begin(), parameters_.end(), by_name);
  const int64_t unit = off_host_ ? kAlignedFloats : 1;
  int64_t size = 0;
  for (Parameter& parameter : parameters_) {
    parameter.offset = size;
    parameter.shape = parameter.tensor.sizes().vec();
    size += (parameter.tensor.numel() + unit - 1) / unit * unit;
  }
  updater_ = DenseUpdater(job.training().dense_optimizer(), size, Parts(size));
  host_weights_ = torch::zeros({size}, torch::kFloat32);
  for (Parameter& parameter : parameters_) {
    host_weights_.narrow(0, parameter.offset, parameter.tensor.numel()).view(parameter.shape).copy_(parameter.tensor);
  }
  weights_ =
      off_host_ ? host_weights_.to(device_, torch::kFloat32, /*non_blocking=*/false, /*copy=*/true) : host_weights_;
  PointParameters(weights_);
  if (off_host_) PrepareOffHost();
  for (auto& item : model_->named_buffers()) {
    if (!item.value().defined()) continue;
    torch::Tensor host = item.value();
    if (off_host_) {
      host = host.clone();
      item.value().set_data(item.value().to(device_));
    }
    buffers_.push_back({item.key(), item.value(), host});
  }
  std::sort(buffers_.begin(), buffers_.end(), by_name);
}

// Which elements have a learning rate or a decay of their own; equal neighbours are one.
std::vector<DenseUpdater::Part> DenseModel::Parts(int64_t size) const {
  const DenseOptimizer& optimizer = job_.training().dense_optimizer();
  std::vector<DenseUpdater::Part> parts;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    DenseUpdater::Part part;
    part.end = i + 1 < parameters_.size() ? parameters_[i + 1].offset : size;
    part.weight_decay = optimizer.weight_decay();
    for (const DenseOptimizer::Group& group : optimizer.group()) {
      if (group.match() != GroupOf(parameters_[i].name)) continue;
      part.rate_factor = group.learning_rate_factor();
      if (group.has_weight_decay()) part.weight_decay = group.weight_decay();
    }
    const bool matrix = parameters_[i].shape.size() > 1;
    if (!matrix || optimizer.kind() != DenseOptimizer::ADAMW) part.weight_decay = 0;
    const bool same = !parts.empty() && parts.back().rate_factor == part.rate_factor &&
                      parts.back().weight_decay == part.weight_decay;
    if (same) parts.pop_back();
    parts.push_back(part);
  }
  return parts;
}

// Two arrays in place of a launch for every part.
void DenseModel::PrepareOffHost() {
  if (updater_.adam()) {
    first_moment_ = torch::zeros_like(weights_);
    second_moment_ = torch::zeros_like(weights_);
  }
  bool factors = false;
  bool decay = false;
  torch::Tensor rate_factors = torch::ones_like(host_weights_);
  torch::Tensor decays = torch::zeros_like(host_weights_);
  int64_t begin = 0;
  for (const DenseUpdater::Part& part : updater_.parts()) {
    rate_factors.narrow(0, begin, part.end - begin).fill_(part.rate_factor);
    decays.narrow(0, begin, part.end - begin).fill_(part.rate_factor * part.weight_decay);
    factors |= part.rate_factor != 1;
    decay |= part.weight_decay > 0;
    begin = part.end;
  }
  if (factors) rate_factors_ = rate_factors.to(device_);
  if (decay) decays_ = decays.to(device_);
}

void DenseModel::PointParameters(const torch::Tensor& array) {
  for (Parameter& parameter : parameters_) {
    parameter.tensor.set_data(array.narrow(0, parameter.offset, parameter.tensor.numel()).view(parameter.shape));
  }
}

// ---- Input

DenseInput DenseModel::View(const Batch& batch) const {
  DenseInput input;
  for (size_t i = 0; i < batch.groups.size(); ++i) {
    const RowGroup& from = batch.groups[i];
    DenseInput::Group group;
    const int64_t unique = static_cast<int64_t>(from.unique.size());
    if (unique > 0) {
      const int64_t bags = static_cast<int64_t>(layout_.groups[i].slots.size()) * batch.records;
      group.rows = ViewOf(from.rows, {unique, from.dim}, torch::kFloat32);
      group.row_of = ViewOf(from.row_of, {static_cast<int64_t>(from.row_of.size())}, torch::kInt64);
      group.offsets = ViewOf(from.offsets, {bags + 1}, torch::kInt64);
      if (has_mean_[i]) {
        group.scale = torch::ones({bags, 1}, torch::kFloat32);
        float* factor = group.scale.data_ptr<float>();
        for (int64_t bag = 0; bag < bags; ++bag) {
          const int64_t values = from.offsets[bag + 1] - from.offsets[bag];
          if (values > 1 && mean_bag_[i][static_cast<size_t>(bag / batch.records)]) {
            factor[bag] = 1.0f / static_cast<float>(values);
          }
        }
      }
    }
    input.groups.push_back(std::move(group));
  }
  if (job_.dense_size() > 0) input.dense = ViewOf(batch.dense, {batch.records, job_.dense_size()}, torch::kFloat32);
  if (!batch.labels.empty()) {
    input.labels = ViewOf(batch.labels, {batch.records, job_.task_size()}, torch::kFloat32);
    input.mask = ViewOf(batch.mask, {batch.records, job_.task_size()}, torch::kFloat32);
  }
  return input;
}

DenseInput DenseModel::Upload(const Batch& batch) const {
  DenseInput input = View(batch);
  const auto upload = [this](torch::Tensor* array) {
    if (!array->defined()) return;
    *array = device_.is_cpu() ? array->clone() : array->pin_memory().to(device_, /*non_blocking=*/true);
  };
  for (DenseInput::Group& group : input.groups) {
    for (torch::Tensor* array : {&group.rows, &group.row_of, &group.offsets, &group.scale}) upload(array);
  }
  for (torch::Tensor* array : {&input.dense, &input.labels, &input.mask}) upload(array);
  return input;
}

// The group's rows pooled by bag → [records, slots · dim].
torch::Tensor DenseModel::Pooled(const DenseInput::Group& group, size_t index, int64_t records) const {
  const int64_t slots = static_cast<int64_t>(layout_.groups[index].slots.size());
  const int64_t dim = layout_.groups[index].dim;
  if (!group.rows.defined()) {
    return torch::zeros({records, slots * dim}, torch::TensorOptions(torch::kFloat32).device(device_));
  }
  torch::Tensor pooled =
      std::get<0>(at::embedding_bag(group.rows, group.row_of, group.offsets, /*scale_grad_by_freq=*/false, /*mode=*/0,
                                    /*sparse=*/false, /*per_sample_weights=*/{},
                                    /*include_last_offset=*/true));  // [slots · records, dim]
  if (group.scale.defined()) pooled = pooled * group.scale;
  return pooled.view({slots, records, dim}).permute({1, 0, 2}).reshape({records, slots * dim});
}

torch::Tensor DenseModel::Features(const DenseInput& input, int64_t records) const {
  std::vector<torch::Tensor> columns;
  for (size_t i = 0; i < input.groups.size(); ++i) columns.push_back(Pooled(input.groups[i], i, records));
  if (input.dense.defined()) columns.push_back(input.dense);
  return columns.size() == 1 ? columns[0] : torch::cat(columns, 1);
}

torch::Tensor DenseModel::Loss(const torch::Tensor& logits, const DenseInput& input) const {
  return MultiTaskLoss(logits, input.labels, input.mask, task_weights_);
}

torch::Tensor DenseModel::Evaluate(const Batch& batch) {
  torch::NoGradGuard no_grad;
  const Serving serving(this);
  return model_->Forward(Features(InputOf(batch), batch.records), Phase::kEvaluate, nullptr);
}

DenseModel::Serving::Serving(DenseModel* model)
    : model_(model->job_.training().dense_optimizer().ema_serves() && model->mean_.defined() ? model : nullptr) {
  if (model_ != nullptr) model_->PointParameters(model_->mean_);
}

DenseModel::Serving::~Serving() {
  if (model_ != nullptr) model_->PointParameters(model_->weights_);
}

// ---- Update

void DenseModel::PointGradients(const torch::Tensor& gradient) {
  for (Parameter& parameter : parameters_) {
    parameter.tensor.mutable_grad() =
        gradient.narrow(0, parameter.offset, parameter.tensor.numel()).view(parameter.shape);
  }
}

void DenseModel::UpdateRunningStatistics(const BatchMoments& pooled) {
  model_->UpdateRunningStatistics(pooled, updater_.updates() + 1);
}

void DenseModel::Update(uint64_t step, const torch::Tensor& gradient) {
  torch::NoGradGuard no_grad;
  const bool keeps_mean = job_.training().dense_optimizer().ema_decay() > 0;
  if (keeps_mean != mean_.defined()) KeepMean(keeps_mean);  // it begins as the weights are before this update
  if (off_host_) {
    UpdateOffHost(updater_.Next(step), gradient);
  } else {
    updater_.Update(step, weights_.data_ptr<float>(), gradient.data_ptr<float>());
  }
  if (keeps_mean) UpdateMean();
}

void DenseModel::UpdateOffHost(const DenseUpdater::Factors& f, const torch::Tensor& gradient) {
  const auto factored = [this](const torch::Tensor& way) {
    return rate_factors_.defined() ? way * rate_factors_ : way;
  };
  if (!updater_.adam()) {
    weights_.add_(factored(gradient), -f.rate);
    return;
  }
  if (decays_.defined()) weights_.addcmul_(weights_, decays_, -f.plain_rate);
  first_moment_.mul_(f.beta1).add_(gradient, f.keep1);
  second_moment_.mul_(f.beta2).addcmul_(gradient, gradient, f.keep2);
  weights_.addcdiv_(factored(first_moment_), second_moment_.sqrt().div_(f.root2).add_(f.epsilon), -f.rate);
}

// With the decay at its full size the initial weights would be most of the mean for 1 / (1 − decay) updates.
void DenseModel::UpdateMean() {
  const double t = static_cast<double>(updater_.updates());
  const double decay = std::min(job_.training().dense_optimizer().ema_decay(), (1 + t) / (10 + t));
  mean_.lerp_(weights_, 1 - decay);
}

// ---- Snapshots

std::vector<NamedTensor> DenseModel::Tensors() {
  torch::NoGradGuard no_grad;
  const bool moments = updater_.adam();
  if (off_host_) {
    host_weights_.copy_(weights_);
    if (moments) {
      ViewOf(updater_.first_moment(), weights_.sizes(), torch::kFloat32).copy_(first_moment_);
      ViewOf(updater_.second_moment(), weights_.sizes(), torch::kFloat32).copy_(second_moment_);
    }
    if (mean_.defined()) host_mean_.copy_(mean_);
    for (Buffer& buffer : buffers_) buffer.host.copy_(buffer.tensor);
  }
  std::vector<NamedTensor> tensors;
  const auto add = [&tensors](std::string name, const std::vector<int64_t>& shape, const float* data, int64_t count) {
    tensors.push_back({std::move(name), "F32", shape, BytesOf(data, static_cast<size_t>(count) * sizeof(float))});
  };
  for (const Parameter& parameter : parameters_) {
    const int64_t count = parameter.tensor.numel();
    add(parameter.name, parameter.shape, host_weights_.data_ptr<float>() + parameter.offset, count);
    if (mean_.defined()) {
      add(kMean + parameter.name, parameter.shape, host_mean_.data_ptr<float>() + parameter.offset, count);
    }
    if (!moments) continue;
    add(kFirstMoment + parameter.name, parameter.shape, updater_.first_moment().data() + parameter.offset, count);
    add(kSecondMoment + parameter.name, parameter.shape, updater_.second_moment().data() + parameter.offset, count);
  }
  for (const Buffer& buffer : buffers_) {
    HEARTH_CHECK(buffer.host.is_contiguous(), "buffer ", buffer.name, " is not contiguous");
    tensors.push_back({buffer.name, DtypeOf(buffer.host), buffer.host.sizes().vec(),
                       BytesOf(buffer.host.data_ptr(), buffer.host.nbytes())});
  }
  updates_ = updater_.updates();
  tensors.push_back({kUpdates, "I64", {}, BytesOf(&updates_, sizeof(updates_))});
  return tensors;
}

bool DenseModel::IsMean(const std::string& tensor) { return tensor.rfind(kMean, 0) == 0; }

void DenseModel::KeepMean(bool kept) {
  mean_ = kept ? weights_.clone() : torch::Tensor();
  host_mean_ = kept && off_host_ ? torch::zeros_like(host_weights_) : mean_;
}

void DenseModel::Restored() {
  updater_.set_updates(updates_);
  if (!off_host_) return;
  torch::NoGradGuard no_grad;
  weights_.copy_(host_weights_);
  if (mean_.defined()) mean_.copy_(host_mean_);
  if (updater_.adam()) {
    first_moment_.copy_(ViewOf(updater_.first_moment(), weights_.sizes(), torch::kFloat32));
    second_moment_.copy_(ViewOf(updater_.second_moment(), weights_.sizes(), torch::kFloat32));
  }
  for (Buffer& buffer : buffers_) buffer.tensor.copy_(buffer.host);
}

}  // namespace hearth
