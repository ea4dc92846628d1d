// gaussian_mask on GPUs.
#include "gaussian_mask.h"

#include "gaussian.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int THREADS = 128;

template <class T>
__global__ void __launch_bounds__(THREADS) gaussian_mask_kernel(GaussianMaskParams p) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + thread();
    if (index >= p.rows * p.length) return;
    const int64_t row = index / p.length;
    const Gaussian gaussian(to_float(load(static_cast<const T*>(p.center) + row)),
                            to_float(load(static_cast<const T*>(p.width) + row)), p.alpha, p.min_width, p.complement);
    const auto value_of = [&](const auto& of_row) { return of_row.value(of_row.point(index % p.length, p.length)); };
    T value;
    from_float(&value, p.normalized ? value_of(NormalizedGaussian(gaussian, p.length)) : value_of(gaussian));
    store(static_cast<T*>(p.out) + index, value);
}

template <class T>
__global__ void __launch_bounds__(THREADS) gaussian_mask_backward_kernel(GaussianMaskBackwardParams p) {
    const int64_t row = blockIdx.x;
    const Gaussian gaussian(to_float(load(static_cast<const T*>(p.center) + row)),
                            to_float(load(static_cast<const T*>(p.width) + row)), p.alpha, p.min_width, p.complement);
    float d_center = 0, d_width = 0;
    const auto add = [&](const auto& of_row) {
        for (int64_t j = thread(); j < p.length; j += THREADS) {
            const float upstream = to_float(load(static_cast<const T*>(p.d_out) + row * p.length + j));
            of_row.add_gradient(of_row.point(j, p.length), upstream, d_center, d_width);
        }
    };
    if (p.normalized) {
        add(NormalizedGaussian(gaussian, p.length));
    } else {
        add(gaussian);
    }
    float* const scratch = dynamic_shared<float>();
    d_center = sum_over_block(d_center, scratch);
    d_width = sum_over_block(d_width, scratch);
    if (thread() != 0) return;
    T rounded;
    from_float(&rounded, d_center);
    store(static_cast<T*>(p.d_center) + row, rounded);
    from_float(&rounded, gaussian.width_passes ? d_width : 0.0f);
    store(static_cast<T*>(p.d_width) + row, rounded);
}

}  // namespace
}  // namespace cuda

void gaussian_mask(const GaussianMaskParams& p) {
    if (p.rows * p.length == 0) return;
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::gaussian_mask_kernel<T>, {cuda::ceil_div(p.rows * p.length, cuda::THREADS)}, cuda::THREADS,
                     0, p);
    });
}

void gaussian_mask_backward(const GaussianMaskBackwardParams& p) {
    if (p.rows == 0) return;
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::gaussian_mask_backward_kernel<T>, {p.rows}, cuda::THREADS,
                     sizeof(float) * cuda::THREADS / cuda::WARP, p);
    });
}

}  // namespace cnm
