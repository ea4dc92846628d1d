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
// Both run on mma.sync, and on wgmma where that is (GPUs of 9.0; 129 to 256 columns of 16 bits, aligned).
#include "linear_nll_groups.cuh"

namespace cnm {
namespace cuda {
namespace {

// The least maximum: words of bias -INFINITY are infinitely below it, also where there are no others.
constexpr float LOWEST = -0x1.fffffep127f;

// One block per row.
__global__ void __launch_bounds__(SUM_THREADS) list_tokens_kernel(LinearNllInputs p, ActiveTokens active) {
    list_tokens(p, nullptr, nullptr, active);
}

struct ForwardScratch {
    const int *tokens, *count;
    float* partial;   // [parts, 4, M L]: max z, sum exp(z - max), sum (z - max), z_y
    int* likeliest;   // [parts, M L] or null
    float* expected;  // [parts, M L, D], before the division by the sum; or null
};

template <class T, int D, bool GROUPS>
__global__ void __launch_bounds__(MAX_WARPS* WARP, 1)
    linear_nll_kernel(LinearNllInputs p, ForwardScratch scratch, int words_per_part, int stages, bool aligned) {
    if constexpr (COMPILED<GROUPS>) {
        using Tiles = ProductsOf<T, D, false, GROUPS>;
        constexpr int KEYS = Tiles::KEYS, N = Tiles::N;
        const int warps = threads() / WARP, first = static_cast<int>(blockIdx.x) * warps * 16;
        const int count = load(scratch.count);
        if (first >= count) return;
        const Tiles products(p.D, stages, aligned);
        int* const tokens = reinterpret_cast<int*>(products.rest);  // [warps * 16]
        float* const bias = reinterpret_cast<float*>(tokens + warps * 16);
        for (int i = thread(); i < warps * 16; i += threads()) {
            tokens[i] = first + i < count ? load(scratch.tokens + first + i) : -1;
        }
        sync_block();
        const int first_word = static_cast<int>(blockIdx.y) * words_per_part;
        const int vocabulary = static_cast<int>(p.V);
        const int end = first_word + words_per_part < vocabulary ? first_word + words_per_part : vocabulary;
        int target[2];
        float highest[2] = {LOWEST, LOWEST}, total[2] = {0, 0}, below[2] = {0, 0}, z_target[2] = {0, 0};
        float shrink[2];
        int best[2] = {0, 0};
        float expected[D / 8][4];
        clear(expected);
        for (int r = 0; r < 2; ++r) {
            const int token = tokens[warp() * 16 + row_of(2 * r)];
            target[r] = token < 0 ? -1 : static_cast<int>(load(p.target + token));
        }
        products.walk((end - first_word + KEYS - 1) / KEYS, p.hidden, [&](int r) { return tokens[r]; }, p.weight,
                      [&](int tile, int r) {
                          const int word = first_word + tile * KEYS + r;
                          return word < end ? word : -1;
                      },
                      [&](int tile) {
                          const int word = first_word + tile * KEYS + thread();
                          const bool inside = thread() < KEYS && word < end;
                          return inside ? load(p.bias + word) : 0.0f;
                      },
                      [&](float of_word, int slot) {
                          if (thread() < KEYS) bias[slot * KEYS + thread()] = of_word;
                      },
                      [&](int tile, int slot, float(&z)[N][4]) {
                          const int tile_word = first_word + tile * KEYS + column_of(0);  // this lane's first
                          const bool whole = first_word + (tile + 1) * KEYS <= end;
                          float here[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
                          int at[2] = {0, 0};
#pragma unroll
                          for (int n = 0; n < N; ++n) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) z[n][i] += bias[slot * KEYS + 8 * n + column_of(i)];
                          }
#pragma unroll
                          for (int r = 0; r < 2; ++r) {
                              const int place = target[r] - tile_word;  // among this lane's words, if even and the next
                              if (place < 0 || place >= KEYS || target[r] >= end) continue;
#pragma unroll
                              for (int n = 0; n < N; ++n) {
                                  if (place == 8 * n) z_target[r] += z[n][2 * r];
                                  if (place == 8 * n + 1) z_target[r] += z[n][2 * r + 1];
                              }
                          }
                          if (!whole) {
#pragma unroll
                              for (int n = 0; n < N; ++n) {
#pragma unroll
                                  for (int i = 0; i < 4; ++i) {
                                      if (tile_word + 8 * n + i % 2 >= end) z[n][i] = -INFINITY;
                                  }
                              }
                          }
#pragma unroll
                          for (int n = 0; n < N; ++n) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) here[i / 2] = fmaxf(here[i / 2], z[n][i]);
                          }
                          if (scratch.likeliest != nullptr) {
#pragma unroll
                              for (int n = N - 1; n >= 0; --n) {
#pragma unroll
                                  for (int i = 3; i >= 0; --i) {
                                      if (z[n][i] == here[i / 2]) at[i / 2] = tile_word + 8 * n + i % 2;
                                  }
                              }
                          }
#pragma unroll
                          for (int r = 0; r < 2; ++r) {
#pragma unroll
                              for (int mask = 1; mask < 4; mask *= 2) {  // the most likely word; of equals the first
                                  const float other = shuffle_xor(here[r], mask);
                                  if (scratch.likeliest != nullptr) {
                                      const int other_at = static_cast<int>(
                                          bits_of(shuffle_xor(float_of(static_cast<uint32_t>(at[r])), mask)));
                                      if (other > here[r] || (other == here[r] && other_at < at[r])) at[r] = other_at;
                                  }
                                  here[r] = fmaxf(here[r], other);
                              }
                              if (here[r] > highest[r]) best[r] = at[r];
                              const float higher = fmaxf(highest[r], here[r]);
                              shrink[r] = exponential(highest[r] - higher);
                              // from this lane's words of earlier tiles
                              if (tile > 0) below[r] += (highest[r] - higher) * static_cast<float>(tile * (KEYS / 4));
                              highest[r] = higher;
                          }
#pragma unroll
                          for (int n = 0; n < N; ++n) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) z[n][i] -= highest[i / 2];
                          }
#pragma unroll
                          for (int n = 0; n < N; ++n) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) {
                                  if (whole || tile_word + 8 * n + i % 2 < end) below[i / 2] += z[n][i];
                              }
                          }
#pragma unroll
                          for (int n = 0; n < N; ++n) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) {
                                  z[n][i] = exponential(z[n][i]);
                                  sum[i / 2] += z[n][i];
                              }
                          }
#pragma unroll
                          for (int r = 0; r < 2; ++r) total[r] = total[r] * shrink[r] + sum[r];
                          return shrink[0] != 1.0f || shrink[1] != 1.0f;
                      },
                      scratch.expected != nullptr,
                      [&] {
#pragma unroll
                          for (int d = 0; d < D / 8; ++d) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) expected[d][i] *= shrink[i / 2];
                          }
                      },
                      expected);
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
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp() * 16 + row_of(2 * r);
            if (tokens[row] < 0) continue;
            store_accumulators<D>(expected, r, scratch.expected + (part * N_TOKENS + first + row) * p.D,
                                  products.own_chunk * D, p.D);
        }
    }
}

// For each row: combines the parts of its tokens into statistics, O and the mean nll. A warp processes one token at a
// time.
__global__ void __launch_bounds__(SUM_THREADS)
    combine_kernel(LinearNllParams p, ForwardScratch scratch, int parts, int words_per_part) {
    constexpr int EACH = 4;  // columns of a lane
    const bool whole = p.D % EACH == 0;
    float* const shared = dynamic_shared<float>();
    float* const shares = shared + SUM_THREADS / WARP + warp() * parts;  // of each part in O
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
        sync_warp();  // whoever still reads the shares of a token before this one
        for (int part = lane(); part < parts; part += WARP) {
            shares[part] = exponential(load(partial + part * 4 * N) - highest) / total;
        }
        sync_warp();
        for (int64_t c = EACH * lane(); c < p.D; c += EACH * WARP) {
            const int numbers = p.D - c < EACH ? static_cast<int>(p.D - c) : EACH;
            float expected[EACH] = {0};
#pragma unroll 2  // as far as registers go
            for (int part = 0; part < parts; ++part) {
                float here[EACH];
                load_numbers(here, scratch.expected + (part * N + before + i) * p.D + c, numbers, whole);
#pragma unroll
                for (int k = 0; k < EACH; ++k) expected[k] += shares[part] * here[k];
            }
            store_numbers(p.expected + token * p.D + c, expected, numbers, whole);
        }
    }
    const float size = static_cast<float>(length > 0 ? length : 1);
    nll = sum_over_block(lane() == 0 ? nll : 0.0f, shared);
    correct = sum_over_block(lane() == 0 ? correct : 0.0f, shared);
    if (thread() != 0) return;
    store(p.nll + m, nll / size);
    if (p.accuracy != nullptr) store(p.accuracy + m, correct / size);
}

}  // namespace

}  // namespace cuda

void linear_nll(const LinearNllParams& p) {
    using namespace cuda;
    const int64_t N = p.M * p.L;
    if (p.M == 0) return;
    const Scratch list((N + 1) * int64_t{sizeof(int)});
    const ActiveTokens active{list.as<int>() + 1, list.as<int>(), nullptr};
    launch(list_tokens_kernel, {p.M}, SUM_THREADS, SCRATCH_BYTES, static_cast<const LinearNllInputs&>(p), active);
    dispatch(p.dtype, p.D, [&](auto* type, auto size) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int D = size();
        const bool aligned =
            p.D * sizeof(T) % sizeof(Vec16B) == 0 && aligned_to_vec16b(p.hidden) && aligned_to_vec16b(p.weight);
        const auto groups_kernel = kernel_of_groups<T, D>(p.D, aligned && p.expected != nullptr, [](auto in_groups) {
            return linear_nll_kernel<T, D, decltype(in_groups)::value>;
        });
        // float32 operands take twice the registers, so a block has only four warps
        const Plan chosen = plan<T, D>(sizeof(T) == 4 ? MAX_WARPS / 2 : MAX_WARPS, groups_kernel != nullptr, p.D,
                                       sizeof(int), sizeof(float));
        const int64_t tiles = ceil_div(N, chosen.warps * 16), word_tiles = ceil_div(p.V, chosen.keys);
        const int64_t per_part = ceil_div(word_tiles, chosen.parts(tiles, ceil_div(word_tiles, 4))) * chosen.keys;
        const int64_t parts = std::max<int64_t>(ceil_div(p.V, std::max<int64_t>(per_part, 1)), 1);
        const Scratch partial(parts * 4 * N * int64_t{sizeof(float)});
        const Scratch likeliest(p.accuracy ? parts * N * int64_t{sizeof(int)} : 0);
        const Scratch expected(p.expected ? parts * N * p.D * int64_t{sizeof(float)} : 0);
        const ForwardScratch scratch{active.tokens, active.count, partial.as<float>(),
                                     p.accuracy ? likeliest.as<int>() : nullptr,
                                     p.expected ? expected.as<float>() : nullptr};
        if (tiles > 0 && p.V > 0) {
            launch(groups_kernel ? groups_kernel : linear_nll_kernel<T, D, false>,
                   {tiles, parts, p.expected ? ceil_div(p.D, D) : 1}, chosen.warps * WARP, chosen.bytes,
                   static_cast<const LinearNllInputs&>(p), scratch, static_cast<int>(per_part), chosen.stages, aligned);
        }
        launch(combine_kernel, {p.M}, SUM_THREADS, SCRATCH_BYTES * static_cast<size_t>(1 + parts), p, scratch,
               static_cast<int>(parts), static_cast<int>(per_part));
    });
}

}  // namespace cnm
