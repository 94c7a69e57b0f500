// Bounded and unbounded hand-over between threads. The only locks in Hearth live in common/.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "common/base/bytes.h"
#include "common/base/env.h"

namespace hearth {

// Where a message goes: a process and one of its endpoints.
struct Address {
  int rank = -1;
  int port = 0;
  bool operator==(const Address& other) const { return rank == other.rank && port == other.port; }
};

struct Message {
  Address from;
  Bytes payload;
};

// A queue between one producing and one consuming thread, at most `capacity` long. A batch moves through it.
// Close() ends it from either side: pushes are then refused, pops give what is left and then nothing.
template <typename T>
class BoundedQueue {
 public:
  BoundedQueue(Env* env, size_t capacity)
      : env_(env), capacity_(capacity), not_empty_(env->NewEvent()), not_full_(env->NewEvent()) {}

  // Waits for room. False (and `item` is dropped) when closed.
  bool Push(T item) {
    while (true) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return false;
        if (items_.size() < capacity_) {
          items_.push_back(std::move(item));
          break;
        }
      }
      not_full_->WaitUntil(kNever);
    }
    not_empty_->Notify();
    return true;
  }

  // Waits for an item until the deadline. Nothing: deadline passed, or closed and empty (see closed()).
  std::optional<T> Pop(int64_t deadline_us = kNever) {
    while (true) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!items_.empty()) {
          std::optional<T> item(std::move(items_.front()));
          items_.pop_front();
          not_full_->Notify();
          return item;
        }
        if (closed_) return std::nullopt;
      }
      if (!not_empty_->WaitUntil(deadline_us) && env_->NowUs() >= deadline_us && Empty()) return std::nullopt;
    }
  }

  void Close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    not_empty_->Notify();
    not_full_->Notify();
  }

  bool closed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
  }
  size_t size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_.size();
  }

 private:
  bool Empty() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_.empty();
  }

  Env* const env_;
  const size_t capacity_;
  mutable std::mutex mutex_;
  std::deque<T> items_;  // guarded by mutex_
  bool closed_ = false;  // guarded by mutex_
  const std::unique_ptr<Event> not_empty_;
  const std::unique_ptr<Event> not_full_;
};

// An endpoint's inbox: any thread delivers, one thread receives. Unbounded in code, bounded by protocol: at most
// staleness + 1 batches a lane are in flight (docs/PROTOCOL.md §8).
class Mailbox {
 public:
  explicit Mailbox(Env* env) : env_(env), arrived_(env->NewEvent()) {}

  void Deliver(Message message);
  // The oldest message, waiting for one until the deadline; nothing when it passed. A deadline in the past polls.
  std::optional<Message> Receive(int64_t deadline_us);

 private:
  Env* const env_;
  std::mutex mutex_;
  std::deque<Message> messages_;  // guarded by mutex_
  const std::unique_ptr<Event> arrived_;
};

// A process's mailboxes by port, made when first asked for. Thread-safe.
class MailboxSet {
 public:
  explicit MailboxSet(Env* env) : env_(env) {}
  // The same object on every call; lives as long as the set.
  Mailbox* Get(int port);

 private:
  Env* const env_;
  std::mutex mutex_;
  std::map<int, std::unique_ptr<Mailbox>> mailboxes_;  // guarded by mutex_
};

}  // namespace hearth
