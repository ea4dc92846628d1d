// Weighted and Gaussian attention: what its kernels are given.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

// [B, H, L, d], the last dimension contiguous; strides in elements.
struct Heads {
    void* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
};

struct AttentionInputs {
    Dtype dtype;  // of query, key, value, out and their gradients
    int64_t B, H, Lq, Lk, d;
    Heads query, key, value;
    bool causal;
    float scale;
    const int64_t* key_lengths;  // [B] or null: all Lk
    // The keys' weights: a tensor, a Gaussian, or neither.
    const float* key_weight;      // [B, Lk]
    const float *center, *width;  // [B]
    float alpha, min_width;
    bool complement;
};

struct AttentionParams : AttentionInputs {
    Heads out;
    float* stats;    // [B, H, Lq, 2]: of each row the maximum and 1 / sum, for the backward
    float* weights;  // [B, Lq, Lk] or null: P averaged over the heads
};

struct AttentionBackwardParams : AttentionInputs {
    Heads d_out;
    const float* d_weights;         // [B, Lq, Lk] or null
    const float* stats;             // [B, H, Lq, 2]
    Heads d_query, d_key, d_value;  // data null: not wanted
    float* d_key_weight;            // [B, Lk] or null
    float *d_center, *d_width;      // [B] or null
};

CNM_MATRIX_KERNEL(attention, AttentionParams)
CNM_MATRIX_KERNEL(attention_backward, AttentionBackwardParams)

}  // namespace cnm
