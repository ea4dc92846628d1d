// weighted_attention, gaussian_attention and branched_attention on GPUs, backward.
//
// With P as in attention.cu and p0 = e / Z:  dS = P (dP - delta), delta_i = sum_j P_ij dP_ij, dP = dO V^T,
// dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, dm_j = sum over heads and queries of p0_ij (dP_ij - delta_i).
//
// A block processes one head in two phases. The first computes delta and then dQ of tiles of 64 queries, 16 to a warp.
// The second has tiles of 64 keys, 16 to a warp. It computes scores and dP transposed: their accumulators are the
// operands of the products for dK and dV. Warps exchange nothing, and there are no atomics, so the order of all sums is
// fixed. If a head is one tile of queries and keys, its data stays in shared memory between the phases. If there are
// too few heads to fill a GPU, the phases are two launches with a block for each tile. A last kernel sums dm over the
// heads in order and derives the gradients of center and width.
#include "attention_backward.cuh"

namespace cnm {
namespace cuda {
namespace {

enum Phases { QUERIES = 1, KEYS = 2 };

constexpr int N = TILE / 8;

// AVERAGED: the returned weights have a gradient too. This is rare and needs registers, so it is a separate kernel.
template <class T, int D, bool AVERAGED>
struct Block {
    static constexpr int STRIDE = tile_stride<T>(D), SIZE = TILE * STRIDE;
    static constexpr int PART = D == 128 ? TILE / 4 : TILE / 2;  // queries that a tile of keys processes at a time

    const BranchedAttentionBackwardParams& p;
    float *delta, *d_weight_parts;  // [branches, B, H, Lq], [branches, B, H, Lk]
    bool aligned;
    int b, h, limit, n;  // sample, head, real keys, branches
    T *query, *upstream, *keys, *values;
    float *highest, *inverse, *deltas, *weights, *d_weights;  // [TILE], the others [branches, TILE]

    __device__ Block(const BranchedAttentionBackwardParams& p, float* delta, float* d_weight_parts, bool aligned)
        : p(p), delta(delta), d_weight_parts(d_weight_parts), aligned(aligned) {
        b = static_cast<int>(blockIdx.x) / static_cast<int>(p.H);
        h = static_cast<int>(blockIdx.x) % static_cast<int>(p.H);
        limit = static_cast<int>(real_keys(p, b));
        n = static_cast<int>(p.branches.n);
        query = dynamic_shared<T>();
        upstream = query + SIZE;
        keys = upstream + SIZE;
        values = keys + SIZE;
        highest = reinterpret_cast<float*>(values + SIZE);
        inverse = highest + TILE;
        deltas = inverse + n * TILE;
        weights = deltas + n * TILE;
        d_weights = weights + n * TILE;
    }

    static size_t bytes(int64_t n) {
        return sizeof(T) * 4 * SIZE + sizeof(float) * static_cast<size_t>(TILE * (1 + 4 * n));
    }

    __device__ int64_t head(int64_t branch) const { return (branch * p.B + b) * p.H + h; }

    __device__ void copy(T* tile, const Heads& from, int first, int end, int64_t offset = 0) const {
        copy_tile<TILE, D>(
            tile, static_cast<int>(p.d), aligned,
            [&](int r) -> const T* {
                return first + r < end ? row_of_head<T>(from, b, h, first + r) + offset : nullptr;
            },
            STRIDE);
    }

    // With several branches, loads the dO of a branch before it is processed.
    __device__ void copy_upstream_in_turn(int branch, int first_row) const {
        if (n == 1) return;
        sync_block();
        copy(upstream, p.d_out, first_row, rows(), branch * p.branches.out);
        arrive();
    }

    __device__ static void arrive() {
        commit_async();
        wait_async<0>();
        sync_block();
    }

    __device__ void load_stats(int first_row, bool with_deltas) const {
        for (int i = thread(); i < n * TILE; i += threads()) {
            const int row = first_row + i % TILE, branch = i / TILE;
            const bool inside = row < rows();
            const float* const stats = p.stats + branch * p.branches.stats + ((b * p.H + h) * p.Lq + row) * 2;
            if (branch == 0) highest[i] = inside ? load(stats) : 0.0f;
            inverse[i] = inside ? load(stats + 1) : 0.0f;
            deltas[i] = inside && with_deltas ? load(delta + head(branch) * p.Lq + row) : 0.0f;
        }
    }

    __device__ int rows() const { return static_cast<int>(p.Lq); }

    __device__ void load_weights(int first_key) const {
        load_key_weights(p, p.branches, b, 0, n, first_key, limit, weights);
    }

    __device__ bool visible(int row, int key) const { return key < limit && (!p.causal || key <= row); }

    // Adds each head's share of the gradient of the averaged weights that the forward returned.
    template <int TILES>
    __device__ void add_average(float (&d_p)[TILES][4], int row, int key, bool transposed) const {
        if constexpr (!AVERAGED) return;
        const float share = 1.0f / static_cast<float>(p.H);
#pragma unroll
        for (int k = 0; k < TILES; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int along = row_of(i), across = 8 * k + column_of(i);
                const int r = row + (transposed ? across : along), j = key + (transposed ? along : across);
                if (r >= rows() || j >= static_cast<int>(p.Lk)) continue;
                d_p[k][i] += load(p.d_weights + (b * p.Lq + r) * p.Lk + j) * share;
            }
        }
    }

    __device__ void queries(int first_row) const {
        const int reach = p.causal && first_row + TILE < limit ? first_row + TILE : limit;
        const int tiles = (reach + TILE - 1) / TILE, own_row = first_row + warp() * 16;
        T* const own = query + warp() * 16 * STRIDE;
        sync_block();
        copy(query, p.query, first_row, rows());
        if (n == 1) copy(upstream, p.d_out, first_row, rows());
        load_stats(first_row, false);
        float d_query[D / 8][4];
        clear(d_query);
        // delta is a sum over all tiles, so with several tiles it needs a first pass.
        for (int pass = tiles > 1 ? 0 : 1; pass < 2; ++pass) {
            for (int tile = 0; tile < tiles; ++tile) {
                sync_block();
                copy(keys, p.key, tile * TILE, limit);
                copy(values, p.value, tile * TILE, limit);
                load_weights(tile * TILE);
                arrive();
                float e[N][4];
                clear(e);
                add_products<D>(e, own, keys, STRIDE);
#pragma unroll
                for (int k = 0; k < N; ++k) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = warp() * 16 + row_of(i), key = 8 * k + column_of(i);
                        const float s = rounded_product(e[k][i], p.scale) - highest[row];
                        e[k][i] = exponential(visible(first_row + row, tile * TILE + key) ? s : -INFINITY);
                    }
                }
                for (int branch = 0; branch < n; ++branch) {
                    copy_upstream_in_turn(branch, first_row);
                    const float row_inverse[2] = {inverse[branch * TILE + warp() * 16 + row_of(0)],
                                                  inverse[branch * TILE + warp() * 16 + row_of(2)]};
                    float d_p[N][4], row_delta[2] = {0, 0};
                    clear(d_p);
                    add_products<D>(d_p, upstream + warp() * 16 * STRIDE, values, STRIDE);
                    add_average(d_p, own_row, tile * TILE, false);
                    const auto probability = [&](int k, int i) {
                        return e[k][i] * row_inverse[i / 2] * weights[branch * TILE + 8 * k + column_of(i)];
                    };
#pragma unroll
                    for (int k = 0; k < N; ++k) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) row_delta[i / 2] += probability(k, i) * d_p[k][i];
                    }
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float& kept = deltas[branch * TILE + warp() * 16 + row_of(2 * r)];
                        row_delta[r] = sum_over_lanes<4>(row_delta[r]);
                        if (pass == 0 || tiles == 1) {
                            if (lane() % 4 == 0) kept += row_delta[r];
                        } else {
                            row_delta[r] = kept;
                        }
                    }
                    if (pass == 0 || p.d_query.data == nullptr) continue;
#pragma unroll
                    for (int k = 0; k < N; ++k) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) d_p[k][i] = probability(k, i) * (d_p[k][i] - row_delta[i / 2]);
                    }
                    add_weighted<T>(d_query, d_p, keys, STRIDE);
                }
                sync_warp();  // the next pass reads the deltas that the lanes wrote
            }
        }
        arrive();  // also where no key was
        for (int i = thread(); i < n * TILE; i += threads()) {
            if (first_row + i % TILE < rows()) store(delta + head(i / TILE) * p.Lq + first_row + i % TILE, deltas[i]);
        }
        if (p.d_query.data == nullptr) return;
        store_rows(d_query, p.scale, own, STRIDE, static_cast<int>(p.d), aligned, [&](int r) -> T* {
            return own_row + r < rows() ? row_of_head<T>(p.d_query, b, h, own_row + r) : nullptr;
        });
    }

    // resident: shared memory still holds keys, values, dO, weights and statistics of the first phase
    __device__ void of_keys(int first_key, bool resident) const {
        const int own_key = first_key + warp() * 16;
        T *const own_keys = keys + warp() * 16 * STRIDE, *const own_values = values + warp() * 16 * STRIDE;
        float d_key[D / 8][4], d_value[D / 8][4];
        clear(d_key);
        clear(d_value);
        sync_block();
        if (!resident) {
            copy(keys, p.key, first_key, limit);
            copy(values, p.value, first_key, limit);
            load_weights(first_key);
        }
        for (int i = thread(); i < n * TILE; i += threads()) d_weights[i] = 0.0f;
        const int first = p.causal ? first_key : 0, end = first_key < limit ? rows() : 0;
        for (int first_row = first; first_row < end; first_row += TILE) {
            sync_block();
            copy(query, p.query, first_row, rows());
            if (!resident) {
                if (n == 1) copy(upstream, p.d_out, first_row, rows());
                load_stats(first_row, true);
            }
            arrive();
            for (int part = 0; part < TILE && first_row + part < rows(); part += PART) {
                float e[PART / 8][4];
                clear(e);
                add_products<D, true>(e, own_keys, query + part * STRIDE, STRIDE);  // the forward's scores, to the bit
#pragma unroll
                for (int q = 0; q < PART / 8; ++q) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = part + 8 * q + column_of(i);
                        const float s = rounded_product(e[q][i], p.scale) - highest[row];
                        e[q][i] = exponential(visible(first_row + row, own_key + row_of(i)) ? s : -INFINITY);
                    }
                }
                for (int branch = 0; branch < n; ++branch) {
                    copy_upstream_in_turn(branch, first_row);
                    float d_p[PART / 8][4], along_keys[2] = {0, 0};
                    clear(d_p);
                    add_products<D>(d_p, own_values, upstream + part * STRIDE, STRIDE);
                    add_average(d_p, first_row + part, own_key, true);
                    float probability[PART / 8][4];
#pragma unroll
                    for (int q = 0; q < PART / 8; ++q) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int row = part + 8 * q + column_of(i);
                            const float unweighted = e[q][i] * inverse[branch * TILE + row];
                            probability[q][i] = unweighted * weights[branch * TILE + warp() * 16 + row_of(i)];
                            const float centered = d_p[q][i] - deltas[branch * TILE + row];
                            along_keys[i / 2] += unweighted * centered;
                            d_p[q][i] = probability[q][i] * centered;
                        }
                    }
                    if (p.d_value.data != nullptr)
                        add_weighted<T>(d_value, probability, upstream + part * STRIDE, STRIDE);
                    if (p.d_key.data != nullptr) add_weighted<T>(d_key, d_p, query + part * STRIDE, STRIDE);
                    if (d_weight_parts == nullptr) continue;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float sum = sum_over_lanes<4>(along_keys[r]);
                        if (lane() % 4 == 0) d_weights[branch * TILE + warp() * 16 + row_of(2 * r)] += sum;
                    }
                }
            }
        }
        arrive();
        if (d_weight_parts != nullptr) {
            for (int i = thread(); i < n * TILE; i += threads()) {
                const int key = first_key + i % TILE;
                if (key < p.Lk) store(d_weight_parts + head(i / TILE) * p.Lk + key, d_weights[i]);
            }
        }
        const auto store_keys = [&](const Heads& to, const float(&gradient)[D / 8][4], float scale, T* tile) {
            if (to.data == nullptr) return;
            store_rows(gradient, scale, tile, STRIDE, static_cast<int>(p.d), aligned, [&](int r) -> T* {
                return own_key + r < p.Lk ? row_of_head<T>(to, b, h, own_key + r) : nullptr;
            });
        };
        store_keys(p.d_key, d_key, p.scale, own_keys);
        store_keys(p.d_value, d_value, 1.0f, own_values);
    }
};

template <class T, int D, bool AVERAGED>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_backward_kernel(BranchedAttentionBackwardParams p, float* delta, float* d_weight_parts, int phases,
                              bool aligned) {
    const Block<T, D, AVERAGED> block(p, delta, d_weight_parts, aligned);
    const int first = static_cast<int>(blockIdx.y) * TILE, stride = static_cast<int>(gridDim.y) * TILE;
    if (phases & QUERIES) {
        for (int row = first; row < p.Lq; row += stride) block.queries(row);
    }
    if (phases & KEYS) {
        const bool resident = phases == (QUERIES | KEYS) && p.Lq <= TILE && p.Lk <= TILE && p.Lq > 0;
        for (int key = first; key < p.Lk; key += stride) {
            block.of_keys(key, resident);
        }
    }
}

// Sums dm of a sample and branch over the heads in order; writes it, or the gradients of center and width.
__global__ void __launch_bounds__(ATTENTION_THREADS)
    key_weight_gradient_kernel(BranchedAttentionBackwardParams p, const float* d_weight_parts) {
    const int64_t b = blockIdx.x, branch = blockIdx.y;
    finish_key_weights(p, b, branch, dynamic_shared<float>(), [&](int64_t j) {
        float sum = 0;
        for (int64_t h = 0; h < p.H; ++h) sum += load(d_weight_parts + ((branch * p.B + b) * p.H + h) * p.Lk + j);
        return sum;
    });
}

}  // namespace
}  // namespace cuda

void branched_attention_backward(const BranchedAttentionBackwardParams& p) {
    using namespace cuda;
    const int64_t n = p.branches.n, heads = p.B * p.H;
    if (p.B == 0 || n == 0) return;
    const bool need_weights = p.d_key_weight != nullptr || p.d_center != nullptr;
    const ShortBackward fits = short_backward(p);
    const Scratch delta(fits.possible ? 0 : n * heads * p.Lq * int64_t{sizeof(float)});
    const Scratch parts(need_weights && !fits.sees_all_heads ? n * heads * p.Lk * int64_t{sizeof(float)} : 0);
    float* const d_weight_parts = need_weights && !fits.sees_all_heads ? parts.as<float>() : nullptr;
    const Heads branches{p.d_out.data, p.branches.out, 0, 0};
    const bool aligned =
        rows_aligned(p.dtype, p.d, {p.query, p.key, p.value, p.d_out, branches, p.d_query, p.d_key, p.d_value});
    const int64_t rows = ceil_div(p.Lq, TILE), keys = ceil_div(p.Lk, TILE);
    if (fits.possible) {
        attention_backward_short(p, fits.sees_all_heads, d_weight_parts);
    } else if (heads > 0) {
        with_head_size(p.dtype, p.d, [&](auto* type, auto size) {
            using T = std::remove_pointer_t<decltype(type)>;
            const auto run = [&](int phases, int64_t blocks) {
                if (blocks == 0) return;
                const auto kernel = p.d_weights != nullptr ? attention_backward_kernel<T, size(), true>
                                                           : attention_backward_kernel<T, size(), false>;
                launch(kernel, {heads, blocks}, ATTENTION_THREADS, Block<T, size(), false>::bytes(n), p,
                       delta.as<float>(), d_weight_parts, phases, aligned);
            };
            if (heads >= ENOUGH_BLOCKS || (rows <= 1 && keys <= 1)) {
                run(QUERIES | KEYS, 1);
            } else {
                run(QUERIES, rows);
                run(KEYS, keys);
            }
        });
    }
    if (need_weights && !fits.sees_all_heads) {
        launch(key_weight_gradient_kernel, {p.B, n}, ATTENTION_THREADS, sizeof(float) * ATTENTION_THREADS / WARP, p,
               static_cast<const float*>(d_weight_parts));
    }
}

void attention_backward(const AttentionBackwardParams& p) {
    BranchedAttentionBackwardParams one{};
    static_cast<AttentionBackwardParams&>(one) = p;
    branched_attention_backward(one);
}

}  // namespace cnm
