// What the attention kernels are told: pointers, sizes and strides. Torch-free.
#pragma once

#include "kernel.h"

namespace cnm {

struct Heads {  // [B, H, L, d], the last dimension contiguous
  void* data = nullptr;
  std::ptrdiff_t batch = 0, head = 0, row = 0;  // strides in elements
};

struct AttentionParams {
  DType dtype;
  int B, H, Lq, Lk, d;
  bool causal;
  float scale;
  const std::int64_t* key_lengths;  // [B] or null: all Lk
  // The key weights: a tensor, a Gaussian, or neither.
  const float* key_weight;      // [B, Lk]
  const float *center, *width;  // [B]
  float alpha, min_width;
  bool complement;
  Heads query, key, value, out;
  float* stats;    // [B, H, Lq, 2]: each row's maximum and 1 / sum; written by the forward, read by the backward
  float* weights;  // [B, Lq, Lk] or null: P averaged over the heads
  // Backward only; a null output is not wanted.
  Heads grad_out, grad_query, grad_key, grad_value;
  const float* grad_weights;  // [B, Lq, Lk] or null
  float* grad_key_weight;     // [B, Lk]
  float *grad_center, *grad_width;  // [B]
};

}  // namespace cnm
