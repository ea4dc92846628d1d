// What the dropout kernels are told. Torch-free.
#pragma once

#include "kernel.h"

namespace cnm {

struct DropoutParams {
  std::uint64_t seed, offset;
  int threshold;  // of 65,536 draws, those below it drop
  float scale;    // of what is kept
};

struct ElementwiseDropoutParams {
  DType dtype;
  std::int64_t count;
  DropoutParams dropout;
  const void* x;
  void* out;
};

struct LayerNormParams {  // of rows [N, D]
  DType dtype, weight_dtype;
  std::int64_t N;
  int D;
  float eps;
  DropoutParams dropout;
  const void *x, *residual, *weight, *bias;
  void* out;
  float* stats;  // [N, 2]: mean and 1 / standard deviation; written by the forward, read by the backward
  // Backward only; a null output is not wanted.
  const void* grad_out;
  void *grad_x, *grad_residual;
  float* partial;  // [ceil(N / kLayerNormRows), 2, D] or null: sums for weight and bias, a block of rows each
};

constexpr std::int64_t kLayerNormRows = 128;

}  // namespace cnm
