// The Gaussian over time, as mask and as key weight.
#pragma once

#include "device.cuh"

namespace cnm::cuda {

// linspace(0, 1, length), counted from the nearer end as torch.linspace does.
__device__ __forceinline__ float position(int64_t j, int64_t length) {
    if (length <= 1) return 0.0f;
    const float last = static_cast<float>(length - 1), step = 1.0f / last;
    return j < length / 2 ? step * static_cast<float>(j) : 1.0f - step * (last - static_cast<float>(j));
}

struct Gaussian {
    float center, width, alpha;  // the width after the clamp
    bool complement, width_passes;

    __device__ Gaussian(float center, float width, float alpha, float min_width, bool complement)
        : center(center),
          width(width < min_width ? min_width : width),  // a NaN stays
          alpha(alpha),
          complement(complement),
          width_passes(!(width < min_width)) {}

    // g = exp(-alpha (x - c)^2 / w^2)
    __device__ float bell(float x) const {
        const float u = (x - center) / width;  // divided first: the width's square may be 0 or infinite
        return expf(-(alpha * u) * u);
    }
    __device__ float value(float x) const { return complement ? 1.0f - bell(x) : bell(x); }

    // Adds upstream . dm/dc and upstream . dm/dw: dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3;
    // the clamp passes a gradient where `width_passes`.
    __device__ void add_gradient(float x, float upstream, float& d_center, float& d_width) const {
        const float u = (x - center) / width, g = bell(x);
        const float common = g == 0.0f ? 0.0f : upstream * g * u * ((complement ? -2.0f : 2.0f) * alpha) / width;
        d_center += common;
        d_width += common * u;
    }
};

}  // namespace cnm::cuda
