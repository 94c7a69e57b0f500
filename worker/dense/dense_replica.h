// A worker's replica of the dense model: built, evaluated, saved and restored here, moved by host_step.h or
// device_step.h. Torch's exceptions end here, as a Status.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/artifact/safetensors.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"
#include "model/batch/batch.h"
#include "model/multi_task_model.h"
#include "worker/collective/device_plan.h"

namespace hearth {

class DenseModel;

// One thread. Bits depend on the job, the batches and training.threads, on one kind of CPU or GPU.
class DenseReplica {
 public:
  // Builds the model; sets Torch's threads (of the process). base_rates: [tasks], only where the initial values matter.
  // A GPU becomes the calling thread's current one.
  static absl::StatusOr<std::unique_ptr<DenseReplica>> Create(const Job& job, const std::vector<double>& base_rates,
                                                              const DevicePlan& device = {});
  // Around a model that someone else built. REQUIRES: it fits the job.
  static absl::StatusOr<std::unique_ptr<DenseReplica>> Wrap(const Job& job, std::shared_ptr<MultiTaskModel> model,
                                                            int gpu = kNoGpu);
  ~DenseReplica();

  // Logits [records, tasks] with the running statistics; changes nothing.
  absl::StatusOr<std::vector<float>> Predict(const Batch& batch);
  // What experts and gates do with the first `records_max` records of these batches (model/diagnostics.h); changes
  // nothing. REQUIRES: batches with records and their rows.
  absl::StatusOr<Evaluation::Diagnostics> Diagnose(const std::vector<std::unique_ptr<Batch>>& batches,
                                                   int64_t records_max);

  // Parameters, buffers and optimizer state as a safetensors file, durable when it returns; and the hash of all of it.
  absl::StatusOr<uint64_t> Save(const std::string& path, uint64_t step);
  // DataLoss when the file is damaged or holds another model.
  absl::Status Restore(const std::string& path);
  // Hands `write` the places of all that a snapshot holds, the weights' running mean among them where `mean`, and goes
  // on with what it wrote there. On its error the model is of no more use.
  using Write = std::function<absl::Status(const std::vector<NamedTensor>& places)>;
  absl::Status Overwrite(bool mean, const Write& write);
  absl::StatusOr<uint64_t> Hash();
  absl::StatusOr<bool> Finite();  // every parameter is

  int64_t parameters() const;
  int64_t moment_columns() const;
  DenseModel* dense_model() { return model_.get(); }

 private:
  explicit DenseReplica(std::unique_ptr<DenseModel> model);
  const std::unique_ptr<DenseModel> model_;
};

}  // namespace hearth
