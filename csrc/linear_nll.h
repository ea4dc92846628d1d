// linear_nll: the arguments of its kernels.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

struct LinearNllInputs {
    Dtype dtype;  // of hidden, weight and the gradient of hidden
    int64_t M, L, D, V;
    float label_smoothing;
    const void* hidden;            // [M, L, D]
    const void* weight;            // [V, D]
    const float* bias;             // [V]
    const int64_t* target;         // [M, L], in [0, V) on valid tokens
    const int64_t* valid_lengths;  // [M]

    // The number of valid tokens of row m.
    int64_t valid(int64_t m) const {
        const int64_t n = valid_lengths[m];
        return n < 0 ? 0 : n < L ? n : L;
    }
};

struct LinearNllParams : LinearNllInputs {
    float* nll;       // [M]
    float* accuracy;  // [M] or null
    float* stats;     // [2, M, L], max z and log sum exp(z - max) of each token, for the backward
    float* expected;  // [M, L, D], softmax(z) W, for the backward, or null
};

struct LinearNllBackwardParams : LinearNllInputs {
    const float* d_nll;     // [M]
    const float* stats;     // [2, M, L]
    const float* expected;  // [M, L, D] or null
    void* d_hidden;         // [M, L, D], or null if not needed
    void* d_weight;         // [V, D] or null
    float* d_bias;          // [V] or null
    Dtype d_weight_dtype;   // dtype, or float32
};

CNM_MATRIX_KERNEL(linear_nll, LinearNllParams)
CNM_MATRIX_KERNEL(linear_nll_backward, LinearNllBackwardParams)

}  // namespace cnm
