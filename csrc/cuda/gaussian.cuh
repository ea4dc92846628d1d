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

    __device__ static float point(int64_t j, int64_t length) { return position(j, length); }

    // g = exp(-alpha (x - c)^2 / w^2)
    __device__ float value(float x) const {
        const float u = scaled(x);
        return value(u, u);
    }

    // Adds upstream . dm/dc and upstream . dm/dw: dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3;
    // the clamp passes a gradient where `width_passes`.
    __device__ void add_gradient(float x, float upstream, float& d_center, float& d_width) const {
        const float u = scaled(x);
        add_gradient(u, u, upstream, d_center, d_width);
    }

  protected:
    // (x - c) / w, divided before it is squared: the width's square may be 0 or infinite.
    __device__ float scaled(float x) const { return (x - center) / width; }

    // The same of exp(-alpha t s), where dt/dc = ds/dc = -1 / w or t does not depend on c.
    __device__ float bell(float t, float s) const { return expf(-(alpha * t) * s); }
    __device__ float value(float t, float s) const { return complement ? 1.0f - bell(t, s) : bell(t, s); }
    __device__ void add_gradient(float t, float s, float upstream, float& d_center, float& d_width) const {
        // The division is the same for all samples; finite, for t may be 0.
        const float slope = fminf(2.0f * alpha / width, 3.402823466e38f), g = bell(t, s);
        const float product = upstream * g * t * (complement ? -slope : slope);
        d_center += g == 0.0f ? 0.0f : product;  // where t and s may be infinite
        d_width += g == 0.0f ? 0.0f : product * s;
    }
};

// g divided by its largest sample, which is at the position p nearest to the center, of two the first:
// exp(-alpha (u^2 - u_p^2)) with u = (x - c) / w. The difference of squares is the product of t = u - u_p and
// s = u + u_p, in which nothing cancels, and which gives the gradient too: 2 alpha t / w to c, 2 alpha t s / w to w.
// Positions are counted, x = j / (length - 1), and j - c (length - 1) is rounded once.
struct NormalizedGaussian : Gaussian {
    float last, peak, scale;  // two positions, and how much of u a step is

    __device__ NormalizedGaussian(const Gaussian& gaussian, int64_t length)
        : Gaussian(gaussian),
          last(length > 1 ? static_cast<float>(length - 1) : 1.0f),
          peak(nearest(length)),
          scale(1.0f / (last * width)) {}

    __device__ static float point(int64_t j, int64_t) { return static_cast<float>(j); }

    __device__ float value(float j) const { return Gaussian::value(from_peak(j), sum(j)); }
    __device__ void add_gradient(float j, float upstream, float& d_center, float& d_width) const {
        Gaussian::add_gradient(from_peak(j), sum(j), upstream, d_center, d_width);
    }

  private:
    __device__ float from_peak(float j) const { return (j - peak) * scale; }
    __device__ float from_center(float j) const { return fmaf(-center, last, j); }

    // Finite: at the peak it is multiplied by 0. A NaN stays.
    __device__ float sum(float j) const {
        constexpr float MOST = 3.402823466e38f;
        const float s = (from_center(j) + from_center(peak)) * scale;
        return s == s ? fminf(fmaxf(s, -MOST), MOST) : s;
    }

    // Without a branch on what is in memory, so that the kernels' barriers can be verified.
    __device__ float nearest(int64_t length) const {
        const float inside = fminf(fmaxf(center, 0.0f), 1.0f);  // 0 also for a NaN
        const float below = floorf(fminf(inside * last, last - 1.0f)), above = below + 1.0f;
        const bool nearer = fabsf(fmaf(-inside, last, above)) < fabsf(fmaf(-inside, last, below));
        return below + (length > 1 && nearer ? 1.0f : 0.0f);
    }
};

}  // namespace cnm::cuda
