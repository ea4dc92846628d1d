// Work sharing among threads, and scratch memory that outlives a call.
//
// A kernel cuts its work into chunks that depend on the problem alone, never on the number of threads, and a chunk
// writes only what is its own. Threads take chunks as they become free, so results do not depend on who took which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace cnm {

// Calls body(chunk, context) for every chunk in [0, chunks), on PyTorch's own threads.
void parallel_chunks(int64_t chunks, void (*body)(int64_t chunk, void* context), void* context);

// At least `bytes` bytes, aligned to 64, owned by the calling thread: what it held before is lost at the next call.
// Fresh pages cost more than the kernels' work on them, so the memory is kept.
void* thread_scratch(size_t bytes);

template <class Body>
void parallel_for(int64_t chunks, Body&& body) {
    using Callable = std::remove_reference_t<Body>;
    parallel_chunks(
        chunks, [](int64_t chunk, void* context) { (*static_cast<Callable*>(context))(chunk); }, &body);
}

}  // namespace cnm
