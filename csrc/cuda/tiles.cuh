// Tiles in shared memory and what a warp's tensor cores make of them.
//
// A warp computes 16 rows. Its accumulators c[n][4] hold 16 x 8 numbers each: with g = lane / 4 and t = lane % 4,
// numbers 0 and 1 are row g, columns 8n + 2t and the next; 2 and 3 the same of row g + 8. Two such products are all
// that attention and the loss are made of:
//     add_products:  c += A B^T, both from shared memory
//     add_weighted:  out += C V, C from accumulators, V from shared memory
// 16-bit operands take m16n8k16; float32 takes three tf32 products of what each number's leading and trailing 11 bits
// are (big big + big small + small big), which lose about as much as float32 does.
#pragma once

#include "device.cuh"

namespace cnm::cuda {

// Rows are sixteen bytes longer than their numbers: eight rows' pieces then lie in different banks.
template <class T>
constexpr int tile_stride(int columns) {
    return columns + PER_VEC16B<T>;
}

// Sixteen columns of A's 16 rows, and of 8 rows of B, as a lane holds them.
template <class T>
struct RowsOperand {
    uint32_t r[4];
};
template <class T>
struct ColumnsOperand {
    uint32_t r[2];
};
template <>
struct RowsOperand<float> {
    uint32_t big[2][4], small[2][4];  // two steps of eight columns
};
template <>
struct ColumnsOperand<float> {
    uint32_t big[2][2], small[2][2];
};

// Tensor cores read the leading 19 bits of a number: `big` is x rounded to them, and of `small`, which is exact, they
// lose what is below 2^-23 of x. An infinity stays one, and a NaN is at least in `small`.
__device__ __forceinline__ void split(float x, uint32_t& big, uint32_t& small) {
    big = (bits_of(x) + 0x1000) & 0xFFFFE000;
    small = bits_of(x - float_of(big));
}

// rows: the tile's first row, at the first of sixteen columns
template <class T>
__device__ __forceinline__ void load_rows(RowsOperand<T>& a, const T* rows, int stride) {
    load_matrix(a.r, rows + (lane() % 16) * stride + (lane() / 16) * 8);
}
__device__ __forceinline__ void load_rows(RowsOperand<float>& a, const float* rows, int stride) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            split(rows[(g + 8 * (i % 2)) * stride + 8 * step + t + 4 * (i / 2)], a.big[step][i], a.small[step][i]);
        }
    }
}

// B^T's columns are rows of the tile: sixteen of them.
template <class T>
__device__ __forceinline__ void load_columns(ColumnsOperand<T> (&b)[2], const T* rows, int stride) {
    uint32_t r[4];
    load_matrix(r, rows + (lane() % 8 + lane() / 16 * 8) * stride + (lane() / 8 % 2) * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].r[i % 2] = r[i];
}
__device__ __forceinline__ void load_columns(ColumnsOperand<float> (&b)[2], const float* rows, int stride) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            split(rows[(8 * half + g) * stride + 8 * (i / 2) + t + 4 * (i % 2)], b[half].big[i / 2][i % 2],
                  b[half].small[i / 2][i % 2]);
        }
    }
}

// The same of V, whose sixteen rows are summed over. In float32 the k-th and (k + 4)-th of eight are rows 2k and 2k +
// 1, which is how accumulators come (see `narrow`): the order of a sum over rows is free.
template <class T>
__device__ __forceinline__ void load_columns_of_sum(ColumnsOperand<T> (&b)[2], const T* rows, int stride) {
    uint32_t r[4];
    load_matrix_transposed(r, rows + (lane() % 16) * stride + (lane() / 16) * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].r[i % 2] = r[i];
}
__device__ __forceinline__ void load_columns_of_sum(ColumnsOperand<float> (&b)[2], const float* rows, int stride) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            split(rows[(8 * (i / 2) + 2 * t + i % 2) * stride + 8 * half + g], b[half].big[i / 2][i % 2],
                  b[half].small[i / 2][i % 2]);
        }
    }
}

// Accumulators of sixteen columns as an operand.
template <class T>
__device__ __forceinline__ void narrow(RowsOperand<T>& a, const float (&first)[4], const float (&second)[4]) {
    a.r[0] = pack<T>(first[0], first[1]);
    a.r[1] = pack<T>(first[2], first[3]);
    a.r[2] = pack<T>(second[0], second[1]);
    a.r[3] = pack<T>(second[2], second[3]);
}
__device__ __forceinline__ void narrow(RowsOperand<float>& a, const float (&first)[4], const float (&second)[4]) {
    constexpr int FROM[] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        split(first[FROM[i]], a.big[0][i], a.small[0][i]);
        split(second[FROM[i]], a.big[1][i], a.small[1][i]);
    }
}

// SMALL_B_FIRST: of which operand the trailing bits come first, as sums differ by their order.
template <bool SMALL_B_FIRST = false, class T>
__device__ __forceinline__ void multiply(float (&c)[4], const RowsOperand<T>& a, const ColumnsOperand<T>& b) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            if (SMALL_B_FIRST) mma_tf32(c, a.big[step], b.small[step]);
            mma_tf32(c, a.small[step], b.big[step]);
            if (!SMALL_B_FIRST) mma_tf32(c, a.big[step], b.small[step]);
            mma_tf32(c, a.big[step], b.big[step]);
        }
    } else {
        mma<T>(c, a.r, b.r);
    }
}

template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
    }
}

// c [16, 8 N] += a [16, K] b [8 N, K]^T
template <int K, bool SMALL_B_FIRST = false, int N, class T>
__device__ __forceinline__ void add_products(float (&c)[N][4], const T* a, const T* b, int stride) {
#pragma unroll(sizeof(T) == 4 || K > 128 ? 1 : 2)  // as far as registers go
    for (int k = 0; k < K; k += 16) {
        RowsOperand<T> rows;
        load_rows(rows, a + k, stride);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            keep_order();
            ColumnsOperand<T> columns[2];
            load_columns(columns, b + n * 8 * stride + k, stride);
            multiply<SMALL_B_FIRST>(c[n], rows, columns[0]);
            multiply<SMALL_B_FIRST>(c[n + 1], rows, columns[1]);
        }
    }
}

// out [16, 8 D] += c [16, 8 N] v [8 N, 8 D]
template <class T, int N, int D>
__device__ __forceinline__ void add_weighted(float (&out)[D][4], const float (&c)[N][4], const T* v, int stride) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        RowsOperand<T> rows;
        narrow(rows, c[n], c[n + 1]);
#pragma unroll
        for (int d = 0; d < D; d += 2) {
            keep_order();
            ColumnsOperand<T> columns[2];
            load_columns_of_sum(columns, v + n * 8 * stride + d * 8, stride);
            multiply(out[d], rows, columns[0]);
            multiply(out[d + 1], rows, columns[1]);
        }
    }
}

// Row of a lane's i-th accumulator, and column within eight.
__device__ __forceinline__ int row_of(int i) { return lane() / 4 + 8 * (i / 2); }
__device__ __forceinline__ int column_of(int i) { return 2 * (lane() % 4) + i % 2; }

// Starts to copy sixteen bytes of a row, from column c on: zeros behind the columns, or where there is no row.
template <class T>
__device__ __forceinline__ void copy_piece(T* to, const T* row, int c, int columns, bool aligned) {
    if (aligned) {
        const bool inside = row != nullptr && c < columns;
        copy_async(to, inside ? row + c : nullptr, inside);
        return;
    }
#pragma unroll
    for (int k = 0; k < PER_VEC16B<T>; ++k) {
        if (row != nullptr && c + k < columns) {
            to[k] = load(row + c + k);
        } else {
            from_float(to + k, 0.0f);
        }
    }
}

// Starts to copy ROWS rows of COLUMNS numbers into a tile; row_at(r) points to row r, or is null where there is none.
// Zeros fill what is not there. The whole block takes part; who reads waits (wait_async) and meets at a barrier first.
template <int ROWS, int COLUMNS, class T, class RowAt>
__device__ __forceinline__ void copy_tile(T* tile, int columns, bool aligned, RowAt row_at, int stride) {
    constexpr int PER = PER_VEC16B<T>, PIECES = COLUMNS / PER;
    for (int i = thread(); i < ROWS * PIECES; i += threads()) {
        const int r = i / PIECES, c = i % PIECES * PER;
        copy_piece(tile + r * stride + c, row_at(r), c, columns, aligned);
    }
}

// Writes a warp's 16 rows out[D][4], times `scale`, by way of its own rows of a tile that nobody else reads any more,
// so that global memory sees sixteen bytes at a time.
template <class T, int D, class RowAt>
__device__ __forceinline__ void store_rows(const float (&out)[D][4], float scale, T* tile, int stride, int columns,
                                           bool aligned, RowAt row_at) {
    sync_warp();
#pragma unroll
    for (int d = 0; d < D; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            from_float(tile + row_of(i) * stride + 8 * d + column_of(i), out[d][i] * scale);
        }
    }
    sync_warp();
    constexpr int PER = PER_VEC16B<T>, PIECES = 8 * D / PER;
    for (int i = lane(); i < 16 * PIECES; i += WARP) {
        const int r = i / PIECES, c = i % PIECES * PER;
        T* const row = row_at(r);
        if (row == nullptr) continue;
        const T* const from = tile + r * stride + c;
        if (aligned && c < columns) {
            store(reinterpret_cast<Vec16B*>(row + c), *reinterpret_cast<const Vec16B*>(from));
        } else if (!aligned) {
            for (int k = 0; k < PER && c + k < columns; ++k) store(row + c + k, from[k]);
        }
    }
    sync_warp();
}

}  // namespace cnm::cuda
