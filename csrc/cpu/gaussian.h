// The Gaussian over time that weights keys: g_j = exp(-alpha (x_j - c)^2 / w^2), x = linspace(0, 1, length).
#pragma once

#include <cmath>

#include "simd.h"

namespace cnm {
namespace CNM_ISA {

struct Gaussian {
  float center, width, alpha;  // the width already clamped
  int length;

  // torch.linspace(0, 1, length)[j], which counts from the nearer end
  float position(int j) const {
    if (length == 1) return 0.f;
    const float step = 1.f / float(length - 1);
    return j < length / 2 ? step * float(j) : 1.f - step * float(length - 1 - j);
  }
  float value(int j) const {
    const float distance = position(j) - center;
    return std::exp(-alpha * (distance * distance) / (width * width));
  }
  // Adds the share of point j to the gradients: `upstream` is dL/dg_j g_j.
  void add_gradient(int j, double upstream, double& to_center, double& to_width) const {
    const double distance = double(position(j)) - center, w = width;
    const double slope = upstream * 2 * alpha * distance / (w * w);
    to_center += slope;
    to_width += slope * distance / w;
  }
};

}  // namespace CNM_ISA
}  // namespace cnm
