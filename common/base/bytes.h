// Owned bytes without the zero fill of std::vector: messages are megabytes, and first touch is what costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/types/span.h"

namespace hearth {

// A move-only buffer of a fixed size. Aligned for any scalar; contents are uninitialised until written.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(size_t size) : data_(size ? new char[size] : nullptr), size_(size) {}
  Bytes(Bytes&& other) noexcept : data_(std::move(other.data_)), size_(other.size_) { other.size_ = 0; }
  Bytes& operator=(Bytes&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = other.size_;
    other.size_ = 0;
    return *this;
  }
  Bytes Clone() const;

  char* data() { return data_.get(); }
  const char* data() const { return data_.get(); }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  absl::Span<const char> span() const { return {data_.get(), size_}; }

 private:
  std::unique_ptr<char[]> data_;
  size_t size_ = 0;
};

}  // namespace hearth
