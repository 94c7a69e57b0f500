#include "model/batch/batch.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <utility>

#include "common/base/status.h"

namespace hearth {
namespace {

int FindTable(const Job& job, const std::string& name) {
  for (int i = 0; i < job.table_size(); ++i) {
    if (job.table(i).name() == name) return i;
  }
  return -1;
}

struct Occurrence {
  uint64_t sign;
  uint32_t position;  // in the group's values, slot-major
};

// Sorts by sign, stable, least significant byte first; bytes that are the same in all signs cost nothing. `spare` is
// scratch of the same size.
void RadixSort(std::vector<Occurrence>* values, std::vector<Occurrence>* spare) {
  constexpr int kDigits = 8;
  constexpr int kBuckets = 256;
  if (values->empty()) return;
  std::array<std::array<uint32_t, kBuckets>, kDigits> counts{};
  const uint64_t first = values->front().sign;
  uint64_t differing = 0;
  for (const Occurrence& value : *values) {
    differing |= value.sign ^ first;
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][(value.sign >> (8 * digit)) & 0xff];
  }
  spare->resize(values->size());
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 8 * digit;
    if (((differing >> shift) & 0xff) == 0) continue;
    uint32_t begin = 0;
    std::array<uint32_t, kBuckets> next;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      next[bucket] = begin;
      begin += counts[digit][bucket];
    }
    for (const Occurrence& value : *values) (*spare)[next[(value.sign >> shift) & 0xff]++] = value;
    values->swap(*spare);
  }
}

}  // namespace

FeatureLayout MakeFeatureLayout(const Job& job) {
  FeatureLayout layout;
  layout.slots.resize(job.slot_size());
  std::map<uint32_t, std::vector<int>> slots_of_dim;  // ascending dim, slots in the job's order
  for (int slot = 0; slot < job.slot_size(); ++slot) {
    const int table = FindTable(job, job.slot(slot).table());
    HEARTH_CHECK(table >= 0, "slot ", job.slot(slot).name(), " names table ", job.slot(slot).table(),
                 ", which the job does not have; ValidateJob comes first");
    FeatureLayout::SlotPlace& place = layout.slots[slot];
    place.slot = slot;
    place.table = table;
    place.dim = static_cast<int>(job.table(table).dim());
    slots_of_dim[job.table(table).dim()].push_back(slot);
  }
  int column = 0;
  for (auto& [dim, slots] : slots_of_dim) {
    FeatureLayout::Group group;
    group.dim = dim;
    group.offset = column;
    for (size_t bag = 0; bag < slots.size(); ++bag) {
      FeatureLayout::SlotPlace& place = layout.slots[slots[bag]];
      place.group = static_cast<int>(layout.groups.size());
      place.bag = static_cast<int>(bag);
      place.offset = column;
      column += place.dim;
    }
    group.slots = std::move(slots);
    layout.groups.push_back(std::move(group));
  }
  layout.dense_offset = column;
  layout.width = column + job.dense_size();
  return layout;
}

uint32_t LowerMedian(std::vector<uint32_t>* values) {
  if (values->empty()) return 0;
  const auto middle = values->begin() + static_cast<ptrdiff_t>((values->size() - 1) / 2);
  std::nth_element(values->begin(), middle, values->end());
  return *middle;
}

struct BatchBuilder::State {
  // One slot's values, record after record.
  struct SlotValues {
    std::vector<uint64_t> signs;
    std::vector<uint32_t> ends;  // [records] into signs
  };

  explicit State(const Job& job)
      : layout(MakeFeatureLayout(job)), dense_size(job.dense_size()), tasks(job.task_size()), slots(job.slot_size()) {}

  void BuildGroup(const FeatureLayout::Group& place, int64_t records, RowGroup* group);

  const FeatureLayout layout;
  const size_t dense_size;
  const size_t tasks;

  std::vector<SlotValues> slots;  // by job index
  std::unique_ptr<Batch> batch = std::make_unique<Batch>();
  std::vector<uint32_t> times_s;
  std::vector<Occurrence> values;  // scratch
  std::vector<Occurrence> spare;   // scratch
};

BatchBuilder::BatchBuilder(const Job& job) : state_(std::make_unique<State>(job)) {}
BatchBuilder::~BatchBuilder() = default;

void BatchBuilder::AddSign(int slot, uint64_t sign) { state_->slots[slot].signs.push_back(sign); }

void BatchBuilder::AddDense(absl::Span<const float> values) {
  HEARTH_CHECK(values.size() == state_->dense_size, "a record with ", values.size(), " dense values, the job has ",
               state_->dense_size);
  state_->batch->dense.insert(state_->batch->dense.end(), values.begin(), values.end());
}

void BatchBuilder::AddLabels(absl::Span<const float> labels, absl::Span<const float> mask) {
  HEARTH_CHECK(labels.size() == state_->tasks && mask.size() == state_->tasks, "a record with ", labels.size(),
               " labels and ", mask.size(), " masks, the job has ", state_->tasks, " tasks");
  for (size_t task = 0; task < labels.size(); ++task) {
    const bool known = mask[task] != 0;
    state_->batch->labels.push_back(known && labels[task] != 0 ? 1.0f : 0.0f);
    state_->batch->mask.push_back(known ? 1.0f : 0.0f);
  }
}

void BatchBuilder::AddTime(uint32_t time_s) { state_->times_s.push_back(time_s); }

void BatchBuilder::EndRecord(uint32_t file, uint64_t offset) {
  Batch& batch = *state_->batch;
  ++batch.records;
  batch.file_of.push_back(file);
  batch.offset.push_back(offset);
  for (State::SlotValues& slot : state_->slots) {
    HEARTH_CHECK(slot.signs.size() <= std::numeric_limits<uint32_t>::max());
    slot.ends.push_back(static_cast<uint32_t>(slot.signs.size()));
  }
  const size_t records = static_cast<size_t>(batch.records);
  HEARTH_CHECK(batch.dense.size() == records * state_->dense_size, "AddDense once a record");
  HEARTH_CHECK(batch.labels.size() == records * state_->tasks, "AddLabels once a record");
}

int64_t BatchBuilder::records() const { return state_->batch->records; }

std::unique_ptr<Batch> BatchBuilder::Build() {
  std::unique_ptr<Batch> batch = std::exchange(state_->batch, std::make_unique<Batch>());
  batch->groups.resize(state_->layout.groups.size());
  for (size_t i = 0; i < batch->groups.size(); ++i) {
    state_->BuildGroup(state_->layout.groups[i], batch->records, &batch->groups[i]);
  }
  batch->time_s = LowerMedian(&state_->times_s);
  state_->times_s.clear();
  for (State::SlotValues& slot : state_->slots) {
    slot.signs.clear();
    slot.ends.clear();
  }
  return batch;
}

void BatchBuilder::State::BuildGroup(const FeatureLayout::Group& place, int64_t records, RowGroup* group) {
  group->dim = place.dim;
  group->offsets.reserve(place.slots.size() * records + 1);
  group->offsets.push_back(0);
  values.clear();
  for (int index : place.slots) {
    const SlotValues& slot = slots[index];
    // Past the last EndRecord there is a record that was never finished: Build between records.
    HEARTH_CHECK(slot.signs.size() == (slot.ends.empty() ? 0 : slot.ends.back()), "Build inside a record");
    const int64_t before = static_cast<int64_t>(values.size());
    for (uint32_t end : slot.ends) group->offsets.push_back(before + end);
    for (uint64_t sign : slot.signs) values.push_back({sign, static_cast<uint32_t>(values.size())});
  }
  HEARTH_CHECK(values.size() <= std::numeric_limits<uint32_t>::max(), "a batch of ", values.size(), " values");
  RadixSort(&values, &spare);
  group->row_of.resize(values.size());
  for (const Occurrence& value : values) {
    if (group->unique.empty() || group->unique.back() != value.sign) {
      group->unique.push_back(value.sign);
      group->occurrences.push_back(0);
    }
    ++group->occurrences.back();
    group->row_of[value.position] = static_cast<int64_t>(group->unique.size()) - 1;
  }
}

}  // namespace hearth
