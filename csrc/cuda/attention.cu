// weighted_attention, gaussian_attention and branched_attention on GPUs, forward.
//
// A block processes 64 queries of a head, a warp 16 of them with their scores in registers. Keys and values pass
// through shared memory in tiles of 64; a tile is loaded while the previous one is processed. With e_ij = exp(s_ij -
// max) and weights m_j of the keys, P_ij = e_ij m_j / Z_i, Z_i = sum_j e_ij m_j. If one tile holds all keys, no online
// softmax is needed and all branches share e. Longer rows keep max, Z and the output of the keys so far; this output is
// already divided by Z, so that weights as small as 1e-10 do not underflow in float16.
#include "attention.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int N = TILE / 8;

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_kernel(BranchedAttentionParams p, int stages, bool aligned) {
    constexpr int STRIDE = tile_stride<T>(D), SIZE = TILE * STRIDE;
    T* const query = dynamic_shared<T>();
    T* const keys = query + SIZE;            // [stages]: one or two, so a mask finds a tile without a division
    T* const values = keys + stages * SIZE;  // [stages]
    float* const weights = reinterpret_cast<float*>(values + stages * SIZE);  // [branches of this block, TILE]

    const int64_t b = blockIdx.x / p.H, h = blockIdx.x % p.H;
    const int64_t first_branch = blockIdx.z, branches = gridDim.z == 1 ? p.branches.n : 1;
    const int first_row = static_cast<int>(blockIdx.y) * TILE, limit = static_cast<int>(real_keys(p, b));
    const int reach = p.causal && first_row + TILE < limit ? first_row + TILE : limit;
    const int tiles = reach > 0 ? (reach + TILE - 1) / TILE : 1;  // a row without keys still writes zeros

    const int d = static_cast<int>(p.d);
    const auto copy_both = [&](int tile) {
        const int first = tile * TILE, place = (tile & (stages - 1)) * SIZE;
        if (tile < tiles)
            copy_rows<T, D>(keys + place, row_of_head<T>(p.key, b, h, 0), p.key.row, first, limit, d, aligned);
        commit_async();
        if (tile < tiles)
            copy_rows<T, D>(values + place, row_of_head<T>(p.value, b, h, 0), p.value.row, first, limit, d, aligned);
        commit_async();
    };
    copy_rows<T, D>(query, row_of_head<T>(p.query, b, h, 0), p.query.row, first_row, static_cast<int>(p.Lq), d,
                    aligned);
    copy_both(0);

    T* const own = query + warp() * 16 * STRIDE;
    const int own_row = first_row + warp() * 16;
    const int seen_by_all = p.causal && own_row + 1 < limit ? own_row + 1 : limit;  // keys, by all rows of this warp
    float out[D / 8][4], highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    clear(out);
    for (int tile = 0; tile < tiles; ++tile) {
        if (stages == 2) copy_both(tile + 1);
        load_key_weights(p, p.branches, b, first_branch, branches, static_cast<int64_t>(tile) * TILE, limit, weights);
        stages == 2 ? wait_async<3>() : wait_async<1>();
        sync_block();
        float e[N][4];
        clear(e);
        add_products<D>(e, own, keys + (tile & (stages - 1)) * SIZE, STRIDE);
        float higher[2] = {highest[0], highest[1]}, shrink[2];
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) e[n][i] = rounded_product(e[n][i], p.scale);
        }
        if ((tile + 1) * TILE > seen_by_all) {
            int seen[2];  // keys of this tile, by each of the lane's rows
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int end = own_row + row_of(2 * r) + 1;
                seen[r] = (p.causal && end < limit ? end : limit) - tile * TILE;
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (8 * n + column_of(i) >= seen[i / 2]) e[n][i] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) higher[i / 2] = fmaxf(higher[i / 2], e[n][i]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            higher[r] = max_over_lanes<4>(higher[r]);
            const float reference = higher[r] == -INFINITY ? 0.0f : higher[r];
            shrink[r] = exponential(highest[r] - reference);
            highest[r] = higher[r];
            higher[r] = reference;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) e[n][i] = exponential(e[n][i] - higher[i / 2]);
        }
        stages == 2 ? wait_async<2>() : wait_async<0>();
        sync_block();
        for (int64_t branch = 0; branch < branches; ++branch) {
            float weighted[N][4], sum[2] = {0, 0}, inverse[2];
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weighted[n][i] = e[n][i] * weights[branch * TILE + 8 * n + column_of(i)];
                    sum[i / 2] += weighted[n][i];
                }
            }
            add_to_totals(tile == 0, sum, total, shrink, inverse);
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) out[d][i] = tile == 0 ? 0.0f : out[d][i] * shrink[i / 2];
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) weighted[n][i] *= inverse[i / 2];
            }
            add_weighted<T>(out, weighted, values + (tile & (stages - 1)) * SIZE, STRIDE);
            if (tile + 1 < tiles) continue;
            const int64_t at = first_branch + branch;
            store_rows(out, 1.0f, own, STRIDE, static_cast<int>(p.d), aligned, [&](int r) -> T* {
                return own_row + r < p.Lq ? row_of_head<T>(p.out, b, h, own_row + r) + at * p.branches.out : nullptr;
            });
            for (int r = 0; r < 2; ++r) {
                const int64_t row = own_row + row_of(2 * r);
                if (lane() % 4 != 0 || row >= p.Lq) continue;
                float* const stats = p.stats + at * p.branches.stats + ((b * p.H + h) * p.Lq + row) * 2;
                store(stats, higher[r]);
                store(stats + 1, inverse[r]);
            }
        }
        sync_block();
        if (stages == 1 && tile + 1 < tiles) copy_both(tile + 1);
    }
}

// Averages P over the heads, one after the other, for 64 queries and 64 keys.
template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_weights_kernel(AttentionParams p, bool aligned) {
    constexpr int STRIDE = tile_stride<T>(D), SIZE = TILE * STRIDE;
    T* const query = dynamic_shared<T>();
    T* const keys = query + SIZE;
    float* const weights = reinterpret_cast<float*>(keys + SIZE);
    const int64_t b = blockIdx.x, first_row = static_cast<int64_t>(blockIdx.y) * TILE, limit = real_keys(p, b);
    const int64_t first_key = static_cast<int64_t>(blockIdx.z) * TILE, own_row = first_row + warp() * 16;
    load_key_weights(p, Branches{}, b, 0, 1, first_key, limit, weights);
    const float share = 1.0f / static_cast<float>(p.H);
    float averaged[N][4];
    clear(averaged);
    for (int64_t h = 0; h < p.H; ++h) {
        const auto copy = [&](T* to, const Heads& from, int64_t first, int64_t end) {
            copy_tile<TILE, D>(
                to, static_cast<int>(p.d), aligned,
                [&](int r) -> const T* { return first + r < end ? row_of_head<T>(from, b, h, first + r) : nullptr; },
                STRIDE);
        };
        copy(query, p.query, first_row, p.Lq);
        copy(keys, p.key, first_key, limit);
        commit_async();
        wait_async<0>();
        sync_block();
        float s[N][4], stats[2][2] = {};
        clear(s);
        add_products<D>(s, query + warp() * 16 * STRIDE, keys, STRIDE);
        for (int r = 0; r < 2; ++r) {
            const int64_t row = own_row + row_of(2 * r);
            for (int i = 0; i < 2 && row < p.Lq; ++i)
                stats[r][i] = load(p.stats + ((b * p.H + h) * p.Lq + row) * 2 + i);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = own_row + row_of(i), key = first_key + 8 * n + column_of(i);
                if (key >= limit || (p.causal && key > row)) continue;
                const float e = exponential(rounded_product(s[n][i], p.scale) - stats[i / 2][0]);
                averaged[n][i] += e * weights[8 * n + column_of(i)] * stats[i / 2][1];
            }
        }
        sync_block();
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = own_row + row_of(i), key = first_key + 8 * n + column_of(i);
            if (row < p.Lq && key < p.Lk) {
                store(p.weights + (b * p.Lq + row) * p.Lk + key, averaged[n][i] * share);
            }
        }
    }
}

}  // namespace
}  // namespace cuda

void branched_attention(const BranchedAttentionParams& p) {
    if (p.B * p.H * p.Lq == 0 || p.branches.n == 0) return;
    const bool done = p.branches.n == 1 && cuda::attention_short(p);
    const bool aligned = cuda::rows_aligned(p.dtype, p.d, {p.query, p.key, p.value, p.out});
    const int64_t rows = cuda::ceil_div(p.Lq, cuda::TILE), keys = cuda::ceil_div(p.Lk, cuda::TILE);
    const int64_t apart = keys > 1 ? p.branches.n : 1;  // with several tiles, each branch has its own blocks
    cuda::with_head_size(p.dtype, p.d, [&](auto* type, auto size) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int D = size();
        constexpr size_t tile = sizeof(T) * cuda::TILE * cuda::tile_stride<T>(D);
        const size_t weights = sizeof(float) * static_cast<size_t>(cuda::TILE * (p.branches.n / apart));
        const auto bytes = [&](int stages) { return tile * static_cast<size_t>(1 + 2 * stages) + weights; };
        const int stages = keys > 1 && bytes(2) <= static_cast<size_t>(cuda::most_shared_bytes()) ? 2 : 1;
        if (!done) {
            cuda::launch(cuda::attention_kernel<T, D>, {p.B * p.H, rows, apart}, cuda::ATTENTION_THREADS, bytes(stages),
                         p, stages, aligned);
        }
        if (p.weights != nullptr && keys > 0) {
            cuda::launch(cuda::attention_weights_kernel<T, D>, {p.B, rows, keys}, cuda::ATTENTION_THREADS,
                         2 * tile + sizeof(float) * cuda::TILE, static_cast<const AttentionParams&>(p), aligned);
        }
    });
}

void attention(const AttentionParams& p) {
    BranchedAttentionParams one{};
    static_cast<AttentionParams&>(one) = p;
    branched_attention(one);
}

}  // namespace cnm
