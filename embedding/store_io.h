// A store's reads and writes beside the thread that serves: many readers, for a disk answers many at once, and one
// writer, so that what is written later is newer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/base/env.h"
#include "common/base/task_pool.h"
#include "embedding/kv_store.h"

namespace hearth {

// Filled by the serving thread, then in the hands of another thread until `done`.
struct StoreRead {
  std::vector<KvKey> keys;
  KvValues values;
  absl::Status status;
  std::atomic<bool> done = false;
};

struct StoreWrite {
  struct Item {
    KvKey key;
    uint32_t slot;  // the caller's
    uint32_t bytes;
    uint64_t begin;  // in `bytes`
  };
  std::vector<Item> items;  // in any order; of a key that comes twice the later one holds
  std::string bytes;
  absl::Status status;
  std::atomic<bool> done = false;

  void Add(KvKey key, uint32_t slot, absl::string_view value) {
    items.push_back({key, slot, static_cast<uint32_t>(value.size()), bytes.size()});
    bytes.append(value.data(), value.size());
  }
  void Clear() {  // keeps its memory
    items.clear();
    bytes.clear();
    done = false;
  }
};

// All but the constructor and destructor belong to one thread, the serving one. Reads and writes that it has handed
// over must stay where they are until `done`; the destructor waits for all of them.
class StoreIo {
 public:
  // read_threads 0: no threads. Everything is done when the call returns. `written`, if any, is called by the writer's
  // thread after each write.
  StoreIo(Env* env, KvStore* store, size_t read_threads, std::function<void()> written = {});
  ~StoreIo();

  KvStore* store() const { return store_; }
  // Urgent: a pull waits for it.
  void Read(StoreRead* read, bool urgent);
  // In the order of the calls, those of Then included. After a failed one none is written.
  void Write(StoreWrite* write);
  // On the writer's thread, with what became of all writes before.
  void Then(std::function<void(const absl::Status& written)> call);
  // Until `done` of a read or write. Meanwhile the caller reads what others wait for.
  void WaitFor(const std::atomic<bool>& done);

 private:
  void Done(std::atomic<bool>* done);

  KvStore* const store_;
  const std::unique_ptr<Event> one_done_;
  const std::function<void()> on_written_;
  absl::Status written_;  // the first failure. The writer's
  TaskPool readers_;
  TaskPool writer_;
};

}  // namespace hearth
