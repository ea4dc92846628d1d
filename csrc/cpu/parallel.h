// Work sharing among threads, and scratch memory that outlives a call.
//
// A kernel cuts its work into chunks that depend on the problem alone, never on the number of threads, and a chunk
// writes only what is its own. Threads take chunks as they become free, so results do not depend on who took which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace cnm {

// Calls body(chunk, context) for every chunk in [0, chunks), on PyTorch's own threads.
void parallel_chunks(int64_t chunks, void (*body)(int64_t chunk, void* context), void* context);

// At least `bytes` bytes, aligned to 64, owned by the calling thread: what it held before is lost at the next call.
// Fresh pages cost more than the kernels' work on them, so the memory is kept.
void* thread_scratch(size_t bytes);

// How many threads share work at most. Nothing that decides a result may depend on it.
int64_t thread_count();

// Memory of one call, aligned to 64, that threads share.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t bytes);

    template <class E>
    E* as() const {
        return static_cast<E*>(data_.get());
    }

  private:
    struct Free {
        void operator()(void* data) const { std::free(data); }
    };
    std::unique_ptr<void, Free> data_;
};

// Hands out parts of one piece of memory, each aligned to 64. On a null piece it only counts.
class Arena {
  public:
    explicit Arena(void* memory) : base_(reinterpret_cast<uintptr_t>(memory)) {}

    template <class E>
    E* alloc(int64_t count) {
        const uintptr_t at = base_ + bytes_;
        bytes_ += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
        return reinterpret_cast<E*>(at);
    }
    size_t bytes() const { return bytes_; }

  private:
    uintptr_t base_;
    size_t bytes_ = 0;
};

template <class Body>
void parallel_for(int64_t chunks, Body&& body) {
    using Callable = std::remove_reference_t<Body>;
    parallel_chunks(
        chunks, [](int64_t chunk, void* context) { (*static_cast<Callable*>(context))(chunk); }, &body);
}

}  // namespace cnm
