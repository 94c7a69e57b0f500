// One lane's batch, from the reader to the push. Free of Torch: plain arrays, moved from thread to thread.
//
//   slots with several values are jagged:       record   0     1   2
//                                               row_of [ 4 7 | 9 |   ]      offsets [ 0 2 3 3 ]
//   row_of numbers into RowGroup::unique, so each distinct sign of the batch is pulled, and its gradient pushed, once.
//
// All tables of one width form a RowGroup; its slots are looked up by ONE embedding_bag: bags are slot-major, [slots,
// records].
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "common/proto/control.pb.h"
#include "common/proto/job.pb.h"

namespace hearth {

struct RowGroup {
  uint32_t dim = 0;
  std::vector<uint64_t> unique;       // [unique] signs, strictly ascending: a table's signs are a contiguous run
  std::vector<uint32_t> occurrences;  // [unique] how often each occurs in the batch
  std::vector<int64_t> row_of;        // [values] indices into unique, slot-major
  std::vector<int64_t> offsets;       // [slots × records + 1] into row_of; bag b = slot · records + record
  std::vector<float> rows;            // [unique, dim] from the pull
  std::vector<float> gradients;       // [unique, dim] for the push: sums over the batch's samples
};

// A record without a user: GAUC leaves it out.
constexpr uint64_t kNoUser = 0;

// What a model that computes elsewhere keeps of a batch; its own kind.
struct StagedBatch {
  virtual ~StagedBatch() = default;
};

struct Batch {
  enum class Kind {
    kRecords,  // at least one record
    kAtEnd,    // the lane has no more of this segment: no records, carries the counts since the batch before
    kIdle,     // tail: nothing came for idle_ms
  };
  Kind kind = Kind::kRecords;
  uint32_t lane = 0;
  uint64_t step = 0;  // set by the pipeline
  uint32_t epoch = 0;
  int64_t records = 0;

  std::vector<RowGroup> groups;  // one for each width in use, ascending dim; also when empty
  std::vector<float> dense;      // [records, job.dense_size()]
  std::vector<float> labels;     // [records, tasks] 0 or 1; 0 where masked
  std::vector<float> mask;       // [records, tasks] 1 where the label is known

  uint32_t time_s = 0;  // of the log: the lower median of its records', seconds since 1970; 0: none has a time

  std::unique_ptr<StagedBatch> staged;  // a copy of the above where the model computes; none on the host

  // Where the records come from: for predictions, dead letters and GAUC.
  std::vector<uint64_t> offset;        // [records] byte offset (of the decompressed text) of the record; window order
  std::vector<uint32_t> file_of;       // [records] file of each record (a window may span files)
  std::vector<uint64_t> user;          // [records] 64-bit hash of the GAUC column, or kNoUser; empty: no GAUC
  std::vector<std::string> user_text;  // [records] the column itself, only when predictions are asked for

  // State at the END of this batch (docs/PROTOCOL.md §1).
  Cursor cursor;
  Ledger delta;              // read, rejected, filtered since the batch before; trained is set at apply
  Reading reading;           // of the same records as delta; no tasks
  std::string dead_letters;  // lines for DIR/dead-letter, written when the step is applied
};

// The middle one, of two the smaller; 0 of none. Of times it is the time of most: a few broken clocks do not move it
// far. Reorders the values.
uint32_t LowerMedian(std::vector<uint32_t>* values);

// Where each column of the model's input v [B, V] comes from: groups in ascending dim; within a group its slots in the
// job's order, `dim` columns each; then the dense features in the job's order. A pure function of the job.
struct FeatureLayout {
  struct SlotPlace {
    int slot = 0;    // index in the job
    int table = 0;   // index in the job; its number is table + 1
    int group = 0;   // index into groups
    int bag = 0;     // position among the group's slots
    int offset = 0;  // first column in v
    int dim = 0;
  };
  struct Group {
    uint32_t dim = 0;
    std::vector<int> slots;  // job indices, in bag order
    int offset = 0;          // first column in v
  };
  std::vector<SlotPlace> slots;  // by job index
  std::vector<Group> groups;
  int dense_offset = 0;
  int width = 0;  // V
};
FeatureLayout MakeFeatureLayout(const Job& job);

// Collects one record's values, then builds the arrays above (sort, dedupe). One thread; reused from batch to batch.
class BatchBuilder {
 public:
  explicit BatchBuilder(const Job& job);
  ~BatchBuilder();
  void AddSign(int slot, uint64_t sign);  // to the record being built, any order of slots
  void AddDense(absl::Span<const float> values);
  void AddLabels(absl::Span<const float> labels, absl::Span<const float> mask);
  void AddTime(uint32_t time_s);  // where the record has one
  void EndRecord(uint32_t file, uint64_t offset);
  int64_t records() const;
  // Hands out the batch (groups always present, rows and gradients empty) and starts the next.
  std::unique_ptr<Batch> Build();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hearth
