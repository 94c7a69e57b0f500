#include "embedding/store_io.h"

#include <algorithm>
#include <utility>

namespace hearth {
namespace {

// In the order of keys, the last of equal ones alone.
std::vector<KvWrite> Ordered(StoreWrite* write) {
  std::sort(write->items.begin(), write->items.end(), [](const StoreWrite::Item& a, const StoreWrite::Item& b) {
    return a.key == b.key ? a.begin < b.begin : a.key < b.key;
  });
  std::vector<KvWrite> ordered;
  ordered.reserve(write->items.size());
  for (const StoreWrite::Item& item : write->items) {
    __builtin_prefetch(write->bytes.data() + item.begin);
    const absl::string_view value = absl::string_view(write->bytes).substr(item.begin, item.bytes);
    if (!ordered.empty() && ordered.back().key == item.key) {
      ordered.back().value = value;
    } else {
      ordered.push_back({item.key, value, false});
    }
  }
  return ordered;
}

}  // namespace

StoreIo::StoreIo(Env* env, KvStore* store, size_t read_threads, std::function<void()> written)
    : store_(store),
      one_done_(env->NewEvent()),
      on_written_(std::move(written)),
      readers_(env, "read", read_threads),
      writer_(env, "write", read_threads == 0 ? 0 : 1) {}

StoreIo::~StoreIo() = default;

void StoreIo::Read(StoreRead* read, bool urgent) {
  readers_.Run(
      [this, read] {
        read->status = store_->MultiGet(read->keys, &read->values);
        Done(&read->done);
      },
      urgent);
}

void StoreIo::Write(StoreWrite* write) {
  writer_.Run([this, write] {
    if (written_.ok()) written_ = store_->Write(Ordered(write));
    write->status = written_;
    Done(&write->done);
    if (on_written_) on_written_();
  });
}

void StoreIo::Then(std::function<void(const absl::Status&)> call) {
  writer_.Run([this, call = std::move(call)] { call(written_); });
}

void StoreIo::WaitFor(const std::atomic<bool>& done) {
  while (!done.load(std::memory_order_acquire)) {
    if (!readers_.RunOne()) one_done_->WaitUntil(kNever);
  }
}

void StoreIo::Done(std::atomic<bool>* done) {
  done->store(true, std::memory_order_release);
  one_done_->Notify();
}

}  // namespace hearth
