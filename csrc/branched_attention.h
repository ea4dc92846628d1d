// branched_attention: what its kernels are given.
#pragma once

#include "attention.h"

namespace cnm {

// Branches lie one behind the other: numbers from one to the next. Attention itself has one branch.
struct Branches {
    int64_t n = 1;
    int64_t weights = 0;  // of key_weight [n, B, Lk]
    int64_t out = 0;      // of out and d_out [n, B, H, Lq, d]
    int64_t stats = 0;    // of stats [n, B, H, Lq, 2]
};

struct BranchedAttentionParams : AttentionParams {
    Branches branches;
};

struct BranchedAttentionBackwardParams : AttentionBackwardParams {
    Branches branches;
};

CNM_MATRIX_KERNEL(branched_attention, BranchedAttentionParams)
CNM_MATRIX_KERNEL(branched_attention_backward, BranchedAttentionBackwardParams)

}  // namespace cnm
