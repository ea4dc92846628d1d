// Attention's backward where one block holds all keys of a head: 256 at most, 16-bit numbers, one branch.
//
// A warp owns 16 keys: their dK and dV stay in its registers. Queries pass through shared memory in tiles of 16; a tile
// is fetched while the previous one is processed. Scores and dP are computed once, transposed, so that accumulators are
// the operands of the products for dV and dK. With the formulas of attention_backward.cu, of each tile:
//     first:   each warp computes P and dP of its keys and sums P dP over them
//     barrier: delta is the sum over the warps
//     second:  each warp computes dS, adds dS^T Q to dK, leaves dS in shared memory and adds P^T dO to dV
//     barrier: the warps share dQ = dS K among them, beside the next tile's first step
// Where all heads of a sample fit into a block, it also derives the gradient of the keys' weights.
#include "attention_backward.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int QUERIES = 16;
// Columns of dQ that a warp computes at a time, as far as registers go.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int COLUMNS = 16;
#else
constexpr int COLUMNS = 32;
#endif
constexpr int MOST_WARPS = 16, MOST_THREADS = MOST_WARPS * WARP;
constexpr int64_t MOST_HEADS = 65535;  // of a grid's y

// What a warp's keys have in shared memory, and what all warps of a head share: offsets that the compiler knows.
template <class T, int D>
struct OfKeys {
    static constexpr int STRIDE = tile_stride<T>(D), SCORES = tile_stride<T>(QUERIES);
    alignas(16) T keys[16 * STRIDE];
    T values[16 * STRIDE];
    T d_scores[16 * SCORES];  // transposed
    float parts[QUERIES], deltas[QUERIES];
    float weights[16], d_weights[16];
};
template <class T, int D>
struct Head {
    static constexpr int STRIDE = tile_stride<T>(D);
    alignas(16) T query[2][QUERIES * STRIDE];
    T upstream[2][QUERIES * STRIDE];
    alignas(16) float stats[2][2 * QUERIES];  // as the forward left them: of each query the maximum and 1 / sum

    static __device__ Head& at(int group, int warps) {
        return *reinterpret_cast<Head*>(dynamic_shared<unsigned char>() + group * bytes(warps));
    }
    // Behind it, of each warp.
    __device__ OfKeys<T, D>& of_keys(int warp) { return reinterpret_cast<OfKeys<T, D>*>(this + 1)[warp]; }
    static constexpr int bytes(int warps) {
        return static_cast<int>(sizeof(Head)) + warps * static_cast<int>(sizeof(OfKeys<T, D>));
    }
};

// Starts to copy rows [first, end) of a head to `rows` rows of a tile, by `count` threads.
template <class T, int D>
__device__ __forceinline__ void copy_some(T* tile, const T* from, int64_t row_stride, int first, int end, int rows,
                                          int columns, bool aligned, int own, int count) {
    constexpr int PER = PER_VEC16B<T>, PIECES = D / PER, STRIDE = tile_stride<T>(D);
    for (int i = own; i < rows * PIECES; i += count) {
        const int r = i / PIECES, c = i % PIECES * PER;
        const T* const row = first + r < end ? from + (first + r) * row_stride : nullptr;
        copy_piece(tile + r * STRIDE + c, row, c, columns, aligned);
    }
}

// Sums over the lanes of a column c[n][i]; lane l gets the sum of column column_summed(l).
__device__ __forceinline__ float sum_of_columns(const float (&c)[2][2]) {
    const auto kept = [](int mask, float low, float high) {
        const bool upper = (lane() & mask) != 0;
        return (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
    };
    const float sum = kept(8, kept(16, c[0][0], c[1][0]), kept(16, c[0][1], c[1][1]));
    return sum + shuffle_xor(sum, 4);
}
__device__ __forceinline__ int column_summed(int lane) { return lane / 16 * 8 + 2 * (lane % 4) + lane / 8 % 2; }

// WEIGHTED: whether the keys have weights.
template <class T, int D, bool WEIGHTED>
__global__ void __launch_bounds__(MOST_THREADS, 1)
    attention_backward_short_kernel(BranchedAttentionBackwardParams p, float* d_weight_parts, int warps, bool merged,
                                    bool aligned) {
    constexpr int STRIDE = Head<T, D>::STRIDE, SCORES = OfKeys<T, D>::SCORES;
    constexpr int APART = sizeof(OfKeys<T, D>) / sizeof(T);  // from a warp's to the next one's
    const int heads = static_cast<int>(p.H);
    int group = warp() / warps, own = warp() % warps, own_key = 16 * own;
    const int b = static_cast<int>(blockIdx.x);
    int h = static_cast<int>(blockIdx.y) + group;
    const int Lq = static_cast<int>(p.Lq), Lk = static_cast<int>(p.Lk), d = static_cast<int>(p.d);
    int limit = static_cast<int>(real_keys(p, b));
    Head<T, D>& head = Head<T, D>::at(group, warps);
    const float scale = p.scale;

    const auto copy = [&](T* tile, const Heads& from, int first, int end, int rows, int own_thread, int count) {
        copy_some<T, D>(tile, row_of_head<T>(from, b, h, 0), from.row, first, end, rows, d, aligned, own_thread, count);
    };
    const auto copy_queries = [&](int first) {
        const int stage = first / QUERIES & 1, row = first + lane(), own_thread = own * WARP + lane(),
                  count = warps * WARP;
        copy(head.query[stage], p.query, first, Lq, QUERIES, own_thread, count);
        copy(head.upstream[stage], p.d_out, first, Lq, QUERIES, own_thread, count);
        if (own == warps - 1 && lane() < QUERIES) {
            const float* const stats = p.stats + (static_cast<int64_t>(b) * heads + h) * Lq * 2;
            copy_pair_async(head.stats[stage] + 2 * lane(), stats + 2 * row, row < Lq);
        }
        commit_async();
    };
    {
        OfKeys<T, D>& mine = head.of_keys(own);
        copy(mine.keys, p.key, own_key, limit, 16, lane(), WARP);
        copy(mine.values, p.value, own_key, limit, 16, lane(), WARP);
        copy_queries(0);
        if (WEIGHTED && lane() < 16) mine.weights[lane()] = key_weight_of(p, p.branches, b, 0, own_key + lane(), limit);
    }

    float d_key[D / 8][4], d_value[D / 8][4], along_keys[2] = {0, 0};
    clear(d_key);
    clear(d_value);
    // Tiles of sixteen keys that the queries from `first_row` on see.
    const auto reach = [&](int first_row) {
        const int real = (limit + 15) / 16, seen = first_row / 16 + 1;
        return p.causal && seen < real ? seen : real;
    };
    const auto store_d_query = [&](int first_row) {
        if (p.d_query.data == nullptr) return;
        for (int unit = warps - 1 - own; unit < D / COLUMNS; unit += warps) {  // the last warps have fewest keys
            const int column = unit * COLUMNS;
            float sum[COLUMNS / 8][4];
            clear(sum);
            const T* scores = head.of_keys(0).d_scores + (lane() % 8 + lane() / 16 * 8) * SCORES + lane() / 8 % 2 * 8;
            const T* keys = head.of_keys(0).keys + column;
#pragma unroll 1
            for (int left = reach(first_row); left > 0; --left) {
                RowsOperand<T> rows;
                load_matrix_transposed(rows.r, scores);
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n += 2) {
                    ColumnsOperand<T> columns[2];
                    load_columns_of_sum(columns, keys + 8 * n, STRIDE);
                    multiply(sum[n], rows, columns[0]);
                    multiply(sum[n + 1], rows, columns[1]);
                }
                scores += APART;
                keys += APART;
            }
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n += 2) {
                const int from = column + 8 * n;
                store_columns<T>(sum[n], sum[n + 1], scale, d - from, aligned, [&](int r) -> T* {
                    return first_row + r < Lq ? row_of_head<T>(p.d_query, b, h, first_row + r) + from : nullptr;
                });
            }
        }
    };

    for (int first_row = 0; first_row < Lq; first_row += QUERIES) {
        for (int* number : {&own, &group, &limit, &first_row}) renew(*number);
        own_key = 16 * own;
        h = static_cast<int>(blockIdx.y) + group;
        const int stage = first_row / QUERIES & 1;
        const T *const query = head.query[stage], *const upstream = head.upstream[stage];
        const float* const stats = head.stats[stage];
        OfKeys<T, D>& mine = head.of_keys(own);
        wait_async<0>();
        sync_block();
        if (first_row + QUERIES < Lq) copy_queries(first_row + QUERIES);
        if (first_row > 0) store_d_query(first_row - QUERIES);

        const int last = reach(first_row);
        float e[2][4], d_p[2][4];
        clear(e);
        clear(d_p);
        if (own < last) {
            add_products<D>(e, mine.keys, query, STRIDE);
            add_products<D>(d_p, mine.values, upstream, STRIDE);
            const bool crossed = own_key + 16 > limit || (p.causal && own_key + 16 > first_row);
            float terms[2][2] = {};  // of delta, of two keys
#pragma unroll
            for (int q = 0; q < 2; ++q) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = 8 * q + column_of(i), key = own_key + row_of(i);
                    e[q][i] = exponential(rounded_product(e[q][i], scale) - stats[2 * row]) * stats[2 * row + 1];
                    if (crossed && (key >= limit || (p.causal && key > first_row + row))) e[q][i] = 0.0f;
                    terms[q][i % 2] += (WEIGHTED ? e[q][i] * mine.weights[row_of(i)] : e[q][i]) * d_p[q][i];
                }
            }
            const float part = sum_of_columns(terms);  // of two lanes each
            if (lane() / 4 % 2 == 0) mine.parts[column_summed(lane())] = part;
        }
        sync_block();
        if (own >= last) continue;
        float delta = 0;
#pragma unroll 1
        for (int w = lane() / QUERIES; w < last; w += 2) delta += head.of_keys(w).parts[lane() % QUERIES];
        delta += shuffle_xor(delta, QUERIES);
        if (lane() < QUERIES) mine.deltas[lane()] = delta;
        sync_warp();
        float d_s[2][4], probability[2][4];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float centered = e[q][i] * (d_p[q][i] - mine.deltas[8 * q + column_of(i)]);
                const float weight = WEIGHTED ? mine.weights[row_of(i)] : 1.0f;
                if (WEIGHTED) along_keys[i / 2] += centered;
                d_s[q][i] = centered * weight;
                probability[q][i] = e[q][i] * weight;
            }
        }
        RowsOperand<T> narrow_d_s;
        narrow(narrow_d_s, d_s[0], d_s[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            T* const to = mine.d_scores + (lane() / 4 + i % 2 * 8) * SCORES + i / 2 * 8 + 2 * (lane() % 4);
            *reinterpret_cast<uint32_t*>(to) = narrow_d_s.r[i];
        }
        if (p.d_key.data != nullptr) add_weighted<T>(d_key, d_s, query, STRIDE);
        if (p.d_value.data != nullptr) add_weighted<T>(d_value, probability, upstream, STRIDE);
    }
    sync_block();
    store_d_query((Lq - 1) / QUERIES * QUERIES);

    const auto store_keys = [&](const Heads& to, const float(&gradient)[D / 8][4], float factor) {
        if (to.data == nullptr) return;
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            store_columns<T>(gradient[n], gradient[n + 1], factor, d - 8 * n, aligned, [&](int r) -> T* {
                return own_key + r < Lk ? row_of_head<T>(to, b, h, own_key + r) + 8 * n : nullptr;
            });
        }
    };
    store_keys(p.d_key, d_key, scale);
    store_keys(p.d_value, d_value, 1.0f);

    if constexpr (WEIGHTED) {
        if (!merged && d_weight_parts == nullptr) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = sum_over_lanes<4>(along_keys[r]);
            const int key = own_key + row_of(2 * r);
            if (lane() % 4 != 0) continue;
            if (merged) {
                head.of_keys(own).d_weights[row_of(2 * r)] = sum;
            } else if (key < Lk) {
                store(d_weight_parts + (static_cast<int64_t>(b) * heads + h) * Lk + key, sum);
            }
        }
        if (!merged) return;
        sync_block();
        finish_key_weights(p, b, 0, Head<T, D>::at(0, warps).of_keys(0).parts, [&](int64_t j) {
            float sum = 0;
            for (int other = 0; other < heads; ++other)
                sum += Head<T, D>::at(other, warps).of_keys(j / 16).d_weights[j % 16];
            return sum;
        });
    }
}

int64_t bytes_of_head(int64_t d, int warps) {
    return d <= 32 ? Head<bf16, 32>::bytes(warps) : Head<bf16, 64>::bytes(warps);
}

}  // namespace

ShortBackward short_backward(const BranchedAttentionBackwardParams& p) {
    const int64_t warps = ceil_div(p.Lk, 16), most = most_shared_bytes();
    const int64_t bytes = warps <= MOST_WARPS ? bytes_of_head(p.d, static_cast<int>(warps)) : 0;
    const bool possible = p.dtype != Dtype::float32 && p.d <= 64 && p.branches.n == 1 && p.d_weights == nullptr &&
                          p.B * p.H * p.Lq * p.Lk > 0 && p.H <= MOST_HEADS && warps <= MOST_WARPS && bytes <= most;
    const bool weighted = p.d_key_weight != nullptr || p.d_center != nullptr;
    return {possible, possible && weighted && p.H * warps <= MOST_WARPS && p.H * bytes <= most};
}

void attention_backward_short(const BranchedAttentionBackwardParams& p, bool merged, float* d_weight_parts) {
    const bool aligned = rows_aligned(p.dtype, p.d, {p.query, p.key, p.value, p.d_out, p.d_query, p.d_key, p.d_value});
    const int warps = static_cast<int>(ceil_div(p.Lk, 16)), heads = merged ? static_cast<int>(p.H) : 1;
    const bool weighted = p.key_weight != nullptr || p.center != nullptr;
    with_head_size(p.dtype, p.d, [&](auto* type, auto size) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (sizeof(T) == 2 && size() <= 64) {
            launch(weighted ? attention_backward_short_kernel<T, size(), true>
                            : attention_backward_short_kernel<T, size(), false>,
                   {p.B, p.H / heads}, heads * warps * WARP, static_cast<size_t>(heads * Head<T, size()>::bytes(warps)),
                   p, d_weight_parts, warps, merged, aligned);
        }
    });
}

}  // namespace cuda
}  // namespace cnm
