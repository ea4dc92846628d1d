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

// m + eps of key j in a branch; 1 behind the `limit` real keys: what lies there may be anything.
__device__ __forceinline__ float key_weight_of(const AttentionInputs& p, const Branches& branches, int64_t b,
                                               int64_t branch, int64_t j, int64_t limit) {
    if (j < limit && p.key_weight != nullptr)
        return load(p.key_weight + branch * branches.weights + b * p.Lk + j) + KEY_WEIGHT_EPS;
    if (p.center == nullptr) return 1.0f;
    const Gaussian gaussian(load(p.center + b), load(p.width + b), p.alpha, p.min_width, p.complement);
    return gaussian.value(position(j, p.Lk)) + KEY_WEIGHT_EPS;
}

// The same of a tile of keys, for each of `count` branches, to weights [count, TILE].
__device__ __forceinline__ void load_key_weights(const AttentionInputs& p, const Branches& branches, int64_t b,
                                                 int64_t first_branch, int64_t count, int64_t first_key, int64_t limit,
                                                 float* weights) {
    for (int64_t i = thread(); i < count * TILE; i += threads())
        weights[i] = key_weight_of(p, branches, b, first_branch + i / TILE, first_key + i % TILE, limit);
}

// Swaps the one's `low` for the `high` of the other lane.
__device__ __forceinline__ void swap(uint32_t& low, uint32_t& high, int mask) {
    const bool upper = (lane() & mask) != 0;
    const uint32_t got = bits_of(shuffle_xor(float_of(upper ? low : high), mask));
    (upper ? low : high) = got;
}

// Writes sixteen columns of a warp's 16 rows, times `scale`. The four lanes of a row exchange what they hold, so that
// each writes sixteen bytes. row_at(r) points to the first of the columns, or is null.
template <class T, class RowAt>
__device__ __forceinline__ void store_columns(const float (&first)[4], const float (&second)[4], float scale,
                                              int columns, bool aligned, RowAt row_at) {
    if (aligned) {
        uint32_t words[4];  // of columns 0 to 7 and the others of row g, and of row g + 8
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            words[2 * half] = pack<T>(first[2 * half] * scale, first[2 * half + 1] * scale);
            words[2 * half + 1] = pack<T>(second[2 * half] * scale, second[2 * half + 1] * scale);
        }
        swap(words[0], words[1], 1);
        swap(words[2], words[3], 1);
        swap(words[0], words[2], 2);
        swap(words[1], words[3], 2);
        const int column = lane() % 2 * 8;
        T* const row = row_at(lane() / 4 + lane() % 4 / 2 * 8);
        if (row != nullptr && column < columns) {
            store(reinterpret_cast<Vec16B*>(row + column), Vec16B{{words[0], words[1], words[2], words[3]}});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        T* const row = row_at(row_of(i));
        if (row == nullptr) continue;
        T rounded;
        from_float(&rounded, first[i] * scale);
        if (column_of(i) < columns) store(row + column_of(i), rounded);
        from_float(&rounded, second[i] * scale);
        if (column_of(i) + 8 < columns) store(row + column_of(i) + 8, rounded);
    }
}

inline bool rows_aligned(Dtype dtype, int64_t d, std::initializer_list<Heads> tensors) {
    const int64_t element = dtype == Dtype::float32 ? 4 : 2;
    const auto whole = [&](int64_t numbers) { return numbers * element % static_cast<int64_t>(sizeof(Vec16B)) == 0; };
    return whole(d) && std::all_of(tensors.begin(), tensors.end(), [&](const Heads& heads) {
               return aligned_to_vec16b(heads.data) && whole(heads.batch) && whole(heads.head) && whole(heads.row);
           });
}

constexpr int64_t ENOUGH_BLOCKS = 264;  // fill any GPU; a constant, so that all GPUs launch the same blocks

// The forward where one block holds all keys of a head; false: it does not take these.
bool attention_short(const AttentionParams& p);

// Calls body(T, D) with the element type and the padded head dimension.
template <class Body>
void with_head_size(Dtype dtype, int64_t d, Body body) {
    with_type(dtype, [&](auto* type) {
        if (d <= 32) return body(type, std::integral_constant<int, 32>());
        if (d <= 64) return body(type, std::integral_constant<int, 64>());
        if (d <= 128) return body(type, std::integral_constant<int, 128>());
        throw std::runtime_error("cnm_kernels: these kernels take heads of up to 128, got " + std::to_string(d) +
                                 ": use_backend('torch') takes wider ones");
    });
}

// Adds a tile's sums to those of a thread's two rows. `shrink` comes in as exp of how far the maximum rose, and goes
// out as the factor of results that were divided by the sums so far; `inverse` is 1 / total.
__device__ __forceinline__ void add_to_totals(bool first, const float (&sum)[2], float (&total)[2], float (&shrink)[2],
                                              float (&inverse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float before = first ? 0.0f : total[r] * shrink[r];
        total[r] = before + sum_over_lanes<4>(sum[r]);
        inverse[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
        shrink[r] = before * inverse[r];
    }
}

}  // namespace cnm::cuda
