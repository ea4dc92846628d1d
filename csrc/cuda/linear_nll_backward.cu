// Gradients of linear_nll; the formulas stand in linear_nll.cu.
#include "linear_nll.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int COLUMN_SUM_PARTS = 32;

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

}  // namespace
}  // namespace cuda

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
