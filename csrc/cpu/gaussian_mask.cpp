// g_j = exp(-alpha (x_j - c)^2 / max(w, min_width)^2), or that over its largest sample, or 1 - g_j; and its gradient to
// c and w.
//
// A chunk is a number of rows; a row is one pass over its positions, both gradients summed in float32 lanes in order.
#include "gaussian_mask.h"

#include <algorithm>

#include "gaussian.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

// About as much work as is worth waking a thread for.
constexpr int64_t ELEMENTS_PER_CHUNK = 16384;

template <class Body>
void for_each_row(int64_t rows, int64_t length, const Body& body) {
    const int64_t step = std::max<int64_t>(1, ELEMENTS_PER_CHUNK / std::max<int64_t>(length, 1));
    parallel_for((rows + step - 1) / step, [&](int64_t chunk) {
        const int64_t end = std::min(rows, (chunk + 1) * step);
        for (int64_t row = chunk * step; row < end; ++row) body(row);
    });
}

// Calls body(row, Gaussian) of every row.
template <class T, class Params, class Body>
void for_each_gaussian(const Params& p, const Body& body) {
    for_each_row(p.rows, p.length, [&](int64_t row) {
        const float center = to_float(static_cast<const T*>(p.center)[row]);
        const float width = to_float(static_cast<const T*>(p.width)[row]);
        const Gaussian gaussian(center, width, p.alpha, p.min_width, p.complement);
        if (p.normalized) {
            body(row, NormalizedGaussian(gaussian, p.length));
        } else {
            body(row, gaussian);
        }
    });
}

template <class T>
void forward(const GaussianMaskParams& p) {
    for_each_gaussian<T>(p, [&](int64_t row, const auto& gaussian) {
        T* out = static_cast<T*>(p.out) + row * p.length;
        for (int64_t j = 0; j < p.length; j += W) {
            store_tail(out + j, gaussian.value(gaussian.points(j, p.length)), p.length - j);
        }
    });
}

template <class T>
void backward(const GaussianMaskBackwardParams& p) {
    for_each_gaussian<T>(p, [&](int64_t row, const auto& gaussian) {
        const T* d_out = static_cast<const T*>(p.d_out) + row * p.length;
        Vec d_center = set1(0), d_width = set1(0);
        for (int64_t j = 0; j < p.length; j += W) {
            gaussian.add_gradient(gaussian.points(j, p.length), load_tail(d_out + j, p.length - j), d_center, d_width);
        }
        from_float(static_cast<T*>(p.d_center) + row, hsum(d_center));
        from_float(static_cast<T*>(p.d_width) + row, gaussian.width_passes ? hsum(d_width) : 0.0f);
    });
}

}  // namespace

void gaussian_mask(const GaussianMaskParams& p) {
    with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void gaussian_mask_backward(const GaussianMaskBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace cnm::CNM_ISA
