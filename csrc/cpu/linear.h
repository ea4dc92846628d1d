// linear: what its kernels are given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace cnm {

// out[N, M] = x[N, K] weight[M, K]^T + bias[M], 0 where that is negative and `relu`.
struct LinearParams {
    Dtype dtype;         // of x and out
    Dtype weight_dtype;  // of weight: dtype, or float32
    int64_t N, M, K;
    const void* x;  // rows `x_ld` elements apart
    int64_t x_ld;
    const void* weight;
    const float* bias;  // or null
    void* out;          // [N, M]
    bool relu;
};

struct LinearBackwardParams {
    Dtype dtype;         // of d_out, out, x, d_x
    Dtype weight_dtype;  // of weight and d_weight
    int64_t N, M, K;
    const void* d_out;  // [N, M], rows `d_out_ld` elements apart
    int64_t d_out_ld;
    const void* out;  // [N, M] where `relu` was on, else null
    const void* x;    // rows `x_ld` elements apart
    int64_t x_ld;
    const void* weight;  // [M, K]
    void* d_x;           // [N, K] or null: not wanted
    void* d_weight;      // [M, K] or null
    float* d_bias;       // [M] or null
};

CNM_MATRIX_KERNEL(linear, LinearParams)
CNM_MATRIX_KERNEL(linear_backward, LinearBackwardParams)

}  // namespace cnm
