// parallel.h on the thread pool that PyTorch itself uses, so that the two never compete.
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include <torch/csrc/stable/ops.h>

#include "contention.h"

namespace cnm {

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

// How a thread rounds, and whether it flushes denormal numbers (torch.set_flush_denormal is of the calling thread
// alone): while this lives, as the thread where `mode` was read.
class FloatMode {
  public:
#ifdef __SSE__
    static unsigned current() { return __builtin_ia32_stmxcsr(); }
    explicit FloatMode(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
    ~FloatMode() { __builtin_ia32_ldmxcsr(own_); }
#else
    static unsigned current() { return 0; }
    explicit FloatMode(unsigned) {}
#endif
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;
#ifdef __SSE__

  private:
    const unsigned own_ = current();
#endif
};

}  // namespace

Buffer::Buffer(size_t bytes) {
    if (bytes == 0) return;
    data_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
}

void parallel_chunks(int64_t chunks, void (*body)(int64_t, void*), void* context) {
    thread_local Contention contention;
    const int64_t all = thread_count(), threads = std::min(all, chunks);
    if (threads <= 1 || contention.alone()) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, context);
        return;
    }
    std::atomic<int64_t> next{0};
    const bool measures = contention.measures() && threads == all;
    torch::stable::parallel_for(
        0, threads, 1, [&, caller = &contention, mode = FloatMode::current()](int64_t, int64_t) {
            const FloatMode of_caller(mode);
            for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(chunk, context);
            if (measures) caller->add_own_time();
        });
    if (measures) contention.decide();
}

void* thread_scratch(size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (buffer.data == nullptr) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace cnm
