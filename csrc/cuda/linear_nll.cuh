// Shared by the forward and the backward kernels of linear_nll: lists of the active tokens, the product of both, and
// their launch settings.
#pragma once

#include <algorithm>

#include "linear_nll.h"
#include "tiles.cuh"

namespace cnm::cuda {

// Constants, so that all GPUs that run a kernel give the same bits.
constexpr int64_t BLOCKS = 256;   // fill any GPU
constexpr int64_t MAX_PARTS = 8;  // parts of the vocabulary, or of the tokens
constexpr int SUM_THREADS = 256, MAX_WARPS = 8;

struct alignas(8) Pair {
    float first, second;
};

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

// What the backward wants to know of an active token.
struct alignas(16) TokenNote {
    float highest, log_total, d_nll;
    int target;
};
// The tokens that take part, in order.
struct ActiveTokens {
    int *tokens, *count;  // [M L]: their indices, and []: how many
    TokenNote* notes;     // [M L], or null in the forward
};

// Lists the tokens of one row; the block's index is the row, and 0 where there are none.
__device__ __forceinline__ void list_tokens(const LinearNllInputs& p, const float* d_nll, const float* stats,
                                            const ActiveTokens& active) {
    if (p.M == 0) {
        if (thread() == 0) store(active.count, 0);
        return;
    }
    const int64_t m = blockIdx.x, before = tokens_before(p, d_nll, m, dynamic_shared<float>());
    const int64_t length = valid_length(p, d_nll, m);
    for (int64_t i = thread(); i < length; i += threads()) {
        const int64_t token = m * p.L + i;
        store(active.tokens + before + i, static_cast<int>(token));
        if (active.notes == nullptr) continue;
        store(active.notes + before + i,
              TokenNote{load(stats + token), load(stats + p.M * p.L + token),
                        load(d_nll + m) / static_cast<float>(length), static_cast<int>(load(p.target + token))});
    }
    if (m == p.M - 1 && thread() == 0) store(active.count, static_cast<int>(before + length));
}

// ------------------------------------------------------------------------------------------------ the two products

// Multiplies a tile of rows (16 per warp) with a range of keys, tile by tile and in chunks of D columns. The same
// two vectors have the same product, to the bit, whichever of them is the row, if `KEYS_FIRST` says where it is not.
template <class T, int D, bool KEYS_FIRST>
struct Products {
    static constexpr int STRIDE = tile_stride<T>(D), KEYS = cuda::KEYS<T, D>, N = KEYS / 8;

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
        rest = reinterpret_cast<char*>(keys + stages * KEYS * STRIDE);
    }

    static size_t bytes(int warps, int64_t columns, int stages) {
        const int row_stages = columns > D ? stages : 1;
        return sizeof(T) * STRIDE * static_cast<size_t>(row_stages * warps * 16 + stages * KEYS);
    }

    __device__ int row_tile() const { return threads() / WARP * 16 * STRIDE; }

    // Copies the data of step `step` over tiles and chunks; row_at and key_at(tile, r) point to whole rows.
    template <class RowAt, class KeyAt>
    __device__ void copy(int step, RowAt row_at, KeyAt key_at) const {
        const int tile = step / chunks, first = (own_chunk + 1 + step % chunks) % chunks * D;
        const int width = columns - first < D ? columns - first : D;
        const auto from = [&](const T* row) { return row == nullptr ? nullptr : row + first; };
        if (chunks > 1 || step == 0) {
            T* const to = rows + (chunks > 1 ? step % stages : 0) * row_tile();
            const auto at = [&](int r) { return from(row_at(r)); };
            if (threads() == MAX_WARPS * WARP) {
                copy_tile<MAX_WARPS * 16, D>(to, width, aligned, at, STRIDE);
            } else {
                copy_tile<MAX_WARPS / 2 * 16, D>(to, width, aligned, at, STRIDE);
            }
        }
        copy_tile<KEYS, D>(
            keys + step % stages * KEYS * STRIDE, width, aligned, [&](int r) { return from(key_at(tile, r)); }, STRIDE);
    }

    // Rows and keys are rows row_index(r) and key_index(tile, r) of memory, zeros where these are below 0. Calls
    // keep(fetch(tile), slot) before a barrier, and use(tile, slot, z) after it: z [16, KEYS] are the products of this
    // warp's rows; it returns whether rescale() would change `out` now. Then, if `weighted`, rescale(), and out += z V,
    // where V is the tile of keys at the block's columns.
    template <class RowIndex, class KeyIndex, class Fetch, class Keep, class Use, class Rescale>
    __device__ void walk(int tiles, const void* rows_from, RowIndex row_index, const void* keys_from,
                         KeyIndex key_index, Fetch fetch, Keep keep, Use use, bool weighted, Rescale rescale,
                         float (&out)[D / 8][4]) const {
        const auto at = [&](const void* from, int index) -> const T* {
            return index < 0 ? nullptr : static_cast<const T*>(from) + int64_t{index} * columns;
        };
        const auto row_at = [&](int r) { return at(rows_from, row_index(r)); };
        const auto key_at = [&](int tile, int r) { return at(keys_from, key_index(tile, r)); };
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
                keep(fetch(tile), 0);
            }
            stages == 2 ? wait_async<1>() : wait_async<0>();
            sync_block();
            const T* const own = rows + (chunks > 1 ? step % stages : 0) * row_tile() + warp() * 16 * STRIDE;
            const T* const tile_keys = keys + step % stages * KEYS * STRIDE;
            add_products<D, KEYS_FIRST>(z, own, tile_keys, STRIDE);
            if (chunk + 1 == chunks) {
                use(tile, 0, z);
                if (weighted) {
                    rescale();
                    add_weighted<T>(out, z, tile_keys, STRIDE);
                }
            }
            sync_block();
            if (stages == 1 && step + 1 < steps) {
                copy(step + 1, row_at, key_at);
                commit_async();
            }
        }
    }
};

// Up to PER numbers from memory, all of them sixteen bytes at a time where `whole`.
template <int PER, class T>
__device__ __forceinline__ void load_numbers(float (&out)[PER], const T* from, int numbers, bool whole) {
    constexpr int IN_VEC16B = PER_VEC16B<T>;
    if (!whole) {
#pragma unroll
        for (int k = 0; k < PER; ++k) out[k] = k < numbers ? to_float(load(from + k)) : 0.0f;
        return;
    }
#pragma unroll
    for (int k = 0; k < PER; k += IN_VEC16B) {
        float few[IN_VEC16B];
        unpack(load(reinterpret_cast<const Vec16B*>(from + k)), few, T());
#pragma unroll
        for (int i = 0; i < IN_VEC16B; ++i) out[k + i] = few[i];
    }
}

// The way back, rounded to T.
template <int PER, class T>
__device__ __forceinline__ void store_numbers(T* to, const float (&numbers)[PER], int count, bool whole) {
    constexpr int IN_VEC16B = PER_VEC16B<T>;
    if (!whole) {
#pragma unroll
        for (int k = 0; k < PER; ++k) {
            if (k >= count) continue;
            T rounded;
            from_float(&rounded, numbers[k]);
            store(to + k, rounded);
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < PER; k += IN_VEC16B) {
        float few[IN_VEC16B];
#pragma unroll
        for (int i = 0; i < IN_VEC16B; ++i) few[i] = numbers[k + i];
        store(reinterpret_cast<Vec16B*>(to + k), pack_vec16b<T>(few));
    }
}

// Writes row r (0 or 1) of a lane's accumulators, a tile's columns `first` and on, to a row of `columns` numbers.
template <int D>
__device__ __forceinline__ void store_accumulators(const float (&c)[D / 8][4], int r, float* row, int first,
                                                   int64_t columns) {
    const bool pairs = columns % 2 == 0;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
        const int column = first + 8 * d + column_of(0);
        if (pairs && column < columns) {
            store(reinterpret_cast<Pair*>(row + column), Pair{c[d][2 * r], c[d][2 * r + 1]});
        } else if (column < columns) {
            store(row + column, c[d][2 * r]);
            if (column + 1 < columns) store(row + column + 1, c[d][2 * r + 1]);
        }
    }
}

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

}  // namespace cnm::cuda
