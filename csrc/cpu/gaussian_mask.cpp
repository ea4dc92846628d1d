// The Gaussian mask by itself, forward and backward: one Gaussian after the other, its points in order.

#include "gaussian_mask.h"

#include "gaussian.h"

namespace cnm {
namespace CNM_ISA {
namespace {

Gaussian gaussian_at(const GaussianMaskParams& p, std::int64_t n) {
  // Written so that a NaN width stays NaN.
  return {p.center[n], p.width[n] < p.min_width ? p.min_width : p.width[n], p.alpha, p.length};
}

}  // namespace

void gaussian_mask_forward(const GaussianMaskParams& p, ParallelFor parallel_for) {
  parallel_for(p.N, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Gaussian gaussian = gaussian_at(p, n);
      for (int j = 0; j < p.length; ++j) {
        const float g = gaussian.value(j);
        p.mask[n * p.length + j] = p.complement ? 1.f - g : g;
      }
    }
  });
}

void gaussian_mask_backward(const GaussianMaskParams& p, ParallelFor parallel_for) {
  parallel_for(p.N, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Gaussian gaussian = gaussian_at(p, n);
      const float sign = p.complement ? -1.f : 1.f;
      double to_center = 0, to_width = 0;
      for (int j = 0; j < p.length; ++j)
        gaussian.add_gradient(j, double(sign * p.grad_mask[n * p.length + j]) * gaussian.value(j), to_center, to_width);
      p.grad_center[n] = float(to_center);
      p.grad_width[n] = p.width[n] >= p.min_width ? float(to_width) : 0.f;
    }
  });
}

}  // namespace CNM_ISA
}  // namespace cnm
