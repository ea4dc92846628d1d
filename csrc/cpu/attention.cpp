// Weighted and Gaussian attention, forward and backward.
//
//   e_ij = exp(scale q_i.k_j - max_i) (m_j + eps), Z_i = sum_k e_ik, P_ij = e_ij / Z_i, out = P v
//   dP = dO v^T, delta_i = sum_j P_ij dP_ij, dS = P (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T dO
//   dm_j = sum over heads and queries of dS_ij / (m_j + eps)
//
// One (batch, head) pair at a time: its keys (and values, in the backward) are transposed once into scratch, then blocks
// of query rows pass through. A block's scores stay in the first caches; no [Lq, Lk] matrix exists. Weighting after
// exp needs no logarithm, and m + eps is never so small that dividing by it loses anything.
//
// A chunk is a pair, or all heads of a batch entry where a result sums over heads; it owns what it writes.
#include "attention.h"

#include <algorithm>
#include <limits>

#include "gaussian.h"
#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr float KEY_WEIGHT_EPS = 1e-10f;       // as in cnm_kernels/constants.py
constexpr int64_t BLOCK_ROWS = 48;             // at most, of queries
constexpr int64_t BLOCK_ELEMENTS = 16384;      // at most, of a block's scores: 64 KiB

// Rows of a matrix as gemm takes them.
template <class E>
struct Rows {
    const E* data;
    int64_t ld;

    Rows from(int64_t row) const { return {data + row * ld, ld}; }
};

// Of query rows: `keys` is how many keys any of them sees.
struct Block {
    int64_t begin, rows, keys;
};

// Rows in blocks of even size, so that none is left with a row or two.
int64_t rows_of_a_block(int64_t Lq, int64_t Lk) {
    const int64_t most = std::clamp<int64_t>(BLOCK_ELEMENTS / round_up(std::max<int64_t>(Lk, 1), W), 1, BLOCK_ROWS);
    const int64_t blocks = (Lq + most - 1) / most;
    return blocks == 0 ? 1 : round_up((Lq + blocks - 1) / blocks, 2);  // even: bf16 pairs rows
}

template <class T>
class Attention {
   public:
    using E = Operand<T>;

    // With a null `memory`, only counts the bytes it needs.
    Attention(const AttentionInputs& p, bool backward, void* memory)
        : p_(p), wide_(round_up(p.d, W)), long_(round_up(p.Lk, 2 * W)), block_rows_(rows_of_a_block(p.Lq, p.Lk)),
          layout_(memory) {
        const int64_t rows = block_rows_ + block_rows_ % 2;
        scores_ = layout_.take<float>(rows * long_);
        packed_ = layout_.take<E>(rows * long_);
        out_ = layout_.take<float>(rows * wide_);
        weight_ = layout_.take<float>(long_);
        query_ = layout_.take<E>(p.Lq * wide_);
        key_t_ = layout_.take<E>(wide_ * long_);
        value_ = layout_.take<E>(long_ * wide_);
        if (!backward) return;
        value_t_ = layout_.take<E>(wide_ * long_);
        key_ = layout_.take<E>(long_ * wide_);
        d_out_ = layout_.take<E>(p.Lq * wide_);
        rows_ = layout_.take<E>(rows * wide_);
        d_scores_ = layout_.take<float>(rows * long_);
        d_key_ = layout_.take<float>(long_ * wide_);
        d_value_ = layout_.take<float>(long_ * wide_);
        d_weight_ = layout_.take<float>(long_);
    }

    size_t bytes() const { return layout_.bytes(); }

    // The keys' weights m + eps in batch entry b, zero beyond its length.
    void begin_batch(int64_t b) {
        b_ = b;
        length_ = p_.key_lengths == nullptr ? p_.Lk : std::clamp<int64_t>(p_.key_lengths[b], 0, p_.Lk);
        weighted_ = p_.key_weight != nullptr || p_.center != nullptr;
        if (!weighted_) return;
        for (int64_t j = 0; j < long_; j += W) {
            const int64_t n = std::clamp<int64_t>(length_ - j, 0, W);
            const Vec m = p_.center == nullptr ? load_tail(p_.key_weight + b * p_.Lk + (n == 0 ? 0 : j), n)
                                               : gaussian().value(positions(j, p_.Lk));
            store(weight_ + j, within(m + set1(KEY_WEIGHT_EPS), n));
        }
    }

    void forward(const AttentionParams& p, int64_t h) {
        begin_head(h);
        const Rows<E> value = as_b(p_.value, 0, length_, value_);
        float* stats = p.stats + 2 * (b_ * p_.H + h) * p_.Lq;
        for_each_block([&](const Block& block) {
            score(block);
            for (int64_t r = 0; r < block.rows; ++r) softmax(block, r, stats + 2 * (block.begin + r));
            // Rows are normalised after the product, where they have d elements instead of Lk.
            multiply(packed_a(scores_, block), value, block.rows, block.keys, out_);
            for (int64_t r = 0; r < block.rows; ++r) {
                write_row(p.out, block.begin + r, out_ + r * wide_, stats[2 * (block.begin + r) + 1]);
            }
            if (p.weights != nullptr) add_weights(p.weights, block, stats);
        });
    }

    void backward(const AttentionBackwardParams& p, int64_t h) {
        begin_head(h);
        pack_transposed(p_.d, length_, row(p_.value, 0), p_.value.row, value_t_, long_);
        const Rows<E> key = as_b(p_.key, 0, length_, key_);
        const Rows<E> d_out = as_a(p.d_out, p_.Lq, d_out_);
        const bool want_weight = p.d_key_weight != nullptr || p.d_center != nullptr;
        const float* stats = p.stats + 2 * (b_ * p_.H + h) * p_.Lq;
        if (want_weight && h == 0) std::fill(d_weight_, d_weight_ + long_, 0.0f);
        key_rows_done_ = 0;
        for_each_block([&](const Block& block) {
            score(block);
            for (int64_t r = 0; r < block.rows; ++r) probabilities(block, r, stats + 2 * (block.begin + r));
            if (p.d_value.data != nullptr) add_transposed(scores_, p.d_out, block, d_value_);
            gemm(block.rows, block.keys, packed_k<T>(p_.d), d_out.from(block.begin).data, d_out.ld, 1, value_t_, long_,
                 d_scores_, long_, false);
            for (int64_t r = 0; r < block.rows; ++r) score_gradient(p, block, r);
            if (want_weight) add_weight_gradient(block);
            if (p.d_query.data != nullptr) {
                multiply(packed_a(d_scores_, block), key, block.rows, block.keys, out_);
                for (int64_t r = 0; r < block.rows; ++r) {
                    write_row(p.d_query, block.begin + r, out_ + r * wide_, p_.scale);
                }
            }
            if (p.d_key.data != nullptr) add_transposed(d_scores_, p_.query, block, d_key_);
            key_rows_done_ = std::max(key_rows_done_, block.keys);
        });
        for (int64_t j = 0; j < p_.Lk; ++j) {
            const bool seen = j < key_rows_done_;
            if (p.d_key.data != nullptr) write_row(p.d_key, j, seen ? d_key_ + j * wide_ : nullptr, p_.scale);
            if (p.d_value.data != nullptr) write_row(p.d_value, j, seen ? d_value_ + j * wide_ : nullptr, 1);
        }
    }

    // After a batch entry's last head: the gradient of its key weights, or of the Gaussian behind them.
    void end_batch(const AttentionBackwardParams& p) {
        const auto d_m = [&](int64_t j) { return static_cast<double>(d_weight_[j]) / weight_[j]; };
        if (p.d_key_weight != nullptr) {
            float* out = p.d_key_weight + b_ * p_.Lk;
            for (int64_t j = 0; j < p_.Lk; ++j) out[j] = j < length_ ? static_cast<float>(d_m(j)) : 0.0f;
        }
        if (p.d_center == nullptr) return;
        // In float64, since sum_j dS_ij = 0: far from the Gaussian what remains is small beside its terms.
        double d_center = 0, d_width = 0;
        const Gaussian g = gaussian();
        for (int64_t j = 0; j < length_; j += W) {
            float x[W], bell[W];
            store(x, positions(j, p_.Lk));
            store(bell, g.bell(load(x)));
            for (int64_t i = 0; i < std::min<int64_t>(W, length_ - j); ++i) {
                g.add_gradient(x[i], d_m(j + i) * bell[i], d_center, d_width);
            }
        }
        p.d_center[b_] = static_cast<float>(d_center);
        p.d_width[b_] = g.width_passes ? static_cast<float>(d_width) : 0.0f;
    }

   private:
    Gaussian gaussian() const { return {p_.center[b_], p_.width[b_], p_.alpha, p_.min_width, p_.complement}; }

    void begin_head(int64_t h) {
        h_ = h;
        query_rows_ = as_a(p_.query, p_.Lq, query_);
        pack_transposed(p_.d, length_, row(p_.key, 0), p_.key.row, key_t_, long_);
    }

    template <class Body>
    void for_each_block(const Body& body) const {
        for (int64_t begin = 0; begin < p_.Lq; begin += block_rows_) {
            const int64_t rows = std::min(block_rows_, p_.Lq - begin);
            body(Block{begin, rows, p_.causal ? std::min(begin + rows, length_) : length_});
        }
    }

    T* row(const Heads& t, int64_t i) const {
        return static_cast<T*>(t.data) + b_ * t.batch + h_ * t.head + i * t.row;
    }

    // The head's rows as a left operand whose rows are multiplied: where they lie, if dtype and layout allow it.
    Rows<E> as_a(const Heads& t, int64_t rows, E* buffer) const {
        if constexpr (std::is_same_v<T, E>) {
            return {row(t, 0), t.row};
        } else {
            if constexpr (std::is_same_v<E, pair>) {
                const bool pairs = p_.d % 2 == 0 && t.row % 2 == 0 && reinterpret_cast<uintptr_t>(row(t, 0)) % 4 == 0;
                if (pairs) return {as_pairs(row(t, 0)), t.row / 2};
            }
            pack_a(rows, p_.d, row(t, 0), t.row, buffer, wide_);
            return {buffer, wide_};
        }
    }
    // The same, of rows from `begin` on, as a right operand.
    Rows<E> as_b(const Heads& t, int64_t begin, int64_t rows, E* buffer) const {
        if constexpr (std::is_same_v<T, E>) {
            return {row(t, begin), t.row};
        } else {
            pack_rows(rows, p_.d, row(t, begin), t.row, buffer, wide_);
            return {buffer, wide_};
        }
    }
    // A block of scores as a left operand whose rows are multiplied.
    Rows<E> packed_a(const float* scores, const Block& block) const {
        if constexpr (std::is_same_v<E, float>) {
            return {scores, long_};
        } else {
            pack_a(block.rows, block.keys, scores, long_, packed_, long_);
            return {packed_, long_};
        }
    }

    // out[rows, d] = a[rows, keys] b[keys, d]
    void multiply(Rows<E> a, Rows<E> b, int64_t rows, int64_t keys, float* out) const {
        gemm(rows, p_.d, packed_k<T>(keys), a.data, a.ld, 1, b.data, b.ld, out, wide_, false);
    }

    // sums[keys, d] += scores[rows, keys]^T t[the block's rows, d]; keys that no block saw before start here.
    void add_transposed(const float* scores, const Heads& t, const Block& block, float* sums) const {
        const Rows<E> b = as_b(t, block.begin, block.rows, rows_);
        const E* a;
        if constexpr (std::is_same_v<E, float>) {
            a = scores;
        } else {
            pack_rows(block.rows, block.keys, scores, long_, packed_, long_);
            a = packed_;
        }
        const auto add = [&](int64_t from, int64_t to, bool accumulate) {
            gemm(to - from, p_.d, packed_k<T>(block.rows), a + from, 1, long_, b.data, b.ld, sums + from * wide_, wide_,
                 accumulate);
        };
        const int64_t old = std::min(key_rows_done_, block.keys);
        if (old > 0) add(0, old, true);
        if (block.keys > old) add(old, block.keys, false);
    }

    void score(const Block& block) const {
        gemm(block.rows, block.keys, packed_k<T>(p_.d), query_rows_.from(block.begin).data, query_rows_.ld, 1, key_t_,
             long_, scores_, long_, false);
    }

    int64_t visible(const Block& block, int64_t r) const {
        return p_.causal ? std::min(block.begin + r + 1, length_) : length_;
    }

    // e of W keys from j on, n of them visible. The backward must get the very bits that the forward summed.
    Vec exponential(const float* scores, int64_t j, int64_t n, Vec max) const {
        const Vec e = exp(fma(load(scores + j), set1(p_.scale), -max));
        return within(weighted_ ? e * load(weight_ + j) : e, n);
    }

    // Row r of the scores to e, 0 where not visible; stats to maximum and 1 / Z.
    void softmax(const Block& block, int64_t r, float* stats) const {
        float* scores = scores_ + r * long_;
        const int64_t n = visible(block, r);
        const Vec scale = set1(p_.scale), lowest = set1(std::numeric_limits<float>::lowest());
        Vec top = lowest;
        for (int64_t j = 0; j < n; j += W) {
            const Vec s = load(scores + j) * scale;
            top = vmax(n - j >= W ? s : select(first_n(static_cast<int>(n - j)), s, lowest), top);
        }
        const float max = hmax(top);
        Vec total = set1(0);
        for (int64_t j = 0; j < n; j += W) {
            const Vec e = exponential(scores, j, n - j, set1(max));
            store(scores + j, e);
            total += e;
        }
        blank(scores, n, block.keys);
        const float Z = hsum(total);
        stats[0] = max;
        stats[1] = Z == 0 ? 0 : 1 / Z;
    }

    // Row r of the scores to P, 0 where not visible.
    void probabilities(const Block& block, int64_t r, const float* stats) const {
        float* scores = scores_ + r * long_;
        const int64_t n = visible(block, r);
        const Vec max = set1(stats[0]), inverse = set1(stats[1]);
        for (int64_t j = 0; j < n; j += W) store(scores + j, exponential(scores, j, n - j, max) * inverse);
        blank(scores, n, block.keys);
    }

    // Zeros from key n's vector on: within it they are there already.
    static void blank(float* scores, int64_t n, int64_t keys) {
        for (int64_t j = round_up(n, W); j < keys; j += W) store(scores + j, set1(0));
    }

    // Row r of dP to dS, with P from the scores.
    void score_gradient(const AttentionBackwardParams& p, const Block& block, int64_t r) const {
        const float* probability = scores_ + r * long_;
        float* d = d_scores_ + r * long_;
        const int64_t n = visible(block, r);
        if (p.d_weights != nullptr) {
            const float* given = p.d_weights + (b_ * p_.Lq + block.begin + r) * p_.Lk;
            const Vec share = set1(1.0f / static_cast<float>(p_.H));
            for (int64_t j = 0; j < n; j += W) store(d + j, fma(load_tail(given + j, n - j), share, load(d + j)));
        }
        Vec total = set1(0);
        for (int64_t j = 0; j < n; j += W) total = fma(load(probability + j), within(load(d + j), n - j), total);
        const Vec delta = set1(hsum(total));
        for (int64_t j = 0; j < n; j += W) {
            store(d + j, load(probability + j) * within(load(d + j) - delta, n - j));
        }
        blank(d, n, block.keys);
    }

    void add_weight_gradient(const Block& block) const {
        for (int64_t j = 0; j < block.keys; j += W) {
            Vec even = set1(0), odd = set1(0);  // sums of sums round less than one long sum
            for (int64_t r = 0; r < block.rows; r += 2) {
                even += load(d_scores_ + r * long_ + j);
                if (r + 1 < block.rows) odd += load(d_scores_ + (r + 1) * long_ + j);
            }
            store(d_weight_ + j, load(d_weight_ + j) + (even + odd));
        }
    }

    // Heads add up in order; the first one finds nothing there.
    void add_weights(float* weights, const Block& block, const float* stats) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            const float* scores = scores_ + r * long_;
            float* out = weights + (b_ * p_.Lq + block.begin + r) * p_.Lk;
            const Vec share = set1(stats[2 * (block.begin + r) + 1] / static_cast<float>(p_.H));
            for (int64_t j = 0; j < p_.Lk; j += W) {
                const Vec before = h_ == 0 ? set1(0) : load_tail(out + j, p_.Lk - j);
                store_tail(out + j, j < block.keys ? fma(load(scores + j), share, before) : before, p_.Lk - j);
            }
        }
    }

    void write_row(const Heads& t, int64_t i, const float* values, float factor) const {
        T* out = row(t, i);
        for (int64_t c = 0; c < p_.d; c += W) {
            const int64_t n = p_.d - c;
            store_tail(out + c, values == nullptr ? set1(0) : load_tail(values + c, n) * set1(factor), n);
        }
    }

    const AttentionInputs& p_;
    const int64_t wide_, long_;  // d and Lk, padded
    const int64_t block_rows_;
    Layout layout_;
    float *scores_, *out_, *weight_, *d_scores_, *d_key_, *d_value_, *d_weight_;
    E *packed_, *query_, *key_t_, *value_, *value_t_, *key_, *d_out_, *rows_;
    Rows<E> query_rows_{};
    int64_t b_ = 0, h_ = 0, length_ = 0;
    int64_t key_rows_done_ = 0;  // key rows whose gradients have been begun in this head
    bool weighted_ = false;
};

// Calls body(attention, head) for every head, with begin_batch before and end(attention) after a batch entry's heads.
template <class T, class Params, class Body, class End>
void for_each_head(const Params& p, bool backward, bool heads_together, const Body& body, const End& end) {
    const size_t bytes = Attention<T>(p, backward, nullptr).bytes();
    parallel_for(heads_together ? p.B : p.B * p.H, [&](int64_t chunk) {
        Attention<T> attention(p, backward, thread_scratch(bytes));
        attention.begin_batch(heads_together ? chunk : chunk / p.H);
        if (!heads_together) return body(attention, chunk % p.H);
        for (int64_t h = 0; h < p.H; ++h) body(attention, h);
        end(attention);
    });
}

}  // namespace

void attention(const AttentionParams& p) {
    with_type(p.dtype, [&](auto* type) {
        for_each_head<std::remove_pointer_t<decltype(type)>>(
            p, false, p.weights != nullptr, [&](auto& attention, int64_t h) { attention.forward(p, h); },
            [](auto&) {});
    });
}

void attention_backward(const AttentionBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) {
        for_each_head<std::remove_pointer_t<decltype(type)>>(
            p, true, p.d_key_weight != nullptr || p.d_center != nullptr,
            [&](auto& attention, int64_t h) { attention.backward(p, h); },
            [&](auto& attention) { attention.end_batch(p); });
    });
}

}  // namespace cnm::CNM_ISA
