// dropout on GPUs: a thread keeps or drops the eight elements of a draw.
#include "dropout.h"

#include "philox.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS)
    dropout_kernel(const T* x, T* out, int64_t numel, const int64_t* seed, Dropout dropout, bool aligned) {
    const int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + thread(), first = group * GROUP;
    if (first >= numel) return;
    const uint32_t keep = keep_bits(dropout, static_cast<uint64_t>(load(seed)), static_cast<uint64_t>(group));
    const bool whole = aligned && first + GROUP <= numel;
    float values[GROUP];
    load_group(x, first, numel, whole, values);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) values[i] = keep >> i & 1 ? values[i] * dropout.scale : 0.0f;
    store_group(out, first, numel, whole, values);
}

}  // namespace
}  // namespace cuda

void dropout(const DropoutParams& p) {
    if (p.numel == 0) return;
    const bool aligned = cuda::aligned_to_vec16b(p.x) && cuda::aligned_to_vec16b(p.out);
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::dropout_kernel<T>, {cuda::ceil_div(p.numel, cuda::THREADS * cuda::GROUP)}, cuda::THREADS, 0,
                     static_cast<const T*>(p.x), static_cast<T*>(p.out), p.numel, p.seed,
                     cuda::Dropout::of(p.p, p.offset), aligned);
    });
}

}  // namespace cnm
