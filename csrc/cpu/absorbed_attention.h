// absorbed_attention: what its kernels are given.
#pragma once

#include <cstdint>

#include "attention.h"
#include "isa.h"
#include "types.h"

namespace cnm {

struct AbsorbedAttentionInputs {
    Dtype dtype;  // of query, key, value, out and their gradients
    int64_t B, H, Lq, Lk, D;
    Heads query;       // [B, Lq, D]
    Heads key, value;  // [B, H, Lk, D]; a value without data: the keys are the values
    float scale;
    const int64_t *query_lengths, *key_lengths;  // [B] or null: all are real
    const float* key_bias;                       // [B, H, Lk] or null: zeros
    const float* key_weight;                     // [B, Lk] or null: ones
};

struct AbsorbedAttentionParams : AbsorbedAttentionInputs {
    Heads out;  // [B, Lq, D]
};

struct AbsorbedAttentionBackwardParams : AbsorbedAttentionInputs {
    Heads d_out;
    Heads d_query, d_key, d_value;  // without data: not wanted
    float* d_key_bias;              // [B, H, Lk] or null
    float* d_key_weight;            // [B, Lk] or null
};

CNM_MATRIX_KERNEL(absorbed_attention, AbsorbedAttentionParams)
CNM_MATRIX_KERNEL(absorbed_attention_backward, AbsorbedAttentionBackwardParams)

}  // namespace cnm
