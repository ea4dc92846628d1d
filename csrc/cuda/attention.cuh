// What attention's forward and backward kernels share.
#pragma once

#include <algorithm>

#include "branched_attention.h"
#include "constants.h"
#include "gaussian.cuh"
#include "tiles.cuh"

namespace cnm::cuda {

constexpr int TILE = 64;  // queries, and keys, that a block holds at a time: a warp has 16 of them
constexpr int ATTENTION_THREADS = TILE / 16 * WARP;

template <class T>
__device__ __forceinline__ T* row_of_head(const Heads& heads, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(heads.data) + b * heads.batch + h * heads.head + row * heads.row;
}

// Keys of a sample that are real.
__device__ __forceinline__ int64_t real_keys(const AttentionInputs& p, int64_t b) {
    if (p.key_lengths == nullptr) return p.Lk;
    const int64_t length = load(p.key_lengths + b);
    return length < 0 ? 0 : length < p.Lk ? length : p.Lk;
}

// m + eps of a tile of keys, for each of `branches`, to weights [branches, TILE]; 1 behind the `limit` real keys: what
// lies there may be anything.
__device__ __forceinline__ void load_key_weights(const AttentionInputs& p, const Branches& branches, int64_t b,
                                                 int64_t first_branch, int64_t count, int64_t first_key, int64_t limit,
                                                 float* weights) {
    for (int64_t i = thread(); i < count * TILE; i += threads()) {
        const int64_t j = first_key + i % TILE;
        float m = 1.0f;
        if (j < limit && p.key_weight != nullptr) {
            m = load(p.key_weight + (first_branch + i / TILE) * branches.weights + b * p.Lk + j) + KEY_WEIGHT_EPS;
        } else if (p.center != nullptr) {
            const Gaussian gaussian(load(p.center + b), load(p.width + b), p.alpha, p.min_width, p.complement);
            m = gaussian.value(position(j, p.Lk)) + KEY_WEIGHT_EPS;
        }
        weights[i] = m;
    }
}

inline bool rows_aligned(Dtype dtype, int64_t d, std::initializer_list<Heads> tensors) {
    const int64_t element = dtype == Dtype::float32 ? 4 : 2;
    const auto whole = [&](int64_t numbers) { return numbers * element % static_cast<int64_t>(sizeof(Vec16B)) == 0; };
    return whole(d) && std::all_of(tensors.begin(), tensors.end(), [&](const Heads& heads) {
               return aligned_to_vec16b(heads.data) && whole(heads.batch) && whole(heads.head) && whole(heads.row);
           });
}

// Calls body(T, D) with the element type and the padded head dimension.
template <class Body>
void with_head_size(Dtype dtype, int64_t d, Body body) {
    with_type(dtype, [&](auto* type) {
        if (d <= 32) return body(type, std::integral_constant<int, 32>());
        if (d <= 64) return body(type, std::integral_constant<int, 64>());
        if (d <= 128) return body(type, std::integral_constant<int, 128>());
        throw std::runtime_error("cnm_kernels: these kernels take heads of up to 128, got " + std::to_string(d) +
                                 ": use_backend('triton') or use_backend('torch') takes wider ones");
    });
}

}  // namespace cnm::cuda
