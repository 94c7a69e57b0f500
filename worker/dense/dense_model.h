// What the dense half of a step computes with, on the CPU or on a GPU: the model, all its parameters views into one
// array, the optimizer's state, and the way from a batch to the model's input. Private to dense_replica.cc and
// device_step.cc, which turn what Torch throws into a Status.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/artifact/safetensors.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"
#include "model/multi_task_model.h"
#include "worker/collective/device_plan.h"
#include "worker/step/dense_optimizer.h"

namespace hearth {

// The arrays of a batch where the model computes.
struct DenseInput {
  struct Group {
    torch::Tensor rows;     // [unique, dim]; undefined: the batch has no sign of this width
    torch::Tensor row_of;   // [values]
    torch::Tensor offsets;  // [slots · records + 1]
    torch::Tensor scale;    // [slots · records, 1] 1 / values where a bag's mean is taken; undefined: only sums
  };
  std::vector<Group> groups;
  torch::Tensor dense;   // [records, dense features]; undefined: the job has none
  torch::Tensor labels;  // [records, tasks], as the mask undefined where the batch has none
  torch::Tensor mask;    // [records, tasks]
};

// One thread, but for Upload.
class DenseModel {
 public:
  struct Parameter {
    std::string name;
    torch::Tensor tensor;  // a view of the array
    int64_t offset = 0;
    std::vector<int64_t> shape;
  };

  // gpu: its number; kNoGpu: the CPU; kCopiesOnCpu: as on a GPU, but there is none, for tests (device.h).
  DenseModel(const Job& job, std::shared_ptr<MultiTaskModel> model, int gpu);

  // Views of the batch's own arrays, which outlive them. REQUIRES: !off_host().
  DenseInput View(const Batch& batch) const;
  // Copies; to a GPU through pinned memory on the calling thread's stream, which nothing waits for. Any thread.
  DenseInput Upload(const Batch& batch) const;
  DenseInput InputOf(const Batch& batch) const { return off_host_ ? Upload(batch) : View(batch); }
  torch::Tensor Features(const DenseInput& input, int64_t records) const;          // [records, V]
  torch::Tensor Loss(const torch::Tensor& logits, const DenseInput& input) const;  // of logits [records, T]
  torch::Tensor Evaluate(const Batch& batch);                                      // logits [records, T]
  // While it lives the model computes with the weights that serve: their running mean where the job says so and there
  // is one, else the weights themselves. Training goes on with the weights.
  class Serving {
   public:
    explicit Serving(DenseModel* model);
    ~Serving();
    Serving(const Serving&) = delete;
    Serving& operator=(const Serving&) = delete;

   private:
    DenseModel* const model_;  // null: the weights serve
  };

  // From now on backward adds each parameter's gradient into its place in `gradient` [size], on the device.
  void PointGradients(const torch::Tensor& gradient);
  // The next update's: before it, for a device's upload waits for what is queued.
  void UpdateRunningStatistics(const BatchMoments& pooled);
  // The update of step `step`, where the parameters are. gradient [size]: divided by n and clipped.
  void Update(uint64_t step, const torch::Tensor& gradient);

  // All state by name, in this object's own arrays on the host: good until something changes. A reader of a snapshot
  // says whether that has the weights' running mean, writes into them, then calls Restored.
  std::vector<NamedTensor> Tensors();
  static bool IsMean(const std::string& tensor);
  void KeepMean(bool kept);
  void Restored();

  MultiTaskModel* model() { return model_.get(); }
  const Job& job() const { return job_; }
  torch::Device device() const { return device_; }
  bool off_host() const { return off_host_; }  // parameters are not in the host's memory, or as if they were not
  // [size] in name order. Off the host each parameter begins at a multiple of 128 bytes; what lies between stays zero.
  const torch::Tensor& weights() const { return weights_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t updates() const { return updates_; }

 private:
  struct Buffer {
    std::string name;
    torch::Tensor tensor;  // the model's
    torch::Tensor host;    // on the host the same
  };
  torch::Tensor Pooled(const DenseInput::Group& group, size_t index, int64_t records) const;
  std::vector<DenseUpdater::Part> Parts(int64_t size) const;
  void PrepareOffHost();
  void PointParameters(const torch::Tensor& array);
  void UpdateOffHost(const DenseUpdater::Factors& factors, const torch::Tensor& gradient);
  void UpdateMean();

  const bool off_host_;
  const torch::Device device_;
  const Job job_;
  const FeatureLayout layout_;
  std::vector<std::vector<bool>> mean_bag_;  // [groups][bags] pooled by mean
  std::vector<bool> has_mean_;               // [groups]
  torch::Tensor task_weights_;               // [T]

  const std::shared_ptr<MultiTaskModel> model_;
  std::vector<Parameter> parameters_;           // in name order
  std::vector<Buffer> buffers_;                 // in name order
  DenseUpdater updater_;                        // off the host its moments are copies for snapshots
  int64_t updates_ = 0;                         // the updater's count, where a NamedTensor can point at it
  torch::Tensor weights_;                       // [size]
  torch::Tensor first_moment_, second_moment_;  // [size] off the host, for Adam
  torch::Tensor host_weights_;                  // on the host the same as weights_, else a copy for snapshots
  // [size] off the host, of the updater's parts; undefined: 1, and no decay, everywhere.
  torch::Tensor rate_factors_, decays_;  // rate factor; rate factor · weight decay
  // [size] undefined: none. From the first update on as the job says; before it as the snapshot, so that what was
  // restored is what was saved.
  torch::Tensor mean_, host_mean_;
};

}  // namespace hearth
