// What the linear_nll kernels are told. Torch-free.
#pragma once

#include "kernel.h"

namespace cnm {

struct LinearNllParams {
  DType dtype;
  int M, L, D, V;
  float label_smoothing;
  const void* hidden;                 // [M, L, D]
  const void* weight;                 // [V, D]
  const void* bias;                   // [V]
  const std::int64_t* target;         // [M, L]
  const std::int64_t* valid_lengths;  // [M]
  float* nll;                         // [M]
  float* lse;                         // [M, L], valid tokens only
  float* expected;                    // [M, L, D] or null: softmax(logits) W, valid tokens only
  float* accuracy;                    // [M] or null
  // Backward only; a null output is not wanted.
  const float* grad_nll;  // [M]
  void* grad_hidden;      // [M, L, D]
  void* grad_weight;      // [V, D]
  void* grad_bias;        // [V]
};

}  // namespace cnm
