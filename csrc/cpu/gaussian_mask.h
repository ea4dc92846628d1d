// What the Gaussian mask's kernels are told. Torch-free.
#pragma once

#include "kernel.h"

namespace cnm {

struct GaussianMaskParams {
  std::int64_t N;  // Gaussians
  int length;
  const float *center, *width;  // [N]
  float alpha, min_width;
  bool complement;
  float* mask;  // [N, length]
  // Backward only.
  const float* grad_mask;           // [N, length]
  float *grad_center, *grad_width;  // [N]
};

}  // namespace cnm
