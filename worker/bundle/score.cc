#include "worker/bundle/score.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/artifact/safetensors.h"
#include "common/base/file.h"
#include "common/base/file_list.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/sign.h"
#include "model/export/export.h"
#include "model/multi_task_model.h"
#include "worker/dense/dense_replica.h"
#include "worker/log/log_reader.h"

namespace hearth {
namespace {

constexpr uint32_t kBatchRecords = 4096;
constexpr size_t kNpyHeaderBytes = 128;  // as ExportTables writes it

class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (data_ != nullptr) munmap(data_, size_);
  }
  absl::Status Open(const std::string& path) {
    HEARTH_ASSIGN_OR_RETURN(size_, FileBytes(path));
    if (size_ == 0) return absl::OkStatus();
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return absl::UnavailableError(absl::StrCat(path, ": ", std::strerror(errno)));
    void* const data = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (data == MAP_FAILED)
      return absl::UnavailableError(absl::StrCat(path, ": cannot be mapped: ", std::strerror(errno)));
    data_ = data;
    return absl::OkStatus();
  }
  const char* data() const { return static_cast<const char*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// One table's rows, found by sign.
class RowFiles {
 public:
  absl::Status Open(const std::string& folder, uint32_t dim, BundleScorer::Rows rows) {
    dim_ = dim;
    int8_ = rows == BundleScorer::Rows::kInt8;
    const bool hps = PathExists(JoinPath(folder, "key"));
    const bool npy = !int8_ && !hps;
    header_ = npy ? kNpyHeaderBytes : 0;
    row_bytes_ = int8_ ? QuantizedBytes(dim) : dim * sizeof(float);
    const std::string key_path = JoinPath(folder, npy ? "keys.npy" : "key");
    const std::string rows_path = JoinPath(folder, int8_ ? "rows.i8" : npy ? "values.npy" : "emb_vector");
    for (const std::string& path : {key_path, rows_path}) {
      if (PathExists(path)) continue;
      return absl::FailedPreconditionError(
          absl::StrCat(path, ": is missing; export with --format all, or one that holds the rows (hps, npy, int8)"));
    }
    MappedFile keys;
    HEARTH_RETURN_IF_ERROR(keys.Open(key_path));
    HEARTH_RETURN_IF_ERROR(rows_.Open(rows_path));
    const uint64_t count = keys.size() < header_ ? 0 : (keys.size() - header_) / sizeof(Sign);
    if (keys.size() != header_ + count * sizeof(Sign) || rows_.size() != header_ + count * row_bytes_) {
      return absl::DataLossError(absl::StrCat(rows_path, ": ", rows_.size(), " bytes do not fit the ", count,
                                              " keys of ", key_path, "; export the snapshot again"));
    }
    row_of_.reserve(count);
    for (uint64_t row = 0; row < count; ++row) {
      Sign sign;
      std::memcpy(&sign, keys.data() + header_ + row * sizeof(Sign), sizeof(Sign));
      row_of_[sign] = row;
    }
    return absl::OkStatus();
  }
  // Leaves `out` [dim] as it is where there is no such row.
  void Find(Sign sign, float* out) const {
    const auto found = row_of_.find(sign);
    if (found == row_of_.end()) return;
    const char* row = rows_.data() + header_ + found->second * row_bytes_;
    if (int8_) {
      DequantizeRow(row, absl::MakeSpan(out, dim_));
    } else {
      std::memcpy(out, row, row_bytes_);
    }
  }

 private:
  uint32_t dim_ = 0;
  bool int8_ = false;
  size_t header_ = 0;
  size_t row_bytes_ = 0;
  MappedFile rows_;
  absl::flat_hash_map<Sign, uint64_t> row_of_;
};

// Parameters and buffers by name from the file into the model.
absl::Status LoadWeights(const SafetensorsFile& file, const std::string& path, MultiTaskModel* model) {
  torch::NoGradGuard no_grad;
  size_t used = 0;
  const auto load = [&](const std::string& name, torch::Tensor tensor) {
    const NamedTensor* saved = file.Find(name);
    if (saved == nullptr || saved->dtype != "F32" || saved->shape != tensor.sizes().vec() || !tensor.is_contiguous()) {
      return absl::DataLossError(absl::StrCat(path, ": tensor ", name, " is missing or has another shape"));
    }
    ++used;
    if (!saved->data.empty()) std::memcpy(tensor.data_ptr<float>(), saved->data.data(), saved->data.size());
    return absl::OkStatus();
  };
  for (const auto& item : model->named_parameters()) HEARTH_RETURN_IF_ERROR(load(item.key(), item.value()));
  for (const auto& item : model->named_buffers()) HEARTH_RETURN_IF_ERROR(load(item.key(), item.value()));
  if (used == file.tensors.size()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(path, ": ", file.tensors.size(), " tensors, the job's model has ", used));
}

}  // namespace

struct BundleScorer::State {
  Job job;
  std::vector<std::unique_ptr<RowFiles>> tables;  // by number − 1
  std::unique_ptr<DenseReplica> model;
};

BundleScorer::BundleScorer(std::unique_ptr<State> state) : state_(std::move(state)) {}
BundleScorer::~BundleScorer() = default;
const Job& BundleScorer::job() const { return state_->job; }

absl::StatusOr<std::unique_ptr<BundleScorer>> BundleScorer::Open(const std::string& bundle, Rows rows) {
  auto state = std::make_unique<State>();
  HEARTH_ASSIGN_OR_RETURN(state->job, LoadJob(JoinPath(bundle, "job.txtpb"), {}));
  for (SideTable& table : *state->job.mutable_side_table()) {
    const std::string copy = JoinPath(bundle, "side_tables/" + ExportTableFolder(table.name()));
    table.set_path(std::filesystem::absolute(copy).string());
  }
  for (const Table& table : state->job.table()) {
    const std::string folder = JoinPath(bundle, "embeddings/" + ExportTableFolder(table.name()));
    state->tables.push_back(std::make_unique<RowFiles>());
    HEARTH_RETURN_IF_ERROR(state->tables.back()->Open(folder, table.dim(), rows));
  }
  const std::string path = JoinPath(bundle, "dense.safetensors");
  if (!PathExists(path)) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": is missing; export with --format all"));
  }
  HEARTH_ASSIGN_OR_RETURN(const SafetensorsFile dense, ReadSafetensors(path));
  const std::vector<double> base_rates(static_cast<size_t>(state->job.task_size()), 0.5);  // overwritten
  try {
    const std::shared_ptr<MultiTaskModel> model = MakeModel(MakeModelSpec(state->job, base_rates));
    HEARTH_RETURN_IF_ERROR(LoadWeights(dense, path, model.get()));
    HEARTH_ASSIGN_OR_RETURN(state->model, DenseReplica::Wrap(state->job, model));
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("building the model: ", error.what()));
  }
  return std::unique_ptr<BundleScorer>(new BundleScorer(std::move(state)));
}

absl::StatusOr<std::vector<float>> BundleScorer::Predict(Batch* batch) {
  for (RowGroup& group : batch->groups) {
    group.rows.assign(group.unique.size() * group.dim, 0.0f);
    for (size_t i = 0; i < group.unique.size(); ++i) {
      const Sign sign = group.unique[i];
      state_->tables[TableOf(sign) - 1]->Find(sign, group.rows.data() + i * group.dim);
    }
  }
  return state_->model->Predict(*batch);
}

absl::StatusOr<ScoredLog> ChooseLog(const Job& job, const std::string& name, const std::vector<std::string>& files) {
  ScoredLog chosen;
  bool found = false;
  const auto consider = [&](const Log& log, const std::string& its_name, const Split& split) {
    const bool fits = name.empty() ? log.path_size() > 0 || !files.empty() : its_name == name;
    if (found || !fits) return;
    chosen = {log, its_name, split.user(), split.records_max()};
    found = true;
  };
  for (const Split& split : job.split()) consider(split.log(), split.name(), split);
  for (const Log& log : job.log()) consider(log, log.name(), Split());
  if (!found) {
    return absl::NotFoundError(
        absl::StrCat("the job has no split or log ", name.empty() ? "with files" : name, "; name one of the job's"));
  }
  chosen.log.clear_shuffle();
  chosen.log.clear_time_ms();  // nothing expires
  if (files.empty()) return chosen;
  chosen.log.clear_path();
  chosen.log.clear_directory();
  for (const std::string& file : files) chosen.log.add_path(std::filesystem::absolute(file).string());
  return chosen;
}

absl::Status VisitBatches(const Job& job, const ScoredLog& scored, bool keep_user_text, const BatchVisitor& visit) {
  const std::vector<Log> logs = {scored.log};
  LaneReaderOptions reading;
  HEARTH_ASSIGN_OR_RETURN(reading.schema, LogSchema::Open(job, logs, {scored.user}));
  HEARTH_ASSIGN_OR_RETURN(const std::vector<LogFile> listed, ListLogFiles(job, logs));
  FileList files(Env::Real());
  files.Append(listed, /*closed=*/true);
  reading.job = job;
  reading.logs = logs;
  reading.files = &files;
  reading.batch_size = kBatchRecords;
  reading.keep_user = !scored.user.empty();
  reading.keep_user_text = keep_user_text && !scored.user.empty();
  reading.user_column = scored.user;
  HEARTH_ASSIGN_OR_RETURN(const std::unique_ptr<LaneReader> reader, LaneReader::Open(reading));
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(std::unique_ptr<Batch> batch, reader->Next());
    if (batch == nullptr) return absl::OkStatus();
    HEARTH_ASSIGN_OR_RETURN(const bool more, visit(batch.get()));
    if (!more) return absl::OkStatus();
  }
}

absl::StatusOr<PredictionRows> ScoreLog(BundleScorer* scorer, const ScoredLog& scored, bool keep_user_text,
                                        uint64_t records_max) {
  PredictionRows rows;
  rows.tasks = static_cast<uint32_t>(scorer->job().task_size());
  HEARTH_RETURN_IF_ERROR(VisitBatches(scorer->job(), scored, keep_user_text, [&](Batch* batch) -> absl::StatusOr<bool> {
    std::vector<float> logits;
    if (batch->records > 0) {
      HEARTH_ASSIGN_OR_RETURN(logits, scorer->Predict(batch));
    }
    rows.Append(batch, logits);  // its counts too
    return rows.records() < records_max;
  }));
  return rows;
}

}  // namespace hearth
