// Shared by the forward and the backward kernels of linear_nll: lists of the active tokens, the product of both, and
// their launch settings.
#pragma once

#include <algorithm>

#include "linear_nll.h"
#include "tiles.cuh"

namespace cnm::cuda {

constexpr int64_t BLOCKS = 256;   // fill any GPU; a constant, so that all GPUs give the same bits
constexpr int64_t MAX_PARTS = 8;  // parts of the vocabulary, or of the tokens
constexpr int SUM_THREADS = 256, MAX_WARPS = 8;

// Keys (words; in the backward tokens) of a tile with D columns; registers limit the number.
template <class T, int D>
constexpr int KEYS = sizeof(T) == 4 || D > 128 ? 32 : 64;

// ------------------------------------------------------------------------------------------------ active tokens

__device__ __forceinline__ int64_t valid_length(const LinearNllInputs& p, const float* d_nll, int64_t m) {
    const int64_t length = load(p.valid_lengths + m);
    if (length <= 0 || (d_nll != nullptr && load(d_nll + m) == 0.0f)) return 0;
    return length < p.L ? length : p.L;
}

// Counts the active tokens of the rows before m; all threads of the block take part.
__device__ __forceinline__ int64_t tokens_before(const LinearNllInputs& p, const float* d_nll, int64_t m,
                                                 float* scratch) {
    float low = 0, high = 0;  // exact: each stays below 2^24
    for (int64_t row = thread(); row < m; row += threads()) {
        const int64_t length = valid_length(p, d_nll, row);
        low += static_cast<float>(length & 0xFFF);
        high += static_cast<float>(length >> 12);
    }
    return static_cast<int64_t>(sum_over_block(low, scratch)) +
           (static_cast<int64_t>(sum_over_block(high, scratch)) << 12);
}

// Writes the indices of the active tokens to tokens [M L], in order, and their number to count [].
void list_tokens(const LinearNllInputs& p, const float* d_nll, int* tokens, int* count);

// ------------------------------------------------------------------------------------------------ the two products

// Multiplies a tile of rows (16 per warp) with a range of keys, tile by tile and in chunks of D columns. The same
// two vectors have the same product, to the bit, whichever of them is the row, if `KEYS_FIRST` says where it is not.
template <class T, int D, bool KEYS_FIRST>
struct Products {
    static constexpr int STRIDE = tile_stride<T>(D), N = KEYS<T, D> / 8;

    int columns, chunks, own_chunk, stages;
    bool aligned;
    T *rows, *keys;  // [stages if chunks > 1, warps * 16], [stages, KEYS]
    char* rest;      // unused shared memory

    __device__ Products(int64_t columns, int stages, bool aligned)
        : columns(static_cast<int>(columns)),
          chunks(static_cast<int>((columns + D - 1) / D)),
          own_chunk(static_cast<int>(blockIdx.z)),
          stages(stages),
          aligned(aligned) {
        rows = dynamic_shared<T>();
        keys = rows + (chunks > 1 ? stages : 1) * row_tile();
        rest = reinterpret_cast<char*>(keys + stages * KEYS<T, D> * STRIDE);
    }

    static size_t bytes(int warps, int64_t columns, int stages) {
        const int row_stages = columns > D ? stages : 1;
        return sizeof(T) * STRIDE * static_cast<size_t>(row_stages * warps * 16 + stages * KEYS<T, D>);
    }

    __device__ int row_tile() const { return threads() / WARP * 16 * STRIDE; }

    // Copies the data of step `step` over tiles and chunks; row_at and key_at(tile, r) point to whole rows.
    template <class RowAt, class KeyAt>
    __device__ void copy(int step, RowAt row_at, KeyAt key_at) const {
        const int tile = step / chunks, first = (own_chunk + 1 + step % chunks) % chunks * D;
        const int width = columns - first < D ? columns - first : D;
        if (chunks > 1 || step == 0) {
            T* const to = rows + (chunks > 1 ? step % stages : 0) * row_tile();
            const auto at = [&](int r) -> const T* {
                const T* const row = row_at(r);
                return row == nullptr ? nullptr : row + first;
            };
            if (threads() == MAX_WARPS * WARP) {
                copy_tile<MAX_WARPS * 16, D>(to, width, aligned, at, STRIDE);
            } else {
                copy_tile<MAX_WARPS / 2 * 16, D>(to, width, aligned, at, STRIDE);
            }
        }
        copy_tile<KEYS<T, D>, D>(
            keys + step % stages * KEYS<T, D> * STRIDE, width, aligned,
            [&](int r) -> const T* {
                const T* const key = key_at(tile, r);
                return key == nullptr ? nullptr : key + first;
            },
            STRIDE);
    }

    // Calls before(tile) before a barrier, and use(tile, z, v): z [16, KEYS] are the products of this warp's rows, and
    // v is the tile of keys at the block's columns.
    template <class RowAt, class KeyAt, class Before, class Use>
    __device__ void walk(int tiles, RowAt row_at, KeyAt key_at, Before before, Use use) const {
        const int steps = tiles * chunks;
        float z[N][4];
        copy(0, row_at, key_at);
        commit_async();
        for (int step = 0; step < steps; ++step) {
            if (stages == 2 && step + 1 < steps) copy(step + 1, row_at, key_at);
            commit_async();
            const int tile = step / chunks, chunk = step % chunks;
            if (chunk == 0) {
                clear(z);
                before(tile);
            }
            stages == 2 ? wait_async<1>() : wait_async<0>();
            sync_block();
            const T* const own = rows + (chunks > 1 ? step % stages : 0) * row_tile() + warp() * 16 * STRIDE;
            const T* const tile_keys = keys + step % stages * KEYS<T, D> * STRIDE;
            add_products<D, KEYS_FIRST>(z, own, tile_keys, STRIDE);
            if (chunk + 1 == chunks) use(tile, z, tile_keys);
            sync_block();
            if (stages == 1 && step + 1 < steps) {
                copy(step + 1, row_at, key_at);
                commit_async();
            }
        }
    }
};

// ------------------------------------------------------------------------------------------------ on the host

constexpr size_t SCRATCH_BYTES = sizeof(float) * SUM_THREADS / WARP;

// Calls body(T, D) with the width of a chunk.
template <class Body>
void dispatch(Dtype dtype, int64_t columns, Body body) {
    with_type(dtype, [&](auto* type) {
        if (columns <= 64) return body(type, std::integral_constant<int, 64>());
        if (columns <= 128) return body(type, std::integral_constant<int, 128>());
        return body(type, std::integral_constant<int, 256>());
    });
}

// Launch settings of a kernel that loops over keys: as many warps and stages as shared memory allows.
struct Plan {
    int warps, stages;
    size_t bytes;
};
template <class T, int D>
Plan plan(int most_warps, int64_t columns, size_t rest_per_row, size_t rest) {
    const size_t limit = static_cast<size_t>(most_shared_bytes());
    Plan found{};
    for (const auto& [warps, stages] :
         {std::pair{MAX_WARPS, 2}, {MAX_WARPS, 1}, {MAX_WARPS / 2, 2}, {MAX_WARPS / 2, 1}}) {
        const size_t tiles = Products<T, D, false>::bytes(warps, columns, stages);
        found = {warps, stages, tiles + rest + rest_per_row * static_cast<size_t>(warps * 16)};
        if (warps <= most_warps && found.bytes <= limit) return found;
    }
    return found;  // too large: the launch reports the error
}

constexpr int64_t parts_to_fill(int64_t tiles, int64_t most) {
    return std::max<int64_t>(1, std::min({BLOCKS / std::max<int64_t>(tiles, 1), MAX_PARTS, most}));
}

}  // namespace cnm::cuda
