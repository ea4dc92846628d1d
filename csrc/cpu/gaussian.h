// The Gaussian over time, in registers: g(x) = exp(-alpha (x - c)^2 / w^2), w = max(width, min_width), or 1 - g.
#pragma once

#include <limits>

#include "simd.h"

namespace cnm::CNM_ISA {

struct Gaussian {
    float center, width, alpha;
    bool complement;
    bool width_passes;  // whether the clamp lets the gradient through to the width

    Gaussian(float center, float width, float alpha, float min_width, bool complement)
        : center(center),
          width(width < min_width ? min_width : width),
          alpha(alpha),
          complement(complement),
          width_passes(width >= min_width) {}

    Vec value(Vec x) const {
        const Vec g = bell(x);
        return complement ? set1(1.0f) - g : g;
    }

    // Adds upstream . dg/dcenter and upstream . dg/dwidth, lane by lane, with the clamp not yet applied:
    // dg/dc = g 2 alpha (x - c) / w^2, dg/dw = g 2 alpha (x - c)^2 / w^3.
    void add_gradient(Vec x, Vec upstream, Vec& d_center, Vec& d_width) const {
        const Vec u = (x - set1(center)) / set1(width), g = bell(x);
        const Vec product = upstream * g * u * set1((complement ? -2.0f : 2.0f) * alpha) / set1(width);
        const Vec common = select(less(g, set1(std::numeric_limits<float>::denorm_min())), set1(0), product);
        d_center += common;
        d_width = fma(common, u, d_width);
    }

    // One position's, in float64; `upstream` comes multiplied by bell(x).
    void add_gradient(double x, double upstream, double& d_center, double& d_width) const {
        const double slope = (complement ? -2.0 : 2.0) * alpha / width, u = (x - center) / width;
        d_center += upstream * slope * u;
        d_width += upstream * slope * u * u;
    }

    Vec bell(Vec x) const {
        const Vec u = (x - set1(center)) / set1(width);  // divided first: the width's square may be 0 or infinite
        return exp(set1(-alpha) * u * u);
    }
};

// Positions j to j + W of linspace(0, 1, length), counted from the nearer end as torch.linspace does.
inline Vec positions(int64_t j, int64_t length) {
    constexpr float LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vec index = set1(static_cast<float>(j)) + load(LANES);
    const Vec step = set1(length > 1 ? 1.0f / static_cast<float>(length - 1) : 0.0f);
    const Vec from_the_end = fnma(step, set1(static_cast<float>(length - 1)) - index, set1(1.0f));
    const Vec half = set1(length > 1 ? static_cast<float>(length / 2) : 1.0f);
    return select(less(index, half), step * index, from_the_end);
}

}  // namespace cnm::CNM_ISA
