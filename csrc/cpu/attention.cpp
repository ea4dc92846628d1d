// Weighted and Gaussian attention, forward and backward.
//
//   e_ij = exp(scale q_i.k_j - max_i), P_ij = e_ij (m_j + eps) / sum_k e_ik (m_k + eps), out = P v
//   dP = dO v^T, delta_i = sum_j P_ij dP_ij, dS = P (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T dO
//   dm_j = sum over heads and queries of (e_ij / Z_i) (dP_ij - delta_i), Z_i = sum_k e_ik (m_k + eps)
//
// One (batch, head) pair at a time: its keys (and values, in the backward) are transposed once into scratch, then blocks
// of query rows pass through. A block's scores stay in the first-level cache; no [Lq, Lk] matrix exists. Multiplying
// after exp needs no logarithm, and dm never divides by m. Pairs do not share results, so any number of threads gives
// the same bits; where a result sums over heads, one thread takes the heads of a batch entry in order.
//
// float32 computes with fused multiply-adds; bfloat16 feeds pairs of neighbours to the CPU's dot-product instruction
// where it has one. All else is converted to float32 on entry.

#include "attention.h"

#include <limits>

#include "gaussian.h"
#include "gemm.h"
#include "scratch.h"

namespace cnm {
namespace CNM_ISA {
namespace {

constexpr float kKeyWeightEps = 1e-10f;
constexpr int kBlockElements = 16384;  // of a block of scores: 64 KiB
constexpr int kMinBlockRows = 6, kMaxBlockRows = 48;

struct Block {  // of query rows
  int begin, rows;
  int keys;  // the rows see keys 0 to keys - 1 at most
};

template <class Op>
class Attention {
 public:
  Attention(const AttentionParams& p, Scratch& scratch)
      : p_(p), dp_(round_up(p.d, kLanes)), lk_(round_up(p.Lk, kLanes * Op::kPair)), scratch_(scratch) {
    int rows = kBlockElements / (lk_ ? lk_ : 1) / kMinBlockRows * kMinBlockRows;
    block_rows_ = rows < kMinBlockRows ? kMinBlockRows : rows > kMaxBlockRows ? kMaxBlockRows : rows;
    scores_ = scratch.take<float>(std::size_t(block_rows_) * lk_);
    out_ = scratch.take<float>(std::size_t(block_rows_) * dp_);
    weight_ = scratch.take<float>(lk_);
    gaussian_ = scratch.take<float>(lk_);
    key_t_ = scratch.take<Elem>(std::size_t(dp_ / Op::kPair) * lk_);
    query_rows_ = scratch.take<Elem>(std::size_t(p.Lq) * dp_ / Op::kPair);
    key_rows_ = scratch.take<Elem>(std::size_t(lk_) * dp_ / Op::kPair);
    value_rows_ = scratch.take<Elem>(std::size_t(lk_) * dp_ / Op::kPair);
    value_pairs_ = scratch.take<Elem>(std::size_t(lk_ / Op::kPair) * dp_);
    packed_ = scratch.take<Elem>(std::size_t(block_rows_) * lk_ / Op::kPair);
  }

  void reserve_backward() {
    value_t_ = scratch_.take<Elem>(std::size_t(dp_ / Op::kPair) * lk_);
    key_pairs_ = scratch_.take<Elem>(std::size_t(lk_ / Op::kPair) * dp_);
    grad_rows_ = scratch_.take<Elem>(std::size_t(p_.Lq) * dp_ / Op::kPair);
    block_pairs_ = scratch_.take<Elem>(std::size_t(block_rows_ / Op::kPair) * dp_);
    grads_ = scratch_.take<float>(std::size_t(block_rows_) * lk_);
    grad_key_ = scratch_.take<float>(std::size_t(lk_) * dp_);
    grad_value_ = scratch_.take<float>(std::size_t(lk_) * dp_);
    grad_weight_ = scratch_.take<float>(lk_);
  }

  // The keys' weights m + eps of batch entry b, zero beyond its length.
  void begin_batch(int b) {
    b_ = b;
    len_ = p_.Lk;
    if (p_.key_lengths != nullptr) {
      const std::int64_t given = p_.key_lengths[b];
      len_ = given < 0 ? 0 : given < p_.Lk ? int(given) : p_.Lk;
    }
    weighted_ = p_.key_weight != nullptr || p_.center != nullptr;
    if (p_.key_weight != nullptr) {
      for (int j = 0; j < len_; ++j) weight_[j] = p_.key_weight[std::ptrdiff_t(b) * p_.Lk + j] + kKeyWeightEps;
    } else if (p_.center != nullptr) {
      gaussian_at_ = {p_.center[b], p_.width[b] < p_.min_width ? p_.min_width : p_.width[b], p_.alpha, p_.Lk};
      for (int j = 0; j < len_; ++j) {
        gaussian_[j] = gaussian_at_.value(j);
        weight_[j] = (p_.complement ? 1.f - gaussian_[j] : gaussian_[j]) + kKeyWeightEps;
      }
    } else {
      for (int j = 0; j < len_; ++j) weight_[j] = 1;
    }
    for (int j = len_; j < lk_; ++j) weight_[j] = 0;
  }

  void forward(int h) {
    begin_head(h);
    const Matrix<Op> value_pairs = pairs(matrix(p_.value, len_, value_rows_), len_, value_pairs_);
    for (int begin = 0; begin < p_.Lq; begin += block_rows_) {
      const Block block = block_at(begin);
      score(block);
      float* stats = p_.stats + 2 * ((std::ptrdiff_t(b_) * p_.H + h) * p_.Lq + begin);
      for (int r = 0; r < block.rows; ++r) softmax(block, r, stats + 2 * r);
      // The rows are normalised after the product, where there are d instead of Lk elements.
      const Matrix<Op> e = pack_rows(scores_, block);
      multiply<false>(e.data, e.row, 1, value_pairs, out_, block.rows, ceil_div(block.keys, Op::kPair));
      for (int r = 0; r < block.rows; ++r) store_row(p_.out, begin + r, out_ + r * dp_, stats[2 * r + 1]);
      if (p_.weights != nullptr) add_weights(block, h, stats);
    }
  }

  void backward(int h) {
    begin_head(h);
    const Matrix<Op> value = matrix(p_.value, len_, value_rows_);
    transpose(value.data, value.row, len_, dp_ / Op::kPair, value_t_, lk_);
    const Matrix<Op> key_pairs = pairs(key_, len_, key_pairs_);
    const Matrix<Op> grad_out = matrix(p_.grad_out, p_.Lq, grad_rows_);
    std::memset(grad_key_, 0, std::size_t(lk_) * dp_ * sizeof(float));
    std::memset(grad_value_, 0, std::size_t(lk_) * dp_ * sizeof(float));
    const bool want_weight = p_.grad_key_weight != nullptr || p_.grad_center != nullptr;
    if (h == 0 && want_weight) std::memset(grad_weight_, 0, lk_ * sizeof(float));
    for (int begin = 0; begin < p_.Lq; begin += block_rows_) {
      const Block block = block_at(begin);
      const int pairs_of_rows = ceil_div(block.rows, Op::kPair);
      score(block);
      const float* stats = p_.stats + 2 * ((std::ptrdiff_t(b_) * p_.H + h) * p_.Lq + begin);
      {  // scores_ <- P, kept for dv
        for (int r = 0; r < block.rows; ++r) probabilities(block, r, stats + 2 * r);
        const Matrix<Op> block_grad = pairs(at(grad_out, begin), block.rows, block_pairs_);
        const Matrix<Op> p = pack_pairs(scores_, block);
        multiply<true>(p.data, 1, p.row, block_grad, grad_value_, block.keys, pairs_of_rows);
      }
      // grads_ <- dP, then dS
      const GemmArgs<Op> product{at(grad_out, begin).data, grad_out.row, 1, value_t_, lk_, grads_, lk_, dp_ / Op::kPair};
      gemm<Op, false>(product, block.rows, padded(block.keys));
      for (int r = 0; r < block.rows; ++r) score_gradient(block, r);
      if (want_weight) add_weight_gradient(block);
      if (p_.grad_query.data != nullptr) {
        const Matrix<Op> ds = pack_rows(grads_, block);
        multiply<false>(ds.data, ds.row, 1, key_pairs, out_, block.rows, ceil_div(block.keys, Op::kPair));
        for (int r = 0; r < block.rows; ++r) store_row(p_.grad_query, begin + r, out_ + r * dp_, p_.scale);
      }
      if (p_.grad_key.data != nullptr) {
        const Matrix<Op> block_query = pairs(at(query_, begin), block.rows, block_pairs_);
        const Matrix<Op> ds = pack_pairs(grads_, block);
        multiply<true>(ds.data, 1, ds.row, block_query, grad_key_, block.keys, pairs_of_rows);
      }
    }
    for (int j = 0; j < p_.Lk; ++j) {  // keys beyond the length take the zeros left there
      if (p_.grad_key.data != nullptr) store_row(p_.grad_key, j, grad_key_ + std::ptrdiff_t(j) * dp_, p_.scale);
      if (p_.grad_value.data != nullptr) store_row(p_.grad_value, j, grad_value_ + std::ptrdiff_t(j) * dp_, 1.f);
    }
  }

  // After the last head of the batch entry: the gradient of its key weights, or of the Gaussian behind them.
  void end_batch() {
    if (p_.grad_key_weight != nullptr) {
      float* out = p_.grad_key_weight + std::ptrdiff_t(b_) * p_.Lk;
      for (int j = 0; j < p_.Lk; ++j) out[j] = j < len_ ? grad_weight_[j] / weight_[j] : 0.f;
    }
    if (p_.grad_center == nullptr) return;
    double to_center = 0, to_width = 0;
    for (int j = 0; j < len_; ++j)  // the same g that weighted the keys: the terms cancel, so another rounding would show
      gaussian_at_.add_gradient(j, double(grad_weight_[j]) / weight_[j] * gaussian_[j], to_center, to_width);
    const double sign = p_.complement ? -1 : 1;
    p_.grad_center[b_] = float(sign * to_center);
    p_.grad_width[b_] = p_.width[b_] >= p_.min_width ? float(sign * to_width) : 0.f;
  }

 private:
  using Elem = typename Op::Elem;

  static int ceil_div(int n, int by) { return (n + by - 1) / by; }
  static int padded(int keys) { return round_up(keys, kLanes); }
  static Matrix<Op> at(Matrix<Op> m, int row) { return {m.data + row * m.row, m.row}; }

  Block block_at(int begin) const {
    Block block{begin, p_.Lq - begin < block_rows_ ? p_.Lq - begin : block_rows_, len_};
    if (p_.causal && begin + block.rows < len_) block.keys = begin + block.rows;
    return block;
  }

  const char* row_address(const Heads& t, int row) const {
    return static_cast<const char*>(t.data) + (b_ * t.batch + h_ * t.head + row * t.row) * element_size(p_.dtype);
  }

  // The head's rows as elements of Op, in place where layout and dtype allow it, else converted into `buffer`.
  Matrix<Op> matrix(const Heads& t, int rows, Elem* buffer) const {
    if (Op::kDType == p_.dtype && p_.d == dp_ && t.row % Op::kPair == 0 &&
        reinterpret_cast<std::uintptr_t>(row_address(t, 0)) % sizeof(Elem) == 0)
      return {reinterpret_cast<const Elem*>(row_address(t, 0)), t.row / Op::kPair};
    const std::ptrdiff_t width = dp_ / Op::kPair;
    for (int r = 0; r < rows; ++r) Op::convert_row(row_address(t, r), p_.dtype, p_.d, dp_, buffer + r * width);
    return {buffer, width};
  }

  // Rows as the right operand of a product that sums over rows: neighbours of a column next to each other.
  Matrix<Op> pairs(Matrix<Op> m, int rows, Elem* buffer) const {
    if (Op::kPair == 1) return m;
    for (int r = 0; r < rows; r += 2)
      Op::interleave(m.data + r * m.row, r + 1 < rows ? m.data + (r + 1) * m.row : nullptr, dp_, buffer + (r / 2) * dp_);
    return {buffer, dp_};
  }

  // A block of float32 as a left operand that sums over its columns (keys), or over its rows (queries).
  Matrix<Op> pack_rows(const float* block_data, const Block& block) const {
    return Op::pack_rows(block_data, lk_, block.rows, round_up(block.keys, kLanes), packed_);
  }
  Matrix<Op> pack_pairs(const float* block_data, const Block& block) const {
    return Op::pack_pairs(block_data, lk_, block.rows, padded(block.keys), packed_);
  }

  template <bool Accumulate>
  void multiply(const Elem* a, std::ptrdiff_t a_row, std::ptrdiff_t a_col, Matrix<Op> b, float* c, int rows, int k) const {
    gemm<Op, Accumulate>(GemmArgs<Op>{a, a_row, a_col, b.data, b.row, c, dp_, k}, rows, dp_);
  }

  void begin_head(int h) {
    h_ = h;
    query_ = matrix(p_.query, p_.Lq, query_rows_);
    key_ = matrix(p_.key, len_, key_rows_);
    transpose(key_.data, key_.row, len_, dp_ / Op::kPair, key_t_, lk_);
  }

  void score(const Block& block) const {
    const Matrix<Op> query = at(query_, block.begin);
    gemm<Op, false>(GemmArgs<Op>{query.data, query.row, 1, key_t_, lk_, scores_, lk_, dp_ / Op::kPair}, block.rows,
                    padded(block.keys));
  }

  int visible(const Block& block, int r) const {
    return p_.causal && block.begin + r + 1 < len_ ? block.begin + r + 1 : len_;
  }

  // e (m + eps) of kLanes keys from j on, zero from key n on. The backward must get the very bits that the forward summed.
  Vec exponential(const float* row, int j, int n, Vec max) const {
    Vec e = exp_nonpositive(load(row + j) * splat(p_.scale) - max);
    if (weighted_) e = e * load(weight_ + j);
    return j + kLanes > n ? select(lanes_below(n - j), e, Vec{}) : e;
  }

  // Row r of scores_ <- e (m + eps), zero where not visible; stats <- maximum, 1 / sum.
  void softmax(const Block& block, int r, float* stats) const {
    float* row = scores_ + r * lk_;
    const int n = visible(block, r), end = padded(block.keys);
    const Vec scale = splat(p_.scale);
    Vec top = splat(std::numeric_limits<float>::lowest());
    for (int j = 0; j < n; j += kLanes) {
      const Vec s = load(row + j) * scale;
      top = maximum(j + kLanes > n ? select(lanes_below(n - j), s, top) : s, top);
    }
    const float max = highest(top);
    Vec total = {};
    for (int j = 0; j < n; j += kLanes) {
      const Vec e = exponential(row, j, n, splat(max));
      store(row + j, e);
      total += e;
    }
    for (int j = round_up(n, kLanes); j < end; j += kLanes) store(row + j, Vec{});
    const float z = sum(total);
    stats[0] = max;
    stats[1] = z == 0 ? 0 : 1 / z;
  }

  // Row r of scores_ <- P, zero where not visible.
  void probabilities(const Block& block, int r, const float* stats) const {
    float* row = scores_ + r * lk_;
    const int n = visible(block, r), end = padded(block.keys);
    const Vec max = splat(stats[0]), inverse = splat(stats[1]);
    for (int j = 0; j < n; j += kLanes) store(row + j, exponential(row, j, n, max) * inverse);
    for (int j = round_up(n, kLanes); j < end; j += kLanes) store(row + j, Vec{});
  }

  // Row r of grads_: dP -> dS = P (dP - delta), with P from scores_. Adds to dm, where (e / Z) (dP - delta) is
  // dS / (m + eps): the weights are never below eps, so this loses nothing.
  void score_gradient(const Block& block, int r) const {
    const float* p_row = scores_ + r * lk_;
    float* row = grads_ + r * lk_;
    const int end = padded(block.keys), n = visible(block, r);
    if (p_.grad_weights != nullptr) {
      const float* given = p_.grad_weights + (std::ptrdiff_t(b_) * p_.Lq + block.begin + r) * p_.Lk;
      for (int j = 0; j < n; ++j) row[j] += given[j] / float(p_.H);
    }
    Vec total = {};
    for (int j = 0; j < end; j += kLanes) total += load(p_row + j) * load(row + j);
    const Vec delta = splat(sum(total));
    for (int j = 0; j < end; j += kLanes) {
      const Vec ds = load(p_row + j) * (load(row + j) - delta);
      store(row + j, ds);
    }
  }

  // Adds the block's dS to its keys' sums, which are dm (m + eps): first over the block's rows, then to the total.
  void add_weight_gradient(const Block& block) const {
    for (int j = 0; j < padded(block.keys); j += kLanes) {
      Vec total = {};
      for (int r = 0; r < block.rows; ++r) total += load(grads_ + r * lk_ + j);
      store(grad_weight_ + j, load(grad_weight_ + j) + total);
    }
  }

  void add_weights(const Block& block, int h, const float* stats) const {
    for (int r = 0; r < block.rows; ++r) {
      float* out = p_.weights + (std::ptrdiff_t(b_) * p_.Lq + block.begin + r) * p_.Lk;
      const float share = stats[2 * r + 1] / float(p_.H);
      for (int j = 0; j < p_.Lk; ++j)
        out[j] = (h == 0 ? 0.f : out[j]) + (j < block.keys ? scores_[r * lk_ + j] * share : 0.f);
    }
  }

  void store_row(const Heads& t, int row, const float* x, float factor) const {
    store_as(const_cast<char*>(row_address(t, row)), p_.dtype, x, p_.d, factor);
  }

  const AttentionParams& p_;
  const int dp_, lk_;  // d and Lk, padded
  Scratch& scratch_;
  int block_rows_;
  float *scores_, *out_, *weight_, *gaussian_, *grads_, *grad_key_, *grad_value_, *grad_weight_;
  Elem *key_t_, *value_t_, *query_rows_, *key_rows_, *value_rows_, *grad_rows_, *value_pairs_, *key_pairs_, *block_pairs_, *packed_;
  int b_ = 0, h_ = 0, len_ = 0;
  bool weighted_ = false;
  Gaussian gaussian_at_{};
  Matrix<Op> query_, key_;
};

template <class Op, bool Backward>
void run_units(const AttentionParams& p, bool per_batch, std::int64_t begin, std::int64_t end) {
  static thread_local Scratch scratch;
  scratch.reset();
  Attention<Op> attention(p, scratch);
  if (Backward) attention.reserve_backward();
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const int b = int(per_batch ? unit : unit / p.H), first = per_batch ? 0 : int(unit % p.H), last = per_batch ? p.H : first + 1;
    attention.begin_batch(b);
    for (int h = first; h < last; ++h) Backward ? attention.backward(h) : attention.forward(h);
    if (Backward && per_batch) attention.end_batch();
  }
}

template <bool Backward>
void run(const AttentionParams& p, ParallelFor parallel_for) {
  const bool per_batch = Backward ? p.grad_key_weight != nullptr || p.grad_center != nullptr : p.weights != nullptr;
  parallel_for(per_batch ? p.B : std::int64_t(p.B) * p.H, [&](std::int64_t begin, std::int64_t end) {
#if defined(__AVX512BF16__)
    if (p.dtype == DType::kBFloat16) return run_units<BF16Pair, Backward>(p, per_batch, begin, end);
#endif
    run_units<F32, Backward>(p, per_batch, begin, end);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, ParallelFor parallel_for) { run<false>(p, parallel_for); }
void attention_backward(const AttentionParams& p, ParallelFor parallel_for) { run<true>(p, parallel_for); }

}  // namespace CNM_ISA
}  // namespace cnm
