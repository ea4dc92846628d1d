// Attention's forward where one block holds all keys of a head: 16-bit numbers, one branch, and heads enough to fill a
// GPU with a block for each.
//
// Keys and values are read once. A warp takes 16 queries at a time, from the last on, in an order that gives each warp
// as many keys where rows see only keys up to their own; 64 keys at a time, sixteen products less where none is seen.
// The arithmetic is that of attention.cu. Rows are not padded, so that four blocks of 200 keys lie in a processor's
// shared memory: piece c of row r is at c ^ (r % 8), which spreads eight rows' pieces over the banks as padding would.
#include "attention.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int D = 64, PIECES = D / 8;  // of sixteen bytes
constexpr int STEP = 16, STEPS = 4;    // keys, and how often at a time
constexpr int N = STEP * STEPS / 8;

int64_t rows_held(int64_t Lk) { return ceil_div(Lk, STEP) * STEP; }
int64_t bytes_held(int64_t Lk) { return rows_held(Lk) * (2 * D * 2 + int64_t{sizeof(float)}); }

template <class T>
__device__ __forceinline__ void copy_swizzled(T* tile, const T* from, int64_t row_stride, int rows, int end,
                                              int columns, bool aligned) {
    constexpr int PER = PER_VEC16B<T>;
    for (int i = thread(); i < rows * PIECES; i += threads()) {
        const int r = i / PIECES, c = i % PIECES;
        const T* const row = r < end ? from + r * row_stride : nullptr;
        copy_piece(tile + r * D + (c ^ (r % 8)) * PER, row, c * PER, columns, aligned);
    }
}

// Two neighbours of a row, zeros behind its end; `row` may be null.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* row, int column, int columns, bool aligned) {
    if (row == nullptr || column >= columns) return 0;
    if (aligned) return load(reinterpret_cast<const uint32_t*>(row + column));
    const uint32_t low = load(row + column).bits;
    return column + 1 < columns ? low | static_cast<uint32_t>(load(row + column + 1).bits) << 16 : low;
}

template <class T>
__global__ void __launch_bounds__(ATTENTION_THREADS, 4) attention_short_kernel(AttentionParams p, bool aligned) {
    const int b = static_cast<int>(blockIdx.x), h = static_cast<int>(blockIdx.y), warps = threads() / WARP;
    const int Lq = static_cast<int>(p.Lq), Lk = static_cast<int>(p.Lk), d = static_cast<int>(p.d);
    const int held = (Lk + STEP - 1) / STEP * STEP, limit = static_cast<int>(real_keys(p, b));
    T *const keys = dynamic_shared<T>(), *const values = keys + held * D;
    float* const weights = reinterpret_cast<float*>(values + held * D);
    copy_swizzled(keys, row_of_head<T>(p.key, b, h, 0), p.key.row, held, limit, d, aligned);
    copy_swizzled(values, row_of_head<T>(p.value, b, h, 0), p.value.row, held, limit, d, aligned);
    commit_async();
    for (int j = thread(); j < held; j += threads()) weights[j] = key_weight_of(p, Branches{}, b, 0, j, limit);
    wait_async<0>();
    sync_block();

    // A lane's row for ldmatrix, of the first sixteen columns; the k-th others are at place ^ (16 k).
    int place = (lane() % 8 + lane() / 16 * 8) * D + (lane() / 8 % 2 ^ lane() % 8) * 8;
    const int tiles = (Lq + 15) / 16;
    for (int round = 0;; ++round) {
        const int turn = round * warps + (round % 2 == 0 ? warp() : warps - 1 - warp());
        if (round * warps >= tiles) break;
        if (turn >= tiles) continue;
        int first_row = (tiles - 1 - turn) * 16;
        RowsOperand<T> query[D / 16];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + row_of(2 * r);
            const T* const from = row < Lq ? row_of_head<T>(p.query, b, h, row) : nullptr;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                query[k].r[r] = load_pair(from, 16 * k + column_of(0), d, aligned);
                query[k].r[r + 2] = load_pair(from, 16 * k + 8 + column_of(0), d, aligned);
            }
        }
        const int real = (limit + STEP - 1) / STEP, before = first_row / STEP + 1;
        const int steps = p.causal && before < real ? before : real;
        float out[D / 8][4], highest[2] = {-INFINITY, -INFINITY}, reference[2] = {0, 0};
        float total[2] = {0, 0}, inverse[2] = {0, 0};
        clear(out);
        for (int step = 0; step < steps; step += STEPS) {
            renew(place);
            renew(first_row);
            float e[N][4], shrink[2], sum[2] = {0, 0};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
#pragma unroll
                for (int n = 2 * s; n < 2 * s + 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) e[n][i] = step + s < steps ? 0.0f : -INFINITY;
                }
                if (step + s >= steps) continue;
#pragma unroll
                for (int k = 0; k < D / 16; ++k) {
                    uint32_t r[4];
                    load_matrix(r, keys + (step + s) * STEP * D + (place ^ 16 * k));
                    const ColumnsOperand<T> columns[2] = {{{r[0], r[1]}}, {{r[2], r[3]}}};
                    multiply(e[2 * s], query[k], columns[0]);
                    multiply(e[2 * s + 1], query[k], columns[1]);
                }
                const int first_key = (step + s) * STEP;
#pragma unroll
                for (int n = 2 * s; n < 2 * s + 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) e[n][i] = rounded_product(e[n][i], p.scale);
                }
                if (first_key + STEP > limit || (p.causal && first_key + STEP > first_row)) {
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int key = first_key + 8 * n + column_of(i), row = first_row + row_of(i);
                            if (key >= limit || (p.causal && key > row)) e[2 * s + n][i] = -INFINITY;
                        }
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float higher = highest[r];
#pragma unroll
                for (int n = 0; n < N; ++n) higher = fmaxf(higher, fmaxf(e[n][2 * r], e[n][2 * r + 1]));
                higher = max_over_lanes<4>(higher);
                reference[r] = higher == -INFINITY ? 0.0f : higher;
                shrink[r] = exponential(highest[r] - reference[r]);
                highest[r] = higher;
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (step + s >= steps) continue;  // of which the infinities are not read
#pragma unroll
                for (int n = 2 * s; n < 2 * s + 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        e[n][i] = exponential(e[n][i] - reference[i / 2]) * weights[step * STEP + 8 * n + column_of(i)];
                        sum[i / 2] += e[n][i];
                    }
                }
            }
            add_to_totals(step == 0, sum, total, shrink, inverse);
            if (step > 0) {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
                }
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (step + s >= steps) continue;
#pragma unroll
                for (int n = 2 * s; n < 2 * s + 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) e[n][i] *= inverse[i / 2];
                }
                RowsOperand<T> rows;
                narrow(rows, e[2 * s], e[2 * s + 1]);
#pragma unroll
                for (int k = 0; k < D / 16; ++k) {
                    uint32_t r[4];
                    load_matrix_transposed(r, values + (step + s) * STEP * D + (place ^ 16 * k));
                    const ColumnsOperand<T> columns[2] = {{{r[0], r[2]}}, {{r[1], r[3]}}};
                    multiply(out[2 * k], rows, columns[0]);
                    multiply(out[2 * k + 1], rows, columns[1]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            store_columns<T>(out[n], out[n + 1], 1.0f, d - 8 * n, aligned, [&](int r) -> T* {
                return first_row + r < Lq ? row_of_head<T>(p.out, b, h, first_row + r) + 8 * n : nullptr;
            });
        }
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + row_of(2 * r);
            if (lane() % 4 != 0 || row >= Lq) continue;
            float* const stats = p.stats + ((b * p.H + h) * p.Lq + row) * 2;
            store(stats, reference[r]);
            store(stats + 1, inverse[r]);
        }
    }
}

}  // namespace

bool attention_short(const AttentionParams& p) {
    const int64_t most = most_shared_bytes();
    if (p.dtype == Dtype::float32 || p.d <= 32 || p.d > D || p.Lk == 0 || p.H > 65535) return false;
    if (p.Lk > most / (4 * D) || bytes_held(p.Lk) > most) return false;
    if (p.B * p.H < ENOUGH_BLOCKS && p.Lq > TILE) return false;
    const int64_t warps = std::min<int64_t>(ceil_div(p.Lq, 16), ATTENTION_THREADS / WARP);
    const bool aligned = rows_aligned(p.dtype, p.d, {p.query, p.key, p.value, p.out});
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (sizeof(T) == 2) {
            launch(attention_short_kernel<T>, {p.B, p.H}, static_cast<int>(warps * WARP),
                   static_cast<size_t>(bytes_held(p.Lk)), p, aligned);
        }
    });
    return true;
}

}  // namespace cuda
}  // namespace cnm
