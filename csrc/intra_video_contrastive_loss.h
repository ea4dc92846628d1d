// intra_video_contrastive_loss: what its kernels are given.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

struct IntraVideoContrastiveLossParams {
    const void* positive;  // [B]
    const void* hard;      // [B]
    const void* easy;      // [B]
    Dtype dtype;           // of all three
    int64_t B;
    float beta_1, beta_2;
    float* loss;  // []
};

struct IntraVideoContrastiveLossBackwardParams {
    const float* d_loss;   // []
    const void* positive;  // [B]
    const void* hard;      // [B]
    const void* easy;      // [B]
    Dtype dtype;           // of those and of what comes
    int64_t B;
    float beta_1, beta_2;
    void* d_positive;  // [B]
    void* d_hard;      // [B]
    void* d_easy;      // [B]
};

CNM_KERNEL(intra_video_contrastive_loss, IntraVideoContrastiveLossParams)
CNM_KERNEL(intra_video_contrastive_loss_backward, IntraVideoContrastiveLossBackwardParams)

}  // namespace cnm
