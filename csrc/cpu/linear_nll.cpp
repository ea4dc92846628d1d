// Label-smoothed negative log likelihood of a linear layer, forward and backward, in blocks of the vocabulary.
//
//   z = h W^T + b, token nll = (1-e)(lse - z_y) + e (lse - mean_v z_v), averaged over each row's valid tokens
//   lse = max z + log sum exp(z - max): two numbers, never added, since a large maximum would absorb the logarithm
//   dz_v = g (softmax_v - (1-e) [v = y] - e / V), dh = dz W, dW = dz^T h, db = sum dz
//
// Active tokens (valid, and in the backward with a nonzero gradient) are gathered into tiles of 64. The logits of a
// tile are computed transposed, [words, tokens], so that each vector lane computes maximum, sum and exponentials of one
// token, and only one block of words exists at a time. On request the forward also keeps O = softmax(z) W, by an online
// softmax; then dh = g (O - (1-e) W_y - e mean(W)) needs no logits.
//
// Forward and dh are parallel over tiles. dW is parallel over blocks of words: dz of a few tiles is stored (always a
// small part of the logits), then each block sums it in the order of the tokens.
#include "linear_nll.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t TOKENS = 64;  // in a tile
constexpr int64_t WORDS = 128;  // in a block of logits: 32 KiB
constexpr int64_t PAD = W;      // padding of scratch rows: rows at power-of-two distances share few cache sets

int64_t words_from(const LinearNllInputs& p, int64_t begin) { return std::min(WORDS, p.V - begin); }
int64_t blocks(const LinearNllInputs& p) { return (p.V + WORDS - 1) / WORDS; }

// The active tokens, and the gradient of each one's nll.
struct Tokens {
    std::vector<int64_t> index;
    std::vector<float> gradient;

    explicit Tokens(const LinearNllInputs& p, const float* d_nll = nullptr) {
        for (int64_t m = 0; m < p.M; ++m) {
            if (d_nll != nullptr && d_nll[m] == 0) continue;
            const int64_t n = p.valid(m);
            for (int64_t t = 0; t < n; ++t) {
                index.push_back(m * p.L + t);
                if (d_nll != nullptr) gradient.push_back(d_nll[m] / static_cast<float>(n));
            }
        }
    }
    int64_t size() const { return static_cast<int64_t>(index.size()); }
    int64_t tiles() const { return (size() + TOKENS - 1) / TOKENS; }
};

// The vocabulary as operands of gemm: the left one of z = W h^T and, on request, the right one of sums over words.
template <class T>
struct Vocabulary {
    using E = Operand<T>;
    const E *rows, *summed;
    int64_t rows_ld, summed_ld;

    Vocabulary(const LinearNllInputs& p, bool want_summed) {
        const int64_t wide = round_up(p.D, W);
        const T* weight = static_cast<const T*>(p.weight);
        if constexpr (std::is_same_v<T, E>) {
            rows = summed = weight;
            rows_ld = summed_ld = p.D;
        } else {
            const bool in_place = usable_in_place(p.D, weight, p.D);
            if (!in_place) rows_buffer_ = Buffer(static_cast<size_t>(p.V * wide) * sizeof(E));
            rows = rows_buffer_.as<E>();
            rows_ld = wide;
            if constexpr (std::is_same_v<E, bf16x2>) {
                if (in_place) {
                    rows = as_bf16x2(weight);
                    rows_ld = p.D / 2;
                }
            }
            // Converted rows are float and serve as either operand.
            const bool pack = want_summed && std::is_same_v<E, bf16x2>;
            if (pack) summed_buffer_ = Buffer(static_cast<size_t>(round_up(p.V, 2) * wide) / 2 * sizeof(E));
            summed = pack ? summed_buffer_.as<E>() : rows;
            summed_ld = wide;
            parallel_for(in_place && !pack ? 0 : blocks(p), [&](int64_t block) {
                const int64_t begin = block * WORDS;
                const T* source = weight + begin * p.D;
                if (!in_place)
                    pack_a(words_from(p, begin), p.D, source, p.D, rows_buffer_.as<E>() + begin * wide, wide);
                if (pack) {
                    E* to = summed_buffer_.as<E>() + packed_k<T>(begin) * wide;
                    pack_rows(words_from(p, begin), p.D, source, p.D, to, wide);
                }
            });
        }
    }

  private:
    Buffer rows_buffer_, summed_buffer_;
};

// A tile of tokens, and its logits for a block of words.
template <class T>
class Tile {
  public:
    using E = Operand<T>;

    Tile(const LinearNllInputs& p, const Vocabulary<T>& vocabulary, Arena& arena)
        : p_(p), vocabulary_(vocabulary), width_padded_(round_up(p.D, W)) {
        logits = arena.alloc<float>(WORDS * TOKENS);
        rows_ = arena.alloc<T>(TOKENS * p.D);
        transposed_ = arena.alloc<E>(packed_k<T>(p.D) * TOKENS);
        packed_ = arena.alloc<E>(WORDS * TOKENS);
        sums = arena.alloc<float>(TOKENS * width_padded_);
    }

    void load(const Tokens& tokens, int64_t tile) {
        first = tile * TOKENS;
        size = std::min(TOKENS, tokens.size() - first);
        for (int64_t t = 0; t < size; ++t) {
            const T* row = static_cast<const T*>(p_.hidden) + tokens.index[static_cast<size_t>(first + t)] * p_.D;
            std::memcpy(rows_ + t * p_.D, row, static_cast<size_t>(p_.D) * sizeof(T));
        }
        std::memset(rows_ + size * p_.D, 0, static_cast<size_t>((TOKENS - size) * p_.D) * sizeof(T));
        pack_transposed(p_.D, TOKENS, rows_, p_.D, transposed_, TOKENS);
    }

    // Computes z[word][token] without the bias.
    void score(int64_t begin, float* z) const {
        gemm(words_from(p_, begin), TOKENS, packed_k<T>(p_.D), vocabulary_.rows + begin * vocabulary_.rows_ld,
             vocabulary_.rows_ld, 1, transposed_, TOKENS, z, TOKENS, false);
    }

    // sums[token] += sum over the block's words of z[word][token] W[word]
    void add_words(int64_t begin, const float* z) const {
        const int64_t words = words_from(p_, begin);
        const E* a = right_rows(words, TOKENS, z, TOKENS, packed_, TOKENS).data;
        gemm(size, p_.D, packed_k<T>(words), a, 1, TOKENS,
             vocabulary_.summed + packed_k<T>(begin) * vocabulary_.summed_ld, vocabulary_.summed_ld, sums,
             width_padded_, true);
    }

    void clear_sums() const { std::fill(sums, sums + TOKENS * width_padded_, 0.0f); }
    const T* rows() const { return rows_; }
    int64_t sums_ld() const { return width_padded_; }

    float* logits;  // [WORDS, TOKENS]
    float* sums;    // [TOKENS, sums_ld]
    int64_t first = 0, size = 0;

  private:
    const LinearNllInputs& p_;
    const Vocabulary<T>& vocabulary_;
    const int64_t width_padded_;
    T* rows_;
    E *transposed_, *packed_;
};

// For each token of a tile: running maximum, sum of exponentials and sum of z - max.
struct Softmax {
    alignas(64) float max[TOKENS], total[TOKENS], below[TOKENS], target_logit[TOKENS], scale[TOKENS], best[TOKENS];

    Softmax() {
        std::fill_n(max, TOKENS, std::numeric_limits<float>::lowest());
        std::fill_n(total, TOKENS, 0.0f);
        std::fill_n(below, TOKENS, 0.0f);
        std::fill_n(target_logit, TOKENS, 0.0f);
        std::fill_n(best, TOKENS, 0.0f);
    }

    // Adds a block of z + bias to the running values. With `keep`, replaces the logits by exp(z - new maximum), and
    // sets `scale` to the factor that rescales the sums of earlier blocks.
    void take(float* logits, const float* bias, const int64_t* target, int64_t begin, int64_t words, int64_t size,
              bool keep) {
        for (int64_t i = 0; i < TOKENS; i += W) {
            Vec top = load(max + i), word = load(best + i);
            for (int64_t v = 0; v < words; ++v) {
                float* p = logits + v * TOKENS + i;
                const Vec z = load(p) + set1(bias[v]);
                store(p, z);
                word = select(less(top, z), set1(static_cast<float>(begin + v)), word);
                top = vmax(z, top);
            }
            store(best + i, word);
            store(scale + i, top);
        }
        for (int64_t t = 0; t < size; ++t) {
            if (target[t] >= begin && target[t] < begin + words) {
                target_logit[t] = logits[(target[t] - begin) * TOKENS + t];
            }
        }
        for (int64_t i = 0; i < TOKENS; i += W) {
            const Vec top = load(scale + i), raised = load(max + i) - top, factor = exp(raised);
            Vec sum = set1(0), under = set1(0);  // of this block: beside a likely word's 1 a small one rounds away
            for (int64_t v = 0; v < words; ++v) {
                float* p = logits + v * TOKENS + i;
                const Vec less_top = load(p) - top, e = exp(less_top);
                under += less_top;
                if (keep) store(p, e);
                sum += e;
            }
            Vec before = load(below + i);
            if (begin > 0) before += raised * set1(static_cast<float>(begin));
            store(total + i, load(total + i) * factor + sum);
            store(below + i, before + under);
            store(max + i, top);
            store(scale + i, factor);
        }
    }
};

template <class T>
void write_row(T* out, const float* values, int64_t n, float factor) {
    for (int64_t c = 0; c < n; c += W) store_tail(out + c, load_tail(values + c, n - c) * set1(factor), n - c);
}

template <class T>
void forward(const LinearNllParams& p) {
    const Tokens tokens(p);
    const Vocabulary<T> vocabulary(p, p.expected != nullptr);
    std::vector<float> token_nll(tokens.index.size());
    std::vector<char> correct(tokens.index.size());
    Arena counted(nullptr);
    Tile<T>(p, vocabulary, counted);
    parallel_for(tokens.tiles(), [&](int64_t index) {
        Arena arena(thread_scratch(counted.bytes()));
        Tile<T> tile(p, vocabulary, arena);
        tile.load(tokens, index);
        Softmax softmax;
        int64_t target[TOKENS];
        for (int64_t t = 0; t < tile.size; ++t) target[t] = p.target[tokens.index[static_cast<size_t>(tile.first + t)]];
        if (p.expected != nullptr) tile.clear_sums();
        for (int64_t begin = 0; begin < p.V; begin += WORDS) {
            tile.score(begin, tile.logits);
            softmax.take(tile.logits, p.bias + begin, target, begin, words_from(p, begin), tile.size,
                         p.expected != nullptr);
            if (p.expected == nullptr) continue;
            for (int64_t t = 0; t < tile.size; ++t) {
                float* row = tile.sums + t * tile.sums_ld();
                write_row(row, row, p.D, softmax.scale[t]);
            }
            tile.add_words(begin, tile.logits);
        }
        for (int64_t t = 0; t < tile.size; ++t) {
            const size_t i = static_cast<size_t>(tile.first + t);
            const int64_t token = tokens.index[i];
            const float max = softmax.max[t], log_total = std::log(softmax.total[t]), smoothing = p.label_smoothing;
            const float smooth = smoothing * (softmax.below[t] / static_cast<float>(p.V));
            token_nll[i] = log_total + (1 - smoothing) * (max - softmax.target_logit[t]);
            if (smoothing > 0) token_nll[i] -= smooth;  // words with bias -inf make it infinite
            correct[i] = static_cast<int64_t>(softmax.best[t]) == target[t];
            p.stats[token] = max;
            p.stats[p.M * p.L + token] = log_total;
            if (p.expected != nullptr) {
                write_row(p.expected + token * p.D, tile.sums + t * tile.sums_ld(), p.D, 1 / softmax.total[t]);
            }
        }
    });
    size_t token = 0;
    for (int64_t m = 0; m < p.M; ++m) {
        const int64_t n = p.valid(m);
        float nll = 0;
        int64_t right = 0;
        for (int64_t t = 0; t < n; ++t, ++token) {
            nll += token_nll[token];
            right += correct[token];
        }
        // Initialise padding of the tensors saved for the backward.
        const int64_t padding = m * p.L + n;
        for (float* stats : {p.stats, p.stats + p.M * p.L}) std::fill(stats + padding, stats + (m + 1) * p.L, 0.0f);
        if (p.expected != nullptr) std::fill(p.expected + padding * p.D, p.expected + (m + 1) * p.L * p.D, 0.0f);
        const float count = static_cast<float>(n);
        p.nll[m] = n == 0 ? 0 : nll / count;
        if (p.accuracy != nullptr) p.accuracy[m] = n == 0 ? 0 : static_cast<float>(right) / count;
    }
}

// The backward's data of a tile; padding tokens have gradient 0.
struct TileGradient {
    alignas(64) float max[TOKENS], log_total[TOKENS], gradient[TOKENS];
    int64_t target[TOKENS];

    TileGradient(const LinearNllBackwardParams& p, const Tokens& tokens, int64_t first, int64_t size) {
        for (int64_t t = 0; t < TOKENS; ++t) {
            const bool real = t < size;
            const int64_t token = real ? tokens.index[static_cast<size_t>(first + t)] : 0;
            max[t] = real ? p.stats[token] : std::numeric_limits<float>::max();
            log_total[t] = real ? p.stats[p.M * p.L + token] : 0;
            gradient[t] = real ? tokens.gradient[static_cast<size_t>(first + t)] : 0;
            target[t] = real ? p.target[token] : -1;
        }
    }

    // Replaces z by dz; writes its sum over the tokens to d_bias.
    void apply(float* z, const float* bias, float label_smoothing, int64_t V, int64_t begin, int64_t words,
               float* d_bias) const {
        const Vec share = set1(label_smoothing / static_cast<float>(V));
        for (int64_t v = 0; v < words; ++v) {
            Vec sum = set1(0);
            for (int64_t i = 0; i < TOKENS; i += W) {
                float* p = z + v * TOKENS + i;
                const Vec probability = exp(load(p) + set1(bias[v]) - load(max + i) - load(log_total + i));
                const Vec dz = (probability - share) * load(gradient + i);
                store(p, dz);
                sum += dz;
            }
            d_bias[v] = hsum(sum);
        }
        for (int64_t t = 0; t < TOKENS; ++t) {
            if (target[t] < begin || target[t] >= begin + words) continue;
            const float less = (1 - label_smoothing) * gradient[t];
            z[(target[t] - begin) * TOKENS + t] -= less;
            d_bias[target[t] - begin] -= less;
        }
    }
};

// Zeros d_hidden of inactive tokens.
template <class T>
void clear_others(const LinearNllBackwardParams& p, const Tokens& tokens) {
    T* out = static_cast<T*>(p.d_hidden);
    int64_t done = 0;
    const auto clear_to = [&](int64_t token) {
        std::memset(static_cast<void*>(out + done * p.D), 0, static_cast<size_t>((token - done) * p.D) * sizeof(T));
        done = token + 1;
    };
    for (const int64_t token : tokens.index) clear_to(token);
    clear_to(p.M * p.L);
}

// Computes d_hidden from the O that the forward kept.
template <class T>
void hidden_gradient_from_expected(const LinearNllBackwardParams& p, const Tokens& tokens) {
    const T* weight = static_cast<const T*>(p.weight);
    std::vector<double> sums(static_cast<size_t>(p.D));
    for (int64_t v = 0; v < p.V; ++v) {
        for (int64_t c = 0; c < p.D; c += W) {
            float lanes[W];
            store(lanes, load_tail(weight + v * p.D + c, p.D - c));
            for (int64_t i = 0; i < std::min<int64_t>(W, p.D - c); ++i) sums[static_cast<size_t>(c + i)] += lanes[i];
        }
    }
    std::vector<float> mean(sums.size());
    for (size_t c = 0; c < sums.size(); ++c) mean[c] = static_cast<float>(sums[c] / static_cast<double>(p.V));
    parallel_for(tokens.tiles(), [&](int64_t tile) {
        for (int64_t i = tile * TOKENS; i < std::min(tokens.size(), (tile + 1) * TOKENS); ++i) {
            const int64_t token = tokens.index[static_cast<size_t>(i)];
            const T* word = weight + p.target[token] * p.D;
            T* out = static_cast<T*>(p.d_hidden) + token * p.D;
            for (int64_t c = 0; c < p.D; c += W) {
                const int64_t n = p.D - c;
                Vec d = load_tail(p.expected + token * p.D + c, n);
                d = fnma(set1(1 - p.label_smoothing), load_tail(word + c, n), d);
                d = fnma(set1(p.label_smoothing), load_tail(&mean[static_cast<size_t>(c)], n), d);
                store_tail(out + c, d * set1(tokens.gradient[static_cast<size_t>(i)]), n);
            }
        }
    });
}

template <class T>
void backward(const LinearNllBackwardParams& p) {
    using E = Operand<T>;
    const Tokens tokens(p, p.d_nll);
    const bool want_words = p.d_weight != nullptr || p.d_bias != nullptr;
    const bool want_hidden = p.d_hidden != nullptr && p.expected == nullptr;
    if (p.d_hidden != nullptr) clear_others<T>(p, tokens);
    if (p.d_hidden != nullptr && p.expected != nullptr) hidden_gradient_from_expected<T>(p, tokens);
    if (!want_words && !want_hidden) return;

    const Vocabulary<T> vocabulary(p, want_hidden);
    Arena counted(nullptr);
    Tile<T>(p, vocabulary, counted);

    // For the tiles at hand: dz [word][tile, token], hidden states [tile, token] and their parts of d_bias
    // [tile][word]. SUMMED tiles share a pass over the float32 sums, whatever the number of threads. Narrow products
    // take half the time, so a pass is relatively twice as expensive for them.
    constexpr int64_t SUMMED = std::is_same_v<E, float> ? 2 : 4;
    const int64_t group = round_up(thread_count() * SUMMED / 2, SUMMED);
    const int64_t at_hand = want_words ? std::min(tokens.tiles(), group) : tokens.tiles();
    const int64_t wide = round_up(p.D, W), tile_k = packed_k<T>(TOKENS);
    const int64_t dz_ld = at_hand * tile_k + PAD;
    const size_t kept = want_words ? static_cast<size_t>(at_hand) : 0;
    const Buffer dz_buffer(want_words ? static_cast<size_t>(p.V * dz_ld) * sizeof(E) : 0);
    const Buffer hidden_buffer(kept * static_cast<size_t>(tile_k * wide) * sizeof(E));
    const Buffer share_buffer(kept * static_cast<size_t>(p.V) * sizeof(float));
    E *dz = dz_buffer.as<E>(), *hidden = hidden_buffer.as<E>();
    float* share = share_buffer.as<float>();
    // Sum in float32, in the output itself if it is float32.
    const bool in_place = p.d_weight_dtype == Dtype::float32;
    const Buffer weight_buffer(!in_place && p.d_weight != nullptr ? static_cast<size_t>(p.V * p.D) * sizeof(float) : 0);
    float* d_weight = in_place ? static_cast<float*>(p.d_weight) : weight_buffer.as<float>();
    std::vector<float> d_bias(want_words ? static_cast<size_t>(p.V) : 0);

    const auto do_tile = [&](int64_t index, int64_t slot) {
        Arena arena(thread_scratch(counted.bytes() + WORDS * sizeof(float)));
        Tile<T> tile(p, vocabulary, arena);
        float* unwanted = arena.alloc<float>(WORDS);
        tile.load(tokens, index);
        const TileGradient gradient(p, tokens, tile.first, tile.size);
        if (want_hidden) tile.clear_sums();
        if (want_words) pack_rows(TOKENS, p.D, tile.rows(), p.D, hidden + slot * tile_k * wide, wide);
        for (int64_t begin = 0; begin < p.V; begin += WORDS) {
            const int64_t words = words_from(p, begin);
            float* z = tile.logits;
            tile.score(begin, z);
            gradient.apply(z, p.bias + begin, p.label_smoothing, p.V, begin, words,
                           want_words ? share + slot * p.V + begin : unwanted);
            if (want_words) pack_a(words, TOKENS, z, TOKENS, dz + begin * dz_ld + slot * tile_k, dz_ld);
            if (want_hidden) tile.add_words(begin, z);
        }
        if (!want_hidden) return;
        for (int64_t t = 0; t < tile.size; ++t) {
            T* out = static_cast<T*>(p.d_hidden) + tokens.index[static_cast<size_t>(tile.first + t)] * p.D;
            write_row(out, tile.sums + t * tile.sums_ld(), p.D, 1);
        }
    };
    const auto add_tiles = [&](int64_t block, int64_t first, int64_t tiles) {
        const int64_t begin = block * WORDS, words = words_from(p, begin);
        for (int64_t slot = 0; slot < tiles; ++slot) {
            for (int64_t v = begin; v < begin + words; ++v) d_bias[static_cast<size_t>(v)] += share[slot * p.V + v];
        }
        if (p.d_weight == nullptr) return;
        for (int64_t slot = 0; slot < tiles; slot += SUMMED) {
            gemm(words, p.D, std::min(SUMMED, tiles - slot) * tile_k, dz + begin * dz_ld + slot * tile_k, dz_ld, 1,
                 hidden + slot * tile_k * wide, wide, d_weight + begin * p.D, p.D, first + slot > 0);
        }
    };
    for (int64_t first = 0; first < tokens.tiles(); first += at_hand) {
        const int64_t tiles = std::min(at_hand, tokens.tiles() - first);
        parallel_for(tiles, [&](int64_t slot) { do_tile(first + slot, slot); });
        if (want_words) parallel_for(blocks(p), [&](int64_t block) { add_tiles(block, first, tiles); });
    }
    if (p.d_weight != nullptr && tokens.tiles() == 0) {
        std::memset(p.d_weight, 0, static_cast<size_t>(p.V * p.D) * (in_place ? sizeof(float) : sizeof(T)));
    } else if (p.d_weight != nullptr && !in_place) {
        parallel_for(blocks(p), [&](int64_t block) {
            const int64_t begin = block * WORDS * p.D;
            write_row(static_cast<T*>(p.d_weight) + begin, d_weight + begin, words_from(p, block * WORDS) * p.D, 1);
        });
    }
    if (p.d_bias != nullptr) std::copy(d_bias.begin(), d_bias.end(), p.d_bias);
}

}  // namespace

void linear_nll(const LinearNllParams& p) {
    with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void linear_nll_backward(const LinearNllBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace cnm::CNM_ISA
