// The Gaussian over time, in registers: g(x) = exp(-alpha (x - c)^2 / w^2), w = max(width, min_width), or 1 - g; as it
// is, or divided by its largest sample.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace cnm::CNM_ISA {

// j to j + W.
inline Vec indices(int64_t j) {
    constexpr float LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return set1(static_cast<float>(j)) + load(LANES);
}

// Positions j to j + W of linspace(0, 1, length), counted from the nearer end as torch.linspace does.
inline Vec positions(int64_t j, int64_t length) {
    const Vec index = indices(j);
    const Vec step = set1(length > 1 ? 1.0f / static_cast<float>(length - 1) : 0.0f);
    const Vec from_the_end = fnma(step, set1(static_cast<float>(length - 1)) - index, set1(1.0f));
    const Vec half = set1(length > 1 ? static_cast<float>(length / 2) : 1.0f);
    return select(less(index, half), step * index, from_the_end);
}

struct Gaussian {
    float center, width, alpha;
    bool complement;
    bool width_passes;  // whether the clamp lets the gradient through to the width

    Gaussian(float center, float width, float alpha, float min_width, bool complement)
        : center(center),
          width(width < min_width ? min_width : width),
          alpha(alpha),
          complement(complement),
          width_passes(!(width < min_width)) {}

    static Vec points(int64_t j, int64_t length) { return positions(j, length); }

    Vec value(Vec x) const {
        const Vec u = scaled(x);
        return value(u, u);
    }

    // Adds upstream . dg/dcenter and upstream . dg/dwidth, lane by lane, with the clamp not yet applied:
    // dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3.
    void add_gradient(Vec x, Vec upstream, Vec& d_center, Vec& d_width) const {
        const Vec u = scaled(x);
        add_gradient(u, u, upstream, d_center, d_width);
    }

    // One position's, in float64; `upstream` comes multiplied by bell(x), which is 0 infinitely far from the center.
    void add_gradient(double x, double upstream, double& d_center, double& d_width) const {
        if (upstream == 0) return;
        const double slope = (complement ? -2.0 : 2.0) * alpha / width, u = (x - center) / width;
        d_center += upstream * slope * u;
        d_width += upstream * slope * u * u;
    }

    Vec bell(Vec x) const {
        const Vec u = scaled(x);
        return bell(u, u);
    }

  protected:
    // (x - c) / w, divided before it is squared: the width's square may be 0 or infinite. Finite, since 0 times it is
    // 0.
    Vec scaled(Vec x) const { return finite((x - set1(center)) / set1(width)); }

    static Vec finite(Vec u) {
        constexpr float MOST = std::numeric_limits<float>::max();
        return vmin(set1(MOST), vmax(set1(-MOST), u));  // NaN stays
    }

    // The same of exp(-alpha t s), where dt/dc = ds/dc = -1 / w or t does not depend on c.
    Vec bell(Vec t, Vec s) const { return exp(set1(-alpha) * t * s); }
    Vec value(Vec t, Vec s) const {
        const Vec g = bell(t, s);
        return complement ? set1(1.0f) - g : g;
    }
    void add_gradient(Vec t, Vec s, Vec upstream, Vec& d_center, Vec& d_width) const {
        const Vec g = bell(t, s);
        const Vec product = upstream * g * t * set1((complement ? -2.0f : 2.0f) * alpha) / set1(width);
        const Vec common = select(less(g, set1(std::numeric_limits<float>::denorm_min())), set1(0), product);
        d_center += common;
        d_width = fma(common, s, d_width);
    }
};

// g divided by its largest sample, which is at the position p nearest to the center, of two the first:
// exp(-alpha (u^2 - u_p^2)) with u = (x - c) / w. The difference of squares is the product of t = u - u_p and
// s = u + u_p, in which nothing cancels, and which gives the gradient too: 2 alpha t / w to c, 2 alpha t s / w to w.
// Positions are counted, x = j / (length - 1), and j - c (length - 1) is rounded once.
struct NormalizedGaussian : Gaussian {
    float last, peak, scale;  // two positions, and how much of u a step is

    NormalizedGaussian(const Gaussian& gaussian, int64_t length)
        : Gaussian(gaussian),
          last(length > 1 ? static_cast<float>(length - 1) : 1.0f),
          peak(nearest(length)),
          scale(1.0f / (last * width)) {}

    static Vec points(int64_t j, int64_t) { return indices(j); }

    Vec value(Vec j) const {
        const Vec t = from_peak(j);
        return Gaussian::value(t, sum(j, t));
    }
    void add_gradient(Vec j, Vec upstream, Vec& d_center, Vec& d_width) const {
        const Vec t = from_peak(j);
        Gaussian::add_gradient(t, sum(j, t), upstream, d_center, d_width);
    }

  private:
    Vec from_peak(Vec j) const { return (j - set1(peak)) * set1(scale); }

    // Finite: at the peak it is multiplied by 0. A NaN stays. No sample is larger than the peak's; lanes beyond the
    // last sample, which would be, are as large.
    Vec sum(Vec j, Vec t) const {
        const Vec steps = fnma(set1(center), set1(last), j) + set1(from_center(peak));
        const Vec s = finite(steps * set1(scale));
        return select(less(t * s, set1(0)), set1(0), s);
    }

    float from_center(float j) const { return std::fma(-center, last, j); }

    float nearest(int64_t length) const {
        const float place = center * last;
        if (length <= 1 || !(place > 0)) return 0;  // nor where the center is NaN, as all samples then are
        if (place >= last) return last;
        const float below = std::floor(place);
        return std::abs(from_center(below)) <= std::abs(from_center(below + 1)) ? below : below + 1;
    }
};

}  // namespace cnm::CNM_ISA
