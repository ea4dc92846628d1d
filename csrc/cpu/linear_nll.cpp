// Label-smoothed negative log likelihood of a linear layer, forward and backward, blockwise over the vocabulary.
//
//   z = h W^T + b, token nll = (1-e)(lse - z_y) + e (lse - mean_v z_v), averaged over each row's valid tokens
//   dz_v = g (softmax_v - (1-e) [v = y] - e / V), dh = dz W, dW = dz^T h, db = sum dz
//
// The tokens that count (valid; in the backward, with a nonzero gradient) are gathered into tiles of 64. A tile's logits
// are computed transposed, [vocabulary block, tokens], so that maximum, sum and exponentials run down the vocabulary in
// one vector lane per token, and only a block of them ever exists. Where the vocabulary is much larger than D the
// forward also accumulates O = softmax(z) W with an online softmax; then dh = g (O - (1-e) W_y - e mean(W)) for any g,
// without logits. Otherwise the backward recomputes them, as it does for dW.
//
// Forward and dh run in parallel over token tiles, dW over blocks of the vocabulary, each taking its tokens in order: no
// sum depends on the number of threads.

#include "linear_nll.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "scratch.h"

namespace cnm {
namespace CNM_ISA {
namespace {

constexpr int kTokens = 64;       // of a tile
constexpr int kTokenVecs = kTokens / kLanes;
constexpr int kVocabulary = 128;  // of a block of logits: 32 KiB

struct Tokens {  // the tokens that count, and each one's gradient (backward)
  std::vector<std::int64_t> index;
  std::vector<float> gradient;
  std::int64_t tiles() const { return (std::int64_t(index.size()) + kTokens - 1) / kTokens; }
};

std::int64_t count(const LinearNllParams& p, int m) {
  const std::int64_t n = p.valid_lengths[m];
  return n < 0 ? 0 : n < p.L ? n : p.L;
}

Tokens gather(const LinearNllParams& p) {
  Tokens tokens;
  for (int m = 0; m < p.M; ++m) {
    const std::int64_t n = count(p, m);
    if (p.grad_nll != nullptr && p.grad_nll[m] == 0) continue;
    for (std::int64_t t = 0; t < n; ++t) {
      tokens.index.push_back(std::int64_t(m) * p.L + t);
      if (p.grad_nll != nullptr) tokens.gradient.push_back(p.grad_nll[m] / float(n));
    }
  }
  return tokens;
}

// W as elements of Op: rows for z = W h^T, and neighbours along the vocabulary for sums over it.
template <class Op>
struct Weights {
  std::vector<typename Op::Elem> row_buffer, pair_buffer;
  Matrix<Op> rows, pairs;
  std::vector<float> bias;

  Weights(const LinearNllParams& p, int dp, bool want_pairs, ParallelFor parallel_for) : bias(p.V) {
    load_as(p.bias, p.dtype, p.V, bias.data());
    const std::ptrdiff_t width = dp / Op::kPair, size = element_size(p.dtype);
    rows = {static_cast<const typename Op::Elem*>(p.weight), width};
    if (Op::kDType != p.dtype || dp != p.D || reinterpret_cast<std::uintptr_t>(p.weight) % sizeof(typename Op::Elem) != 0) {
      row_buffer.resize(std::size_t(p.V) * width);
      parallel_for(p.V, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t v = begin; v < end; ++v)
          Op::convert_row(static_cast<const char*>(p.weight) + v * p.D * size, p.dtype, p.D, dp, &row_buffer[v * width]);
      });
      rows.data = row_buffer.data();
    }
    pairs = rows;
    if (Op::kPair == 2 && want_pairs) {
      pair_buffer.resize(std::size_t(p.V + 1) / 2 * dp);
      parallel_for((p.V + 1) / 2, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t v = begin; v < end; ++v)
          Op::interleave(rows.data + 2 * v * width, 2 * v + 1 < p.V ? rows.data + (2 * v + 1) * width : nullptr, dp,
                         &pair_buffer[v * dp]);
      });
      pairs = {pair_buffer.data(), dp};
    }
  }
};

// One tile of tokens and the current block of their logits.
template <class Op>
class Tile {
 public:
  using Elem = typename Op::Elem;

  Tile(const LinearNllParams& p, const Weights<Op>& weights, Scratch& scratch)
      : logits(scratch.take<float>(kVocabulary * kTokens)),
        p_(p),
        weights_(weights),
        dp_(round_up(p.D, kLanes)),
        rows_(scratch.take<Elem>(std::size_t(kTokens) * dp_ / Op::kPair)),
        transposed_(scratch.take<Elem>(std::size_t(dp_ / Op::kPair) * kTokens)),
        pairs_(scratch.take<Elem>(std::size_t(kTokens / Op::kPair) * dp_)),
        packed_(scratch.take<Elem>(std::size_t(kVocabulary) * kTokens / Op::kPair)) {}

  void load(const Tokens& tokens, std::int64_t tile) {
    first = tile * kTokens;
    size = int(std::int64_t(tokens.index.size()) - first < kTokens ? std::int64_t(tokens.index.size()) - first : kTokens);
    const std::ptrdiff_t width = dp_ / Op::kPair;
    for (int t = 0; t < size; ++t) {
      const char* row = static_cast<const char*>(p_.hidden) + tokens.index[first + t] * p_.D * element_size(p_.dtype);
      Op::convert_row(row, p_.dtype, p_.D, dp_, rows_ + t * width);
    }
    std::memset(rows_ + size * width, 0, std::size_t(kTokens - size) * width * sizeof(Elem));
    transpose(rows_, width, kTokens, int(width), transposed_, kTokens);
  }

  // logits[v][t] for the block of v that begins at `begin`.
  void score(int begin, int words) {
    const GemmArgs<Op> product{weights_.rows.data + begin * weights_.rows.row, weights_.rows.row, 1, transposed_, kTokens,
                               logits, kTokens, dp_ / Op::kPair};
    gemm<Op, false>(product, words, kTokens);
    for (int v = 0; v < words; ++v) {
      const Vec bias = splat(weights_.bias[begin + v]);
      for (int i = 0; i < kTokens; i += kLanes) {
        float* z = logits + v * kTokens + i;
        store(z, CNM_ISA::load(z) + bias);
      }
    }
  }

  // logits <- dz, for tokens with gradient g
  void logit_gradient(int begin, int words, const float* lse, const float* g, const std::int64_t* target) {
    const float smooth = p_.label_smoothing / float(p_.V);
    for (int v = 0; v < words; ++v)
      for (int i = 0; i < kTokens; i += kLanes) {
        float* z = logits + v * kTokens + i;
        const Vec probability = exp_nonpositive(CNM_ISA::load(z) - CNM_ISA::load(lse + i));
        store(z, (probability - splat(smooth)) * CNM_ISA::load(g + i));
      }
    for (int t = 0; t < size; ++t)
      if (target[t] >= begin && target[t] < begin + words)
        logits[(target[t] - begin) * kTokens + t] -= (1 - p_.label_smoothing) * g[t];
  }

  // out[t][:] += sum over the block's words of logits[v][t] W[v][:]; `begin` is even
  void add_words(int begin, int words, float* out) {
    const Matrix<Op> a = Op::pack_pairs(logits, kTokens, words, kTokens, packed_);
    const Elem* b = weights_.pairs.data + begin / Op::kPair * weights_.pairs.row;
    const GemmArgs<Op> product{a.data, 1, a.row, b, weights_.pairs.row, out, dp_, (words + Op::kPair - 1) / Op::kPair};
    gemm<Op, true>(product, size, dp_);
  }

  // out[v][:] += sum over the tile's tokens of logits[v][t] h[t][:]
  void add_tokens(int words, float* out) {
    const std::ptrdiff_t width = dp_ / Op::kPair;
    Matrix<Op> b{rows_, width};
    if (Op::kPair == 2) {
      for (int t = 0; t < kTokens; t += 2) Op::interleave(rows_ + t * width, rows_ + (t + 1) * width, dp_, pairs_ + t / 2 * dp_);
      b = {pairs_, dp_};
    }
    const Matrix<Op> a = Op::pack_rows(logits, kTokens, words, kTokens, packed_);
    gemm<Op, true>(GemmArgs<Op>{a.data, a.row, 1, b.data, b.row, out, dp_, (size + Op::kPair - 1) / Op::kPair}, words, dp_);
  }

  float* logits;  // [kVocabulary, kTokens]
  std::int64_t first = 0;
  int size = 0;

 private:
  const LinearNllParams& p_;
  const Weights<Op>& weights_;
  const int dp_;
  Elem *rows_, *transposed_, *pairs_, *packed_;
};

// Running maximum, sum of exponentials and sum of logits of every token of a tile.
struct Softmax {
  alignas(64) float max[kTokens], total[kTokens], logit_sum[kTokens], target_logit[kTokens], scale[kTokens];
  alignas(64) std::int32_t best[kTokens];

  Softmax() {
    for (int t = 0; t < kTokens; ++t) {
      max[t] = std::numeric_limits<float>::lowest();
      total[t] = logit_sum[t] = target_logit[t] = 0;
      best[t] = 0;
    }
  }

  // logits <- exp(logits - new maximum); `scale` is what earlier sums must be multiplied by.
  void take(float* logits, int begin, int words, bool want_best) {
    for (int i = 0; i < kTokens; i += kLanes) {
      Vec top = load(max + i), sums = load(logit_sum + i);
      VecInt index;
      std::memcpy(&index, best + i, sizeof index);
      for (int v = 0; v < words; ++v) {
        const Vec z = load(logits + v * kTokens + i);
        if (want_best) index = (VecInt)select(z > top, (Vec)(VecInt{} + (begin + v)), (Vec)index);
        top = maximum(z, top);
        sums += z;
      }
      const Vec factor = exp_nonpositive(load(max + i) - top);
      Vec sum = load(total + i) * factor;
      for (int v = 0; v < words; ++v) {
        const Vec e = exp_nonpositive(load(logits + v * kTokens + i) - top);
        store(logits + v * kTokens + i, e);
        sum += e;
      }
      store(scale + i, factor);
      store(total + i, sum);
      store(max + i, top);
      store(logit_sum + i, sums);
      std::memcpy(best + i, &index, sizeof index);
    }
  }
};

template <class Op>
void forward(const LinearNllParams& p, ParallelFor parallel_for) {
  const Tokens tokens = gather(p);
  const int dp = round_up(p.D, kLanes);
  const Weights<Op> weights(p, dp, p.expected != nullptr, parallel_for);
  std::vector<float> token_nll(tokens.index.size());
  std::vector<char> correct(tokens.index.size());
  parallel_for(tokens.tiles(), [&](std::int64_t tile_begin, std::int64_t tile_end) {
    static thread_local Scratch scratch;
    scratch.reset();
    Tile<Op> tile(p, weights, scratch);
    float* expected = p.expected == nullptr ? nullptr : scratch.take<float>(std::size_t(kTokens) * dp);
    for (std::int64_t i = tile_begin; i < tile_end; ++i) {
      tile.load(tokens, i);
      Softmax softmax;
      if (expected != nullptr) std::memset(expected, 0, std::size_t(kTokens) * dp * sizeof(float));
      for (int begin = 0; begin < p.V; begin += kVocabulary) {
        const int words = p.V - begin < kVocabulary ? p.V - begin : kVocabulary;
        tile.score(begin, words);
        for (int t = 0; t < tile.size; ++t) {
          const std::int64_t y = p.target[tokens.index[tile.first + t]];
          if (y >= begin && y < begin + words) softmax.target_logit[t] = tile.logits[(y - begin) * kTokens + t];
        }
        softmax.take(tile.logits, begin, words, p.accuracy != nullptr);
        if (expected == nullptr) continue;
        for (int t = 0; t < tile.size; ++t)
          for (int c = 0; c < dp; c += kLanes)
            store(expected + t * dp + c, load(expected + t * dp + c) * splat(softmax.scale[t]));
        tile.add_words(begin, words, expected);
      }
      for (int t = 0; t < tile.size; ++t) {
        const std::int64_t token = tokens.index[tile.first + t];
        const float lse = softmax.max[t] + std::log(softmax.total[t]);
        const float smooth = p.label_smoothing;
        token_nll[tile.first + t] =
            (1 - smooth) * (lse - softmax.target_logit[t]) + smooth * (lse - softmax.logit_sum[t] / float(p.V));
        correct[tile.first + t] = softmax.best[t] == p.target[token];
        p.lse[token] = lse;
        if (expected != nullptr) store_as(p.expected + token * p.D, DType::kFloat32, expected + t * dp, p.D, 1 / softmax.total[t]);
      }
    }
  });
  std::size_t token = 0;
  for (int m = 0; m < p.M; ++m) {
    const std::int64_t n = count(p, m);
    float nll = 0;
    int right = 0;
    for (std::int64_t t = 0; t < n; ++t, ++token) {
      nll += token_nll[token];
      right += correct[token];
    }
    const std::int64_t padding = std::int64_t(m) * p.L + n;  // saved tensors hold no garbage
    std::memset(p.lse + padding, 0, std::size_t(p.L - n) * sizeof(float));
    if (p.expected != nullptr) std::memset(p.expected + padding * p.D, 0, std::size_t(p.L - n) * p.D * sizeof(float));
    p.nll[m] = n == 0 ? 0 : nll / float(n);
    if (p.accuracy != nullptr) p.accuracy[m] = n == 0 ? 0 : float(right) / float(n);
  }
}

// What the backward needs of a tile's tokens, padded with gradient 0.
struct TileGradient {
  alignas(64) float lse[kTokens], gradient[kTokens];
  std::int64_t target[kTokens];

  TileGradient(const LinearNllParams& p, const Tokens& tokens, std::int64_t first, int size) {
    for (int t = 0; t < kTokens; ++t) {
      const bool real = t < size;
      const std::int64_t token = real ? tokens.index[first + t] : 0;
      lse[t] = real ? p.lse[token] : 0;
      gradient[t] = real ? tokens.gradient[first + t] : 0;
      target[t] = real ? p.target[token] : -1;
    }
  }
};

template <class Op>
void hidden_gradient(const LinearNllParams& p, const Tokens& tokens, const Weights<Op>& weights, ParallelFor parallel_for) {
  const int dp = round_up(p.D, kLanes);
  const std::ptrdiff_t size = element_size(p.dtype);
  auto* out = static_cast<char*>(p.grad_hidden);
  std::memset(out, 0, std::size_t(p.M) * p.L * p.D * size);
  std::vector<float> mean(p.expected == nullptr ? 0 : p.D);
  if (p.expected != nullptr) {  // mean(W), each column's words in order
    std::vector<double> sums(p.D);
    std::vector<float> row(p.D);
    for (int v = 0; v < p.V; ++v) {
      load_as(static_cast<const char*>(p.weight) + std::ptrdiff_t(v) * p.D * size, p.dtype, p.D, row.data());
      for (int c = 0; c < p.D; ++c) sums[c] += row[c];
    }
    for (int c = 0; c < p.D; ++c) mean[c] = float(sums[c] / p.V);
  }
  parallel_for(tokens.tiles(), [&](std::int64_t tile_begin, std::int64_t tile_end) {
    static thread_local Scratch scratch;
    scratch.reset();
    Tile<Op> tile(p, weights, scratch);
    float* sum = scratch.take<float>(std::size_t(kTokens) * dp);
    float* word = scratch.take<float>(p.D);
    for (std::int64_t i = tile_begin; i < tile_end; ++i) {
      if (p.expected != nullptr) {
        const std::int64_t first = i * kTokens, last = first + kTokens;
        for (std::int64_t t = first; t < last && t < std::int64_t(tokens.index.size()); ++t) {
          const std::int64_t token = tokens.index[t];
          load_as(static_cast<const char*>(p.weight) + p.target[token] * p.D * size, p.dtype, p.D, word);
          for (int c = 0; c < p.D; ++c)
            word[c] = p.expected[token * p.D + c] - (1 - p.label_smoothing) * word[c] - p.label_smoothing * mean[c];
          store_as(out + token * p.D * size, p.dtype, word, p.D, tokens.gradient[t]);
        }
        continue;
      }
      tile.load(tokens, i);
      const TileGradient gradient(p, tokens, tile.first, tile.size);
      std::memset(sum, 0, std::size_t(kTokens) * dp * sizeof(float));
      for (int begin = 0; begin < p.V; begin += kVocabulary) {
        const int words = p.V - begin < kVocabulary ? p.V - begin : kVocabulary;
        tile.score(begin, words);
        tile.logit_gradient(begin, words, gradient.lse, gradient.gradient, gradient.target);
        tile.add_words(begin, words, sum);
      }
      for (int t = 0; t < tile.size; ++t)
        store_as(out + tokens.index[tile.first + t] * p.D * size, p.dtype, sum + t * dp, p.D, 1.f);
    }
  });
}

template <class Op>
void weight_gradient(const LinearNllParams& p, const Tokens& tokens, const Weights<Op>& weights, ParallelFor parallel_for) {
  const int dp = round_up(p.D, kLanes);
  const std::ptrdiff_t size = element_size(p.dtype);
  parallel_for((p.V + kVocabulary - 1) / kVocabulary, [&](std::int64_t block_begin, std::int64_t block_end) {
    static thread_local Scratch scratch;
    scratch.reset();
    Tile<Op> tile(p, weights, scratch);
    float* sum = scratch.take<float>(std::size_t(kVocabulary) * dp);
    float* bias = scratch.take<float>(kVocabulary);
    for (std::int64_t block = block_begin; block < block_end; ++block) {
      const int begin = int(block) * kVocabulary, words = p.V - begin < kVocabulary ? p.V - begin : kVocabulary;
      std::memset(sum, 0, std::size_t(kVocabulary) * dp * sizeof(float));
      std::memset(bias, 0, kVocabulary * sizeof(float));
      for (std::int64_t i = 0; i < tokens.tiles(); ++i) {
        tile.load(tokens, i);
        const TileGradient gradient(p, tokens, tile.first, tile.size);
        tile.score(begin, words);
        tile.logit_gradient(begin, words, gradient.lse, gradient.gradient, gradient.target);
        if (p.grad_weight != nullptr) tile.add_tokens(words, sum);
        for (int v = 0; v < words; ++v) {
          Vec total = load(tile.logits + v * kTokens);
          for (int j = kLanes; j < kTokens; j += kLanes) total += load(tile.logits + v * kTokens + j);
          bias[v] += CNM_ISA::sum(total);
        }
      }
      if (p.grad_weight != nullptr)
        for (int v = 0; v < words; ++v)
          store_as(static_cast<char*>(p.grad_weight) + std::ptrdiff_t(begin + v) * p.D * size, p.dtype, sum + v * dp, p.D, 1.f);
      if (p.grad_bias != nullptr) store_as(static_cast<char*>(p.grad_bias) + begin * size, p.dtype, bias, words, 1.f);
    }
  });
}

template <class Op>
void backward(const LinearNllParams& p, ParallelFor parallel_for) {
  const Tokens tokens = gather(p);
  const Weights<Op> weights(p, round_up(p.D, kLanes), p.grad_hidden != nullptr && p.expected == nullptr, parallel_for);
  if (p.grad_hidden != nullptr) hidden_gradient<Op>(p, tokens, weights, parallel_for);
  if (p.grad_weight != nullptr || p.grad_bias != nullptr) weight_gradient<Op>(p, tokens, weights, parallel_for);
}

}  // namespace

void linear_nll_forward(const LinearNllParams& p, ParallelFor parallel_for) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16) return forward<BF16Pair>(p, parallel_for);
#endif
  forward<F32>(p, parallel_for);
}

void linear_nll_backward(const LinearNllParams& p, ParallelFor parallel_for) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16) return backward<BF16Pair>(p, parallel_for);
#endif
  backward<F32>(p, parallel_for);
}

}  // namespace CNM_ISA
}  // namespace cnm
