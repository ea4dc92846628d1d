// Gradients of linear_nll; the formulas stand in linear_nll.cu.
#include "linear_nll_groups.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int COLUMN_SUM_PARTS = 32;

// A block for each of p.M rows lists their tokens, if `tokens`; the others write sums [COLUMN_SUM_PARTS, D], if not
// null: column sums of W, each over a range of words.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
    prepare_kernel(LinearNllBackwardParams p, ActiveTokens active, float* sums, int list_blocks) {
    if (static_cast<int>(blockIdx.x) < list_blocks) {
        list_tokens(p, p.d_nll, p.stats, active);
        return;
    }
    const int block = static_cast<int>(blockIdx.x) - list_blocks;
    const int64_t c = static_cast<int64_t>(block / COLUMN_SUM_PARTS) * SUM_THREADS + thread();
    const int64_t part = block % COLUMN_SUM_PARTS;
    if (c >= p.D) return;
    const int64_t share = (p.V + COLUMN_SUM_PARTS - 1) / COLUMN_SUM_PARTS, first = part * share;
    float sum = 0;
#pragma unroll 4
    for (int64_t word = first; word < first + share && word < p.V; ++word) {
        sum += to_float(load(static_cast<const T*>(p.weight) + word * p.D + c));
    }
    store(sums + part * p.D + c, sum);
}

struct WordScratch {
    ActiveTokens active;
    float *d_weight, *d_bias;  // [parts, V, D], [parts, V]
};

template <class T, int D, bool GROUPS>
__global__ void __launch_bounds__(MAX_WARPS* WARP, 1)
    linear_nll_word_gradient_kernel(LinearNllBackwardParams p, WordScratch scratch, int stages, bool aligned) {
    if constexpr (COMPILED<GROUPS>) {
        using Tiles = ProductsOf<T, D, true, GROUPS>;
        constexpr int KEYS = Tiles::KEYS, N = Tiles::N;
        const int warps = threads() / WARP, vocabulary = static_cast<int>(p.V);
        const int first_word = static_cast<int>(blockIdx.x) * warps * 16, own_word = first_word + warp() * 16;
        const int count = load(scratch.active.count), part = static_cast<int>(blockIdx.y);
        const int parts = static_cast<int>(gridDim.y);
        const int tiles = (count + KEYS - 1) / KEYS, share = (tiles + parts - 1) / parts;
        const int first = part * share * KEYS;
        const int end = first + share * KEYS < count ? first + share * KEYS : count;
        const Tiles products(p.D, stages, aligned);
        TokenNote* const notes = reinterpret_cast<TokenNote*>(products.rest);  // of the tokens of a tile
        float bias[2], d_bias[2] = {0, 0}, d_weight[D / 8][4];
        clear(d_weight);
        for (int r = 0; r < 2; ++r) {
            const int word = own_word + row_of(2 * r);
            bias[r] = word < vocabulary ? load(p.bias + word) : 0.0f;
        }
        const float smoothing = p.label_smoothing, uniform = smoothing / static_cast<float>(vocabulary);
        if (first < end) {
            products.walk(
                (end - first + KEYS - 1) / KEYS, p.weight,
                [&](int r) { return first_word + r < vocabulary ? first_word + r : -1; }, p.hidden,
                [&](int tile, int r) {
                    const int i = first + tile * KEYS + r;
                    return i < end ? load(scratch.active.tokens + i) : -1;
                },
                [&](int tile) {
                    const int place = first + tile * KEYS + thread();
                    const bool inside = thread() < KEYS && place < end;
                    return inside ? load(scratch.active.notes + place) : TokenNote{0.0f, 0.0f, 0.0f, -1};
                },
                [&](const TokenNote& of_token, int slot) {
                    if (thread() < KEYS) notes[slot * KEYS + thread()] = of_token;
                },
                [&](int, int slot, float(&z)[N][4]) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        keep_order();
#pragma unroll
                        for (int column = 0; column < 2; ++column) {
                            const TokenNote note = notes[slot * KEYS + 8 * n + column_of(column)];
#pragma unroll
                            for (int r = 0; r < 2; ++r) {
                                float& number = z[n][2 * r + column];
                                float log_probability = number + bias[r] - note.highest - note.log_total;
                                // no probability is above 1, however large logits round; NaN stays, unlike in fminf
                                log_probability = log_probability > 0.0f ? 0.0f : log_probability;
                                float d_z = exponential(log_probability) - uniform;
                                if (own_word + row_of(2 * r) == note.target) d_z -= 1.0f - smoothing;
                                number = note.d_nll == 0.0f ? 0.0f : d_z * note.d_nll;  // no token: exp may be infinite
                                d_bias[r] += number;
                            }
                        }
                    }
                    return std::false_type();  // earlier sums need no other scale
                },
                scratch.d_weight != nullptr, [] {}, d_weight);
        }
        if (scratch.d_weight != nullptr) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t word = own_word + row_of(2 * r);
                if (word >= vocabulary) continue;
                store_accumulators<D>(d_weight, r, scratch.d_weight + (part * p.V + word) * p.D,
                                      static_cast<int>(blockIdx.z) * D, p.D);
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
}

// A block computes d_hidden at SUM_THREADS columns of one row: first the columns' means, then a warp a token at a time.
template <class T>
__device__ __forceinline__ void hidden_gradient(const LinearNllBackwardParams& p, const float* column_sums, int64_t m,
                                                int64_t first_column, bool aligned) {
    constexpr int PER = PER_VEC16B<T>;
    float* const means = dynamic_shared<float>();  // [SUM_THREADS]
    const int64_t length = valid_length(p, p.d_nll, m), own = first_column + thread();
    float mean = 0;
    for (int part = 0; own < p.D && part < COLUMN_SUM_PARTS; ++part) mean += load(column_sums + part * p.D + own);
    means[thread()] = mean / static_cast<float>(p.V);
    sync_block();
    const float d_nll = length > 0 ? load(p.d_nll + m) / static_cast<float>(length) : 0.0f;
    for (int64_t i = warp(); i < p.L; i += SUM_THREADS / WARP) {
        const int64_t token = m * p.L + i, target = i < length ? load(p.target + token) : 0;
        const bool known = target >= 0 && target < p.V;
        for (int at = lane() * PER; at < SUM_THREADS && first_column + at < p.D; at += WARP * PER) {
            const int64_t column = first_column + at;
            const int numbers = p.D - column < PER ? static_cast<int>(p.D - column) : PER;
            float of_target[PER], gradient[PER];
            if (i < length) load_numbers(gradient, p.expected + token * p.D + column, numbers, aligned);
            if (i < length && known) {
                load_numbers(of_target, static_cast<const T*>(p.weight) + target * p.D + column, numbers, aligned);
            }
#pragma unroll
            for (int k = 0; k < PER; ++k) {
                const float less = (1.0f - p.label_smoothing) * (known ? of_target[k] : NAN);
                gradient[k] = i < length ? d_nll * (gradient[k] - less - p.label_smoothing * means[at + k]) : 0.0f;
            }
            store_numbers(static_cast<T*>(p.d_hidden) + token * p.D + column, gradient, numbers, aligned);
        }
    }
}

// out [size] = sum of parts [parts, size], in order; a thread computes SUM_EACH numbers.
constexpr int SUM_EACH = 8;
template <class T>
__device__ __forceinline__ void sum_parts(const float* parts, int64_t size, int count, T* out, int64_t block) {
    const int64_t first = (block * SUM_THREADS + thread()) * SUM_EACH;
    if (first >= size) return;
    float sum[SUM_EACH] = {0};
    const bool whole = size % SUM_EACH == 0;
    const int numbers = size - first < SUM_EACH ? static_cast<int>(size - first) : SUM_EACH;
#pragma unroll 4
    for (int part = 0; part < count; ++part) {
        float here[SUM_EACH];
        load_numbers(here, parts + part * size + first, numbers, whole);
#pragma unroll
        for (int k = 0; k < SUM_EACH; ++k) sum[k] += here[k];
    }
    store_numbers(out + first, sum, numbers, whole);
}

// Blocks [0, hidden) compute d_hidden, of each row all its columns in turn; the next `weight` sum the parts of
// d_weight, and the rest those of d_bias.
struct FinishBlocks {
    int64_t hidden, weight, bias;
};
template <class T, class W>
__global__ void __launch_bounds__(SUM_THREADS)
    finish_kernel(LinearNllBackwardParams p, WordScratch scratch, int parts, const float* column_sums,
                  FinishBlocks blocks, bool aligned) {
    const int64_t block = blockIdx.x, column_blocks = (p.D + SUM_THREADS - 1) / SUM_THREADS;
    if (block < blocks.hidden) {
        hidden_gradient<T>(p, column_sums, block / column_blocks, block % column_blocks * SUM_THREADS, aligned);
    } else if (block < blocks.hidden + blocks.weight) {
        sum_parts(scratch.d_weight, p.V * p.D, parts, static_cast<W*>(p.d_weight), block - blocks.hidden);
    } else {
        sum_parts(scratch.d_bias, p.V, parts, p.d_bias, block - blocks.hidden - blocks.weight);
    }
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
        const bool of_hidden = p.d_hidden != nullptr && N > 0 && p.D > 0;
        const bool of_words = (p.d_weight != nullptr || p.d_bias != nullptr) && p.V > 0;
        if (!of_hidden && !of_words) return;
        const Scratch sums(of_hidden ? COLUMN_SUM_PARTS * p.D * int64_t{sizeof(float)} : 0);
        const Scratch list(of_words ? (N + 1) * int64_t{sizeof(int)} : 0);
        const Scratch notes(of_words ? N * int64_t{sizeof(TokenNote)} : 0);
        const ActiveTokens active{list.as<int>() + 1, list.as<int>(), notes.as<TokenNote>()};
        const int64_t list_blocks = of_words ? std::max<int64_t>(p.M, 1) : 0;
        const int64_t column_blocks = of_hidden ? ceil_div(p.D, SUM_THREADS) : 0;
        launch(prepare_kernel<T>, {list_blocks + COLUMN_SUM_PARTS * column_blocks}, SUM_THREADS, SCRATCH_BYTES, p,
               active, sums.as<float>(), static_cast<int>(list_blocks));

        const auto groups_kernel = kernel_of_groups<T, D>(p.D, aligned && p.d_weight != nullptr, [](auto in_groups) {
            return linear_nll_word_gradient_kernel<T, D, decltype(in_groups)::value>;
        });
        const Plan chosen = plan<T, D>(sizeof(T) == 4 || p.V <= 4096 ? MAX_WARPS / 2 : MAX_WARPS,
                                       groups_kernel != nullptr, p.D, 0, sizeof(TokenNote));
        const int64_t tiles = ceil_div(p.V, chosen.warps * 16);
        const int64_t parts = chosen.parts(tiles, ceil_div(N, 4 * chosen.keys));
        const Scratch d_weight(of_words && p.d_weight ? parts * p.V * p.D * int64_t{sizeof(float)} : 0);
        const Scratch d_bias(of_words && p.d_bias ? parts * p.V * int64_t{sizeof(float)} : 0);
        const WordScratch scratch{active, p.d_weight ? d_weight.as<float>() : nullptr,
                                  p.d_bias ? d_bias.as<float>() : nullptr};
        if (of_words) {
            launch(groups_kernel ? groups_kernel : linear_nll_word_gradient_kernel<T, D, false>,
                   {tiles, parts, p.d_weight ? ceil_div(p.D, D) : 1}, chosen.warps * WARP, chosen.bytes, p, scratch,
                   chosen.stages, aligned);
        }
        const bool all_aligned = aligned && aligned_to_vec16b(p.expected) && aligned_to_vec16b(p.d_hidden);
        const FinishBlocks blocks{p.M * column_blocks,
                                  of_words && p.d_weight ? ceil_div(p.V * p.D, SUM_THREADS * SUM_EACH) : 0,
                                  of_words && p.d_bias ? ceil_div(p.V, SUM_THREADS * SUM_EACH) : 0};
        const auto finish = [&](auto* weights) {
            if (blocks.hidden + blocks.weight + blocks.bias == 0) return;
            launch(finish_kernel<T, std::remove_pointer_t<decltype(weights)>>,
                   {blocks.hidden + blocks.weight + blocks.bias}, SUM_THREADS, sizeof(float) * SUM_THREADS, p, scratch,
                   static_cast<int>(parts), static_cast<const float*>(sums.as<float>()), blocks, all_aligned);
        };
        if (p.d_weight == nullptr || p.d_weight_dtype == p.dtype) return finish(type);
        finish(static_cast<float*>(nullptr));
    });
}

}  // namespace cnm
