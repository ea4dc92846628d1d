// Memory of one thread, kept from call to call: large temporary allocations cost page faults.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <vector>

namespace cnm {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (Buffer& buffer : buffers_) std::free(buffer.data);
  }
  // Hands the buffers out again, in the same order.
  void reset() { next_ = 0; }

  template <class T>
  T* take(std::size_t count) {
    if (next_ == buffers_.size()) buffers_.push_back({});
    Buffer& buffer = buffers_[next_++];
    const std::size_t bytes = (count * sizeof(T) + 64) / 64 * 64;
    if (buffer.bytes < bytes) {
      std::free(buffer.data);
      buffer = {std::aligned_alloc(64, bytes), bytes};
    }
    return static_cast<T*>(buffer.data);
  }

 private:
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
  };
  std::vector<Buffer> buffers_;
  std::size_t next_ = 0;
};

}  // namespace cnm
