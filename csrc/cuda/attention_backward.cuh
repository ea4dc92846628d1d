// Shared by attention's backward kernels.
#pragma once

#include "attention.cuh"

namespace cnm::cuda {

// Writes dm of a sample and branch, sum_of(j) for key j, or the gradients of center and width. The whole block takes
// part; `scratch` has a float for each warp.
template <class SumOf>
__device__ __forceinline__ void finish_key_weights(const BranchedAttentionBackwardParams& p, int64_t b, int64_t branch,
                                                   float* scratch, SumOf sum_of) {
    float d_center = 0, d_width = 0;
    const bool moment = p.d_center != nullptr;
    const Gaussian gaussian(moment ? load(p.center + b) : 0.0f, moment ? load(p.width + b) : 1.0f, p.alpha, p.min_width,
                            p.complement);
#pragma unroll 1  // few turns: counting them ahead takes a division
    for (int64_t j = thread(); j < p.Lk; j += threads()) {
        const float sum = sum_of(j);
        if (moment) {
            gaussian.add_gradient(position(j, p.Lk), sum, d_center, d_width);
        } else {
            store(p.d_key_weight + branch * p.branches.weights + b * p.Lk + j, sum);
        }
    }
    if (!moment) return;
    d_center = sum_over_block(d_center, scratch);
    d_width = sum_over_block(d_width, scratch);
    if (thread() != 0) return;
    store(p.d_center + b, d_center);
    store(p.d_width + b, gaussian.width_passes ? d_width : 0.0f);
}

// The backward where one block holds all keys of a head.
struct ShortBackward {
    bool possible;
    bool sees_all_heads;  // a block has all heads of a sample, and sums the gradient of their keys' weights itself
};
ShortBackward short_backward(const BranchedAttentionBackwardParams& p);
void attention_backward_short(const BranchedAttentionBackwardParams& p, bool merged, float* d_weight_parts);

}  // namespace cnm::cuda
