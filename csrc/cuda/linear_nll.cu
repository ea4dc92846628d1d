// linear_nll on GPUs, computed as an attention: words are the keys, and W holds both keys and values. Logits stay in
// registers.
//
// A first kernel lists the active tokens; padding and rows without a gradient cost nothing.
// Forward: a block has a tile of tokens and one part of the vocabulary. With z = h W^T + b it computes max z,
// sum exp(z - max), sum (z - max), z_y and, for the backward, O = softmax(z) W. A second kernel combines the parts in
// order. max z and log sum exp(z - max) stay two numbers, since a large maximum would absorb the logarithm.
// Backward: dh = g (O - (1 - e) W[y] - e mean W) needs no logits. For dW = dz^T h with
// dz = g (softmax(z) - (1 - e) 1_y - e / V), a block has a tile of words and one part of the tokens; the parts are
// summed in order. Rows wider than a tile are loaded in chunks; a block computes the columns of its last chunk.
#include "linear_nll.h"

#include <algorithm>

#include "tiles.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int64_t BLOCKS = 256;   // fill any GPU; a constant, so that all GPUs give the same bits
constexpr int64_t MAX_PARTS = 8;  // parts of the vocabulary, or of the tokens
// The least maximum: words of bias -INFINITY are infinitely below it, also where there are no others.
constexpr float LOWEST = -0x1.fffffep127f;
constexpr int COLUMN_SUM_PARTS = 32, SUM_THREADS = 256, MAX_WARPS = 8;

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

// Writes the indices of the active tokens to tokens [M L], in order, and their number to count []. One block per row.
__global__ void __launch_bounds__(SUM_THREADS)
    list_tokens_kernel(LinearNllInputs p, const float* d_nll, int* tokens, int* count) {
    if (p.M == 0) {
        if (thread() == 0) store(count, 0);
        return;
    }
    const int64_t m = blockIdx.x, before = tokens_before(p, d_nll, m, dynamic_shared<float>());
    const int64_t length = valid_length(p, d_nll, m);
    for (int64_t i = thread(); i < length; i += threads()) store(tokens + before + i, static_cast<int>(m * p.L + i));
    if (m == p.M - 1 && thread() == 0) store(count, static_cast<int>(before + length));
}

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

// ------------------------------------------------------------------------------------------------ forward

struct ForwardScratch {
    const int *tokens, *count;
    float* partial;   // [parts, 4, M L]: max z, sum exp(z - max), sum (z - max), z_y
    int* likeliest;   // [parts, M L] or null
    float* expected;  // [parts, M L, D], before the division by the sum; or null
};

template <class T, int D>
__global__ void __launch_bounds__(MAX_WARPS* WARP, 1)
    linear_nll_kernel(LinearNllInputs p, ForwardScratch scratch, int words_per_part, int stages, bool aligned) {
    const int warps = threads() / WARP, first = static_cast<int>(blockIdx.x) * warps * 16, count = load(scratch.count);
    if (first >= count) return;
    const Products<T, D, false> products(p.D, stages, aligned);
    int* const tokens = reinterpret_cast<int*>(products.rest);  // [warps * 16]
    float* const bias = reinterpret_cast<float*>(tokens + warps * 16);
    for (int i = thread(); i < warps * 16; i += threads()) {
        tokens[i] = first + i < count ? load(scratch.tokens + first + i) : -1;
    }
    sync_block();
    const int first_word = static_cast<int>(blockIdx.y) * words_per_part;
    const int vocabulary = static_cast<int>(p.V);
    const int end = first_word + words_per_part < vocabulary ? first_word + words_per_part : vocabulary;
    constexpr int N = KEYS<T, D> / 8;
    int target[2];
    float highest[2] = {LOWEST, LOWEST}, total[2] = {0, 0}, below[2] = {0, 0}, z_target[2] = {0, 0};
    int best[2] = {0, 0};
    float expected[D / 8][4];
    clear(expected);
    for (int r = 0; r < 2; ++r) {
        const int token = tokens[warp() * 16 + row_of(2 * r)];
        target[r] = token < 0 ? -1 : static_cast<int>(load(p.target + token));
    }
    products.walk(
        (end - first_word + KEYS<T, D> - 1) / KEYS<T, D>,
        [&](int r) -> const T* { return tokens[r] < 0 ? nullptr : static_cast<const T*>(p.hidden) + tokens[r] * p.D; },
        [&](int tile, int r) -> const T* {
            const int word = first_word + tile * KEYS<T, D> + r;
            return word < end ? static_cast<const T*>(p.weight) + word * p.D : nullptr;
        },
        [&](int tile) {
            for (int i = thread(); i < KEYS<T, D>; i += threads()) {
                const int word = first_word + tile * KEYS<T, D> + i;
                bias[i] = word < end ? to_float(load(static_cast<const T*>(p.bias) + word)) : 0.0f;
            }
        },
        [&](int tile, float(&z)[N][4], const T* words) {
            float here[2] = {-INFINITY, -INFINITY}, shrink[2], sum[2] = {0, 0};
            int at[2] = {0, 0};
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 8 * n + column_of(i), word = first_word + tile * KEYS<T, D> + column;
                    z[n][i] += bias[column];
                    if (word == target[i / 2]) z_target[i / 2] += z[n][i];
                    z[n][i] = word < end ? z[n][i] : -INFINITY;
                    if (z[n][i] > here[i / 2]) at[i / 2] = word;
                    here[i / 2] = fmaxf(here[i / 2], z[n][i]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) {  // the most likely word; of equals the first
                    const float other = shuffle_xor(here[r], mask);
                    const int other_at =
                        static_cast<int>(bits_of(shuffle_xor(float_of(static_cast<uint32_t>(at[r])), mask)));
                    if (other > here[r] || (other == here[r] && other_at < at[r])) at[r] = other_at;
                    here[r] = fmaxf(here[r], other);
                }
                if (here[r] > highest[r]) best[r] = at[r];
                const float higher = fmaxf(highest[r], here[r]);
                shrink[r] = exponential(highest[r] - higher);
                // from this lane's words of earlier tiles
                if (tile > 0) below[r] += (highest[r] - higher) * static_cast<float>(tile * (KEYS<T, D> / 4));
                highest[r] = higher;
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    z[n][i] -= highest[i / 2];
                    if (first_word + tile * KEYS<T, D> + 8 * n + column_of(i) < end) below[i / 2] += z[n][i];
                    z[n][i] = exponential(z[n][i]);
                    sum[i / 2] += z[n][i];
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) total[r] = total[r] * shrink[r] + sum[r];
            if (scratch.expected == nullptr) return;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) expected[d][i] *= shrink[i / 2];
            }
            add_weighted<T>(expected, z, words, tile_stride<T>(D));
        });
    const int64_t N_TOKENS = p.M * p.L, part = blockIdx.y;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = warp() * 16 + row_of(2 * r);
        total[r] = sum_over_lanes<4>(total[r]);
        below[r] = sum_over_lanes<4>(below[r]);
        z_target[r] = sum_over_lanes<4>(z_target[r]);
        if (blockIdx.z != 0 || lane() % 4 != 0 || tokens[row] < 0) continue;
        float* const partial = scratch.partial + part * 4 * N_TOKENS + first + row;
        store(partial, highest[r]);
        store(partial + N_TOKENS, total[r]);
        store(partial + 2 * N_TOKENS, below[r]);
        store(partial + 3 * N_TOKENS, z_target[r]);
        if (scratch.likeliest != nullptr) store(scratch.likeliest + part * N_TOKENS + first + row, best[r]);
    }
    if (scratch.expected == nullptr) return;
    const int first_column = products.own_chunk * D;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = warp() * 16 + row_of(i), column = first_column + 8 * d + column_of(i);
            if (tokens[row] < 0 || column >= p.D) continue;
            store(scratch.expected + (part * N_TOKENS + first + row) * p.D + column, expected[d][i]);
        }
    }
}

// For each row: combines the parts of its tokens into statistics, O and the mean nll. A warp processes one token at a
// time.
__global__ void __launch_bounds__(SUM_THREADS)
    combine_kernel(LinearNllParams p, ForwardScratch scratch, int parts, int words_per_part) {
    float* const shared = dynamic_shared<float>();
    const int64_t m = blockIdx.x, N = p.M * p.L, before = tokens_before(p, nullptr, m, shared);
    const int64_t length = valid_length(p, nullptr, m);
    const float count = static_cast<float>(p.V), smoothing = p.label_smoothing;
    float nll = 0, correct = 0;
    for (int64_t i = warp(); i < p.L; i += threads() / WARP) {
        const int64_t token = m * p.L + i;
        if (i >= length) {  // padding gets zeros
            if (lane() == 0) store(p.stats + token, 0.0f);
            if (lane() == 0) store(p.stats + N + token, 0.0f);
            if (p.expected != nullptr) {
                for (int64_t c = lane(); c < p.D; c += WARP) store(p.expected + token * p.D + c, 0.0f);
            }
            continue;
        }
        const float* const partial = scratch.partial + before + i;
        float highest = LOWEST, total = 0, below = 0, z_target = 0;
        int best = 0;
        for (int part = 0; part < parts; ++part) {
            const float here = load(partial + part * 4 * N);
            if (scratch.likeliest != nullptr && here > highest) best = load(scratch.likeliest + part * N + before + i);
            highest = fmaxf(highest, here);
        }
        for (int part = 0; part < parts; ++part) {
            const float* const of_part = partial + part * 4 * N;
            const float less = load(of_part) - highest, rest = count - static_cast<float>(part * words_per_part);
            total += exponential(less) * load(of_part + N);
            below += load(of_part + 2 * N) + less * fminf(rest, static_cast<float>(words_per_part));
            z_target += load(of_part + 3 * N);
        }
        const float log_total = logf(total);
        const int64_t target = load(p.target + token);
        const bool known = target >= 0 && target < p.V;  // a wrong word gives NaN: a kernel cannot raise an error
        if (smoothing == 0.0f) below = 0;                // words with bias -inf make it infinite
        nll += known ? log_total + (1.0f - smoothing) * (highest - z_target) - smoothing * (below / count) : NAN;
        correct += static_cast<float>(best == target);
        if (lane() == 0) store(p.stats + token, highest);
        if (lane() == 0) store(p.stats + N + token, log_total);
        if (p.expected == nullptr) continue;
        for (int64_t c = lane(); c < p.D; c += WARP) {
            float expected = 0;
            for (int part = 0; part < parts; ++part) {
                const float share = exponential(load(partial + part * 4 * N) - highest) / total;
                expected += share * load(scratch.expected + (part * N + before + i) * p.D + c);
            }
            store(p.expected + token * p.D + c, expected);
        }
    }
    const float size = static_cast<float>(length > 0 ? length : 1);
    nll = sum_over_block(lane() == 0 ? nll : 0.0f, shared);
    correct = sum_over_block(lane() == 0 ? correct : 0.0f, shared);
    if (thread() != 0) return;
    store(p.nll + m, nll / size);
    if (p.accuracy != nullptr) store(p.accuracy + m, correct / size);
}

// ------------------------------------------------------------------------------------------------ backward

// Writes parts [COLUMN_SUM_PARTS, D]: column sums of W, each over a range of words.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS) column_sums_kernel(LinearNllInputs p, float* parts) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * SUM_THREADS + thread();
    if (c >= p.D) return;
    const int64_t share = (p.V + COLUMN_SUM_PARTS - 1) / COLUMN_SUM_PARTS, first = blockIdx.y * share;
    float sum = 0;
    for (int64_t word = first; word < first + share && word < p.V; ++word) {
        sum += to_float(load(static_cast<const T*>(p.weight) + word * p.D + c));
    }
    store(parts + blockIdx.y * p.D + c, sum);
}

// One block per row, one thread per column.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
    linear_nll_hidden_gradient_kernel(LinearNllBackwardParams p, const float* column_sums) {
    const int64_t m = blockIdx.x, length = valid_length(p, p.d_nll, m);
    const float d_nll = length > 0 ? load(p.d_nll + m) / static_cast<float>(length) : 0.0f;
    for (int64_t c = thread(); c < p.D; c += threads()) {
        float mean = 0;
        for (int part = 0; length > 0 && part < COLUMN_SUM_PARTS; ++part) mean += load(column_sums + part * p.D + c);
        mean /= static_cast<float>(p.V);
        for (int64_t token = m * p.L; token < (m + 1) * p.L; ++token) {
            float gradient = 0;
            if (token < m * p.L + length) {
                const int64_t target = load(p.target + token);
                const bool known = target >= 0 && target < p.V;
                const float of_target =
                    known ? to_float(load(static_cast<const T*>(p.weight) + target * p.D + c)) : NAN;
                gradient = d_nll * (load(p.expected + token * p.D + c) - (1.0f - p.label_smoothing) * of_target -
                                    p.label_smoothing * mean);
            }
            T rounded;
            from_float(&rounded, gradient);
            store(static_cast<T*>(p.d_hidden) + token * p.D + c, rounded);
        }
    }
}

struct WordScratch {
    const int *tokens, *count;
    float *d_weight, *d_bias;  // [parts, V, D], [parts, V]
};

template <class T, int D>
__global__ void __launch_bounds__(MAX_WARPS* WARP, 1)
    linear_nll_word_gradient_kernel(LinearNllBackwardParams p, WordScratch scratch, int stages, bool aligned) {
    constexpr int N = KEYS<T, D> / 8;
    const int warps = threads() / WARP, vocabulary = static_cast<int>(p.V);
    const int first_word = static_cast<int>(blockIdx.x) * warps * 16, own_word = first_word + warp() * 16;
    const int count = load(scratch.count), part = static_cast<int>(blockIdx.y), parts = static_cast<int>(gridDim.y);
    const int tiles = (count + KEYS<T, D> - 1) / KEYS<T, D>, share = (tiles + parts - 1) / parts;
    const int first = part * share * KEYS<T, D>;
    const int end = first + share * KEYS<T, D> < count ? first + share * KEYS<T, D> : count;
    const Products<T, D, true> products(p.D, stages, aligned);
    float* const highest = reinterpret_cast<float*>(products.rest);  // for a tile of tokens
    float* const log_total = highest + KEYS<T, D>;
    float* const d_nll = log_total + KEYS<T, D>;
    int* const target = reinterpret_cast<int*>(d_nll + KEYS<T, D>);
    float bias[2], d_bias[2] = {0, 0}, d_weight[D / 8][4];
    clear(d_weight);
    for (int r = 0; r < 2; ++r) {
        const int word = own_word + row_of(2 * r);
        bias[r] = word < vocabulary ? to_float(load(static_cast<const T*>(p.bias) + word)) : 0.0f;
    }
    const float smoothing = p.label_smoothing, uniform = smoothing / static_cast<float>(vocabulary);
    if (first < end) {
        products.walk(
            (end - first + KEYS<T, D> - 1) / KEYS<T, D>,
            [&](int r) -> const T* {
                return first_word + r < vocabulary ? static_cast<const T*>(p.weight) + (first_word + r) * p.D : nullptr;
            },
            [&](int tile, int r) -> const T* {
                const int i = first + tile * KEYS<T, D> + r;
                return i < end ? static_cast<const T*>(p.hidden) + load(scratch.tokens + i) * p.D : nullptr;
            },
            [&](int tile) {
                for (int i = thread(); i < KEYS<T, D>; i += threads()) {
                    const int place = first + tile * KEYS<T, D> + i;
                    const int token = place < end ? load(scratch.tokens + place) : -1;
                    const int64_t m = token < 0 ? 0 : token / p.L;
                    highest[i] = token < 0 ? 0.0f : load(p.stats + token);
                    log_total[i] = token < 0 ? 0.0f : load(p.stats + p.M * p.L + token);
                    d_nll[i] = token < 0 ? 0.0f : load(p.d_nll + m) / static_cast<float>(valid_length(p, nullptr, m));
                    target[i] = token < 0 ? -1 : static_cast<int>(load(p.target + token));
                }
            },
            [&](int, float(&z)[N][4], const T* tokens) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = 8 * n + column_of(i), word = own_word + row_of(i);
                        const float less = z[n][i] + bias[i / 2] - highest[column];
                        const float log_probability = less - log_total[column];
                        // no probability is above 1, however large logits round
                        float d_z = exponential(log_probability > 0.0f ? 0.0f : log_probability) - uniform;
                        if (word == target[column]) d_z -= 1.0f - smoothing;
                        z[n][i] = d_nll[column] == 0.0f ? 0.0f : d_z * d_nll[column];  // no token: exp may be infinite
                        d_bias[i / 2] += z[n][i];
                    }
                }
                if (scratch.d_weight != nullptr) add_weighted<T>(d_weight, z, tokens, tile_stride<T>(D));
            });
    }
    const int first_column = products.own_chunk * D;
    if (scratch.d_weight != nullptr) {
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t word = own_word + row_of(i), column = first_column + 8 * d + column_of(i);
                if (word < vocabulary && column < p.D) {
                    store(scratch.d_weight + (part * p.V + word) * p.D + column, d_weight[d][i]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = sum_over_lanes<4>(d_bias[r]);
        const int word = own_word + row_of(2 * r);
        if (scratch.d_bias != nullptr && blockIdx.z == 0 && lane() % 4 == 0 && word < vocabulary) {
            store(scratch.d_bias + part * p.V + word, sum);
        }
    }
}

// out [size] = sum of parts [parts, size], in order.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS) sum_parts_kernel(const float* parts, int64_t size, int count, T* out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * SUM_THREADS + thread();
    if (i >= size) return;
    float sum = 0;
    for (int part = 0; part < count; ++part) sum += load(parts + part * size + i);
    T rounded;
    from_float(&rounded, sum);
    store(out + i, rounded);
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

void list_tokens(const LinearNllInputs& p, const float* d_nll, int* tokens, int* count) {
    launch(list_tokens_kernel, {std::max<int64_t>(p.M, 1)}, SUM_THREADS, SCRATCH_BYTES, p, d_nll, tokens, count);
}

}  // namespace
}  // namespace cuda

void linear_nll(const LinearNllParams& p) {
    using namespace cuda;
    const int64_t N = p.M * p.L;
    if (p.M == 0) return;
    const Scratch list((N + 1) * int64_t{sizeof(int)});
    int *const count = list.as<int>(), *const tokens = count + 1;
    list_tokens(p, nullptr, tokens, count);
    dispatch(p.dtype, p.D, [&](auto* type, auto size) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int D = size();
        // float32 operands take twice the registers, so a block has only four warps
        const Plan chosen =
            plan<T, D>(sizeof(T) == 4 ? MAX_WARPS / 2 : MAX_WARPS, p.D, sizeof(int), sizeof(float) * KEYS<T, D>);
        const int64_t tiles = ceil_div(N, chosen.warps * 16), word_tiles = ceil_div(p.V, KEYS<T, D>);
        const int64_t per_part = ceil_div(word_tiles, parts_to_fill(tiles, ceil_div(word_tiles, 4))) * KEYS<T, D>;
        const int64_t parts = std::max<int64_t>(ceil_div(p.V, std::max<int64_t>(per_part, 1)), 1);
        const Scratch partial(parts * 4 * N * int64_t{sizeof(float)});
        const Scratch likeliest(p.accuracy ? parts * N * int64_t{sizeof(int)} : 0);
        const Scratch expected(p.expected ? parts * N * p.D * int64_t{sizeof(float)} : 0);
        const ForwardScratch scratch{tokens, count, partial.as<float>(), p.accuracy ? likeliest.as<int>() : nullptr,
                                     p.expected ? expected.as<float>() : nullptr};
        const bool aligned =
            p.D * sizeof(T) % sizeof(Vec16B) == 0 && aligned_to_vec16b(p.hidden) && aligned_to_vec16b(p.weight);
        if (tiles > 0 && p.V > 0) {
            launch(linear_nll_kernel<T, D>, {tiles, parts, p.expected ? ceil_div(p.D, D) : 1}, chosen.warps * WARP,
                   chosen.bytes, static_cast<const LinearNllInputs&>(p), scratch, static_cast<int>(per_part),
                   chosen.stages, aligned);
        }
        launch(combine_kernel, {p.M}, SUM_THREADS, SCRATCH_BYTES, p, scratch, static_cast<int>(parts),
               static_cast<int>(per_part));
    });
}

void linear_nll_backward(const LinearNllBackwardParams& p) {
    using namespace cuda;
    const int64_t N = p.M * p.L;
    dispatch(p.dtype, p.D, [&](auto* type, auto size) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int D = size();
        const bool aligned =
            p.D * sizeof(T) % sizeof(Vec16B) == 0 && aligned_to_vec16b(p.hidden) && aligned_to_vec16b(p.weight);
        if (p.d_hidden != nullptr && N > 0 && p.D > 0) {
            const Scratch sums(COLUMN_SUM_PARTS * p.D * int64_t{sizeof(float)});
            launch(column_sums_kernel<T>, {ceil_div(p.D, SUM_THREADS), COLUMN_SUM_PARTS}, SUM_THREADS, 0,
                   static_cast<const LinearNllInputs&>(p), sums.as<float>());
            launch(linear_nll_hidden_gradient_kernel<T>, {p.M}, SUM_THREADS, 0, p,
                   static_cast<const float*>(sums.as<float>()));
        }
        if ((p.d_weight == nullptr && p.d_bias == nullptr) || p.V == 0) return;
        const Scratch list((N + 1) * int64_t{sizeof(int)});
        int *const count = list.as<int>(), *const tokens = count + 1;
        list_tokens(p, p.d_nll, tokens, count);
        const Plan chosen = plan<T, D>(sizeof(T) == 4 || p.V <= 4096 ? MAX_WARPS / 2 : MAX_WARPS, p.D, 0,
                                       4 * sizeof(float) * KEYS<T, D>);
        const int64_t tiles = ceil_div(p.V, chosen.warps * 16);
        const int64_t parts = parts_to_fill(tiles, ceil_div(N, 4 * KEYS<T, D>));
        const Scratch d_weight(p.d_weight ? parts * p.V * p.D * int64_t{sizeof(float)} : 0);
        const Scratch d_bias(p.d_bias ? parts * p.V * int64_t{sizeof(float)} : 0);
        const WordScratch scratch{tokens, count, p.d_weight ? d_weight.as<float>() : nullptr,
                                  p.d_bias ? d_bias.as<float>() : nullptr};
        launch(linear_nll_word_gradient_kernel<T, D>, {tiles, parts, p.d_weight ? ceil_div(p.D, D) : 1},
               chosen.warps * WARP, chosen.bytes, p, scratch, chosen.stages, aligned);
        const auto sum_parts = [&](const float* from, int64_t numbers, auto* to) {
            if (numbers == 0) return;
            launch(sum_parts_kernel<std::remove_pointer_t<decltype(to)>>, {ceil_div(numbers, SUM_THREADS)}, SUM_THREADS,
                   0, from, numbers, static_cast<int>(parts), to);
        };
        if (p.d_weight) {
            with_type(p.d_weight_dtype,
                      [&](auto* to) { sum_parts(scratch.d_weight, p.V * p.D, static_cast<decltype(to)>(p.d_weight)); });
        }
        if (p.d_bias) sum_parts(scratch.d_bias, p.V, p.d_bias);
    });
}

}  // namespace cnm
