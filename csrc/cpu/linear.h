// linear: what its kernels are given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace cnm {

struct LinearInputs {
    Dtype dtype;         // of x, out and their gradients
    Dtype weight_dtype;  // of weight and d_weight: dtype, or float32
    int64_t N;           // rows
    int64_t G, M, K;     // groups, and of each group outputs and inputs
    const void* x;       // [N, G, K], rows `x_ld` elements apart
    int64_t x_ld;
    const void* weight;  // [G, M, K] with these strides, of which the second or the third is 1
    int64_t weight_group, weight_row, weight_column;
    // Rows come in samples of `sample_rows`, of which the first lengths[b] count; null: all do.
    const int64_t* lengths;
    int64_t sample_rows;
    bool split;  // float32 operands as sums of two bf16 numbers, where the processor multiplies those
};

// out[N, G, M] = x weight^T + bias[G, M], 0 where that is negative and `relu`, and in rows that do not count.
struct LinearParams : LinearInputs {
    const float* bias;  // or null
    void* out;
    bool relu;
};

struct LinearBackwardParams : LinearInputs {
    const void* d_out;  // [N, G, M], rows `d_out_ld` elements apart
    int64_t d_out_ld;
    const void* out;  // [N, G, M] where `relu` was on, else null
    void* d_x;        // [N, G, K] or null: not wanted
    void* d_weight;   // [G, M, K] or null
    float* d_bias;    // [G, M] or null
};

CNM_MATRIX_KERNEL(linear, LinearParams)
CNM_MATRIX_KERNEL(linear_backward, LinearBackwardParams)

}  // namespace cnm
