// Shared by attention's forward and backward kernels.
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

// Starts to copy rows [first, end) of a head, TILE at most, into a tile: a lane takes the same columns of rows that lie
// equally far apart, so that addresses are added up. `rows` is the head's row 0.
template <class T, int D>
__device__ __forceinline__ void copy_rows(T* tile, const T* rows, int64_t row_stride, int first, int end, int columns,
                                          bool aligned) {
    constexpr int PER = PER_VEC16B<T>, PIECES = D / PER, APART = ATTENTION_THREADS / PIECES, STRIDE = tile_stride<T>(D);
    if (!aligned || D == 32) {  // for which registers would not do
        const auto row_at = [&](int r) { return first + r < end ? rows + (first + r) * row_stride : nullptr; };
        copy_tile<TILE, D>(tile, columns, aligned, row_at, STRIDE);
        return;
    }
    const int own_row = thread() / PIECES, c = thread() % PIECES * PER;
    const int below = c < columns ? end - first - own_row : 0;
    const T* from = rows + (first + own_row) * row_stride + c;
    T* const to = tile + own_row * STRIDE + c;
#pragma unroll
    for (int r = 0; r < TILE; r += APART) {
        copy_async(to + r * STRIDE, from, r < below);
        from += APART * row_stride;
    }
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
