// intra_video_contrastive_loss on GPUs: one block forward, which sums in a fixed order.
#include "intra_video_contrastive_loss.h"

#include "device.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float hinge(float margin) { return margin < 0.0f ? 0.0f : margin; }  // a NaN stays

// The hinge's slope; one half at the kink, 1 at NaN as torch.maximum has it: what made the NaN gets a gradient.
__device__ __forceinline__ float slope(float margin) { return margin < 0.0f ? 0.0f : margin == 0.0f ? 0.5f : 1.0f; }

template <class T>
__device__ __forceinline__ float nll(const void* of, int64_t b) {
    return to_float(load(static_cast<const T*>(of) + b));
}

template <class T>
__global__ void __launch_bounds__(THREADS) intra_video_contrastive_loss_kernel(IntraVideoContrastiveLossParams p) {
    float to_hard = 0, to_easy = 0;
    for (int64_t b = thread(); b < p.B; b += THREADS) {
        const float positive = nll<T>(p.positive, b);
        to_hard += hinge(positive - nll<T>(p.hard, b) + p.beta_1);
        to_easy += hinge(positive - nll<T>(p.easy, b) + p.beta_2);
    }
    float* const scratch = dynamic_shared<float>();
    to_hard = sum_over_block(to_hard, scratch);
    to_easy = sum_over_block(to_easy, scratch);
    const float count = static_cast<float>(p.B);
    if (thread() == 0) store(p.loss, to_hard / count + to_easy / count);  // of nothing: NaN
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    intra_video_contrastive_loss_backward_kernel(IntraVideoContrastiveLossBackwardParams p) {
    const int64_t b = static_cast<int64_t>(blockIdx.x) * THREADS + thread();
    if (b >= p.B) return;
    const float share = load(p.d_loss) / static_cast<float>(p.B), positive = nll<T>(p.positive, b);
    const float to_hard = share * slope(positive - nll<T>(p.hard, b) + p.beta_1);
    const float to_easy = share * slope(positive - nll<T>(p.easy, b) + p.beta_2);
    T rounded;
    from_float(&rounded, to_hard + to_easy);
    store(static_cast<T*>(p.d_positive) + b, rounded);
    from_float(&rounded, -to_hard);
    store(static_cast<T*>(p.d_hard) + b, rounded);
    from_float(&rounded, -to_easy);
    store(static_cast<T*>(p.d_easy) + b, rounded);
}

}  // namespace
}  // namespace cuda

void intra_video_contrastive_loss(const IntraVideoContrastiveLossParams& p) {
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::intra_video_contrastive_loss_kernel<T>, {1}, cuda::THREADS,
                     sizeof(float) * cuda::THREADS / cuda::WARP, p);
    });
}

void intra_video_contrastive_loss_backward(const IntraVideoContrastiveLossBackwardParams& p) {
    if (p.B == 0) return;
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::intra_video_contrastive_loss_backward_kernel<T>, {cuda::ceil_div(p.B, cuda::THREADS)},
                     cuda::THREADS, 0, p);
    });
}

}  // namespace cnm
